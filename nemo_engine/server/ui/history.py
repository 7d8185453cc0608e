"""The last minutes of the engine, second by second: what the page's live view draws."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from nemo_engine.outputs import StepRecord

SECONDS = 300


@dataclass(slots=True)
class Second:
    """What happened in one second of ``time.monotonic()``."""

    second: int
    num_steps: int = 0
    num_decode_tokens: int = 0
    num_prefill_tokens: int = 0
    num_new_tokens: int = 0
    ttft: list[float] = field(default_factory=list)
    e2e: list[float] = field(default_factory=list)
    itl_sum: float = 0.0
    itl_count: int = 0


class History:
    """The last ``SECONDS`` seconds in which something happened."""

    def __init__(self) -> None:
        self._seconds: deque[Second] = deque(maxlen=SECONDS)
        self._last_time: float | None = None

    def step_done(self, record: StepRecord) -> None:
        """Count a step."""
        entry = self._at(record.time)
        entry.num_steps += 1
        entry.num_decode_tokens += record.num_decodes
        entry.num_prefill_tokens += record.num_prefill_tokens
        entry.num_new_tokens += record.num_new_tokens
        if record.num_decodes and self._last_time is not None:
            entry.itl_sum += (record.time - self._last_time) * record.num_decodes
            entry.itl_count += record.num_decodes
        self._last_time = record.time

    def request_done(self, ttft: float, e2e: float) -> None:
        """Count a request that ended now. Seconds."""
        entry = self._at(time.monotonic())
        entry.ttft.append(ttft)
        entry.e2e.append(e2e)

    def view(self) -> list[dict[str, Any]]:
        """One entry a second, oldest first; ``age`` in seconds."""
        now = int(time.monotonic())
        return [
            {
                "age": now - entry.second,
                "steps": entry.num_steps,
                "decode_tokens": entry.num_decode_tokens,
                "prefill_tokens": entry.num_prefill_tokens,
                "new_tokens": entry.num_new_tokens,
                "ttft": _median(entry.ttft),
                "e2e": _median(entry.e2e),
                "itl": entry.itl_sum / entry.itl_count if entry.itl_count else None,
                "requests": len(entry.e2e),
            }
            for entry in self._seconds
            if now - entry.second <= SECONDS
        ]

    def _at(self, when: float) -> Second:
        second = int(when)
        # Steps are reported late, so the second need not be the last one.
        for entry in reversed(self._seconds):
            if entry.second == second:
                return entry
            if entry.second < second:
                break
        entry = Second(second)
        if self._seconds and self._seconds[-1].second > second:
            later = [kept for kept in self._seconds if kept.second > second]
            for _ in later:
                self._seconds.pop()
            self._seconds.append(entry)
            self._seconds.extend(later)
        else:
            self._seconds.append(entry)
        return entry


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
