"""``nemo-engine bench report``: tables of known results, what stands in one ratio, plots, and the README's section."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from nemo_engine.benchmarks import report as reports
from nemo_engine.benchmarks.report import BEGIN, END, TABLES, groups_of, readme_section, report, with_section
from nemo_engine.benchmarks.results import Record, read
from nemo_engine.benchmarks.tables import Table, anything, workload_name
from nemo_engine.cli import main

ROOT = Path(__file__).parents[2]
PLACE = {
    "cpu": "Some CPU", "cores": 2, "usable_cores": 2, "memory_gib": 24, "gpu": None, "commit": "abc1234", "command": "bench",
    "date": "2026-11-25T13:00:00Z", "file": "r.jsonl", "line": 1,
}  # fmt: skip


def throughput(engine: str, rates: list[float] | None = None, **fields: Any) -> Record:
    """A line of ``bench throughput``; failed without rates."""
    found = (
        {"status": "ok", "tokens_per_second": rates} if rates else {"status": "failed", "error": "it | died\nat once"}
    )
    workload = {"source": "requests=16,input=uniform:16:256,output=128", "requests": 16, "new_tokens": 2048}
    return {
        "benchmark": "throughput",
        "model": "nemo-tiny",
        "workload": workload,
        "engine": engine,
        **found,
        **PLACE,
        **fields,
    }


def serve(server: str, concurrency: int, rates: list[float], **fields: Any) -> Record:
    """A line of ``bench serve``."""
    times = {"p50": 0.01 * concurrency, "p90": 0.03, "p95": 0.04, "p99": 0.05}
    return {
        "benchmark": "serve", "server": server, "workload": {"source": "requests=8,input=64,output=32", "requests": 8},
        "arrivals": {"concurrency": concurrency, "rate": None, "arrivals": None, "burstiness": 1.0}, "route": "completions",
        "output_tokens_per_second": rates, "ttft_s": times, "itl_s": times, "tpot_s": times, "e2e_s": times,
        "slo": {"ttft_s": None, "itl_s": None}, "goodput_requests_per_second": [1.0], "errors": 0, "first_errors": [], **PLACE,
        **fields,
    }  # fmt: skip


def decode(batch: int, context: int) -> Record:
    """A line of ``bench latency``."""
    return {
        "benchmark": "latency", "what": "decode", "batch": batch, "context": context, "engine": "nemo_engine", "status": "ok",
        "model": "nemo", "options": {"kv_cache_dtype": "fp8"}, "ms_per_step": 6.0 + batch * context / 1e5, "roofline_ms": 5.0,
        "fraction": 0.8, **PLACE,
    }  # fmt: skip


def write(folder: Path, *records: Record, name: str = "r.jsonl") -> Path:
    """A results file."""
    kept = [{k: v for k, v in record.items() if k not in ("file", "line")} for record in records]
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in kept))
    return folder


# ---- tables


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
        (*head, "nemo_engine", ms, "2 (1 to 4)", ms, ms, "100 (50 to 200)", "50%, 25%", "–"),
        (*head, "vllm", ms, "–", ms, ms, "100 (50 to 200)", "–", "–, 2.00x"),
        (*head, "sglang", "failed", *["–"] * 6),
    )
    assert requests.notes == ("llama.cpp missing: not there", "sglang failed, 8 requests: no memory")
    assert "nemo (kv_cache_dtype fp8)" in steps.title
    assert steps.rows == (("1024", "6.01 (80%)", "6.66 (80%)"), ("4096", "–", "8.62 (80%)"))
    assert (
        profile.rows == (("linear", "60", "60.0%", "4"),)
        and "100 us with the timers, 90 us without" in profile.notes[0]
    )


def op(name: str, implementation: str, **fields: Any) -> Record:
    """A line of ``bench ops``: 2 FLOP for each byte."""
    rates = {"us": 2.0, "gb_per_s": 1000.0, "tflop_per_s": 2.0, "fraction": 0.5, "speedup": 1.5}
    ceilings = {"bytes_per_s": 4e12, "bf16_flops_per_s": 8e14, "fp8_flops_per_s": 1.5e15}
    row = {
        "benchmark": "ops",
        "op": name,
        "size": "8 rows",
        "implementation": implementation,
        "is_baseline": False,
        "error": None,
    }
    return {**row, **rates, "ceilings": ceilings, **PLACE, **fields}


def test_operations_of_known_numbers() -> None:
    nothing = dict.fromkeys(("us", "gb_per_s", "tflop_per_s", "fraction", "speedup"))
    broken = op("linear", "torch", is_baseline=True, error="RuntimeError: no kernel", **nothing)
    first, second = tables_of("ops", [op("linear", "triton"), broken, op("norm", "cuda")])
    assert (first.title, second.title) == ("Operation linear", "Operation norm")
    assert first.rows == (
        ("8 rows", "triton", "2", "1000", "2", "50%", "1.50x", ""),
        ("8 rows", "torch *", "–", "–", "–", "–", "–", "failed: RuntimeError: no kernel"),
    )


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


# ---- the command


def test_a_bad_line_is_refused_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, throughput("nemo_engine", [1.0]))
    with (folder / "r.jsonl").open("a") as file:
        file.write("{not json\n")
    assert main(["bench", "report", str(folder)]) == 2
    assert "r.jsonl:2: is not a line of JSON" in capsys.readouterr().err
    lacking = throughput("nemo_engine", [1.0])
    del lacking["workload"]
    assert main(["bench", "report", str(write(tmp_path, serve("ours", 1, [1.0]), lacking))]) == 2
    assert "r.jsonl:2: a result of throughput has no field 'workload'" in capsys.readouterr().err
    odd = throughput("nemo_engine", [1.0], tokens_per_second="fast")
    assert main(["bench", "report", str(write(tmp_path, odd))]) == 2
    assert "r.jsonl:1: a result of throughput cannot be shown" in capsys.readouterr().err


def test_an_empty_folder_and_a_missing_matplotlib_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["bench", "report", str(tmp_path)]) == 2
    assert "there is no *.jsonl with results" in capsys.readouterr().err
    monkeypatch.setattr(reports.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "report", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "pip install nemo-engine[plot]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tables_and_plots_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engines = [throughput("nemo_engine", [10.0, 12.0]), throughput("transformers", [4.0, 5.0]), throughput("vllm")]
    servers = [serve(name, n, [100.0 * n]) for n in (1, 16) for name in ("ours", "theirs")]
    steps = [decode(batch, context) for batch in (1, 64) for context in (1024, 131072)]
    operations = [op("linear", "triton"), op("norm", "torch", is_baseline=True, tflop_per_s=0.5)]
    folder = write(tmp_path, *engines, *servers, *steps, *operations)
    assert main(["bench", "report", str(folder), "--out", str(tmp_path / "out")]) == 0
    written = (tmp_path / "out" / "report.md").read_text()
    assert capsys.readouterr().out.startswith(report(read(folder)))
    expected = {
        "throughput": ["output tokens/s", "nemo_engine", "transformers", "failed", "16 requests, 16 to 256 in, 128 out"],
        "serve-1": ["output tokens/s", "median time to first token, ms", "median time between tokens, ms", "ours", "theirs"],
        "decode-1": ["context of each request, tokens", "decode step, ms (median)", "64 requests", "128k", "roofline"],
        "roofline-1": ["FLOP/byte", "TFLOP/s", "linear", "norm", "FP8 products 1500 TFLOP/s", "hollow: a baseline"],
    }  # fmt: skip
    for name, labels in expected.items():
        (svg,) = (tmp_path / "out").glob(f"{name}-*.svg")
        text = svg.read_text()
        for label in [*labels, "Some CPU, 2 cores, 24 GiB · commit abc1234"]:
            assert label in text, (name, label)
        assert f"({svg.name})" in written
        png = svg.with_suffix(".png").read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        assert png.startswith(b"\x89PNG") and min(width, height) > 400 and len(png) > 10_000
    assert len(list((tmp_path / "out").iterdir())) == 1 + 2 * len(expected)


# ---- the README


def test_the_section_has_the_newest_commit_of_each_machine_and_links_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    old = throughput("nemo_engine", [1.0], commit="old", date="2026-01-01T00:00:00Z")
    write(folder, old, throughput("nemo_engine", [2.0], commit="new"), name="cpu.jsonl")
    write(folder, throughput("nemo_engine", [3.0], gpu="NVIDIA H200", commit="old"), name="gpu.jsonl")
    write(folder, {"benchmark": "gpu", "stage": "tests", **PLACE}, name="stages.jsonl")
    section = readme_section(read(folder), folder, tmp_path / "README.md")
    assert "commit new" in section and section.count("commit old") == 1 and "NVIDIA H200" in section
    assert "[cpu.jsonl](benchmarks/results/cpu.jsonl) · Some CPU, 2 cores, 24 GiB · commit new · 2026-11-25" in section
    assert "stages" not in section


def test_the_command_rewrites_what_is_between_the_marks_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    write(folder, throughput("nemo_engine", [2.0]))
    readme = tmp_path / "README.md"
    readme.write_text(f"# Before\n\n{BEGIN}\nstale\n{END}\n\nAfter\n")
    for _ in range(2):
        assert main(["bench", "report", str(folder), "--readme", str(readme)]) == 0
        text = readme.read_text()
        assert text.startswith(f"# Before\n\n{BEGIN}\n") and text.endswith(f"{END}\n\nAfter\n")
        assert "stale" not in text and "[r.jsonl](results/r.jsonl)" in text


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n" * 2])
def test_a_readme_without_its_marks_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match=r"README\.md: the marks"):
        with_section(readme, "new")


def test_the_readme_says_what_the_results_say() -> None:
    readme, folder = ROOT / "README.md", ROOT / "benchmarks" / "results"
    section = readme_section(read(folder), folder, readme)
    assert readme.read_text(encoding="utf-8") == with_section(readme, section), (
        "the README's measured section is out of date: nemo-engine bench report --readme README.md"
    )
