"""What else is tested of the Triton kernels, interpreted: hard cases, graphs, the whole engine."""

from __future__ import annotations

from tests.helpers.interpreted import run_interpreted


def test_the_rest_in_the_interpreter() -> None:
    run_interpreted("tests/ops", "tests/runner", "tests/test_triton_engine.py", leaving="tests/ops/test_ops.py")
