"""``Meter``: limits the cost of one rendering of a chat template. A template is code from a stranger.

Only the thread's own time counts, so a busy machine changes nothing. Knows nothing of Jinja.
"""

from __future__ import annotations

import threading
import time
from datetime import datetime
from typing import Any

MAX_SECONDS = 3.0  # of the thread's own time, for one rendering
MAX_CHARS = (
    1 << 26
)  # that a rendering makes in all, what it throws away too; and what one conversion to text may walk through
MAX_NUMBER = 10_000  # a width, an indentation or another size that a filter or a method takes
_LOOK_EVERY = 64  # steps after which the clock is read


class TemplateLimitError(ValueError):
    """A template exceeds a limit of its work."""


class Meter:
    """Counts the work of one rendering, and raises ``TemplateLimitError`` where it becomes too much.

    ``now`` is the time of day that the template sees.
    """

    def __init__(self) -> None:
        self.now = datetime.now()
        self._deadline = time.thread_time() + MAX_SECONDS
        self._num_steps = 0
        self._num_chars = 0

    def step(self) -> None:
        """A turn of a loop, a call or a filter."""
        self._num_steps += 1
        if self._num_steps % _LOOK_EVERY == 0 and time.thread_time() > self._deadline:
            raise TemplateLimitError(f"it takes more than {MAX_SECONDS:g} s of computing time")

    def charge(self, num_chars: int) -> None:
        """Count characters, or elements of lists, that are about to be made."""
        self._num_chars += num_chars
        if self._num_chars > MAX_CHARS:
            raise TemplateLimitError(f"it makes more than {MAX_CHARS} characters of text")

    def charge_value(self, value: Any) -> None:
        """Count the text of ``value``: its strings, and each of its elements as often as it occurs."""
        if isinstance(value, str):
            self.charge(len(value))
            return
        waiting = [value]
        while waiting:
            self.step()
            element = waiting.pop()
            if isinstance(element, str):
                self.charge(len(element))
            elif isinstance(element, dict):
                self.charge(4 * len(element))
                waiting += element.keys()
                waiting += element.values()
            elif isinstance(element, (list, tuple, set, frozenset)):
                self.charge(2 * len(element))
                waiting += element
            elif isinstance(element, int) and not isinstance(element, bool):
                self.charge(element.bit_length())
            else:
                self.charge(8)


class _Current(threading.local):
    meter: Meter | None = None


_current = _Current()


def meter() -> Meter:
    """The meter of the rendering in which this thread is; outside of renderings, a new meter."""
    return _current.meter or Meter()


class Metered:
    """``with Metered():`` meters one rendering, or several as one. An inner one counts for the outer one."""

    def __enter__(self) -> None:
        self._before = _current.meter
        _current.meter = self._before or Meter()

    def __exit__(self, *_: object) -> None:
        _current.meter = self._before


def check_numbers(what: str, values: Any) -> None:
    """Refuse large sizes among arguments, with which a short template would make a huge text."""
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise TemplateLimitError(f"{what} takes numbers up to {MAX_NUMBER}, got one of {value.bit_length()} bits")
