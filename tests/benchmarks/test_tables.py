"""What the tables of known results say, and what stands in one ratio."""

from __future__ import annotations

import pytest

from nemo_engine.benchmarks.report.command import TABLES, groups_of, report
from nemo_engine.benchmarks.report.results import Record
from nemo_engine.benchmarks.report.tables import Table, anything, workload_name
from tests.helpers.bench_lines import PLACE, decode, op, scheduler_run, serve, start, step_cost, throughput


def tables_of(benchmark: str, records: list[Record]) -> list[Table]:
    """As the report makes them."""
    return TABLES.get(benchmark, anything)(records)


def test_throughput_of_known_numbers() -> None:
    known = [
        throughput("transformers", [2.0, 4.0, 4.0], versions={"torch": "2", "transformers": "5.17"}),
        throughput("nemo_engine", [10.0, 10.0, 20.0], versions={"nemo_engine": "0.1"}),
    ]
    side_by_side, spreads = tables_of("throughput", known)
    assert side_by_side.columns == ("workload", "nemo_engine", "transformers 5.17")
    assert side_by_side.rows == (("16 requests, 16 to 256 in, 128 out", "10", "4 (5.0x: 2.5 to 5.0)"),)
    assert [row[2:4] for row in spreads.rows] == [("10 (10 to 20)", "–"), ("4 (2 to 4)", "5.0x (2.5 to 5.0)")]


def test_a_failed_baseline_is_failed_and_a_missing_one_missing() -> None:
    known = [
        throughput("nemo_engine", [10.0]),
        throughput("vllm"),
        throughput("sglang", status="missing", error="sglang is not installed"),
    ]
    table, spreads = tables_of("throughput", known)
    assert table.rows == (("16 requests, 16 to 256 in, 128 out", "10", "failed", "missing"),)
    shown = table.markdown()
    assert "vllm failed: it \\| died at once (16 requests, 16 to 256 in, 128 out)" in shown
    assert "sglang missing: sglang is not installed" in shown
    assert [row[2] for row in spreads.rows] == ["10", "failed", "missing"]


def test_without_ours_there_is_no_ratio() -> None:
    table, _ = tables_of("throughput", [throughput("nemo_engine"), throughput("vllm", [5.0])])
    assert table.rows[0][1:] == ("failed", "5")


def test_results_of_two_commits_or_two_runs_share_no_row() -> None:
    ours = throughput("nemo_engine", [10.0])
    other_commit, other_run = (
        throughput("vllm", [5.0], **{k: v}) for k, v in (("commit", "def"), ("date", "2026-11-26"))
    )
    assert "2.00x (2.00 to 2.00)" in report([ours, throughput("vllm", [5.0])])
    for other in (other_commit, other_run, throughput("vllm", [5.0], cpu="Another CPU")):
        assert "2.00x" not in report([ours, other])
    assert [group.commit for group in groups_of([ours, other_commit])] == ["abc1234", "def"]
    assert len(groups_of([ours, other_run])) == 1
    assert tables_of("throughput", [ours, other_run])[0].rows[0][1:] == ("10", "not measured")


def test_servers_of_known_numbers() -> None:
    known = [serve("ours", 16, [30.0, 40.0]), serve("theirs", 16, [10.0, 20.0])]
    known.append(
        serve("theirs", 32, [10.0], errors=2, first_errors=["HttpError: 500"], slo={"ttft_s": 0.5, "itl_s": None})
    )
    (table,) = tables_of("serve", known)
    head, latencies = ("8 requests, 64 in, 32 out", "16 at a time"), ("160 / 50",) * 3
    assert table.rows[0] == (*head, "ours", "35 (30 to 40)", "–", *latencies, "–", "0")
    assert table.rows[1] == (*head, "theirs", "15 (10 to 20)", "2.50x (2.00 to 3.00)", *latencies, "–", "0")
    assert table.rows[2][-2:] == ("1 within TTFT 500 ms", "2")
    assert table.notes == ("theirs (32 at a time): 2 failed, first: HttpError: 500",)


def test_a_server_that_failed_requests_is_in_no_ratio() -> None:
    (table,) = tables_of("serve", [serve("ours", 1, [30.0]), serve("theirs", 1, [10.0], errors=1)])
    assert table.rows[1][4] == "–"


def test_predictions_of_known_numbers() -> None:
    work = {
        "workload": "all at once", "requests": 150, "measured": {"tokens_per_s": 1000.0, "median_ttft_s": 0.2},
        "predicted": {"tokens_per_s": 900.0, "median_ttft_s": 0.25}, "throughput_error": -0.1, "ttft_error": 0.25,
    }  # fmt: skip
    record = {
        "benchmark": "validate_simulator", "model": "nemo-tiny", "is_within_limits": False, "workloads": [work],
        "most_throughput_error": 0.15, "most_ttft_error": 0.25, **PLACE,
    }  # fmt: skip
    (table,) = tables_of("validate_simulator", [record])
    assert table.rows == (("150 requests, all at once", "1000", "900", "-10.0%", "200", "250", "+25.0%"),)
    assert "NOT within the limits" in table.notes[0]


def test_latencies_of_known_numbers() -> None:
    def summary(median: float) -> dict[str, float]:
        return {"median": median, "low": median / 2, "high": median * 2, "p90": 9.0, "p99": 9.0}

    point = {
        "benchmark": "latency",
        "what": "request",
        "batch": 8,
        "input": 16,
        "output": 32,
        "model": "m",
        "options": {},
        **PLACE,
    }
    times = {name: summary(0.01) for name in ("ttft_s", "tpot_s", "e2e_s")} | {
        "tokens_per_s": summary(100.0),
        "status": "ok",
    }
    ours = {
        **point,
        **times,
        "engine": "nemo_engine",
        "itl_s": summary(0.002),
        "prefill_fraction": 0.5,
        "joules_per_token": 1.5,
        "fraction": 0.25,
    }
    faster = {"median": 2.0, "interval": [1.0, 3.0]}
    peer = {**point, **times, "engine": "vllm", "nemo_engine_e2e_faster_by": faster}
    failed = {**point, "engine": "sglang", "status": "failed", "error": "no memory"}
    start = {**point, "what": "start", "engine": "llama.cpp", "status": "missing", "error": "not there"}
    rows = [{"stage": "linear", "us_per_step": 60.0, "share": 0.6, "calls_per_step": 4.0}]
    profiled = {**decode(1, 1024), "profile": rows, "profiled_us_per_step": 100.0, "unprofiled_us_per_step": 90.0}
    requests, steps, profile = tables_of(
        "latency", [ours, peer, failed, start, profiled, decode(64, 1024), decode(64, 4096)]
    )
    head, ms = ("m", "8", "16", "32"), "10 (5 to 20)"
    assert requests.rows == (
        (*head, "nemo_engine", ms, "2 (1 to 4)", ms, ms, "100 (50 to 200)", "50%, 25%", "–", "1.5"),
        (*head, "vllm", ms, "–", ms, ms, "100 (50 to 200)", "–", "–, 2.00x", "–"),
        (*head, "sglang", "failed", *["–"] * 7),
    )
    assert requests.notes == ("llama.cpp missing: not there", "sglang failed, 8 requests: no memory")
    assert "nemo (kv_cache_dtype fp8)" in steps.title
    assert steps.rows == (("1024", "6.01 (80%)", "6.66 (80%)"), ("4096", "–", "8.62 (80%)"))
    assert (
        profile.rows == (("linear", "60", "60.0%", "4"),)
        and "100 us with the timers, 90 us without" in profile.notes[0]
    )


def test_scheduler_costs_of_known_numbers() -> None:
    side_by_side, spreads = tables_of("scheduler", scheduler_run())
    assert side_by_side.columns[1:] == (
        "nemo_engine, pages of 64",
        "nemo_engine, pages of 16",
        "vllm 0.32, pages of 16",
    )
    assert side_by_side.rows == (
        ("8", "5 (20.0x: 20.0 to 25.0)", "10 (10.0x: 10.0 to 12.0)", "100"),
        ("64", "50", "not measured", "failed"),
    )
    assert side_by_side.notes == ("vllm failed, 64 requests: it died",)
    assert spreads.rows[1] == ("8", "nemo_engine, pages of 64", "5 (4 to 6)", "90", "99", "0.625")
    assert "vLLM" not in tables_of("scheduler", [step_cost("nemo_engine", 8, 64, [5.0])])[0].title


def test_starts_of_known_numbers() -> None:
    missing = {**start("sglang", "warm", [1.0]), "status": "missing", "error": "not there"}
    del missing["stages"], missing["total_s"], missing["checkpoint_in_page_cache"]
    known = [
        start("nemo_engine", "warm", [1.0, 2.0]),
        start("nemo_engine", "cold", [3.0]),
        start("vllm", "warm", [4.0, 4.0]),
        missing,
    ]
    table, stages = tables_of("startup", known)
    longest = "import torch 0.8, load weights 0.1, look up 0.001"
    assert table.rows == (
        ("nemo-tiny", "nemo_engine", "warm", "100%", "1.5 (1 to 2)", "–", longest),
        ("nemo-tiny", "nemo_engine", "cold", "0%", "3", "–", longest),
        ("nemo-tiny", "vllm", "warm", "100%", "4 (4 to 4)", "3.0x (2.0 to 4.0)", longest),
        ("nemo-tiny", "sglang", "warm", "–", "missing", "–", "–"),
    )
    assert table.notes == ("sglang missing: not there (warm)",)
    assert stages.rows == (("import torch", *["0.8"] * 3), ("load weights", *["0.1"] * 3), ("look up", *["0.001"] * 3))


def test_operations_of_known_numbers() -> None:
    nothing = dict.fromkeys(("us", "gb_per_s", "tflop_per_s", "fraction", "speedup"))
    broken = op("linear", "torch", is_baseline=True, error="RuntimeError: no kernel", **nothing)
    first, second = tables_of("ops", [op("linear", "triton"), broken, op("norm", "cuda")])
    assert (first.title, second.title) == ("Operation linear", "Operation norm")
    assert first.rows == (
        ("8 rows", "triton", "2", "1000", "2", "50%", "1.50x", ""),
        ("8 rows", "torch *", "–", "–", "–", "–", "–", "failed: RuntimeError: no kernel"),
    )


def test_gains_of_drafts_of_known_numbers() -> None:
    rates = {"nemo_engine": [10.0, 20.0, 10.0], "nemo_engine drafting": [30.0, 40.0, 20.0]}
    ours: Record = {
        **PLACE, "benchmark": "speculation", "file": "f", "line": 1, "model": "nemo-tiny", "text": "edit", "streams": 8,
        "tokens_per_step": 2.5, "tokens_per_second": rates, "versions": {"nemo_engine": {}},
    }  # fmt: skip
    both = {
        **ours, "text": "chat", "versions": {"nemo_engine": {}, "vllm": {}},
        "tokens_per_second": rates | {"vllm": [4.0, 4.0, 4.0], "vllm drafting": [2.0, 2.0, 2.0]},
    }  # fmt: skip
    (table,) = tables_of("speculation", [ours, both])
    assert table.columns[3:] == (
        "nemo_engine, without", "nemo_engine, with drafts", "vllm, without", "vllm, with drafts"
    )  # fmt: skip
    assert table.rows == (
        ("edit", "8", "2.5", "10", "30 (2.00x: 2.00 to 3.00)", "not measured", "not measured"),
        ("chat", "8", "2.5", "10", "30 (2.00x: 2.00 to 3.00)", "4", "2 (0.50x: 0.50 to 0.50)"),
    )


def test_rows_of_several_models_say_whose_they_are() -> None:
    known = [throughput("nemo_engine", [2.0]), {**throughput("nemo_engine", [4.0]), "model": "/models/large"}]
    rows = tables_of("throughput", known)[0].rows
    assert [row[0].partition(":")[0] for row in rows] == [str(known[0]["model"]), "large"]


def test_a_benchmark_without_a_table_of_its_own_shows_its_numbers() -> None:
    (table,) = tables_of(
        "new", [{"benchmark": "new", "a": 1.5, "b": "x", **PLACE}, {"benchmark": "new", "c": 2, **PLACE}]
    )
    assert table.columns == ("a", "b", "c") and table.rows == (("1.5", "x", "–"), ("–", "–", "2"))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("requests=1,input=128,output=64", "3 requests, 128 in, 64 out"),
        ("input=choice:8:16,output=lognormal:60:0.6", "3 requests, 8 or 16 in, lognormal 60 out"),
        ("input=8,output=9,prefixes=2,prefix_tokens=64", "3 requests, 8 in, 9 out, 2 prefixes of 64"),
        ("traces/sharegpt.jsonl", "3 requests, sharegpt.jsonl"),
    ],
)
def test_names_of_workloads(source: str, name: str) -> None:
    assert workload_name({"workload": {"source": source, "requests": 3}}) == name


def test_points_of_different_concurrency_are_different_rows() -> None:
    known = [
        throughput(name, [rate], concurrency=at)
        for at in (1, 16)
        for name, rate in (("nemo_engine", 10.0 * at), ("vllm", 5.0))
    ]
    table, _ = tables_of("throughput", known)
    assert [row[0] for row in table.rows] == [f"16 requests, {at} at once, 16 to 256 in, 128 out" for at in (1, 16)]
    assert [row[1] for row in table.rows] == ["10", "160"]
