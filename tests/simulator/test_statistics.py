"""Quantiles within half a per cent, and time-weighted means at any length."""

from __future__ import annotations

import math
import random

import pytest

from nemo_engine.simulator.statistics import Sketch, Timeline


@pytest.mark.parametrize("seed", range(5))
def test_quantiles(seed: int) -> None:
    rng = random.Random(seed)
    values = [rng.lognormvariate(rng.choice([-9, 0, 3]), 1.5) for _ in range(rng.choice([1, 10, 5000]))]
    whole, parts = Sketch(), [Sketch(), Sketch()]
    for index, value in enumerate(values):
        whole.add(value)
        parts[index % 2].add(value)
    parts[0].merge(parts[1])
    ordered = sorted(values)
    for q in (0.0, 0.01, 0.5, 0.9, 0.99, 1.0):
        exact = ordered[max(1, math.ceil(q * len(ordered))) - 1]
        assert whole.quantile(q) == pytest.approx(exact, rel=0.0051)
        assert parts[0].quantile(q) == whole.quantile(q)
    assert whole.mean == pytest.approx(sum(values) / len(values)) and whole.largest == ordered[-1]


def test_weights_zeros_and_nothing() -> None:
    sketch = Sketch()
    assert math.isnan(sketch.quantile(0.5)) and math.isnan(sketch.mean) and sketch.summary()["p99"] is None
    sketch.add(0.0)
    sketch.add(2.0, 3)
    assert sketch.count == 4 and sketch.quantile(0.25) < 1e-8 and sketch.quantile(0.5) == pytest.approx(2.0, rel=0.0051)


@pytest.mark.parametrize("end", [0.01, 5.0, 1e5])
def test_timelines(end: float) -> None:
    rng = random.Random(1)
    line = Timeline(["a", "b"])
    now, total = 0.0, 0.0
    while now < end:
        seconds = rng.random() * end / 2000
        line.add(now, seconds, (1.0, now))
        total += seconds * now
        now += seconds
    assert line.mean("a") == pytest.approx(1.0) and line.mean("b") == pytest.approx(total / now)
    series = line.series("b")
    assert 200 < len(series) <= 512 or end < 0.5
    assert all(value == pytest.approx(when, abs=1.1 * line.interval) for when, value in series)
