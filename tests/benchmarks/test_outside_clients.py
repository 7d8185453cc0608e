"""Results of other load generators become lines of results, or are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_engine.benchmarks import outside_clients

LEVELS = ("p50", "p90", "p95", "p99")


def of_vllm() -> dict[str, object]:
    times = {
        f"{level}_{name}_ms": 10.0 * i for i, name in enumerate(("ttft", "itl", "tpot", "e2el"), 1) for level in LEVELS
    }
    return {
        "max_concurrency": 4, "completed": 15, "failed": 1, "total_input_tokens": 2000, "total_output_tokens": 900,
        "output_throughput": 450.0, **times,
    }  # fmt: skip


def of_guidellm() -> dict[str, object]:
    def good(**values: object) -> dict[str, object]:
        return {"successful": values}

    names = ("time_to_first_token_ms", "inter_token_latency_ms", "time_per_output_token_ms", "request_latency")
    metrics = {name: good(percentiles=dict.fromkeys(LEVELS, 10.0 * i)) for i, name in enumerate(names, 1)}
    metrics |= {
        "request_totals": {"successful": 15, "errored": 1}, "request_concurrency": good(max=4.0),
        "prompt_token_count": good(total_sum=2000), "output_token_count": good(total_sum=900),
    }  # fmt: skip
    return {"benchmarks": [{"metrics": metrics, "duration": 2.0}]}


@pytest.mark.parametrize(
    ("tool", "made", "e2e"), [("vllm bench serve", of_vllm, 0.04), ("guidellm", of_guidellm, 40.0)]
)
def test_a_result_becomes_a_line(tool: str, made: Callable[[], dict[str, object]], e2e: float, tmp_path: Path) -> None:
    source, out = tmp_path / "in.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps(made()))
    assert outside_clients.main(["--server", "ours", str(source), "--json", str(out)]) == 0
    (line,) = map(json.loads, out.read_text().splitlines())
    assert (line["tool"], line["server"], line["server_version"], line["concurrency"]) == (tool, "ours", None, 4)
    assert (line["requests"], line["failed"], line["output_tokens_per_second"]) == ([15], [1], [450.0])
    assert line["ttft_s"]["p99"] == pytest.approx([0.01]) and line["tpot_s"]["p50"] == pytest.approx([0.03])
    assert line["e2e_s"]["p95"] == pytest.approx([e2e]) and {"commit", "cpu", "command"} <= set(line)


def test_runs_of_two_servers_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def written(name: str, at_once: int, rate: float, failed: int) -> str:
        changed = {"max_concurrency": at_once, "output_throughput": rate, "failed": failed}
        (tmp_path / name).write_text(json.dumps(of_vllm() | changed))
        return str(tmp_path / name)

    ours = [
        written(f"ours{i}", *run) for i, run in enumerate([(4, 400.0, 0), (8, 900.0, 0), (4, 500.0, 0), (9, 90.0, 1)])
    ]
    theirs = [
        written(f"theirs{i}", *run) for i, run in enumerate([(4, 200.0, 0), (8, 300.0, 2), (4, 250.0, 0), (9, 30.0, 0)])
    ]
    out = tmp_path / "out.jsonl"
    assert outside_clients.main(["--server", "ours", *ours, "--server", "vllm==0.26", *theirs, "--json", str(out)]) == 0
    lines = {(line["server"], line["concurrency"]): line for line in map(json.loads, out.read_text().splitlines())}
    assert lines["ours", 4]["output_tokens_per_second"] == [400.0, 500.0]
    assert lines["vllm", 4]["server_version"] == "0.26" and lines["vllm", 8]["failed"] == [2]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| vllm bench serve")]
    assert [row.count("x (") for row in rows] == [0, 1, 0, 0, 0, 0] and "2.00x (2.00 to 2.00)" in rows[
        1
    ]  # none where requests failed
    assert "| 450 (400 to 500) |" in rows[0] and "4 at a time, 133 in, 60 out" in rows[0] and "vllm 0.26" in rows[1]


def test_a_server_without_files_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert outside_clients.main(["--server", "ours"]) == 2
    assert "--server ours: no file follows it" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["nothing", "{}", '{"benchmarks": [{}]}', "[1]"])
def test_anything_else_is_refused_and_nothing_is_written(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, out = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "out.jsonl"
    good.write_text(json.dumps(of_vllm()))
    bad.write_text(text)
    assert outside_clients.main(["--server", "ours", str(good), str(bad), "--json", str(out)]) == 2
    assert f"{bad}: is no result of vllm bench serve or guidellm" in capsys.readouterr().err
    assert not out.exists()
