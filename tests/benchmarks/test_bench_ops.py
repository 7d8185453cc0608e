"""``bench ops``: its arithmetic, what one failure does to the rest, other makers' kernels beside ours, and the program
on a CPU.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_engine.benchmarks import ops, timing
from nemo_engine.benchmarks.models import SHAPES
from nemo_engine.benchmarks.ops_peers import OpsPeers, _later
from nemo_engine.benchmarks.timing import Size
from nemo_engine.cli import main
from nemo_engine.ops import ALL_OPS, Op, Site
from nemo_engine.ops.op import Case, Impl


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- arithmetic


def test_rates_and_fractions_of_known_numbers() -> None:
    ceilings = timing.Ceilings(bytes_per_s=4e12, bf16_flops_per_s=8e14, fp8_flops_per_s=1.6e15)
    # 1 GB and few operations: 250 us at 4 TB/s, measured in 500.
    row = timing.Row.of("linear", "size", "name", False, 500.0, (10**9, 10**9), ceilings)
    assert (row.gb_per_s, row.tflop_per_s, row.fraction) == pytest.approx((2000.0, 2.0, 0.5))
    # 4e11 operations and few bytes: 500 us in bf16, 250 in FP8.
    for op, fraction in (("linear", 0.5), ("linear_fp8", 0.25), ("norm_linear_fp8", 0.25), ("silu_mul_fp8", 0.5)):
        row = timing.Row.of(op, "size", "name", False, 1000.0, (10**6, 4 * 10**11), ceilings)
        assert row.fraction == pytest.approx(fraction)
        assert row.tflop_per_s == pytest.approx(400.0)


def test_relative_difference() -> None:
    x = torch.tensor([[3.0, 4.0]])
    assert timing.relative_difference(x, x) == 0.0
    assert timing.relative_difference(torch.tensor([3.0, 4.5]), x) == pytest.approx(0.1)
    assert math.isnan(timing.relative_difference(torch.tensor([3.0, math.nan]), x))


# ---- one size


def impl(name: str) -> Impl:
    return Impl(name, f"tests.benchmarks.test_bench_ops:{name}", lambda site: None)


def right(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def wrong(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


def broken(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image")


def test_a_failure_or_a_wrong_result_is_a_row_and_the_rest_goes_on() -> None:
    op = Op("double", right, (impl("broken"), impl("wrong"), impl("right")), lambda: iter(()), lambda x: (1000, 1000))
    clock = iter([0.004, 0.002, 0.001, 0.001])  # milliseconds: two baselines, then those of ours that run
    size = timing.Size(
        "2",
        lambda: (torch.ones(2),),
        lambda x: {"none": lambda: broken(x), "slow": lambda: x + x, "fast": lambda: x + x},
    )
    site = Site.of(SHAPES["tiny"], 64, torch.bfloat16, torch.device("cpu"))
    rows = list(timing.measure_size(op, site, size, lambda call: next(clock), timing.Ceilings(1e9, 1e12, 1e12)))
    assert [(row.implementation, row.is_baseline) for row in rows] == [
        ("none", True), ("slow", True), ("fast", True), ("broken", False), ("wrong", False), ("right", False),
    ]  # fmt: skip
    none, _, fast, failed, off, good = rows
    assert none.error == failed.error == "RuntimeError: no kernel image"
    assert off.error == "differs from the first baseline" and off.difference == pytest.approx(0.5)
    assert good.error is None and good.difference == 0.0
    assert fast.us == pytest.approx(2.0) and fast.speedup is None
    assert good.us == pytest.approx(1.0) and good.speedup == pytest.approx(2.0)
    assert good.fraction == pytest.approx(1.0)
    assert "no kernel image" in failed.format() and "50" not in good.format()


def test_without_an_implementation_the_definition_is_measured() -> None:
    def refuse(site: Site) -> str | None:
        return "not here"

    op = Op("double", right, (Impl("never", "nowhere:f", refuse),), lambda: iter(()), lambda x: (1, 1))
    site: Any = None
    ((name, load),) = timing.implementations(op, site)
    assert name == "semantics" and load() is right


def test_what_does_not_serve_a_size_or_a_case_is_not_called() -> None:
    fp8 = {"kv_dtype": torch.float8_e4m3fn}
    picky = Impl("picky", f"{__name__}:broken", lambda site: "no FP8" if site.kv_dtype == torch.float8_e4m3fn else None)
    case = Case("a", lambda dtype: (torch.ones(2),), fp8)
    op = Op("double", right, (picky, impl("right")), lambda: iter([case]), lambda x: (1000, 1000))
    site = Site.of(SHAPES["tiny"], 64, torch.bfloat16, torch.device("cpu"))
    size = Size("2", lambda: (torch.ones(2),), lambda x: {}, site=fp8)
    rows = list(timing.measure_size(op, site, size, lambda call: 1.0, timing.Ceilings(1e9, 1e12, 1e12)))
    assert [(row.implementation, row.error) for row in rows] == [("right", None)]
    rows = list(timing.run_once(op, site, torch.device("cpu")))
    assert [(row.implementation, row.error) for row in rows] == [("right", None)]


# ---- other makers' kernels


def test_peers_stand_beside_the_baselines_and_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make() -> Any:
        made.append("once")
        raise RuntimeError("does not run on this device")

    monkeypatch.setattr(OpsPeers, "_attention", lambda self, args: {"other": _later(make)})
    op = next(op for op in ALL_OPS if op.name == "paged_attention")
    size = Size("2", lambda: (torch.ones(2),), lambda x: {"torch": lambda: x + x})
    found = OpsPeers().added_to(op, size).baselines(torch.ones(2))
    assert list(found) == ["torch", "other"] and not made
    with pytest.raises(RuntimeError, match="does not run on this device"):
        found["other"]()
    assert made and OpsPeers().added_to(next(op for op in ALL_OPS if op.name == "linear"), size) is size


def test_a_call_is_made_ready_once() -> None:
    made: list[int] = []

    def make() -> Any:
        made.append(1)
        return lambda: len(made)

    call = _later(make)
    assert (call(), call()) == (1, 1)


def test_absent_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_engine.benchmarks.ops_peers.find_spec", lambda name: None)
    assert [line.split()[0] for line in OpsPeers.find(None).missing()] == [
        "flash-attn",
        "FlashInfer",
        "Liger",
        "FlashAttention",
    ]


# ---- the program on a CPU


def test_operations_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        ["bench", "ops", "--device", "cpu", "--sizes", "tiny", "--rounds", "2", "--json", str(tmp_path / "r"), "--op",
         "rms_norm", "silu_mul"]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0, out
    assert "mean nothing for GPUs" in out
    rows = records(tmp_path / "r")
    assert {row["op"] for row in rows} == {"rms_norm", "silu_mul"}
    assert all(row["error"] is None and row["us"] > 0 and 0 < row["fraction"] for row in rows)
    assert all(row["torch"] == torch.__version__ and row["ceilings"]["bytes_per_s"] > 0 for row in rows)
    ours = [row for row in rows if not row["is_baseline"]]
    assert all(row["difference"] < 0.02 and row["speedup"] > 0 for row in ours)
    assert {row["size"] for row in ours} == {row["size"] for row in rows}
    assert "rms_norm: not triton: " in out
    assert [line.split()[0] for line in out.splitlines()[-len(rows) :]] == [row["op"] for row in rows]


def test_once_runs_the_smallest_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ops", "--device", "cpu", "--once", "--op", "silu_mul", "paged_attention"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()].count("ran") >= 4


def test_another_process_goes_on_where_the_device_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(timing, "is_usable", lambda device: False)
    monkeypatch.setattr(ops.subprocess, "run", lambda command: commands.append(command))
    assert main(["bench", "ops", "--device", "cpu", "--once", "--op", "silu_mul", "rms_norm"]) == 1
    assert commands[0][1:] == [
        "-m",
        "nemo_engine",
        "bench",
        "ops",
        "--rounds=20",
        "--device=cpu",
        "--once",
        "--op",
        "silu_mul",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--op", "softmax"], "--op must be among draft_, build_batch_, embed, rms_norm"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--device", "cuda"], "--device cuda needs an NVIDIA GPU"),
        (["--device", "cpu", "--fa3", "/none.so"], "runs on a GPU only"),
    ],
)
def test_bad_options(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "ops", *options]) == 2
    assert message in capsys.readouterr().err
