"""Results of other load generators become lines of results, or are refused by name."""

from __future__ import annotations

import json
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
def test_a_result_becomes_a_line(tool: str, made: object, e2e: float, tmp_path: Path) -> None:
    source, out = tmp_path / "in.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps(made()))  # type: ignore[operator]
    assert outside_clients.main(["--server", "ours", "--json", str(out), str(source)]) == 0
    (line,) = map(json.loads, out.read_text().splitlines())
    assert (line["tool"], line["server"], line["concurrency"]) == (tool, "ours", 4)
    assert (line["requests"], line["failed"], line["output_tokens_per_second"]) == (15, 1, 450.0)
    assert line["ttft_s"]["p99"] == pytest.approx(0.01) and line["tpot_s"]["p50"] == pytest.approx(0.03)
    assert line["e2e_s"]["p95"] == pytest.approx(e2e) and {"commit", "cpu", "command"} <= set(line)


@pytest.mark.parametrize("text", ["nothing", "{}", '{"benchmarks": [{}]}', "[1]"])
def test_anything_else_is_refused_and_nothing_is_written(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, out = tmp_path / "good.json", tmp_path / "bad.json", tmp_path / "out.jsonl"
    good.write_text(json.dumps(of_vllm()))
    bad.write_text(text)
    assert outside_clients.main(["--server", "ours", "--json", str(out), str(good), str(bad)]) == 2
    assert f"{bad}: is no result of vllm bench serve or guidellm" in capsys.readouterr().err
    assert not out.exists()
