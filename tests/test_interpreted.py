"""Runs the tests marked ``interpreted``. Triton reads TRITON_INTERPRET when it is imported, so they need processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HALVES = (
    ["tests/ops/test_ops.py", "tests/test_triton_engine.py"],
    ["tests/ops", "tests/runner", "--ignore=tests/ops/test_ops.py"],
)


@pytest.mark.parametrize("half", HALVES, ids=["all operations", "the rest"])
def test_kernels_in_the_interpreter(half: list[str]) -> None:
    pytest.importorskip("triton")
    assert os.environ.get("TRITON_INTERPRET") != "1", "with TRITON_INTERPRET=1, run `pytest -m interpreted` itself"
    command = [
        sys.executable,
        "-W",
        "error:overflow:RuntimeWarning",
        "-W",
        "ignore:overflow encountered in exp:RuntimeWarning",  # whose infinity SiLU divides by
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "interpreted",
    ]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([*command, *half], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed.group(1)) > 50, run.stdout
