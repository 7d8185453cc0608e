"""Statistics of a stream in bounded memory: quantiles with a relative error, and what changes over time at a resolution
that adapts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_GAMMA = 1.01  # width of a bucket: a quantile is off by half a per cent at most
_LOG_GAMMA = math.log(_GAMMA)
_SMALLEST = 1e-9


def _key(value: float) -> int:
    """The bucket of ``value``."""
    return math.ceil(math.log(value if value > _SMALLEST else _SMALLEST) / _LOG_GAMMA)


class Sketch:
    """Counts of positive numbers in buckets of equal ratio. Count, sum, least and largest are exact."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.least = math.inf
        self.largest = 0.0
        self._buckets: dict[int, int] = {}

    def add(self, value: float, weight: int = 1) -> None:
        """Count ``value``, at least 0, ``weight`` times."""
        self.count += weight
        self.total += value * weight
        if value < self.least:
            self.least = value
        if value > self.largest:
            self.largest = value
        key = _key(value)
        self._buckets[key] = self._buckets.get(key, 0) + weight

    def add_all(self, values: Sequence[float], weight: int = 1) -> None:
        """Count each of ``values``, of which there is at least one, ``weight`` times.

        Quick where they are nearly equal.
        """
        least, largest = min(values), max(values)
        key = _key(least)
        if key != _key(largest):
            if len(values) <= 8:
                for value in values:
                    self.add(value, weight)
            else:
                middle = len(values) // 2
                self.add_all(values[:middle], weight)
                self.add_all(values[middle:], weight)
            return
        count = weight * len(values)
        self.count += count
        self.total += sum(values) * weight
        if least < self.least:
            self.least = least
        if largest > self.largest:
            self.largest = largest
        self._buckets[key] = self._buckets.get(key, 0) + count

    def merge(self, other: Sketch) -> None:
        """Count all that ``other`` has."""
        self.count += other.count
        self.total += other.total
        self.least = min(self.least, other.least)
        self.largest = max(self.largest, other.largest)
        for key, count in other._buckets.items():
            self._buckets[key] = self._buckets.get(key, 0) + count

    @property
    def mean(self) -> float:
        """NaN of nothing."""
        return self.total / self.count if self.count else math.nan

    def quantile(self, q: float) -> float:
        """The smallest number that a part ``q`` of all is at most, within half a per cent; NaN of nothing."""
        if not self.count:
            return math.nan
        left = max(1, math.ceil(q * self.count))
        for key in sorted(self._buckets):
            left -= self._buckets[key]
            if left <= 0:
                break
        return min(max(2 * _GAMMA**key / (_GAMMA + 1), self.least), self.largest)

    def summary(self) -> dict[str, float | int | None]:
        """Count, mean and percentiles; null where there are none."""
        if not self.count:
            return {"count": 0, "mean": None, "p50": None, "p90": None, "p99": None, "max": None}
        quantiles = {f"p{round(q * 100)}": self.quantile(q) for q in (0.5, 0.9, 0.99)}
        return {"count": self.count, "mean": self.mean, **quantiles, "max": self.largest}


class Timeline:
    """Time-weighted means of several numbers in at most 512 intervals, which become twice as long whenever they do not
    suffice. ``interval``: seconds of one at first.
    """

    INTERVALS = 512

    def __init__(self, names: Sequence[str], interval: float = 1e-3) -> None:
        self.names = tuple(names)
        self.interval = interval
        self._rows: list[list[float]] = []  # seconds, and a sum of number * seconds per name

    def add(self, start: float, seconds: float, values: Sequence[float]) -> None:
        """The numbers were ``values`` from ``start`` on for so long."""
        if seconds <= 0:
            return
        while start >= self.interval * self.INTERVALS:
            self._halve()
        place = int(start / self.interval)
        while len(self._rows) <= place:
            self._rows.append([0.0] * (len(self.names) + 1))
        row = self._rows[place]  # all of it: a step is short beside what is looked at
        row[0] += seconds
        for index, value in enumerate(values, 1):
            row[index] += value * seconds

    def end_of_interval(self, start: float) -> float:
        """Where the interval ends in which what begins at ``start`` is counted."""
        while start >= self.interval * self.INTERVALS:
            self._halve()
        return (int(start / self.interval) + 1) * self.interval

    def _halve(self) -> None:
        rows, self.interval = self._rows, 2 * self.interval
        self._rows = [
            [a + b for a, b in zip(rows[index], rows[index + 1] if index + 1 < len(rows) else [0.0] * len(rows[index]))]
            for index in range(0, len(rows), 2)
        ]

    @property
    def total_seconds(self) -> float:
        """All time that was added."""
        return sum([row[0] for row in self._rows])

    def mean(self, name: str) -> float:
        """Over all time that was added; NaN of none."""
        seconds = self.total_seconds
        return self.total(name) / seconds if seconds else math.nan

    def total(self, name: str) -> float:
        """Sum of number * seconds."""
        column = self.names.index(name) + 1
        return sum([row[column] for row in self._rows])

    def series(self, name: str) -> list[tuple[float, float]]:
        """(middle of the interval, mean in it) of all intervals that hold something."""
        column = self.names.index(name) + 1
        return [
            ((place + 0.5) * self.interval, row[column] / row[0]) for place, row in enumerate(self._rows) if row[0] > 0
        ]
