"""Tests of time on a machine that is slow, or stops for seconds: what fails them is the fault that they look for."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable
from typing import ParamSpec

_ROUNDS = 6
_SHARE = 1 / 16  # of the work: 16 times it takes 16 times as long, and squares 256 times
_LIMIT = 64.0
_P = ParamSpec("_P")


def check_growth(seconds: Callable[[float], float], what: str = "") -> None:
    """Assert that time goes with the size. ``seconds(share)`` does this share of the work and says what it computed.

    Of each size the least of several counts, taken in turns, and nothing more is taken once they fit: only a square never does.
    """
    short, whole = math.inf, math.inf
    for _ in range(_ROUNDS):
        short = min(short, seconds(_SHARE), seconds(_SHARE))
        whole = min(whole, seconds(1.0))
        if whole <= _LIMIT * max(short, 1e-3):
            return
    raise AssertionError(f"{what}: {short:.4f} s for a sixteenth, {whole:.4f} s for all")


def yardstick() -> float:
    """CPU seconds of some Python on this machine, now: 0.15 on one of 2024."""
    begun = time.thread_time()
    sum(i * i for i in range(2_000_000))
    return time.thread_time() - begun


def insistent(test: Callable[_P, None]) -> Callable[_P, None]:
    """A test of deadlines, three times at most: what a pause of this process breaks it breaks once, a fault each time."""

    @functools.wraps(test)
    def until_it_holds(*args: _P.args, **kwargs: _P.kwargs) -> None:
        for _ in range(2):
            with contextlib.suppress(Exception):
                return test(*args, **kwargs)
        test(*args, **kwargs)

    return until_it_holds
