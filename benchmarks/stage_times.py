"""Where the time of a step goes: timers around functions, each of which is charged with what it does itself, without
what it calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Label = Callable[[tuple[Any, ...]], str]  # what a call is booked under, by its positional arguments


class StageTimes:
    """Seconds and calls by name. A timer costs some 0.3 us a call, which its caller is charged with."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._inner: list[float] = []  # seconds of timed calls within each call that is under way

    def wrap(self, name: str, function: Callable[..., Any], label: Label | None = None) -> Callable[..., Any]:
        """``function`` with a timer, under ``name`` or under what ``label`` says of the call."""
        clock, inner = time.perf_counter, self._inner

        def timed(*args: Any, **options: Any) -> Any:
            inner.append(0.0)
            start = clock()
            try:
                return function(*args, **options)
            finally:
                took = clock() - start
                key = name if label is None else label(args)
                self.seconds[key] = self.seconds.get(key, 0.0) + took - inner.pop()
                self.calls[key] = self.calls.get(key, 0) + 1
                if inner:
                    inner[-1] += took

        return timed

    def clear(self) -> None:
        """Forget what was measured so far."""
        self.seconds.clear()
        self.calls.clear()

    def rows(self, steps: int, total_seconds: float) -> list[dict[str, Any]]:
        """A row for each stage, the longest first: microseconds and calls per step, and its share of all; what no timer
        saw is the last but in order.
        """
        rest = total_seconds - sum(self.seconds.values())
        every = [(name, seconds, self.calls[name]) for name, seconds in self.seconds.items()]
        every += [("not in a timer", rest, 0)]
        return [
            {
                "stage": name, "us_per_step": seconds / steps * 1e6, "share": seconds / total_seconds,
                "calls_per_step": calls / steps,
            }
            for name, seconds, calls in sorted(every, key=lambda entry: -entry[1])
        ]  # fmt: skip


def format_rows(rows: list[dict[str, Any]]) -> str:
    """The table, an aligned line for each row."""
    width = max(len("stage"), *(len(row["stage"]) for row in rows))
    lines = [f"{'stage'.ljust(width)}  {'us/step':>10}  {'share':>6}  {'calls':>7}"]
    lines += [
        f"{row['stage'].ljust(width)}  {row['us_per_step']:10.2f}  {row['share']:6.1%}  {row['calls_per_step']:7.2f}"
        for row in rows
    ]
    return "\n".join(lines)
