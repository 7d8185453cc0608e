"""Results: JSON lines with provenance, and what may be computed from several of them."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
_SAME = ("cpu", "cores", "gpu", "commit")  # what two results must share to be put into one ratio


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of some numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one number."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times more one is than the other, paired round by round: the median, and an interval that holds it with ``level``."""

    median: float
    low: float
    high: float
    level: float

    @classmethod
    def paired(cls, ours: Sequence[float], theirs: Sequence[float], level: float = 0.95) -> Ratio:
        """Of rounds measured in turns; the interval is that of 2,000 bootstrap samples of the rounds."""
        if len(ours) != len(theirs) or not ours:
            raise ValueError(f"rounds must be paired, got {len(ours)} and {len(theirs)}")
        ratios = [a / b for a, b in zip(ours, theirs)]
        rng = random.Random(0)
        medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
        tail = (1 - level) / 2
        return cls(statistics.median(ratios), medians[int(tail * 1999)], medians[int((1 - tail) * 1999)], level)

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


def percentiles(values: Sequence[float], levels: Sequence[float] = (50, 90, 95, 99)) -> dict[str, float]:
    """``{"p50": ...}`` by linear interpolation; empty of no values."""
    if not values:
        return {}
    ordered = sorted(values)
    found = {}
    for level in levels:
        place = (len(ordered) - 1) * level / 100
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        found[f"p{level:g}"] = ordered[below] + (ordered[above] - ordered[below]) * (place - below)
    return found


def append(path: Path, records: Iterable[Record]) -> None:
    """Add lines to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[Record]:
    """The lines of a results file, or of all ``*.jsonl`` of a folder. ``ValueError`` naming file and line for what is none."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    records = []
    for file in files:
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}:{number}: is not a line of JSON: {error}") from None
            if not isinstance(record, dict) or "benchmark" not in record:
                raise ValueError(f"{file}:{number}: is no result: it has no field benchmark")
            records.append({**record, "file": file.name})
    return records


def check_comparable(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """``ValueError`` unless two results come from one machine and one commit."""
    for name in _SAME:
        if first.get(name) != second.get(name):
            raise ValueError(
                f"results of different {name} are not put into one ratio: {first.get(name)!r} and {second.get(name)!r}"
            )
