"""The scripts that measure the simulator run, and write what they say they do.

How good the numbers are is not for a shared machine to tell.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_engine.benchmarks import simulator, validate_simulator
from nemo_engine.simulator import CostModel, Measurement


def test_validation_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps, model, out = tmp_path / "steps.jsonl", tmp_path / "model.json", tmp_path / "out.jsonl"
    argv = ["--batches", "1", "3", "--inputs", "16", "40", "--joining", "3", "--requests", "5", "--repeats", "1"]
    code = validate_simulator.main([*argv, "--save-steps", str(steps), "--save-model", str(model), "--json", str(out)])
    (record,) = map(json.loads, out.read_text().splitlines())
    assert code == int(not record["is_within_limits"])
    assert {"commit", "cpu", "command", "torch", "fit", "engine"} <= set(record)
    for workload in record["workloads"]:
        assert workload["measured"]["tokens_per_s"] > 0 < workload["predicted"]["tokens_per_s"]
        assert workload["runs"][0]["tokens"] > 5
        assert workload["throughput_error"] == pytest.approx(
            workload["predicted"]["tokens_per_s"] / workload["measured"]["tokens_per_s"] - 1
        )
    found = [Measurement(*json.loads(line)) for line in steps.read_text().splitlines()]
    assert CostModel.load(model).facts["num_measurements"] == len(found)
    # What the recorder saw: a step computes what was planned, prompts whole.
    assert (
        sum(step.prefill_tokens for step in found) > 3 * 4 * (16 + 40) and max(step.num_decodes for step in found) >= 3
    )
    assert all(step.sum_context >= step.num_decodes for step in found)
    assert "predicted" in capsys.readouterr().out


def test_the_stored_model_is_that_of_the_stored_steps() -> None:
    results = Path(__file__).parents[2] / "benchmarks/results"
    stored = sorted(results.glob("cost-model-*.json"))
    assert stored
    for path in stored:
        steps = path.with_name(path.name.replace("cost-model-", "steps-")).with_suffix(".ndjson")
        found = CostModel.load(path)
        again = CostModel.fit([Measurement(*json.loads(line)) for line in steps.read_text().splitlines()], found.facts)
        for name in ("context_seconds", "prefill_row_seconds", "prefill_pair_seconds"):
            assert getattr(again, name) == pytest.approx(getattr(found, name), rel=1e-6), name
        for name in ("decode", "prefill"):
            for point, stored_point in zip(getattr(again, name), getattr(found, name), strict=True):
                assert point == pytest.approx(stored_point, rel=1e-6)


def test_speed_runs(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    simulator.main(["--concurrency", "1", "2", "--requests", "6", "--repeats", "2", "--json", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 6
    for alone, pair in zip(records[::2], records[1::2]):
        low, high = map(int, alone["workload"].rsplit(":", 2)[1:])
        assert 6 * low <= alone["steps"] <= 6 * (high + 1) and alone["steps"] / 3 < pair["steps"] < alone["steps"]
        for record in (alone, pair):
            assert record["steps_per_s"] == pytest.approx(record["steps"] / record["cpu_s"])
            assert 6 * low <= record["tokens_per_s"] * record["cpu_s"] <= 6 * high
            assert len(record["cpu_s_of_runs"]) == 2
