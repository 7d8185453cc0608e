"""Plans on paper: numbers worked out by hand, plans against what engines take, and what does not fit."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_engine import Engine
from nemo_engine.checkpoint.inventory import planned_inventory
from nemo_engine.checkpoint.quant_config import ONLINE
from nemo_engine.config import EngineConfig
from nemo_engine.memory_plan import GIB, DoesNotFitError, num_parameters, plan_kv_cache, plan_memory, weight_bytes
from nemo_engine.model.weights import empty_weights
from nemo_engine.planner import published
from nemo_engine.planner.efficiency import Efficiencies, Figure
from nemo_engine.planner.gpus import GPUS, find_gpu
from nemo_engine.planner.models import BUILT_IN, PlannedModel, formats_of, read_model
from nemo_engine.planner.plan import Load, Plan, alternatives, make_plan, operating, shard
from nemo_engine.planner.report import as_json, report
from nemo_engine.planner.roofline import Roofline, num_pairs
from nemo_engine.workload import Limits
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf
from tests.helpers.fp8_checkpoints import FLAVOURS, write_fp8

NEMO = PlannedModel("nemo", BUILT_IN["nemo"])
FP8 = {"quantization": "fp8", "kv_cache_dtype": "fp8"}
H200 = find_gpu("h200")
LOAD = Load(1000, 200)


def plan(gpu: str = "h200", load: Load = LOAD, ranks: int = 1, **options: Any) -> Plan:
    return make_plan(NEMO, find_gpu(gpu), EngineConfig(**options), load, None, ranks)


# ---- numbers worked out by hand, from the shapes of Mistral NeMo 12B


def test_sizes_of_nemo() -> None:
    assert num_parameters(NEMO.config) == 12_247_782_400
    linear = 40 * (5120 * 6144 + 4096 * 5120 + 2 * 5120 * 14336 + 14336 * 5120)
    head = 131072 * 5120
    norms = 81 * 5120
    assert plan().kv_bytes_per_token == 163_840 and plan(kv_cache_dtype="fp8").kv_bytes_per_token == 81_920
    sizes = {name: formats_of(NEMO, EngineConfig(**options)).sizes.weights for name, options in (
        ("bf16", {}), ("fp8", {"quantization": "fp8"}), ("fp8 head", {"quantization": "fp8", "quantize_lm_head": True}),
    )}  # fmt: skip
    scales = 4 * 40 * (6144 + 5120 + 28672 + 5120)
    assert sizes == {
        "bf16": 2 * (linear + 2 * head + norms),
        "fp8": linear + scales + 2 * (2 * head + norms),
        "fp8 head": linear + scales + head + 4 * 131072 + 2 * (head + norms),
    }
    assert sizes["bf16"] == pytest.approx(24.50e9, rel=1e-3) and sizes["fp8"] == pytest.approx(13.59e9, rel=1e-3)


# Milliseconds of a decode step at 4.3 TB/s, 788 and 1576 TFLOP/s and nothing lost; (batch, context).
DECODE_MS = [
    ({}, {(1, 1024): 5.42, (8, 8192): 7.88, (32, 8192): 15.37, (64, 1024): 7.88, (128, 1024): 10.38, (256, 1024):
    17.52}), ({"quantization": "fp8"}, {(1, 1024): 2.89, (1, 131072): 7.84, (8, 32768): 12.84, (64, 8192): 22.83, (256,
    1024): 13.98}), (FP8, {(1, 1024): 2.87, (1, 32768): 3.47, (8, 131072): 22.82, (64, 8192): 12.84, (128, 8192): 22.83,
    (256, 1024): 8.98}), (FP8 | {"quantize_lm_head": True}, {(1, 1024): 2.71, (1, 131072): 5.19, (32, 8192): 7.69, (256,
    1024): 8.76}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), DECODE_MS)
def test_rooflines_of_decoding(options: dict[str, Any], expected: dict[tuple[int, int], float]) -> None:
    formats = formats_of(NEMO, EngineConfig(**options))
    roofline = Roofline.of(NEMO.config, formats, H200, Efficiencies().ideal())
    for (batch, context), ms in expected.items():
        seconds = roofline.step_seconds(batch, batch * (context + 1), ())
        assert seconds * 1e3 == pytest.approx(ms, abs=0.0051)
        base, slope = roofline.decode_line(batch)
        assert base + slope * batch * (context + 1) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, (34.9, 32.1, 24.2, 12.2)), ({"quantization": "fp8"}, (67.4, 57.9, 36.4, 14.6))],
)
def test_rooflines_of_prefill(options: dict[str, Any], expected: tuple[float, ...]) -> None:
    roofline = Roofline.of(NEMO.config, formats_of(NEMO, EngineConfig(**options)), H200, Efficiencies().ideal())
    for tokens, rate in zip((2048, 8192, 32768, 131072), expected):
        assert tokens / roofline.step_seconds(0, 0, [(0, tokens)]) / 1e3 == pytest.approx(rate, abs=0.06)


def test_pairs() -> None:
    for start, count in ((0, 1), (0, 7), (5, 1), (5, 4)):
        assert num_pairs(start, count) == sum(start + index + 1 for index in range(count))
    assert num_pairs(0, 300) == sum(num_pairs(start, 100) for start in (0, 100, 200))


# ---- plans and engines


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", [None, "fp8", "fp8_block"])
def test_weights_on_paper_are_those_of_the_engine(name: str | None, head: bool, is_tied: bool) -> None:
    config = tiny_config(
        hidden_size=256, intermediate_size=384, num_heads=2, num_kv_heads=2, head_dim=128, tie_word_embeddings=is_tied,
        dtype="bfloat16",
    )  # fmt: skip
    found = formats_of(PlannedModel("", config), EngineConfig(quantization=name, quantize_lm_head=head))
    scheme = None if name is None else ONLINE[name]
    if head:
        scheme = dataclasses.replace(ONLINE[name or "fp8"], ignored=(), targets=("Linear",) if name else ("lm_head",))
    inventory = planned_inventory(config, None, scheme)
    on_paper = empty_weights(config, torch.bfloat16, torch.device("meta"), inventory.kind_of)
    assert found.sizes.weights == on_paper.num_bytes
    kinds = {key: (kind.scales, kind.has_input_scale) for key, kind in found.kinds.items()}
    assert kinds == {key: (kind.scales, kind.has_input_scale) for key, kind in inventory.kinds.items()}


@pytest.mark.parametrize(
    "options", [{}, {"kv_cache_dtype": "fp8"}, {"page_size": 16, "max_model_len": 500}, {"num_kv_pages": 77}]
)
def test_an_engine_takes_what_was_planned(options: dict[str, Any]) -> None:
    found = read_model("nemo-tiny")
    config = EngineConfig(device="cpu", skip_tokenizer_init=True, kv_cache_gib=None, **({"num_kv_pages": 50} | options))
    formats = formats_of(found, config)
    pages, length, _ = plan_kv_cache(found.config, config, formats.sizes, None)
    with Engine("nemo-tiny", device="cpu", skip_tokenizer_init=True, **({"num_kv_pages": 50} | options)) as engine:
        num_bytes = {row.name.split(" (")[0]: row.num_bytes for row in engine.startup_log.rows}
        assert engine.model_config == found.config
        assert (engine.stats().num_pages, engine.max_model_len) == (pages, length)
        page_bytes = config.page_size * found.config.kv_bytes_per_token(formats.sizes.kv_cache)
        assert num_bytes["allocate KV cache"] == (pages + 1) * page_bytes
        loaded = next(count for name, count in num_bytes.items() if "weights" in name and count)
        assert loaded == formats.sizes.weights


@pytest.mark.parametrize("options", [{}, {"quantization": "fp8"}, {"quantization": "fp8", "quantize_lm_head": True}])
def test_dummy_weights_take_what_was_planned(options: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(
        hidden_size=256, intermediate_size=384, num_heads=2, num_kv_heads=2, head_dim=128, dtype="bfloat16"
    )
    write_hf(tmp_path, config, random_state_dict(config))
    found = read_model(str(tmp_path))
    formats = formats_of(found, EngineConfig(**options))
    more: dict[str, Any] = {"load_format": "dummy", "device": "cpu", "skip_tokenizer_init": True, "num_kv_pages": 20}
    with Engine(tmp_path, **more, **options) as engine:
        row = next(row for row in engine.startup_log.rows if row.name == "make dummy weights")
        assert row.num_bytes == formats.sizes.weights


@pytest.mark.parametrize("flavour", sorted(FLAVOURS))
def test_a_quantised_checkpoint_is_read_without_torch_as_the_engine_reads_it(tmp_path: Path, flavour: str) -> None:
    from nemo_engine.checkpoint.checkpoint import open_checkpoint
    from nemo_engine.checkpoint.inventory import take_inventory

    config = tiny_config(
        hidden_size=256, intermediate_size=384, num_heads=2, num_kv_heads=2, head_dim=128, dtype="bfloat16"
    )
    write_fp8(tmp_path, config, random_state_dict(config, dtype=torch.bfloat16), flavour)
    found = read_model(str(tmp_path))
    checkpoint = open_checkpoint(tmp_path)
    assert found.quantization == checkpoint.quantization is not None
    inventory = take_inventory(checkpoint, checkpoint.model_config)
    kinds = planned_inventory(found.config, found.quantization, None).kinds
    assert {key: kind.scales for key, kind in kinds.items()} == {
        key: kind.scales for key, kind in inventory.kinds.items()
    }
    assert formats_of(found, EngineConfig()).sizes.weights == weight_bytes(config, 2, inventory.kind_of)


# ---- what fits


def test_a_plan_fills_the_gpu() -> None:
    found = plan(**FP8)
    assert found.shortage is None and found.max_model_len == 131072
    assert found.memory.total <= H200.free_bytes < found.memory.total + 2 * 64 * 81_920
    assert found.capacity_tokens == found.num_pages * 64 and found.largest_batch == 256
    assert plan(load=Load(100_000, 1000), **FP8).largest_batch == found.num_pages // -(-100_999 // 64)
    # The last token of an answer needs no place in the cache.
    assert (
        plan(load=Load(60, 5), num_kv_pages=10).largest_batch
        == 10
        == 2 * plan(load=Load(60, 6), num_kv_pages=10).largest_batch
    )


@pytest.mark.parametrize(
    ("gpu", "options"),
    [
        ("rtx4090", {}),
        ("l40s", {"max_model_len": 131072, "kv_cache_gib": 12}),
        ("h100", {"kv_cache_gib": 70}),
        ("l40s", {"max_model_len": 131072}),
    ],
)
def test_what_does_not_fit_says_by_how_much_and_what_would(gpu: str, options: dict[str, Any]) -> None:
    found = plan(gpu, **options)
    assert found.shortage is not None
    text = report(found)
    missing = found.shortage.missing
    assert (
        missing > 0
        and re.search(r"does not fit.*GiB", text)
        and re.search(r"what would fit instead: .*(H200|fp8)", text)
    )
    data = as_json(found)
    assert data["fits"] is False and data["missing_gib"] == missing / GIB
    # With so much more memory it fits; a little less and it does not.
    bigger = find_gpu(gpu, find_gpu(gpu).memory_gib + missing / GIB + 0.02)
    if "kv_cache_gib" not in options or gpu == "h100":
        assert make_plan(NEMO, bigger, EngineConfig(**options), Load(10, 10)).shortage is None
        smaller = find_gpu(gpu, find_gpu(gpu).memory_gib + missing / GIB - 0.05)
        assert make_plan(NEMO, smaller, EngineConfig(**options), Load(10, 10)).shortage is not None


def test_only_what_fits_is_named_instead() -> None:
    found = plan("rtx4090", kv_cache_gib=60)
    assert alternatives(found) == ["NVIDIA H200 SXM", "NVIDIA B200 SXM"]


@pytest.mark.parametrize("few", [1, 12_000_000])
def test_so_many_bytes_more_make_it_fit(few: int) -> None:
    """Also where the weights fit and a page does not."""
    config, model = EngineConfig(max_model_len=64), NEMO.config
    sizes = formats_of(NEMO, config).sizes
    enough = plan_memory(model, config, 64, 2, 1 << 40, 1, sizes.weights).total
    assert plan_kv_cache(model, config, sizes, enough)[0] == 1
    with pytest.raises(DoesNotFitError, match="does not fit into the device's memory") as error:
        plan_kv_cache(model, config, sizes, enough - few)
    assert plan_kv_cache(model, config, sizes, enough - few + error.value.missing)[0] >= 1
    assert few <= error.value.missing <= few + 64 * model.kv_bytes_per_token(2)


def test_several_gpus_on_paper() -> None:
    one, two, sixteen = plan(), plan(ranks=2), plan(ranks=16)
    assert (
        two.kv_bytes_per_token == one.kv_bytes_per_token // 2
        and sixteen.kv_bytes_per_token == one.kv_bytes_per_token // 8
    )
    norms = 2 * 81 * 5120
    assert two.memory.weights == (one.memory.weights - norms) // 2 + norms
    assert "this version of the engine runs on one GPU" in report(two) and "one GPU" not in report(one)
    assert as_json(two)["runs_in_this_version"] is False
    assert two.points[0].step < one.points[0].step < 2 * two.points[0].step  # reductions cost something
    ideal, formats = Efficiencies().ideal(), formats_of(NEMO, EngineConfig())
    alone, half, sixteenth = (Roofline.of(NEMO.config, formats, H200, ideal, ranks) for ranks in (1, 2, 16))
    assert alone.context_seconds / sixteenth.context_seconds == pytest.approx(8)  # it has 8 heads of keys and values
    # 80 sums of a vector of 5120 in bf16 per token; each GPU sends 2 (n - 1) / n of it over 450 GB/s.
    both = alone.step_seconds(0, 0, [(0, 4096)]) / 2 + 4096 * 80 * 5120 * 2 / 450e9
    assert half.step_seconds(0, 0, [(0, 4096)]) == pytest.approx(both, rel=1e-3)
    priced = plan(ranks=2, load=Load(1000, 200, price_per_hour=3.6))
    point = priced.points[0]
    assert priced.cost_per_million(point) == pytest.approx(2 * 3.6 / 3600 / point.tokens_per_s * 1e6)
    for ranks in (3, 0, -1):
        with pytest.raises(ValueError, match="tensor_parallel_size"):
            shard(NEMO.config, ranks)


def test_what_a_request_sees_by_hand() -> None:
    """16 requests of 1000 in and 200 out, prompts in one chunk."""
    load, e = Load(1000, 200), Efficiencies()
    roofline = Roofline.of(NEMO.config, formats_of(NEMO, EngineConfig()), H200, e)
    host = 150e-6 + 16 * 0.4e-6
    context = int(16 * 1100.5)
    decode = roofline.step_seconds(16, context, ())
    others = context * 15 // 16
    mixed = roofline.step_seconds(15, others, [(0, 1000)])
    itl = 15 / 200 * (mixed - roofline.step_seconds(15, others, ()))
    overlapped, serial = (
        operating(roofline, roofline, load, 16, EngineConfig(pipeline_depth=depth)) for depth in (2, 1)
    )
    assert overlapped.step == pytest.approx(decode) and serial.step == pytest.approx(decode + host)
    for point in (overlapped, serial):
        assert point.ttft == pytest.approx(host + mixed + point.step / 2)
        assert point.itl == pytest.approx(point.step + itl) and point.longest_itl == pytest.approx(mixed)
        assert point.tokens_per_s == pytest.approx(16 * 200 / (point.ttft + 199 * point.itl))


def test_traffic_between_kernels_grows_with_the_rows() -> None:
    nothing = Figure(0.0, "")
    formats = formats_of(NEMO, EngineConfig())
    with_it, without = (
        Roofline.of(NEMO.config, formats, H200, dataclasses.replace(Efficiencies(), elementwise=part))
        for part in (Figure(1.0, ""), nothing)
    )
    # Per layer: two norms with residual (4 H each), the gated activation (3 I), rotary embedding and the write (2 (Q +
    # 2 K)); 2 bytes each.
    num_bytes = 40 * 2 * (8 * 5120 + 3 * 14336 + 2 * 6144)
    for rows in (1, 100):
        seconds = with_it.step_seconds(rows, 0, ()) - without.step_seconds(rows, 0, ())
        assert seconds == pytest.approx(rows * num_bytes / 4.3e12)


def test_limits_and_cost() -> None:
    load = Load(2000, 200, Limits(ttft_s=1.0, itl_s=0.03), price_per_hour=3.6)
    found = plan(load=load, **FP8)
    assert found.best is not None and found.best.itl <= 0.03 and found.best.ttft <= 1.0
    assert found.best.batch in {point.batch for point in found.points} or 1 < found.best.batch < 256
    longer = make_plan(NEMO, H200, EngineConfig(**FP8, max_num_seqs=found.best.batch + 1), load)
    assert longer.points[-1].batch == found.best.batch + 1 and longer.points[-1].itl > 0.03  # one more is too many
    assert found.cost_per_million(found.best) == pytest.approx(3.6 / 3600 / found.best.tokens_per_s * 1e6)
    assert plan(load=dataclasses.replace(load, limits=Limits(ttft_s=1.0, itl_s=0.001)), **FP8).best is None
    assert plan(load=Load(2000, 200), **FP8).best is None
    rates = [point.tokens_per_s for point in found.points]
    assert rates == sorted(rates)
    for point in found.points:
        assert point.ideal_step < point.step <= point.itl <= point.longest_itl


@pytest.mark.parametrize("gpu", sorted(GPUS))
def test_every_gpu_has_plausible_numbers(gpu: str) -> None:
    found = GPUS[gpu]
    assert 0.9 < found.memory_gib / found.marketing_gb <= 1.0  # neither GB nor GiB as sold
    assert found.fp8_flops_per_s is None or 1.9 < found.fp8_flops_per_s / found.bf16_flops_per_s < 2.1
    assert "https://" in found.source and find_gpu(gpu.upper()) == found


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find_gpu("h900"), "gpu must be one of h200, .* got 'h900'"),
        (lambda: plan("a100", **FP8), "FP8 needs compute capability 8.9"),
        (lambda: plan(load=Load(0, 5)), "input_tokens must be an integer of at least 1, got 0"),
        (lambda: plan(load=Load(5, 5, Limits(itl_s=-1.0))), "itl_s must be finite and greater than 0, got -1.0"),
        (
            lambda: plan(load=Load(131072, 5)),
            "input 131072 and output 5 make 131077 tokens: more than the context of 131072",
        ),
        (lambda: plan(kv_cache_dtype="float16"), "kv_cache_dtype 'float16' conflicts"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- measured efficiencies


def test_measurements_replace_assumptions(tmp_path: Path) -> None:
    records = [
        {"benchmark": "gpu_ceilings", "gpu": "NVIDIA H200", "what": "copy", "gb_per_s": 4000.0}, {"benchmark":
        "gpu_ceilings", "gpu": "NVIDIA H200", "what": "bf16 cublas", "m": 8192, "tflop_per_s": 700.0}, {"benchmark":
        "gpu_ceilings", "gpu": "NVIDIA H200", "what": "bf16 cublas", "m": 4096, "tflop_per_s": 600.0}, {"benchmark":
        "gpu_ceilings", "gpu": "NVIDIA H200", "what": "bf16 cublas", "m": 8, "tflop_per_s": 900.0}, {"benchmark":
        "gpu_ceilings", "gpu": "NVIDIA A100-SXM4-80GB", "what": "copy", "gb_per_s": 1.0}, {"benchmark": "latency",
        "gpu": "NVIDIA H200", "what": "decode", "fraction": 0.8, "options": {"kv_cache_dtype": "fp8"}}, {"benchmark":
        "gpu_ceilings", "gpu": "NVIDIA H100 PCIe", "what": "copy", "gb_per_s": 1.0}, {"benchmark": "latency", "gpu":
        "NVIDIA H200", "what": "decode", "fraction": None, "options": None}, {"benchmark": "latency", "gpu": None,
        "what": "decode", "fraction": 0.1},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = Efficiencies.read(H200, tmp_path)
    assert found.memory.value == pytest.approx(4 / 4.8) and found.memory.source == "measured: a.jsonl"
    assert found.matmul_bf16.value == pytest.approx(700 / 989) and found.matmul_fp8 == Efficiencies().matmul_fp8
    assert found.kv_fp8.value == found.weights.value == 0.8 and found.kv_bf16 == Efficiencies().kv_bf16
    assert "measured: a.jsonl" in report(make_plan(NEMO, H200, EngineConfig(**FP8), Load(10, 10), found), verbose=True)
    assert Efficiencies.read(find_gpu("a100"), tmp_path).memory.value == pytest.approx(1 / 2039)
    assert Efficiencies.read(find_gpu("h100"), tmp_path) == Efficiencies.assumed(find_gpu("h100"))
    assert Efficiencies.read(H200, None) == Efficiencies()
    l40s = find_gpu("l40s")
    assert Efficiencies.read(l40s, tmp_path) == Efficiencies.assumed(l40s)
    (tmp_path / "b.jsonl").write_text("{}\n{")
    with pytest.raises(ValueError, match=r"b.jsonl:2: not a line of JSON"):
        Efficiencies.read(H200, tmp_path)


@pytest.mark.parametrize("gpu", sorted(GPUS))
def test_what_was_measured_on_other_memory_says_so(gpu: str) -> None:
    """No figure of an H200 stands for another kind of memory or chip as if it had been measured there."""
    found, assumed = find_gpu(gpu), Efficiencies.assumed(find_gpu(gpu))
    carried = "carried over" in assumed.memory.source
    assert carried is (found.memory not in ("HBM3e", "HBM2e"))
    assert ("carried over to this chip" in assumed.matmul_bf16.source) is not gpu.startswith("h")
    # FP8 keys and values: bound by arithmetic on the fastest memory, by memory elsewhere.
    assert (assumed.kv_fp8.value < assumed.kv_bf16.value) is (found.memory == "HBM3e")


# ---- published results


def test_the_comparison_with_published_results() -> None:
    """Within these bounds, which are the ones that were found, rounded up; the bias is small where there are many."""
    cases = published.comparison()
    assert len(cases) == 74 and all(case.source and case.published > 0 for case in cases)
    decoding = [case.error for case in cases if not case.is_of_prompts]
    prompts = [case.error for case in cases if case.is_of_prompts]
    assert len(decoding) > 30 and len(prompts) > 20
    assert -0.20 < min(decoding) and max(decoding) < 0.21 and abs(statistics.median(decoding)) < 0.04
    assert -0.12 < min(prompts) and max(prompts) < 0.16 and abs(statistics.median(prompts)) < 0.04
    lines = published.table(cases).splitlines()
    assert len(lines) == 1 + len(cases) + len({case.source for case in cases})
    assert "29 published results on this GPU" in published.error_line("h100")
    assert "none on this GPU" in published.error_line("b200")
