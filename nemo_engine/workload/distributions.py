"""Distributions of lengths and times, written as ``200``, ``uniform:50:400``, ``lognormal:1000:0.8:16:8000``,
``normal:500:100``, ``exponential:300`` or ``choice:128:2048``, or as the number in JSON."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

_SHAPES = {  # kind: (numbers needed, numbers allowed), and what they are
    "uniform": (2, 2, "LOW:HIGH"),
    "lognormal": (2, 4, "MEDIAN:SIGMA[:LOW[:HIGH]]"),
    "normal": (2, 4, "MEAN:DEVIATION[:LOW[:HIGH]]"),
    "exponential": (1, 3, "MEAN[:LOW[:HIGH]]"),
    "choice": (1, 64, "A:B:..."),
}


@dataclass(frozen=True, slots=True)
class Distribution:
    """``kind`` "constant" or one of those above, with its numbers."""

    kind: str
    numbers: tuple[float, ...]

    @classmethod
    def parse(cls, value: object, name: str) -> Distribution:
        """Make a distribution from a number or a text. Raises ``ValueError`` naming ``name``."""
        forms = ", ".join(f"{kind}:{form}" for kind, (_, _, form) in _SHAPES.items())
        if isinstance(value, Distribution):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a number or one of {forms}, got {value!r}")
        kind, _, arguments = value.partition(":")
        texts = arguments.split(":") if arguments else []
        if kind not in _SHAPES:
            kind, texts = "constant", [value]
        try:
            numbers = tuple(float(text) for text in texts)
        except ValueError:
            raise ValueError(f"{name} must be a number or one of {forms}, got {value!r}") from None
        low, high, form = _SHAPES.get(kind, (1, 1, "N"))
        if not low <= len(numbers) <= high or not all(0 <= number < math.inf for number in numbers):
            raise ValueError(f"{name} must be {kind}:{form} with finite numbers of at least 0, got {value!r}")
        limits = (
            numbers if kind == "uniform" else numbers[{"lognormal": 2, "normal": 2, "exponential": 1}.get(kind, 9) :]
        )
        if len(limits) == 2 and limits[0] > limits[1]:
            raise ValueError(f"{name} must have a LOW that is at most its HIGH, got {value!r}")
        if kind == "lognormal" and numbers[0] == 0:
            raise ValueError(f"{name} must have a MEDIAN above 0, got {value!r}")
        return cls(kind, numbers)

    def draw(self, rng: random.Random) -> float:
        """One number."""
        numbers = self.numbers
        if self.kind == "constant":
            return numbers[0]
        if self.kind == "uniform":
            return rng.uniform(numbers[0], numbers[1])
        if self.kind == "choice":
            return rng.choice(numbers)
        if self.kind == "exponential":
            value, limits = rng.expovariate(1.0) * numbers[0], numbers[1:]
        elif self.kind == "normal":
            value, limits = rng.gauss(numbers[0], numbers[1]), numbers[2:]
        else:
            value, limits = numbers[0] * math.exp(rng.gauss(0.0, numbers[1])), numbers[2:]
        low, high = (*limits, 0.0, math.inf)[:2] if len(limits) != 1 else (limits[0], math.inf)
        return min(max(value, low), high)

    def draw_count(self, rng: random.Random) -> int:
        """A number of tokens or turns: an integer, at least 1."""
        if self.kind == "uniform":
            low, high = (round(number) for number in self.numbers)
            return max(1, rng.randint(low, high))
        return max(1, round(self.draw(rng)))

    def __str__(self) -> str:
        numbers = ":".join(f"{number:g}" for number in self.numbers)
        return numbers if self.kind == "constant" else f"{self.kind}:{numbers}"
