"""Runs tests marked ``interpreted``.

Triton reads TRITON_INTERPRET when it is imported, so they need a process of their own.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONS = (
    *("-q", "-p", "no:cacheprovider", "-m", "interpreted"),
    *("-W", "error:overflow:RuntimeWarning"),
    *("-W", "ignore:overflow encountered in exp:RuntimeWarning"),  # whose infinity SiLU divides by
)


def run_interpreted(*paths: str, leaving: str = "") -> None:
    """Fails unless the marked tests in ``paths`` but ``leaving`` pass, and there are some. Other files are not collected:
    their cases alone take seconds.
    """
    pytest.importorskip("triton")
    assert os.environ.get("TRITON_INTERPRET") != "1", "with TRITON_INTERPRET=1, run `pytest -m interpreted` itself"
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    files = [file for path in paths for file in sorted((ROOT / path).rglob("test_*.py")) or [ROOT / path]]
    marked = [file for file in files if "mark.interpreted" in file.read_text() and file != ROOT / leaving]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, *marked],
        cwd=ROOT,
        env={**env, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed.group(1)) > 50, run.stdout


@contextlib.contextmanager
def backwards() -> Iterator[None]:
    """Inside, the interpreter runs the programs of a grid from the last to the first."""
    from triton.runtime.interpreter import interpreter_builder as builder

    set_index = builder.set_grid_idx
    builder.set_grid_idx = lambda *at: set_index(*[size - 1 - x for size, x in zip(builder.grid_dim, at, strict=True)])
    try:
        yield
    finally:
        del builder.set_grid_idx
