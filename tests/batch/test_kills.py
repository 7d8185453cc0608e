"""A few kills of a scripted run; ``kills.py`` makes many of the command's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.batch.kills import finished, killed, write_lines


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / "in.jsonl"
    write_lines(source, 300)

    def command(target: Path) -> list[str]:
        return [sys.executable, "-m", "tests.batch.scripted_run", str(source), str(target), "0.02"]

    wanted = finished(command, tmp_path / f"once{suffix}")
    assert sum(wanted.values()) == 300
    target = tmp_path / f"killed{suffix}"
    counts = killed(command, source, target, 8 if suffix == ".jsonl" else 4, 1, start_up=0.3)
    assert suffix == ".jsonl.gz" or any(0 < count < 300 for count in counts), "no kill came in the middle"
    assert finished(command, target) == wanted
