"""The limits within which a request counts as good: an SLO."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds to the first token, and mean seconds from token to token after that; None for no limit."""

    ttft_s: float | None = None
    itl_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_s", "itl_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be finite and greater than 0, got {value}")

    def are_kept(self, ttft_s: float, itl_s: float) -> bool:
        """Whether both are within the limits."""
        return (self.ttft_s is None or ttft_s <= self.ttft_s) and (self.itl_s is None or itl_s <= self.itl_s)
