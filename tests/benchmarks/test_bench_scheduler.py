"""``bench scheduler``: it counts steps in which all decode, vLLM's scheduler takes turns with ours, and its profile
sums up.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_engine.benchmarks import scheduler
from nemo_engine.benchmarks.peers import PeerError, WorkerProcess
from nemo_engine.benchmarks.scheduler import DecodeLoop, longest_output, timed_scheduler
from nemo_engine.benchmarks.stage_times import StageTimes
from nemo_engine.cli import main
from nemo_engine.scheduler import Scheduler
from tests.scheduler.invariants import check


def bench(path: Path, *options: object) -> tuple[int, list[dict[str, Any]]]:
    code = main(["bench", "scheduler", "--json", str(path), *map(str, options)])
    return code, [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("num_seqs", "prompt_len"), [(1, 1), (3, 100), (64, 1024), (700, 200)])
def test_no_request_ends_before_the_last_step(num_seqs: int, prompt_len: int) -> None:
    loop = DecodeLoop(num_seqs, prompt_len, 16, 20)
    assert len(loop.steps(12)) == 12 and len(loop.steps(8)) == 8
    stats = loop.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.total_preemptions) == (num_seqs, 0, 0)
    check(loop.scheduler)
    assert longest_output(num_seqs, prompt_len, 20) >= 20


def test_a_record_for_each_page_size_with_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = bench(
        tmp_path / "r",
        "--num-seqs",
        2,
        256,
        "--page-sizes",
        64,
        16,
        "--prompt-len",
        60,
        "--steps",
        10,
        "--rounds",
        2,
        "--profile",
    )
    assert code == 0
    assert [(row["num_seqs"], row["page_size"]) for row in rows] == [(2, 64), (2, 16), (256, 64), (256, 16)]
    for row in rows:
        assert row["engine"] == "nemo_engine" and row["status"] == "ok" and len(row["round_medians_us"]) == 2
        assert 0 < row["median_us"] <= row["p90_us"] <= row["p99_us"]
        assert sum(stage["share"] for stage in row["profile"]) == pytest.approx(1.0)
        calls = {stage["stage"]: stage["calls_per_step"] for stage in row["profile"]}
        assert calls["Scheduler.schedule"] == calls["Scheduler.commit"] == 1
    assert rows[2]["goal_us"] == 150.0 and "goal_us" not in rows[0]
    assert "Scheduler.commit" in capsys.readouterr().out


def test_timers_are_taken_off_again() -> None:
    before = dict(vars(Scheduler))
    with pytest.raises(KeyError), timed_scheduler(StageTimes()):
        assert vars(Scheduler)["commit"] is not before["commit"]
        raise KeyError
    assert dict(vars(Scheduler)) == before


# A stand-in for vLLM's process: 1,000 us to plan and 500 to take in, and broken from 64 requests on.
ADAPTER = """
import json, sys
for line in sys.stdin:
    task = json.loads(line)
    if task["do"] == "setup":
        ok = task["num_seqs"] < 64
        assert task["max_tokens"] > task["prompt_len"] and task["block_size"] == 16
        print(json.dumps({"ok": True, "versions": {"vllm": "9"}} if ok else {"ok": False, "error": "too many"}), flush=True)
    else:
        n = task["count"]
        print(json.dumps({"ok": True, "schedule_us": [1000.0] * n, "update_us": [500.0] * n}), flush=True)
"""


def test_vllm_takes_turns_and_its_failure_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter.py").write_text(ADAPTER)
    monkeypatch.setattr(scheduler, "_ADAPTER", tmp_path / "adapter.py")
    monkeypatch.setattr(scheduler, "why_missing", lambda name, python: None)
    code, rows = bench(
        tmp_path / "r", "--num-seqs", 2, 64, "--page-sizes", 64, "--prompt-len", 8, "--steps", 10, "--rounds", 3,
        "--vllm", sys.executable,
    )  # fmt: skip
    assert code == 1
    ours, theirs, ours_too, broken = rows
    assert theirs["engine"] == "vllm" and theirs["versions"] == {"vllm": "9"} and theirs["page_size"] == 16
    assert theirs["median_us"] == 1500.0 and (theirs["schedule_us"], theirs["update_us"]) == (1000.0, 500.0)
    (faster,) = theirs["nemo_engine_faster_by"]
    assert faster["page_size"] == 64 and faster["median"] == pytest.approx(1500 / sorted(ours["round_medians_us"])[1])
    assert ours_too["status"] == "ok" and broken["status"] == "failed" and broken["error"] == "too many"
    assert "x as fast" in capsys.readouterr().out


def test_a_process_that_ends_is_an_error(tmp_path: Path) -> None:
    program = tmp_path / "adapter.py"
    program.write_text("raise SystemExit(7)")
    vllm = WorkerProcess("vllm", sys.executable, str(program))
    with pytest.raises(PeerError, match="ended with status 7"):
        vllm.ask(do="steps", count=1)
    vllm.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-seqs", "0"], "--num-seqs must be at least 1, got 0"),
        (["--vllm-block", "-16"], "--vllm-block must be at least 1, got -16"),
        (["--vllm", "/nowhere/python"], "--vllm '/nowhere/python': /nowhere/python cannot be run"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scheduler", *options]) == 2
    assert message in capsys.readouterr().err
