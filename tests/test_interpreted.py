"""Runs the tests marked ``interpreted``. Triton reads TRITON_INTERPRET when it is imported, so they need processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Of about equal time, one for each of two cores.
HALVES = (
    ["tests/ops/test_ops.py", "tests/test_triton_engine.py"],
    ["tests/ops", "tests/runner", "--ignore=tests/ops/test_ops.py"],
)


def test_kernels_in_the_interpreter() -> None:
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
    runs = [
        subprocess.Popen(
            [*command, *half],
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for half in HALVES
    ]
    outputs = [run.communicate()[0] for run in runs]
    for run, output in zip(runs, outputs, strict=True):
        assert run.returncode == 0, output
        passed = re.search(r"(\d+) passed", output)
        assert passed and int(passed.group(1)) > 50, output
