"""The benchmark programs: they run on a CPU at tiny sizes, their arithmetic is right, and one failure does not stop the
rest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_engine.benchmarks import structured

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable


def run(program: str, *options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PYTHON, str(ROOT / "benchmarks" / program), *map(str, options)],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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
