"""The scripts that measure the simulator run, and write what they say they do. How good the numbers are is not for a shared machine to tell."""

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


def test_speed_runs(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    simulator.main(["--concurrency", "2", "--requests", "6", "--json", str(out)])
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 3 and all(record["steps"] > 100 and record["steps_per_s"] > 0 for record in records)
