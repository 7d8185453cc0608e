"""The benchmark programs: they run on a CPU at tiny sizes, their arithmetic is right, and one failure does not stop the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemo_engine.benchmarks import gpu, structured
from nemo_engine.benchmarks.common import engine_config, peer_setups
from nemo_engine.benchmarks.latency import grid_of
from nemo_engine.cli import build_parser

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable


def run(program: str, *options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, str(ROOT / "benchmarks" / program), *map(str, options)],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- make gpu


def test_make_gpu_refuses_without_a_gpu_before_anything_else(tmp_path: Path) -> None:
    done = run("gpu.py", CUDA_VISIBLE_DEVICES="", OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("make gpu needs an NVIDIA GPU: torch ") and not done.stdout
    assert not (tmp_path / "out").exists()


def test_the_command_line_takes_every_command_of_make_gpu() -> None:
    stages = gpu.stages(Path("out.jsonl"))
    commands = [command for stage in stages for command in stage.commands if "bench" in command]
    kinds = {command[command.index("bench") + 1] for command in commands}
    assert kinds == {"ops", "latency", "startup", "throughput"} and len(commands) >= 15
    for command in commands:
        args = build_parser().parse_args(command[command.index("bench") :])
        if hasattr(args, "option"):
            engine_config(peer_setups(args)[0].options)
        if "latency" in command:
            assert grid_of(args)


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
