"""What a GPU's memory is planned to go to, and what is refused; no GPU is needed to plan."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from nemo_engine.checkpoint.inventory import planned_inventory
from nemo_engine.checkpoint.quant_config import ONLINE
from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.memory_plan import (
    GIB,
    Sizes,
    num_parameters,
    plan_kv_cache,
    plan_memory,
    weight_bytes,
    what_would_fit,
)
from nemo_engine.model.weights import all_dense, dummy_weights, empty_weights
from tests.helpers.checkpoints import tiny_config

NEMO = tiny_config(
    vocab_size=131072, hidden_size=5120, num_layers=40, num_heads=32, num_kv_heads=8, head_dim=128,
    intermediate_size=14336, rope_theta=1e6, dtype="bfloat16",
)  # fmt: skip
BF16 = torch.bfloat16


@pytest.mark.parametrize("is_tied", [False, True])
def test_weights_are_counted_exactly(is_tied: bool) -> None:
    for config in (tiny_config(tie_word_embeddings=is_tied), dataclasses.replace(NEMO, tie_word_embeddings=is_tied)):
        on_paper = empty_weights(config, BF16, torch.device("meta")).num_bytes
        assert 2 * num_parameters(config) == on_paper == weight_bytes(config, 2, all_dense)
    assert num_parameters(NEMO) == 12_247_782_400


def test_an_h200_holds_nemo_and_its_cache() -> None:
    pages, length, memory = plan_kv_cache(NEMO, EngineConfig(), Sizes(2, 2), free=139 * GIB)
    assert memory is not None and length == 131072
    assert memory.total <= memory.free < memory.total + 2 * 64 * 163_840
    assert memory.kv_cache == (pages + 1) * 64 * 163_840  # bytes a token, and the page of padding
    assert pages * 64 > 640_000  # performance is planned on some 700,000 tokens
    text = memory.format()
    numbers = [float(number) for number in re.findall(r"([\d.]+) GiB", text)]
    assert len(numbers) == 9 and abs(sum(numbers[:7]) - numbers[7]) < 0.05 and numbers[8] == 139.0


@pytest.mark.parametrize(
    ("free", "options"),
    [
        (20, {}),  # less than the weights
        (27.0, {}),  # weights, graphs and no cache
        (40, {"kv_cache_gib": 30.0}),
        (40, {"num_kv_pages": 10_000}),
        (40, {"max_model_len": 131072}),
    ],
)
def test_what_does_not_fit_is_refused_with_the_plan_and_what_would(free: float, options: dict[str, Any]) -> None:
    config, free_bytes = EngineConfig(**options), int(free * GIB)
    with pytest.raises(ValueError) as caught:
        plan_kv_cache(NEMO, config, Sizes(2, 2), free_bytes)
    message = str(caught.value)
    for item in (
        "weights",
        "activations of the largest step",
        "request tables",
        "CUDA graphs",
        "cuBLAS workspaces",
        "reserve",
        "KV cache",
        "free on",
    ):
        assert re.search(rf"^  {item}.* GiB$", message, re.MULTILINE), message
    if match := re.match(r"the plan does not fit into the device's memory, by ([\d.]+) GiB", message):
        together, had = (
            float(re.search(rf"{name} +([\d.]+) GiB", message)[1]) for name in ("together", "free on the device")
        )  # type: ignore[index]
        assert abs(float(match[1]) - max(0.0, together - had)) < 0.021
    last = message.splitlines()[-1]
    found = dict(re.findall(r"(max_model_len|max_num_seqs) (\d+)", last.split(",")[0]))
    if free == 20:
        assert last.startswith("no context fits")
        return
    # What is named fits, and one token more does not.
    fitting, seqs = int(found["max_model_len"]), int(found["max_num_seqs"])

    def fits(length: int) -> bool:
        smaller = EngineConfig(
            max_num_seqs=seqs, max_num_batched_tokens=max(seqs, min(EngineConfig().tokens_per_step, length))
        )
        return plan_memory(NEMO, smaller, length, 2, free_bytes, -(-length // 64)).total <= free_bytes

    assert fits(fitting) and (fitting == 131072 or not fits(fitting + 1))


def test_without_an_explicit_context_it_is_cut_to_what_fits() -> None:
    pages, length, memory = plan_kv_cache(NEMO, EngineConfig(max_model_len="auto"), Sizes(2, 2), free=38 * GIB)
    assert memory is not None and 0 < length == pages * 64 < 131072 and memory.total <= memory.free


def test_every_choice_shows_in_the_plan() -> None:
    def plan(config: ModelConfig = NEMO, **options: Any) -> Any:
        return plan_memory(config, EngineConfig(**options), 131072, 2, 100 * GIB, 10)

    assert plan(enforce_eager=True).graphs == 0 < plan().graphs
    assert plan(max_num_batched_tokens=32768).activations > plan().activations
    assert plan(max_num_seqs=512).tables > plan().tables
    assert plan(page_size=128).kv_cache == 2 * plan().kv_cache
    assert plan(dataclasses.replace(NEMO, num_layers=20)).weights < plan().weights
    assert plan_memory(NEMO, EngineConfig(), 131072, 2, 100 * GIB, 10, weight_bytes=7).weights == 7


@pytest.mark.parametrize(
    ("quantization", "heads", "most"), [("fp8", 2, 0.56), ("fp8_block", 2, 0.56), ("fp8", 0, 0.53)]
)
def test_fp8_takes_half(quantization: str, heads: int, most: float) -> None:
    """What is planned for NeMo, and that the plan is what a model takes, scales and all. heads: the matrices that stay
    as they are.
    """
    scheme = ONLINE[quantization] if heads else dataclasses.replace(ONLINE[quantization], ignored=())
    small = tiny_config(hidden_size=256, intermediate_size=384, num_heads=2, num_kv_heads=2, head_dim=128)
    inventory = planned_inventory(small, None, scheme)
    planned = empty_weights(small, BF16, torch.device("meta"), inventory.kind_of).num_bytes
    assert planned == dummy_weights(small, BF16, kind_of=inventory.kind_of).num_bytes
    assert planned == weight_bytes(small, 2, inventory.kind_of)
    inventory = planned_inventory(NEMO, None, scheme)
    nemo = empty_weights(NEMO, BF16, torch.device("meta"), inventory.kind_of).num_bytes
    assert 0.5 < nemo / (2 * num_parameters(NEMO)) < most
    pages = {size: plan_kv_cache(NEMO, EngineConfig(), Sizes(2, size, nemo), free=139 * GIB)[0] for size in (1, 2)}
    scratch = (256 << 20) / (
        EngineConfig().page_size * NEMO.kv_bytes_per_token(1)
    )  # in pages: an FP8 cache's, for prefill
    assert 2 * pages[2] <= pages[1] + scratch <= 2 * pages[2] + 3


def test_what_would_fit_names_nothing_where_nothing_does() -> None:
    assert what_would_fit(NEMO, EngineConfig(), 131072, 2, GIB).startswith("no context fits at any batch size")


def test_small_sizes_are_not_told_as_nothing() -> None:
    with pytest.raises(ValueError) as caught:
        plan_kv_cache(NEMO, EngineConfig(num_kv_pages=2, max_model_len=300), Sizes(2, 2), None)
    assert " 0.00 " not in str(caught.value) and "(20.00 MiB) hold 128: 30.00 MiB are missing" in str(caught.value)
