"""Results: reading lines that ``append_record`` wrote, and what may be computed from several of them."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
# What two results must share to be put into one ratio.
_MACHINE = ("cpu", "cores", "usable_cores", "memory_gib", "gpu", "gpu_driver")
_SAME = (*_MACHINE, "commit")


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of some numbers."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of at least one number."""
        numbers = list(values)
        return cls(statistics.median(numbers), min(numbers), max(numbers))

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times more one is than the other, paired round by round: the median, and an interval that holds it with
    ``level``.
    """

    median: float
    low: float
    high: float
    level: float

    @classmethod
    def paired(cls, ours: Sequence[float], theirs: Sequence[float], level: float = 0.95) -> Ratio:
        """The ratio of rounds measured in turns; the interval is that of 2,000 bootstrap samples of the rounds."""
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
    quantiles = {}
    for level in levels:
        place = (len(ordered) - 1) * level / 100
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        quantiles[f"p{level:g}"] = ordered[below] + (ordered[above] - ordered[below]) * (place - below)
    return quantiles


def read(path: Path) -> list[Record]:
    """The lines of a results file, or of all ``*.jsonl`` of a folder, each with where it stands (``file``, ``line``).

    ``ValueError`` naming file and line for what is no result.
    """
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    records = []
    for file in files:
        try:
            lines = file.read_text("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: is not text in UTF-8: {error}") from None
        for number, line in enumerate(lines, 1):
            records.append({**_parse(line, f"{file}:{number}"), "file": file.name, "line": number})
    return records


def _parse(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: is not a line of JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("benchmark"), str):
        raise ValueError(f"{where}: is no result: it has no field benchmark with a name in it")
    for name in ("cpu", "commit", "command", "date"):
        if not isinstance(record.get(name), str):
            raise ValueError(f"{where}: is no result: it does not say its {name}")
    return record


class BadResult(ValueError):
    """A line whose fields are not those of its benchmark."""


@contextmanager
def blaming(record: Record) -> Iterator[None]:
    """Turns what goes wrong with a result's fields into a ``BadResult`` that names file and line."""
    where = f"{record.get('file')}:{record.get('line')}: a result of {record['benchmark']}"
    try:
        yield
    except BadResult:
        raise
    except KeyError as error:
        raise BadResult(f"{where} has no field {error}") from None
    except (TypeError, AttributeError, IndexError, ArithmeticError, ValueError) as error:
        raise BadResult(f"{where} cannot be shown: {error}") from None


def same_place(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two results must share to be put into one ratio: machine, GPU and commit."""
    return tuple(record.get(name) for name in _SAME)


def same_machine(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """The machine and GPU of a result."""
    return tuple(record.get(name) for name in _MACHINE)


def same_run(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two results of one run share: place, and the command and its time."""
    return (*same_place(record), record.get("command"), record.get("date"))


def ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any], rounds: str) -> Ratio:
    """How many times more ``rounds`` is in one result than in the other, round by round of one run.

    ``ValueError`` if they may not be compared.
    """
    check_comparable(ours, theirs)
    if same_run(ours) != same_run(theirs):
        raise ValueError(f"rounds of two runs are not paired: {ours.get('date')} and {theirs.get('date')}")
    return Ratio.paired(ours[rounds], theirs[rounds])


def check_comparable(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """``ValueError`` unless two results come from one machine and one commit."""
    for name, value, other in zip(_SAME, same_place(first), same_place(second)):
        if value != other:
            raise ValueError(f"results of different {name} are not put into one ratio: {value!r} and {other!r}")
