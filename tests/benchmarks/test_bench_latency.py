"""``bench latency``: its clock, its rooflines, its grid, peers beside it, profiles; and what does not fit does not stop
the rest.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_engine import Engine
from nemo_engine.benchmarks import common, latency, rooflines
from nemo_engine.benchmarks.driver import BatchTimes, DoesNotFit, Driver, summary
from nemo_engine.benchmarks.gpu_meter import EnergySpan, GpuMeter
from nemo_engine.benchmarks.models import SHAPES, config_json, open_model
from nemo_engine.benchmarks.peers import PeerError
from nemo_engine.benchmarks.stage_times import StageTimes
from nemo_engine.benchmarks.timing import Ceilings
from nemo_engine.cli import main
from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.planner.models import PlannedModel

CEILINGS = Ceilings(bytes_per_s=1e12, bf16_flops_per_s=1e15, fp8_flops_per_s=2e15)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def bench(path: Path, *options: object) -> tuple[int, list[dict[str, Any]]]:
    code = main(["bench", "latency", "tiny", "--json", str(path), "--option", "device=cpu", *map(str, options)])
    return code, records(path)


# ---- arithmetic


def test_times_of_a_batch() -> None:
    times = BatchTimes({"a": [1.0, 1.5, 2.5], "b": [2.0, 2.25, 3.0]})
    assert times.first == [1.0, 2.0] and times.last == [2.5, 3.0]
    assert times.gaps == [0.5, 1.0, 0.25, 0.75]
    assert times.per_token == [0.75, 0.5]
    assert BatchTimes({"a": [1.0]}).per_token == []


def test_summary_of_rounds() -> None:
    found = summary([[1.0, 2.0, 9.0], [4.0, 4.0, 4.0]])
    assert found["rounds"] == [2.0, 4.0] and (found["low"], found["high"]) == (2.0, 4.0)
    assert found["median"] == 4.0 and found["p99"] == pytest.approx(8.75)


def test_the_roofline_of_nemo() -> None:
    """The published shape has 12.25 billion weights, of which a step does not read the 0.67 of the embeddings."""
    model = PlannedModel("nemo", SHAPES["nemo"])
    roofline = rooflines.roofline_of(model, EngineConfig(), CEILINGS)
    weights = 2 * (12_247_782_400 - 131072 * 5120)
    assert rooflines.decode_bytes(roofline, 0, 0) == pytest.approx(weights, rel=1e-4)  # norms apart
    assert rooflines.decode_bytes(roofline, 4, 1000) - rooflines.decode_bytes(roofline, 0, 0) == 4000 * 163840
    assert rooflines.decode_seconds(roofline, 4, 1000) == pytest.approx((weights + 4000 * 163840) / 1e12, rel=1e-4)
    # A prompt of 8192 tokens is bound by arithmetic: layers' products, and half a square of attention. One row of the
    # head: by its bytes.
    layers = 2 * (12_247_782_400 - 2 * 131072 * 5120) * 8192
    attention = 4 * 4096 * 40 * 8192 * 8193 / 2
    head = 2 * 131072 * 5120
    least = (layers + attention) / 1e15 + head / 1e12
    assert rooflines.prefill_seconds(roofline, 1, 8192) == pytest.approx(least, rel=1e-4)
    fp8 = rooflines.roofline_of(model, EngineConfig(quantization="fp8", kv_cache_dtype="fp8"), CEILINGS)
    assert fp8.kv_bytes_per_token == 81920 and fp8.linear_bytes * 2 == roofline.linear_bytes
    assert fp8.linear_flops_per_s == 2e15


def test_a_shape_is_a_configuration_that_reads_back() -> None:
    for name, shape in SHAPES.items():
        assert ModelConfig.from_hf(config_json(shape)) == shape, name


def test_energy_is_told_where_it_can_be_read() -> None:
    class Nvml(SimpleNamespace):
        def nvmlDeviceGetTemperature(self, *_: Any) -> int:
            raise RuntimeError("not supported")

    counter = iter([5_000, 9_000])
    nvml = Nvml(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=lambda index: index, NVML_CLOCK_SM=0, NVML_CLOCK_MEM=1,
        NVML_TEMPERATURE_GPU=0, nvmlDeviceGetClockInfo=lambda _, kind: (1500, 3200)[kind],
        nvmlDeviceGetPowerUsage=lambda _: 640_000, nvmlDeviceGetTotalEnergyConsumption=lambda _: next(counter),
    )  # fmt: skip
    with EnergySpan(GpuMeter(nvml)) as span:
        pass
    assert span.facts(8) == {
        "gpu_state": {"sm_mhz": 1500.0, "memory_mhz": 3200.0, "watts": 640.0}, "joules": 4.0, "joules_per_token": 0.5,
    }  # fmt: skip
    with EnergySpan(GpuMeter(SimpleNamespace())) as without:
        pass
    assert without.facts(8) == {}


def test_a_stage_is_charged_with_its_own_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 4.0, 4.5, 5.0, 10.0])  # outer begins, inner runs from 1 to 4 and from 4.5 to 5, outer ends
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    stages = StageTimes()
    inner = stages.wrap("inner", lambda label: None, lambda args: f"inner {args[0]}")

    def work() -> None:
        inner("a")
        inner("b")

    stages.wrap("outer", work)()
    assert stages.seconds == {"outer": 6.5, "inner a": 3.0, "inner b": 0.5}
    rows = stages.rows(2, 20.0)
    assert [row["stage"] for row in rows] == ["not in a timer", "outer", "inner a", "inner b"]
    assert rows[1]["us_per_step"] == pytest.approx(3.25e6) and rows[1]["share"] == pytest.approx(0.325)
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)


# ---- the program


def test_requests_and_decode_steps_of_a_grid(tmp_path: Path) -> None:
    code, rows = bench(
        tmp_path / "r", "--batch", 1, 3, "--input", 20, "--output", 6, "--context", 64, "--steps", 8, "--rounds", 2,
        "--profile",
    )  # fmt: skip
    assert code == 0
    assert [(row["what"], row["batch"]) for row in rows] == [
        ("request", 1),
        ("request", 3),
        ("decode", 1),
        ("decode", 3),
    ]
    for row in rows:
        assert row["status"] == "ok" and row["engine"] == "nemo_engine" and row["model"] == "tiny"
        assert row["ceilings"]["bytes_per_s"] > 0 and row["options"]["load_format"] == "dummy"
        stages = {stage["stage"] for stage in row["profile"]}
        assert {"paged_attention", "schedule", "commit"} <= stages and any("linear (qkv)" in stage for stage in stages)
        assert sum(stage["share"] for stage in row["profile"]) == pytest.approx(1.0)
        calls = {stage["stage"]: stage["calls_per_step"] for stage in row["profile"]}
        assert calls["paged_attention"] == 2  # two layers
        assert calls.get("linear (lm_head)", calls.get("norm_linear (lm_head)")) == 1
    for row in rows[:2]:
        assert len(row["e2e_s"]["rounds"]) == 2
        assert 0 < row["ttft_s"]["median"] < row["e2e_s"]["median"]
        rates = [row["batch"] * 6 / end for end in row["e2e_s"]["rounds"]]
        assert row["tokens_per_s"]["rounds"] == pytest.approx(rates, rel=1e-4)
        assert row["fraction"] == pytest.approx(row["decode_roofline_s"] / row["itl_s"]["median"])
        assert row["prefill_fraction"] > 0
    for row in rows[2:]:
        assert row["fraction"] == pytest.approx(row["roofline_ms"] / row["ms_per_step"])
        assert row["context"] == 64 and abs(row["mean_context"] - 64) <= 3
        assert row["tokens_per_s"] == pytest.approx(row["batch"] * 1e3 / row["ms_per_step"], rel=0.9)


def test_what_does_not_fit_is_reported_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = bench(
        tmp_path / "r", "--batch", 8, 1, "--input", 50, 150, "--output", 20, "--context", 64, 4000, "--steps", 4,
        "--rounds", 1, "--option", "num_kv_pages=4", "--option", "max_model_len=160",
    )  # fmt: skip
    assert code == 1
    by_point = {(row["batch"], row.get("input", 0), row.get("context", 0)): row for row in rows}
    assert "8 requests of 70 tokens: they need 16 pages of 64, it has 4" in by_point[8, 50, 0]["error"]
    assert "150 tokens and 20 more do not fit into the context" in by_point[1, 150, 0]["error"]
    assert "max_model_len is 160" in by_point[1, 0, 4000]["error"]
    assert {point for point, row in by_point.items() if row["status"] == "ok"} == {(1, 50, 0), (1, 0, 64)}
    assert "failed: the KV cache does not hold 8 requests" in capsys.readouterr().out


def test_a_preempted_batch_is_no_latency() -> None:
    model = open_model("tiny")
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "device": "cpu", "num_kv_pages": 2}
    with Engine(model.path, **options) as engine:
        driver = Driver(engine)
        with pytest.raises(DoesNotFit, match="some were preempted"):
            driver.run(driver.prompts(2, 60), 10)
        assert not engine.has_unfinished_requests()
        assert driver.decode(1, 60, 4).batch == 1


def test_peers_take_turns_and_a_wrong_one_has_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns: list[tuple[str, int]] = []

    class Peer:
        def __init__(self, name: str, model: str, options: dict[str, Any], python: str, log: Path | None) -> None:
            if name == "sglang":
                raise PeerError("no kernel image")
            self.name = name
            self.versions = {name: "1"}

        def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> tuple[float, list[list[int]]]:
            turns.append((self.name, max_tokens[0]))
            too_few = self.name == "transformers" and max_tokens[0] > 1
            return 1000.0 * max_tokens[0], [[1] * (count - too_few) for count in max_tokens]

        def close(self) -> None:
            turns.append((self.name, 0))

    monkeypatch.setattr(latency, "PeerProcess", Peer)
    monkeypatch.setattr(latency, "why_missing", lambda name, python: "gone" if name == "llama.cpp" else None)
    code, rows = bench(
        tmp_path / "r", "--batch", 2, "--input", 8, "--output", 4, "--rounds", 2,
        "--peers", "vllm", "sglang", "transformers", "llama.cpp",
    )  # fmt: skip
    assert code == 1
    by_engine = {row["engine"]: row for row in rows}
    assert by_engine["sglang"]["status"] == "failed" and by_engine["sglang"]["error"] == "no kernel image"
    assert by_engine["llama.cpp"]["status"] == "missing"
    assert (
        by_engine["transformers"]["status"] == "failed"
        and "4 new tokens were asked for" in by_engine["transformers"]["error"]
    )
    vllm = by_engine["vllm"]
    assert vllm["ttft_s"]["median"] == 1000.0 and vllm["e2e_s"]["rounds"] == [4000.0, 4000.0]
    assert vllm["tpot_s"]["median"] == 1000.0
    assert vllm["versions"] == {"vllm": "1"}
    calls = next(row for row in rows if row["engine"] == "nemo_engine")["calls"]
    assert calls["ttft_s"]["median"] > 0 and calls["e2e_s"]["median"] > 0 and len(calls["e2e_s"]["rounds"]) == 2
    faster = vllm["nemo_engine_e2e_faster_by"]
    assert 1 < faster["interval"][0] <= faster["median"] <= faster["interval"][1]
    assert turns.count(("vllm", 1)) == turns.count(("vllm", 4)) == 3  # the first round warms up
    assert by_engine["vllm"]["options"] == {"load_format": "dummy"}
    assert "e2e: nemo_engine" in capsys.readouterr().out


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--context", "64", "-1"], "--context must be at least 1, got -1"),
        (["--warmup", "-1"], "--warmup must be at least 0, got -1"),
        (["--context", "64", "--peers", "vllm"], "--peers compares whole requests"),
        (["--option", "max_num_seqs"], "--option must be ENGINE.NAME=JSON, or NAME=JSON"),
        (["--option", "page_size=48"], "page_size must be a power of two"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "latency", "tiny", *options]) == 2
    assert message in capsys.readouterr().err


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "latency", "nowhere"]) == 2
    assert "model must be nemo-tiny, a directory with a config.json, or a shape" in capsys.readouterr().err


def test_a_plain_option_is_ours() -> None:
    args = argparse.Namespace(
        model="nemo", peers=["vllm"], option=["max_num_seqs=8", "vllm.enforce_eager=true", "nemo_engine.dtype=float32"]
    )
    common.peer_setups(args)
    assert args.options == {
        "nemo_engine": {"max_num_seqs": 8, "dtype": "float32", "load_format": "dummy"},
        "vllm": {"enforce_eager": True, "load_format": "dummy"},
    }
