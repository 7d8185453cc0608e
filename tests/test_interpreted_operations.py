"""Every Triton kernel over every case of its operation, interpreted."""

from __future__ import annotations

from tests.helpers.interpreted import run_interpreted


def test_every_operation_in_the_interpreter() -> None:
    run_interpreted("tests/ops/test_ops.py")
