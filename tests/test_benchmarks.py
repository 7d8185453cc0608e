"""The benchmark programs: they run on a CPU at tiny sizes, their arithmetic is right, and one failure does not stop the rest."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from nemo_engine.benchmarks import bench_engine, gpu, structured, timing
from nemo_engine.ops import Op, Site
from nemo_engine.ops.op import Impl

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable


def run(program: str, *options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, str(ROOT / "benchmarks" / program), *map(str, options)],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- arithmetic


def test_rates_and_fractions_of_known_numbers() -> None:
    ceilings = timing.Ceilings(bytes_per_s=4e12, bf16_flops_per_s=8e14, fp8_flops_per_s=1.6e15)
    # 1 GB and few operations: 250 us at 4 TB/s, measured in 500.
    row = timing.Row.of("linear", "size", "name", False, 500.0, (10**9, 10**9), ceilings)
    assert (row.gb_per_s, row.tflop_per_s, row.fraction) == pytest.approx((2000.0, 2.0, 0.5))
    # 4e11 operations and few bytes: 500 us in bf16, 250 in FP8.
    for op, fraction in (("linear", 0.5), ("linear_fp8", 0.25)):
        row = timing.Row.of(op, "size", "name", False, 1000.0, (10**6, 4 * 10**11), ceilings)
        assert row.fraction == pytest.approx(fraction)
        assert row.tflop_per_s == pytest.approx(400.0)


def test_roofline_of_the_engine() -> None:

    ceilings = timing.Ceilings(bytes_per_s=1e12, bf16_flops_per_s=1e15, fp8_flops_per_s=1e15)
    footprint = bench_engine.Footprint(weight_bytes=24e9, kv_bytes_per_token=160e3, flops_per_token=22e9)
    assert footprint.decode_bytes(100, 1000) == pytest.approx(40e9)
    assert footprint.least_decode_seconds(100, 1000, ceilings) == pytest.approx(0.040)
    # 200 prompts of 500 tokens: 2.2 s. Then two waves of 1000 steps, each of 40 ms at the mean context of 1000.
    assert footprint.least_total_seconds(200, 100, 500, 1000, ceilings) == pytest.approx(2.2 + 80.0)


def test_the_footprint_of_nemo() -> None:
    """The published shape has 12.25 billion weights, of which 0.67 are the embeddings."""
    from nemo_engine.config import ModelConfig

    model = ModelConfig.from_hf(bench_engine.CONFIGS["nemo"])
    num_bytes = {"make dummy weights": 24_495_564_800, "allocate KV cache": 11 * 64 * model.kv_bytes_per_token(2)}
    engine: Any = SimpleNamespace(
        model_config=model,
        ledger=SimpleNamespace(rows=[SimpleNamespace(name=k, num_bytes=v) for k, v in num_bytes.items()]),
        stats=lambda: SimpleNamespace(num_pages=10),
        config=SimpleNamespace(page_size=64, dtype="bfloat16"),
    )
    footprint = bench_engine.Footprint.of(engine)
    assert footprint.weight_bytes == 24_495_564_800 - 2 * 131072 * 5120
    assert footprint.kv_bytes_per_token == 163840
    assert footprint.flops_per_token == pytest.approx(2 * (12_247_782_400 - 2 * 131072 * 5120), rel=1e-4)  # norms apart


def test_relative_difference() -> None:
    x = torch.tensor([[3.0, 4.0]])
    assert timing.relative_difference(x, x) == 0.0
    assert timing.relative_difference(torch.tensor([3.0, 4.5]), x) == pytest.approx(0.1)
    assert math.isnan(timing.relative_difference(torch.tensor([3.0, math.nan]), x))


# ---- one size


def impl(name: str) -> Impl:
    return Impl(name, f"tests.test_benchmarks:{name}", lambda site: None)


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
    site: Any = None
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


# ---- the programs on a CPU


def test_bench_ops_on_a_cpu(tmp_path: Path) -> None:
    done = run(
        "ops.py",
        "--device",
        "cpu",
        "--rounds",
        2,
        "--json",
        tmp_path / "r",
        "--op",
        "rms_norm",
        "paged_attention",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mean nothing for GPUs" in done.stdout
    rows = records(tmp_path / "r")
    assert {row["op"] for row in rows} == {"rms_norm", "paged_attention"}
    assert all(row["error"] is None and row["us"] > 0 and 0 < row["fraction"] for row in rows)
    assert all(row["torch"] == torch.__version__ and row["ceilings"]["bytes_per_s"] > 0 for row in rows)
    ours = [row for row in rows if not row["is_baseline"]]
    assert all(row["difference"] < 0.02 and row["speedup"] > 0 for row in ours)
    assert {row["size"] for row in ours} == {row["size"] for row in rows}
    assert "rms_norm: not triton: " in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[-len(rows) :]] == [row["op"] for row in rows]


def test_bench_ops_once_runs_the_smallest_cases(tmp_path: Path) -> None:
    done = run("ops.py", "--device", "cpu", "--once", "--op", "silu_mul", "paged_attention")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()].count("ran") >= 4


def test_bench_ops_needs_a_gpu_unless_told_otherwise() -> None:
    done = run("ops.py", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "needs an NVIDIA GPU" in done.stderr


def test_bench_engine_on_a_cpu(tmp_path: Path) -> None:
    done = run(
        "bench_engine.py", "--config", "tiny", "--device", "cpu", "--batches", 1, 3, "--context", 64, "--steps", 10,
        "--requests", 4, "--input-len", 30, "--output-len", 12, "--json", tmp_path / "r", "--option", "num_kv_pages=20",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    *decodes, total = records(tmp_path / "r")
    assert [(row["what"], row["batch"]) for row in decodes] == [("decode", 1), ("decode", 3)]
    for row in decodes:
        assert row["fraction"] == pytest.approx(row["roofline_ms"] / row["ms_per_step"])
        assert row["roofline_ms"] == pytest.approx(row["gb_per_step"] / row["copy_gb_per_s"] * 1e3)
        assert abs(row["context"] - 64) <= 3 and row["options"]["num_kv_pages"] == 20
    assert total["what"] == "throughput" and total["tokens_per_s"] == pytest.approx(4 * 12 / total["seconds"])


def test_bench_engine_reports_a_batch_that_does_not_fit_and_goes_on(tmp_path: Path) -> None:
    done = run(
        "bench_engine.py", "--config", "tiny", "--device", "cpu", "--batches", 8, 1, "--context", 64, "--steps", 4,
        "--requests", 0, "--json", tmp_path / "r", "--option", "num_kv_pages=4", "--option", "max_model_len=200",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    too_many, one = records(tmp_path / "r")
    assert "does not hold them" in too_many["error"] and one["ms_per_step"] > 0


# ---- make gpu


def test_make_gpu_refuses_without_a_gpu_before_anything_else(tmp_path: Path) -> None:
    done = run("gpu.py", CUDA_VISIBLE_DEVICES="", OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("make gpu needs an NVIDIA GPU: torch ") and not done.stdout
    assert not (tmp_path / "out").exists()


def test_stages_do_not_stop_each_other(tmp_path: Path) -> None:
    def stage(name: str, code: str, missing: str | None = None) -> Any:
        return gpu.Stage(name, (("no-such-program",), (PYTHON, "-c", code)), 60.0, {"MARK": "set"}, missing)

    logs = tmp_path / "logs"
    logs.mkdir()
    results = tmp_path / "results" / "r.jsonl"
    results.parent.mkdir()
    # The child of a stage that runs out of time must end too: it would hold the GPU.
    endless = ("sh", "-c", f"sleep 60 & echo $! > {tmp_path}/pid; wait")
    chosen = [
        stage("failing", "print('the reason'); raise SystemExit(3)"),
        gpu.Stage("endless", (endless,), 1.0, {}),
        stage("absent", "", "the tool is not found"),
        stage("good", "import os; print(os.environ['MARK'])"),
    ]
    outcomes = gpu.run_all(chosen, 5.0, logs, results, "a GPU")
    assert [outcome.status for outcome in outcomes] == [
        "failed (3)", "timed out", "skipped: the tool is not found", "passed",
    ]  # fmt: skip
    assert [outcome.is_bad for outcome in outcomes] == [True, True, False, False]
    child = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    assert (logs / "good.log").read_text().splitlines()[-1] == "set"
    assert "no-such-program is not found" in (logs / "good.log").read_text()
    assert [row["stage"] for row in records(logs / "r.jsonl")] == ["failing", "endless", "absent", "good"]
    assert records(results) == records(logs / "r.jsonl")


def test_a_spent_budget_skips_what_is_left(tmp_path: Path) -> None:
    stage = gpu.Stage("late", ((PYTHON, "-c", "raise SystemExit(1)"),), 600.0, {})
    outcome = gpu.run_stage(stage, 3.0, tmp_path)
    assert outcome.status == "skipped: the budget is spent" and not outcome.is_bad
    assert not list(tmp_path.iterdir())


def test_structured_outputs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, file = ROOT / "nemo_engine" / "assets" / "nemo-tiny" / "tekken.json", tmp_path / "out.jsonl"
    program = structured
    program.main(["--tokenizer", str(tokenizer), "--rounds", "1", "--rows", "2", "--json", str(file)])
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["form"] for record in records if "form" in record] == list(program.FORMS)
    assert all(record["mask_us"] > 0 for record in records if "form" in record) and records[-1]["rows"] == 2
    assert "vocabulary of 6144" in capsys.readouterr().out
