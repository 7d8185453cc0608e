"""When requests come: at times of their own (open loop), or when others end (closed loop)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

_KINDS = ("poisson", "gamma", "constant", "closed", "file")


@dataclass(frozen=True, slots=True)
class Arrivals:
    """kind: "poisson", "gamma" (intervals of shape ``burstiness``: below 1 in bursts, 1 is Poisson), "constant", "file"
    (each item's own ``arrival_s``) or "closed". rate_per_s: for the first three kinds. concurrency: for "closed", the
    requests that are always under way. seed: for the noise.
    """

    kind: str
    rate_per_s: float | None = None
    burstiness: float = 1.0
    concurrency: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"arrivals must be one of {', '.join(_KINDS)}, got {self.kind!r}")
        needs_rate = self.kind in ("poisson", "gamma", "constant")
        rate = self.rate_per_s
        if needs_rate and (rate is None or not 0 < rate < math.inf):
            raise ValueError(f"rate must be finite and greater than 0 for {self.kind} arrivals, got {rate}")
        if not needs_rate and rate is not None:
            raise ValueError(f"rate is not for {self.kind!r} arrivals, got {rate}")
        if not 0 < self.burstiness < math.inf:
            raise ValueError(f"burstiness must be finite and greater than 0, got {self.burstiness}")
        if self.kind == "closed" and (self.concurrency is None or self.concurrency < 1):
            raise ValueError(f"concurrency must be at least 1 for closed arrivals, got {self.concurrency}")
        if self.kind != "closed" and self.concurrency is not None:
            raise ValueError(f"concurrency is for closed arrivals, got {self.concurrency} with {self.kind!r}")

    def times(self) -> Iterator[float]:
        """Yields arrivals in seconds from the start, without end, for "poisson", "gamma" and "constant"."""
        assert self.rate_per_s is not None
        rng = random.Random(f"arrivals {self.seed}")
        now = 0.0
        while True:
            yield now
            if self.kind == "constant":
                now += 1 / self.rate_per_s
            elif self.kind == "poisson":
                now += rng.expovariate(self.rate_per_s)
            else:
                now += rng.gammavariate(self.burstiness, 1 / (self.rate_per_s * self.burstiness))
