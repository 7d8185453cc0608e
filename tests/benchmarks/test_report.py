"""``nemo-engine bench report``: what it refuses, its plots, and the section of docs/results.md."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from nemo_engine.benchmarks.report import command
from nemo_engine.benchmarks.report.command import BEGIN, END, report, section_of, with_section
from nemo_engine.benchmarks.report.results import Record, read
from nemo_engine.cli import main
from tests.helpers.bench_lines import PLACE, decode, op, scheduler_run, serve, start, throughput

ROOT = Path(__file__).parents[2]


def write(folder: Path, *records: Record, name: str = "r.jsonl") -> Path:
    """A results file."""
    kept = [{k: v for k, v in record.items() if k not in ("file", "line")} for record in records]
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in kept))
    return folder


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
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "report", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'nemo-engine[plot]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tables_and_plots_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engines = [throughput("nemo_engine", [10.0, 12.0]), throughput("transformers", [4.0, 5.0]), throughput("vllm")]
    servers = [serve(name, n, [100.0 * n]) for n in (1, 16) for name in ("ours", "theirs")]
    steps = [decode(batch, context) for batch in (1, 64) for context in (1024, 131072)]
    operations = [op("linear", "triton"), op("norm", "torch", is_baseline=True, tflop_per_s=0.5)]
    starts = [start("nemo_engine", "warm", [0.9, 1.2]), start("vllm", "warm", [2.0, 2.1])]
    folder = write(tmp_path, *engines, *servers, *steps, *operations, *starts, *scheduler_run())
    assert main(["bench", "report", str(folder), "--out", str(tmp_path / "out")]) == 0
    written = (tmp_path / "out" / "report.md").read_text()
    assert capsys.readouterr().out.startswith(report(read(folder)))
    expected = {
        "throughput": [
            "output tokens/s",
            "nemo_engine",
            "transformers",
            "failed",
            "16 requests, 16 to 256 in, 128 out",
        ],
        "serve-1": [
            "output tokens/s",
            "median time to first token, ms",
            "median time between tokens, ms",
            "ours",
            "theirs",
        ],
        "decode-1": ["context of each request, tokens", "decode step, ms (median)", "64 requests", "128k", "roofline"],
        "startup-1": [
            "seconds from a new process to the first token",
            "import torch",
            "stages below 2 % together",
            "vllm, warm",
        ],
        "scheduler": ["running requests", "schedule() and commit(), us (median)", "vllm 0.32, pages of 16"],
        "roofline-1": ["FLOP/byte", "TFLOP/s", "linear", "norm", "FP8 products 1500 TFLOP/s", "hollow: a baseline"],
    }
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


def test_a_single_point_is_a_table_and_no_plot(tmp_path: Path) -> None:
    records = [serve("ours", 16, [100.0]), serve("theirs", 16, [90.0]), decode(1, 1024), decode(64, 1024)]
    folder = write(tmp_path, *records)
    assert main(["bench", "report", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.md"]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "theirs" in text and "64" in text


# ---- the section


def test_the_section_has_the_newest_commit_of_each_machine_and_links_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    old = throughput("nemo_engine", [1.0], commit="old", date="2026-01-01T00:00:00Z")
    write(folder, old, throughput("nemo_engine", [2.0], commit="new"), name="cpu.jsonl")
    write(folder, throughput("nemo_engine", [3.0], gpu="NVIDIA H200", commit="old"), name="gpu.jsonl")
    write(folder, {"benchmark": "gpu", "stage": "tests", **PLACE}, name="stages.jsonl")
    section = section_of(read(folder), folder, tmp_path / "results.md")
    assert "commit new" in section and section.count("commit old") == 1 and "NVIDIA H200" in section
    assert "[cpu.jsonl](benchmarks/results/cpu.jsonl) · Some CPU, 2 cores, 24 GiB · commit new · 2026-11-25" in section
    assert "stages" not in section


def test_the_command_rewrites_what_is_between_the_marks_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    write(folder, throughput("nemo_engine", [2.0]))
    target = tmp_path / "results.md"
    target.write_text(f"# Before\n\n{BEGIN}\nstale\n{END}\n\nAfter\n")
    for _ in range(2):
        assert main(["bench", "report", str(folder), "--section", str(target)]) == 0
        text = target.read_text()
        assert text.startswith(f"# Before\n\n{BEGIN}\n") and text.endswith(f"{END}\n\nAfter\n")
        assert "stale" not in text and "[r.jsonl](results/r.jsonl)" in text


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{END}\n" * 2])
def test_a_file_without_its_marks_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    target = tmp_path / "results.md"
    target.write_text(text)
    with pytest.raises(ValueError, match=r"results\.md: the marks"):
        with_section(target, "new")


def test_the_page_of_results_says_what_the_results_say() -> None:
    target, folder = ROOT / "docs" / "results.md", ROOT / "benchmarks" / "results"
    section = section_of(read(folder), folder, target)
    assert target.read_text(encoding="utf-8") == with_section(target, section), (
        "docs/results.md is out of date: nemo-engine bench report --section docs/results.md"
    )
