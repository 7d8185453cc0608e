"""A progress bar over bytes, or over something else that is counted. Must not know what is being read."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BEFORE_BAR = 1.0  # unasked, a bar is shown only for what takes longer


@contextmanager
def progress_bar(what: str, total: int, shows: bool | None, unit: str = "B") -> Iterator[Callable[[int], object]]:
    """Yields a function to call with the bytes (or ``unit``) just done.

    ``shows`` True shows a bar, False none, None one on a terminal if it takes longer than a second. Without tqdm there
    is none.
    """
    may_show = sys.stderr.isatty() if shows is None else shows
    if not may_show or importlib.util.find_spec("tqdm") is None:
        yield lambda num_bytes: None
        return
    from tqdm import tqdm

    delay = 0.0 if shows else SECONDS_BEFORE_BAR
    divisor = 1024 if unit == "B" else 1000
    with tqdm(desc=what, total=total, unit=unit, unit_scale=True, unit_divisor=divisor, delay=delay) as bar:
        yield bar.update
