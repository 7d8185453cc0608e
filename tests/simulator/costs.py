"""A cost of steps that is easy to work out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_engine.planner.roofline import Chunk


@dataclass(frozen=True)
class SimpleCost:
    """Seconds per step, per row of one token, per key of decode rows, and of the host.

    Powers of two keep sums exact.
    """

    step: float = 1 / 64
    token: float = 1 / 256
    key: float = 1 / 65536
    host: float = 0.0

    def decode_line(self, num_decodes: int) -> tuple[float, float]:
        return self.step + self.token * num_decodes, self.key

    def step_seconds(self, num_decodes: int, sum_context: int, prefills: Sequence[Chunk], width: int = 1) -> float:
        rows = num_decodes * width + sum(count for _, count in prefills)
        pairs = sum(start * count for start, count in prefills)
        return self.step + self.token * rows + self.key * (sum_context + pairs / 64)

    def host_seconds(self, num_rows: int) -> float:
        return self.host
