"""Engines with FP8 keys and values and FP8 weights: the same invariances, conflicts refused, saturation counted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_engine import Engine, SamplingParams
from nemo_engine.outputs import Logprob
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf
from tests.helpers.fp8_checkpoints import write_fp8
from tests.test_invariances import VARIANTS, assert_all_returned, make_engine, make_workload, run

CONFIG = tiny_config(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, hidden_size=24, vocab_size=97)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    return write_hf(path, CONFIG, random_state_dict(CONFIG, seed=1))


@pytest.fixture(scope="module")
def model_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp8")
    write_fp8(path, CONFIG, random_state_dict(CONFIG, seed=1), "compressed-tensors static", kv="head")
    return path


# ---- FP8 keys and values, the rest in float64, where no sum depends on its order enough to round otherwise


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(2))
def test_fp8_keys_and_values_change_no_invariance(model: Path, variant: str, seed: int) -> None:
    prompts, params = make_workload(seed)
    alone = {"enable_prefix_caching": False, "max_num_seqs": 1}
    with make_engine(model, kv_cache_dtype="fp8", **alone) as engine:
        expected = [run(engine, [ids], [own])[0] for ids, own in zip(prompts, params)]
    with make_engine(model, kv_cache_dtype="fp8_e4m3", **VARIANTS[variant]) as engine:
        for _ in range(2):  # and from a warm cache
            assert run(engine, prompts, params) == expected
            assert_all_returned(engine)
        assert engine.stats().total_prefix_hit_tokens > 0 or variant != "prefix caching"


def test_preempted_requests_with_fp8_keys_and_values(model: Path) -> None:
    prompts = [[(3 * i + j) % 97 for j in range(1 + 2 * i)] for i in range(8)]
    params = [SamplingParams(max_tokens=60 - i, ignore_eos=True, seed=i, temperature=i % 2) for i in range(8)]
    with make_engine(model, kv_cache_dtype="fp8", enable_prefix_caching=False, max_num_seqs=1) as engine:
        expected = [run(engine, [ids], [own])[0] for ids, own in zip(prompts, params)]
    with make_engine(model, kv_cache_dtype="fp8", num_kv_pages=9, max_model_len=128) as engine:
        assert run(engine, prompts, params) == expected
        assert engine.stats().total_preemptions > 3


def test_fp8_keys_and_values_take_half_the_bytes_and_are_really_fp8(model: Path) -> None:
    rows = {}
    for name in ("auto", "fp8"):
        with Engine(
            model, device="cpu", dtype="bfloat16", kv_cache_dtype=name, num_kv_pages=20, max_model_len=64
        ) as engine:
            engine.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=3))
            rows[name] = next(
                row.num_bytes for row in engine.startup_log.rows if row.name.startswith("allocate KV cache")
            )
            dtype = {kv.dtype for kv in engine._core.runner._kv_cache.layers}
            assert dtype == {torch.float8_e4m3fn if name == "fp8" else torch.bfloat16}
    assert rows["auto"] == 2 * rows["fp8"]


# ---- FP8 weights: in fp32, where a sum in another order may round to the other of two FP8 numbers


def first_logprobs(engine: Engine, prompts: list[list[int]]) -> list[dict[int, Logprob]]:
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=97)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    return [(output.outputs[0].logprobs or [])[0] for output in outputs]


@pytest.mark.parametrize("quantization", ["fp8", "stored"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_fp8_weights_change_no_invariance(model: Path, model_fp8: Path, variant: str, quantization: str) -> None:
    """Log-probabilities after prompts: equal but for single roundings, which a wrong row or scale would exceed by
    far.
    """
    path = model if quantization == "fp8" else model_fp8
    options: dict[str, Any] = {"dtype": "float32", "max_logprobs": 97}
    options |= {"quantization": "fp8"} if quantization == "fp8" else {}
    prompts = [ids for seed in range(3) for ids in make_workload(seed)[0]]
    with make_engine(path, enable_prefix_caching=False, max_num_seqs=1, **options) as engine:
        expected = [first_logprobs(engine, [ids])[0] for ids in prompts]
    with make_engine(path, **options, **VARIANTS[variant]) as engine:
        for _ in range(2):
            errors = torch.tensor(
                [
                    max(abs(found[token].logprob - entry.logprob) for token, entry in wanted.items())
                    for found, wanted in zip(first_logprobs(engine, prompts), expected, strict=True)
                ]
            )
            assert errors.median() < 1e-4 and errors.max() < 0.5
        assert_all_returned(engine)


# ---- conflicts


@pytest.mark.parametrize(
    ("which", "options", "message"),
    [
        (
            "fp8",
            {"quantization": "fp8_block"},
            "quantization 'fp8_block' conflicts with what the checkpoint is already",
        ),
        ("dense", {"quantization": "fp8", "dtype": "float64"}, "dtype 'float64' computes nothing in FP8"),
        ("fp8", {"dtype": "float64"}, "dtype 'float64' computes nothing in FP8"),
        (
            "dense",
            {"kv_cache_dtype": "float16", "dtype": "float32"},
            "kv_cache_dtype 'float16' conflicts with .* float32",
        ),
        ("dense", {"kv_cache_dtype": "int8"}, "kv_cache_dtype must be one of"),
        ("dense", {"quantization": "fp8_block"}, "rows are not whole blocks of 128"),
    ],
)
def test_conflicts_are_refused(model: Path, model_fp8: Path, which: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(model if which == "dense" else model_fp8, device="cpu", max_model_len=64, num_kv_pages=8, **options)


def test_a_checkpoint_made_for_fp8_keys_gets_them_unless_told_otherwise(model_fp8: Path) -> None:
    for kv_cache_dtype, expected in (("auto", "FP8, scales of the checkpoint"), ("float32", None)):
        options: dict[str, Any] = {"device": "cpu", "max_model_len": 64, "num_kv_pages": 8}
        with Engine(model_fp8, kv_cache_dtype=kv_cache_dtype, **options) as engine:
            (name,) = (row.name for row in engine.startup_log.rows if row.name.startswith("allocate KV cache"))
            assert name == "allocate KV cache" + (f" ({expected})" if expected else "")


def test_the_ledger_says_what_was_done(model: Path, model_fp8: Path) -> None:
    for path, options, words in (
        (model, {"quantization": "fp8"}, "quantized to FP8, a scale per channel; kept as fp32 numbers"),
        (model_fp8, {}, "FP8 weights (compressed-tensors), a scale per tensor, static scales of inputs"),
    ):
        with Engine(path, device="cpu", max_model_len=64, num_kv_pages=8, **options) as engine:
            (name,) = (row.name for row in engine.startup_log.rows if row.name.startswith("load weights"))
            assert words.replace("quantized", "quantised") in name


# ---- saturation


def test_saturated_keys_and_values_are_counted_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = random_state_dict(CONFIG, seed=1)
    for layer in range(CONFIG.num_layers):
        state[f"model.layers.{layer}.self_attn.v_proj.weight"] *= 2000
    path = write_hf(tmp_path, CONFIG, state)
    prompt = {"prompt_token_ids": list(range(1, 40))}
    for kv_cache_dtype, is_saturated in (("fp8", True), ("auto", False)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "nemo_engine"):
            with Engine(path, device="cpu", kv_cache_dtype=kv_cache_dtype, max_model_len=64, num_kv_pages=8) as engine:
                (output,) = engine.generate(prompt, SamplingParams(max_tokens=4, ignore_eos=True))
                assert len(output.outputs[0].token_ids) == 4
                saturated, written = engine.count_saturated_kv()
        assert (saturated > 0.1 * written) is is_saturated
        assert ("saturated: its scales are too small" in caplog.text) is is_saturated


def test_counting_reads_what_was_written_alone(model: Path) -> None:
    """All pages that requests have had, and no others: a large cache is not read when it is closed."""
    with Engine(model, device="cpu", kv_cache_dtype="fp8", max_model_len=64, num_kv_pages=50, page_size=16) as engine:
        for first in (0, 40):
            prompts = [{"prompt_token_ids": list(range(first, first + 35))} for _ in range(2)]
            engine.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
        runner = engine._core.runner
        written = engine.count_saturated_kv()[1]
        assert 4 <= runner._table.highest_page < 20
        assert (0, written) == runner._kv_cache.count_saturated(50)
        sampled = runner._kv_cache.count_saturated(runner._table.highest_page, 2)[
            1
        ]  # at most two pages of each layer, as at the end
        assert 0 < sampled <= 2 * 16 * 2 * CONFIG.num_layers * CONFIG.kv_size
        for pages in runner._kv_cache.layers[0].caches:
            pages.view(torch.uint8)[1, 0, 0, :2] = torch.tensor([0x7E, 0xFE], dtype=torch.uint8)  # 448 and -448
            pages.view(torch.uint8)[21] = 0x7E
        assert engine.count_saturated_kv() == (4, written)


def test_nothing_is_saturated_with_scales_that_fit(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Engine(model, device="cpu", kv_cache_dtype="fp8", max_model_len=64, num_kv_pages=8) as engine:
        engine.generate({"prompt_token_ids": list(range(1, 40))}, SamplingParams(max_tokens=4, ignore_eos=True))
        saturated, written = engine.count_saturated_kv()
    # 42 tokens were written: the last one sampled was not. Few entries are 0.
    assert saturated == 0 and 0.9 < written / (42 * 2 * CONFIG.num_layers * CONFIG.kv_size) <= 1
    assert "saturated" not in caplog.text
