"""Engines whose books are checked after every step."""

from __future__ import annotations

from typing import Any

from nemo_engine.engine.engine import Engine
from tests.scheduler.invariants import check


def check_every_step(engine: Engine) -> Engine:
    """``engine``, whose scheduler's invariants are asserted after each of its steps from now on."""
    scheduler, step = engine._core.scheduler, engine._core.step

    def checked_step() -> Any:
        committed = step()
        check(scheduler)
        return committed

    engine._core.step = checked_step  # type: ignore[method-assign]
    return engine
