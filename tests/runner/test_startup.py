"""Start-up of the device half: sizing the KV cache, and refusing what cannot work before weights are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_engine.config import EngineConfig
from nemo_engine.memory_plan import GIB, Sizes, plan_kv_cache
from nemo_engine.ops import Ops, Site
from nemo_engine.runner import startup
from nemo_engine.runner.startup import check_capturable, start_device_half
from nemo_engine.startup_log import StartupLog
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefer": {"rms_norm": "no such"}}, "no such"),
        ({"prefer": {"no_such_op": "triton"}}, "no_such_op"),
        ({"num_kv_pages": 2, "max_model_len": 200}, "max_model_len 200 does not fit: .* hold 128"),
        ({"kv_cache_gib": 1e-9}, "kv_cache_gib must hold at least one page"),
        (
            {"device": "cuda"} if not torch.cuda.is_available() else {"device": "cpu", "prefer": {"x": "y"}},
            "device|prefer",
        ),
    ],
)
def test_refused_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    config = tiny_config()
    write_hf(tmp_path, config, random_state_dict(config))
    monkeypatch.setattr(startup, "load_weights", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        start_device_half(tmp_path, EngineConfig(**({"device": "cpu"} | options)), StartupLog())


@pytest.mark.parametrize(
    ("options", "model", "expected"),
    [
        ({"num_kv_pages": 5}, {}, (5, 320)),
        ({"num_kv_pages": 5, "max_model_len": "auto", "page_size": 16}, {}, (5, 80)),
        ({"num_kv_pages": 5, "max_model_len": 100}, {}, (5, 100)),
        # 2 layers, 2 KV heads of 8, keys and values, 4 bytes: 256 bytes a token
        ({"kv_cache_gib": 0.5}, {}, (GIB // 2 // (64 * 256), 131072)),
        ({}, {}, (GIB // (64 * 256), 131072)),
        # 16 KiB a token: the default grows to hold one whole context, and with 64 KiB stops at 4 GiB
        ({}, {"head_dim": 512}, (2 * GIB // (64 * 16384), 131072)),
        ({}, {"head_dim": 2048}, (4 * GIB // (64 * 65536), 65536)),
        ({}, {"max_position_embeddings": 1000}, (GIB // (64 * 256), 1000)),
    ],
)
def test_the_plan_of_the_kv_cache(options: dict[str, Any], model: dict[str, Any], expected: tuple[int, int]) -> None:
    assert plan_kv_cache(tiny_config(**model), EngineConfig(**options), Sizes(4, 4), None) == (*expected, None)


def test_definitions_are_not_captured_in_graphs() -> None:
    site = dataclasses.replace(
        Site.of(tiny_config(hidden_size=64, intermediate_size=64), 64, torch.bfloat16, torch.device("cpu")),
        device_type="cuda",
        capability=(8, 0),  # without FP8, whose operations nothing uses
    )
    check_capturable(Ops.select(site, {}))
    with pytest.raises(ValueError, match=r"prefer={'sample_': 'semantics'} cannot be captured .* enforce_eager=True"):
        check_capturable(Ops.select(site, {"sample_": "semantics"}))
