"""A cost model that is fitted to measured steps of any machine, and kept as JSON.

The time of a step is the sum of a curve over its decode rows, a constant per key that these attend to, a curve over its
prefill tokens, and constants per prefill row and per pair of query and key in prefills, less a constant for steps with
both kinds of rows. All are at least 0, and the curves do not fall.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from nemo_engine.planner.roofline import Chunk, num_pairs

_FORMAT = "nemo_engine cost model 1"
_LEAST = 8  # measurements that a fit needs
_ROUNDS = 12  # each reweights the measurements, so that single slow steps matter little
_SWEEPS = 400
_RATIO = 1.8  # least ratio of neighbouring knots of a curve

Curve = tuple[tuple[int, float], ...]  # (count, seconds), by count


class Measurement(NamedTuple):
    """One measured step: decode rows, the keys that they attended to, prefill rows, their tokens and pairs of query and
    key, and its seconds.
    """

    num_decodes: int
    sum_context: int
    num_prefills: int
    prefill_tokens: int
    prefill_pairs: int
    seconds: float

    @classmethod
    def of(cls, num_decodes: int, sum_context: int, prefills: Sequence[Chunk], seconds: float) -> Measurement:
        """Make a measurement of the rows of a step."""
        pairs = sum(num_pairs(start, count) for start, count in prefills)
        return cls(num_decodes, sum_context, len(prefills), sum(count for _, count in prefills), pairs, seconds)


@dataclass(frozen=True, slots=True)
class CostModel:
    """``StepCost`` of one machine and model.

    ``facts`` describes the measurements. The seconds include the host's time.
    """

    decode: Curve
    context_seconds: float
    prefill: Curve
    prefill_row_seconds: float
    prefill_pair_seconds: float
    mixed_saving_seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(cls, measurements: Iterable[Measurement], facts: Mapping[str, Any] | None = None) -> CostModel:
        """The model with the least relative error, in which single outliers matter little.

        Raises ``ValueError`` if there are too few measurements.
        """
        measured = [m for m in measurements if m.num_decodes or m.num_prefills]
        if len(measured) < _LEAST:
            raise ValueError(f"measurements must be at least {_LEAST} steps, got {len(measured)}")
        for m in measured:
            if not 0 < m.seconds < float("inf") or min(m[:5]) < 0:
                raise ValueError(f"measurements must have seconds above 0 and no negative counts, got {m}")
        decode_knots = _knots(m.num_decodes for m in measured)
        prefill_knots = _knots(m.prefill_tokens for m in measured)
        rows = [_features(m, decode_knots, prefill_knots) for m in measured]
        weights = [1 / m.seconds for m in measured]
        size = len(decode_knots) + len(prefill_knots) + 4
        x = [0.0] * size
        floor = min(m.seconds for m in measured) / 2
        for _ in range(_ROUNDS):
            x = _least_squares(rows, [m.seconds for m in measured], weights, x)
            guesses = [max(_dot(row, x), floor) for row in rows]
            errors = [abs(guess - m.seconds) / guess for guess, m in zip(guesses, measured)]
            weights = [1 / guess / max(error, 0.01) ** 0.5 for guess, error in zip(guesses, errors)]
        context, row, pair, saving = x[-4:]
        d = len(decode_knots)
        errors.sort()
        about = {
            "num_measurements": len(measured),
            "median_error": statistics.median(errors),
            "p90_error": errors[int(0.9 * (len(errors) - 1))],
        }
        return cls(
            tuple(zip(decode_knots, accumulate(x[:d]))), context, tuple(zip(prefill_knots, accumulate(x[d:-4]))), row,
            pair, saving, {**about, **(facts or {})},
        )  # fmt: skip

    def decode_line(self, num_decodes: int) -> tuple[float, float]:
        """See ``StepCost``."""
        return _value(self.decode, num_decodes), self.context_seconds

    def step_seconds(self, num_decodes: int, sum_context: int, prefills: Sequence[Chunk], width: int = 1) -> float:
        """See ``StepCost``: a row of several tokens takes what as many rows do, as on a CPU."""
        return self.predict(Measurement.of(num_decodes * width, sum_context * width, prefills, 0.0))

    def host_seconds(self, num_rows: int) -> float:
        """See ``StepCost``: contained in the steps."""
        return 0.0

    def predict(self, m: Measurement) -> float:
        """Seconds of a step like ``m``."""
        seconds = _value(self.decode, m.num_decodes) + self.context_seconds * m.sum_context if m.num_decodes else 0.0
        if m.num_prefills:
            seconds += _value(self.prefill, m.prefill_tokens) + self.prefill_row_seconds * m.num_prefills
            seconds += self.prefill_pair_seconds * m.prefill_pairs
            seconds -= self.mixed_saving_seconds if m.num_decodes else 0.0
        return max(0.0, seconds)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps({"format": _FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> CostModel:
        """Read what ``save`` wrote. Raises ``ValueError`` naming the file and the field."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: is not JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError(
                f"{path}: format must be {_FORMAT!r}, got {data.get('format') if isinstance(data, dict) else data!r}"
            )
        values: dict[str, Any] = {}
        for name in ("context_seconds", "prefill_row_seconds", "prefill_pair_seconds", "mixed_saving_seconds"):
            values[name] = _seconds(data.get(name), f"{path}: {name}")
        for name in ("decode", "prefill"):
            values[name] = _curve(data.get(name), f"{path}: {name}")
        return cls(**values, facts=data.get("facts") or {})


def _seconds(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a number of seconds of at least 0, got {value!r}")
    return float(value)


def _curve(value: object, name: str) -> Curve:
    if not isinstance(value, list) or not all(isinstance(point, list) and len(point) == 2 for point in value):
        raise ValueError(f"{name} must be a list of [count, seconds], got {value!r}")
    counts = [count for count, _ in value]
    if not all(isinstance(count, int) and count > 0 for count in counts) or counts != sorted(set(counts)):
        raise ValueError(f"{name} must have growing counts above 0, got {counts!r}")
    return tuple((count, _seconds(seconds, name)) for count, seconds in value)


def _knots(counts: Iterable[int]) -> list[int]:
    """Measured counts above 0, thinned to ratios of at least ``_RATIO``; the smallest and the largest stay."""
    knots: list[int] = []
    distinct = sorted({count for count in counts if count > 0})
    for count in distinct:
        if not knots or count >= knots[-1] * _RATIO:
            knots.append(count)
    if len(knots) > 1 and distinct[-1] != knots[-1]:
        knots[-1] = distinct[-1]
    return knots


def _place(knots: Sequence[int], count: int) -> tuple[int, float]:
    """The knot at or before ``count``, and the part of the way from it to the next one: 0 up to the first knot, above 1
    beyond the last.
    """
    if count <= knots[0] or len(knots) == 1:
        return 0, 0.0
    index = len(knots) - 2
    while knots[index] > count:
        index -= 1
    return index, (count - knots[index]) / (knots[index + 1] - knots[index])


def _value(curve: Curve, count: int) -> float:
    """The curve at ``count``: linear between points and beyond the last, constant before the first, 0 if empty."""
    if not curve:
        return 0.0
    index, part = _place([knot for knot, _ in curve], count)
    here = curve[index][1]
    if part == 0.0:
        return here
    slope = curve[index + 1][1] - here
    return here + part * slope if part <= 1 else curve[index + 1][1] + (part - 1) * max(0.0, slope)


def _features(m: Measurement, decode_knots: Sequence[int], prefill_knots: Sequence[int]) -> list[tuple[int, float]]:
    """(index, factor) of everything that is not 0."""
    row: list[tuple[int, float]] = []
    first = 0
    for knots, count in ((decode_knots, m.num_decodes), (prefill_knots, m.prefill_tokens)):
        if count:
            index, part = _place(knots, count)  # a curve is the sum of its rises from knot to knot
            row += [(first + before, 1.0) for before in range(index + 1)]
            if part:
                row.append((first + index + 1, part))
        first += len(knots)
    factors = (m.sum_context, m.num_prefills, m.prefill_pairs, -1.0 if m.num_decodes and m.num_prefills else 0.0)
    row += [(first + index, float(factor)) for index, factor in enumerate(factors) if factor]
    return row


def _dot(row: Sequence[tuple[int, float]], x: Sequence[float]) -> float:
    return sum([factor * x[index] for index, factor in row])


def _least_squares(
    rows: Sequence[Sequence[tuple[int, float]]], targets: Sequence[float], weights: Sequence[float], start: list[float]
) -> list[float]:
    """Weighted least squares with all unknowns at least 0, by descent along one unknown after the other."""
    size = len(start)
    gram = [[0.0] * size for _ in range(size)]
    right = [0.0] * size
    for row, target, weight in zip(rows, targets, weights):
        square = weight * weight
        for i, a in row:
            right[i] += square * a * target
            line = gram[i]
            for j, b in row:
                line[j] += square * a * b
    x = start[:]
    for _ in range(_SWEEPS):
        change = 0.0
        for i in range(size):
            line = gram[i]
            if line[i] <= 0:
                continue
            value = max(0.0, x[i] + (right[i] - sum([a * b for a, b in zip(line, x)])) / line[i])
            change = max(change, abs(value - x[i]) * line[i] ** 0.5)
            x[i] = value
        if change < 1e-9:
            break
    return x
