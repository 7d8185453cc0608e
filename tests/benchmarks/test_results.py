"""Results files: what is written with each number, what is refused when they are read, and what is not put into one
ratio.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_engine.benchmarks import provenance as facts_of
from nemo_engine.benchmarks.provenance import append_record, command_text, commit_of, gpu_facts, provenance
from nemo_engine.benchmarks.report.results import (
    Ratio,
    Record,
    Spread,
    blaming,
    check_comparable,
    percentiles,
    ratio,
    read,
)


def result(**fields: Any) -> Record:
    """A line of a throughput run."""
    place = {"cpu": "C", "cores": 2, "commit": "abc", "command": "nemo-engine bench", "date": "2026-01-01T00:00:00Z"}
    return {"benchmark": "throughput", "engine": "nemo_engine", "tokens_per_second": [2.0, 4.0], **place, **fields}


# ---- provenance


def test_a_result_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/nemo-engine", "bench", "--json", "results/x.jsonl"])
    facts = provenance("torch")
    assert facts["command"] == "nemo-engine bench --json results/x.jsonl"
    assert facts["torch"].startswith("2.") and facts["cores"] >= facts["usable_cores"] >= 1 and facts["memory_gib"] > 0
    assert {"cpu", "gpu", "gpu_driver", "gpu_clocks_mhz", "python", "commit", "date"} <= facts.keys()
    assert provenance()["date"] == facts["date"]  # one run, one date


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["benchmarks/structured.py", "--json", "out/a.jsonl"], "benchmarks/structured.py --json out/a.jsonl"),
        (["/venv/lib/nemo_engine/__main__.py", "bench"], "python -m nemo_engine bench"),
        (["/bin/nemo-engine", "--json", "/home/me/a.jsonl"], "nemo-engine --json a.jsonl"),
        (["/bin/nemo-engine", "--json=/home/me/folder/"], "nemo-engine --json=folder"),
        (["/bin/nemo-engine", "vllm=/home/me/venv/bin/python"], "nemo-engine vllm=python"),
        (["/bin/nemo-engine", 'x={"file": "/home/me/a b"}'], """nemo-engine 'x={"file": "a b"}'"""),
        (["/bin/nemo-engine", "ours=http://127.0.0.1:8000/v1"], "nemo-engine ours=http://127.0.0.1:8000/v1"),
        (["/bin/nemo-engine", "../up/x", "./here/x"], "nemo-engine ../up/x ./here/x"),
        (["/bin/nemo-engine", "--api-key", "s3cret", "--api-key=s3cret"], "nemo-engine --api-key KEY --api-key=KEY"),
    ],
)
def test_commands_hold_no_folders_of_this_machine_and_no_keys(words: list[str], text: str) -> None:
    assert command_text(words) == text


def test_lines_hold_no_folders_of_this_machine(tmp_path: Path) -> None:
    told = {
        "error": "not installed under /home/me/venv/bin/python, nor at http://host/a/b",
        "options": {"tokenizer": "/home/me/tok"},
    }
    append_record(tmp_path / "r.jsonl", result(model="/home/me/nemo", rates=["1 /s", "a / b"], **told))
    (record,) = read(tmp_path)
    assert record["error"] == "not installed under python, nor at http://host/a/b"
    assert (
        record["model"] == "nemo" and record["options"] == {"tokenizer": "tok"} and record["rates"] == ["1 /s", "a / b"]
    )
    assert record["tokens_per_second"] == [2.0, 4.0]


def test_the_commit_is_that_of_the_checkout_that_tracks_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*args: str) -> str:
        options = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", str(tmp_path), *options, *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    results = tmp_path / "benchmarks" / "results" / "r.jsonl"
    code, installed = tmp_path / "code.py", tmp_path / "venv" / "installed.py"
    results.parent.mkdir(parents=True)
    installed.parent.mkdir()
    for file in (results, code, installed):
        file.write_text("")
    git("init", "--quiet")
    git("add", "code.py", "benchmarks")
    git("commit", "--quiet", "-m", "first")
    monkeypatch.chdir("/")
    commit = git("rev-parse", "--short", "HEAD")
    monkeypatch.setattr(facts_of, "commit_of", commit_of.__wrapped__)
    assert facts_of.commit_of(code) == commit
    results.write_text("{}\n")  # a run that adds to a tracked file of results is no other code
    assert facts_of.commit_of(code) == commit
    code.write_text("pass\n")
    assert facts_of.commit_of(code) == f"{commit}-dirty"
    assert facts_of.commit_of(installed) == "not a git checkout"


class Nvml(SimpleNamespace):
    """What nvidia-ml-py has of an H200; ``clocks`` may be refused."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self, has_clocks: bool = True) -> None:
        super().__init__(asked=[], has_clocks=has_clocks)

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        self.asked.append(index)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if not uuid:
            raise RuntimeError("not found")
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetName(self, device: object) -> bytes:
        return b"NVIDIA H200"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlDeviceGetClockInfo(self, device: object, kind: int) -> int:
        if not self.has_clocks:
            raise RuntimeError("not supported")
        return {1: 1410, 2: 3201}[kind]

    def nvmlDeviceGetMaxClockInfo(self, device: object, kind: int) -> int:
        return {1: 1980, 2: 3201}[kind]


def test_the_gpu_that_is_visible_and_its_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = Nvml()
    clocks = {"sm": 1410, "memory": 3201, "most_sm": 1980, "most_memory": 3201}
    assert gpu_facts(nvml) == {"gpu": "NVIDIA H200", "gpu_driver": "580.1", "gpu_clocks_mhz": clocks}
    for visible in ("3,1", "GPU-12"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        gpu_facts(nvml)
    assert nvml.asked == [0, 3, "GPU-12"]
    refused = gpu_facts(Nvml(has_clocks=False))
    assert refused == {"gpu": "NVIDIA H200", "gpu_driver": "580.1", "gpu_clocks_mhz": None}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_facts(nvml) == {"gpu": None, "gpu_driver": None, "gpu_clocks_mhz": None}


# ---- files


def test_lines_are_read_with_their_place(tmp_path: Path) -> None:
    append_record(None, result())
    append_record(tmp_path / "new" / "b.jsonl", result(engine="second"))
    append_record(tmp_path / "new" / "b.jsonl", result(engine="third"))
    append_record(tmp_path / "new" / "a.jsonl", result(engine="first"))
    (tmp_path / "new" / "notes.txt").write_text("not a result")
    found = [(record["engine"], record["file"], record["line"]) for record in read(tmp_path / "new")]
    assert found == [("first", "a.jsonl", 1), ("second", "b.jsonl", 1), ("third", "b.jsonl", 2)]
    assert [record["engine"] for record in read(tmp_path / "new" / "b.jsonl")] == ["second", "third"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "is not a line of JSON"),
        ("", "is not a line of JSON"),
        ("[1]", "has no field benchmark"),
        ('{"benchmark": 3}', "has no field benchmark"),
        (json.dumps({**result(), "commit": None}), "does not say its commit"),
        (json.dumps({k: v for k, v in result().items() if k != "command"}), "does not say its command"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(tmp_path: Path, line: str, reason: str) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps(result()) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"r\.jsonl:2: .*{reason}"):
        read(tmp_path)


def test_what_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: there is no such file"):
        read(tmp_path / "nowhere")
    (tmp_path / "r.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"r\.jsonl: is not text in UTF-8"):
        read(tmp_path)


def test_what_is_wrong_with_a_field_is_told_with_file_and_line() -> None:
    placed = result(file="r.jsonl", line=7)
    with pytest.raises(ValueError, match=r"r\.jsonl:7: a result of throughput has no field 'ttft_s'"), blaming(placed):
        placed["ttft_s"]
    with pytest.raises(ValueError, match=r"r\.jsonl:7: .* cannot be shown: .*float"), blaming(placed):
        placed["engine"] + 1.0


# ---- numbers


@pytest.mark.parametrize(
    "other", [{"commit": "def"}, {"commit": "abc-dirty"}, {"cpu": "D"}, {"cores": 4}, {"usable_cores": 1}, {"gpu": "G"}]
)
def test_results_of_two_places_are_not_put_into_one_ratio(other: dict[str, Any]) -> None:
    (name,) = other
    with pytest.raises(ValueError, match=f"results of different {name} are not put into one ratio"):
        check_comparable(result(), result(**other))
    with pytest.raises(ValueError, match=f"results of different {name}"):
        ratio(result(), result(**other), "tokens_per_second")


def test_rounds_are_paired_within_one_run_only() -> None:
    assert ratio(result(), result(tokens_per_second=[1.0, 1.0]), "tokens_per_second").median == 3.0
    with pytest.raises(ValueError, match="two runs"):
        ratio(result(), result(date="2026-01-01T00:00:01Z"), "tokens_per_second")
    with pytest.raises(ValueError, match="paired, got 2 and 1"):
        ratio(result(), result(tokens_per_second=[1.0]), "tokens_per_second")


def test_spread_ratio_and_percentiles_of_known_numbers() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    found = Ratio.paired([2.0, 4.0, 6.0], [1.0, 1.0, 2.0])  # ratios 2, 4, 3
    assert (found.median, found.low, found.high) == (3.0, 2.0, 4.0)
    assert percentiles([4.0, 1.0, 2.0, 3.0], (0, 50, 90)) == {"p0": 1.0, "p50": 2.5, "p90": pytest.approx(3.7)}
    assert percentiles([]) == {}
