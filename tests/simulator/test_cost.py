"""Fitted cost models: what they recover, what they make of outliers, and what is no cost model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from nemo_engine.simulator import CostModel, Measurement


def truth(num_decodes: int, context: int, prefills: list[tuple[int, int]]) -> float:
    tokens = sum(count for _, count in prefills)
    pairs = sum(start * count + count * (count + 1) / 2 for start, count in prefills)
    fixed = 1e-3 if num_decodes or prefills else 0.0
    return fixed + 4e-5 * num_decodes**0.9 + 2e-8 * context + 1e-5 * tokens + 1e-4 * len(prefills) + 1e-9 * pairs


def measured(count: int, noise: float, outliers: float, seed: int = 0) -> list[Measurement]:
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        num_decodes = rng.choice([0, 1, 2, 4, 8, 16, 32, 64])
        context = sum(rng.randrange(10, 2000) for _ in range(num_decodes))
        prefills = [(rng.choice([0, 512]), rng.randrange(1, 1024)) for _ in range(rng.choice([0, 0, 1, 3]))]
        if not num_decodes and not prefills:
            continue
        seconds = truth(num_decodes, context, prefills) * (1 + noise * rng.gauss(0, 1) ** 2)
        found.append(Measurement.of(num_decodes, context, prefills, seconds * (20 if rng.random() < outliers else 1)))
    return found


@pytest.mark.parametrize(("noise", "outliers", "most"), [(0.0, 0.0, 0.05), (0.05, 0.0, 0.12), (0.02, 0.05, 0.15)])
def test_a_fit_predicts_steps_that_it_has_not_seen(noise: float, outliers: float, most: float) -> None:
    model = CostModel.fit(measured(600, noise, outliers))
    for unseen in measured(200, 0.0, 0.0, seed=1):
        assert model.predict(unseen) == pytest.approx(unseen.seconds, rel=most, abs=2e-4)
    assert model.facts["num_measurements"] > 400 and model.facts["median_error"] < most
    assert model.context_seconds == pytest.approx(2e-8, rel=0.3)


def test_both_ways_of_asking_agree() -> None:
    model = CostModel.fit(measured(300, 0.01, 0.0))
    rng = random.Random(3)
    for _ in range(200):
        num_decodes = rng.randrange(0, 100)
        context = num_decodes * rng.randrange(1, 3000)
        prefills = [(rng.randrange(0, 2000), rng.randrange(1, 3000)) for _ in range(rng.randrange(0, 3))]
        if num_decodes:
            base, slope = model.decode_line(num_decodes)
            assert base + slope * context == pytest.approx(model.step_seconds(num_decodes, context, ()))
            alone = model.step_seconds(0, 0, prefills)
            saved = base + slope * context + alone - model.step_seconds(num_decodes, context, prefills)
            assert saved == pytest.approx(model.mixed_saving_seconds if prefills else 0.0)
    assert model.host_seconds(9) == 0


def test_a_model_is_kept_as_json(tmp_path: Path) -> None:
    model = CostModel.fit(measured(300, 0.01, 0.0), {"cpu": "a"})
    model.save(tmp_path / "m.json")
    assert CostModel.load(tmp_path / "m.json") == model and model.facts["cpu"] == "a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "x"}, "format must be 'nemo_engine cost model 1', got 'x'"),
        ({"context_seconds": -1}, "context_seconds must be a number of seconds of at least 0, got -1"),
        ({"context_seconds": None}, "context_seconds must be a number"),
        ({"decode": 3}, "decode must be a list"),
        ({"decode": [[2, 1.0], [1, 1.0]]}, "decode must have growing counts above 0"),
        ({"prefill": [[2, float("nan")]]}, "prefill must be a number of seconds"),
    ],
)
def test_what_is_no_cost_model(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "m.json"
    CostModel.fit(measured(300, 0.01, 0.0)).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        CostModel.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        CostModel.load(path)


def test_too_little_to_fit() -> None:
    with pytest.raises(ValueError, match="measurements must be at least 8 steps, got 3"):
        CostModel.fit(measured(300, 0.0, 0.0)[:3])
    with pytest.raises(ValueError, match="seconds above 0"):
        CostModel.fit([Measurement(1, 5, 0, 0, 0, 0.0)] * 9)
    decodes = CostModel.fit([Measurement(1, 5, 0, 0, 0, 0.5)] * 9)
    assert decodes.predict(Measurement(1, 5, 0, 0, 0, 0.0)) == pytest.approx(0.5) and decodes.prefill == ()


def test_curves_between_and_beyond_what_was_measured() -> None:
    """Seconds that are a straight line of the decode rows come back at every count up to and past the largest."""
    model = CostModel.fit([Measurement(n, 0, 0, 0, 0, 1e-3 + n * 1e-4) for n in (1, 2, 4, 8, 16, 24) for _ in range(3)])
    assert [count for count, _ in model.decode] == [1, 2, 4, 8, 24]  # 24 is too near 16, and the largest
    for n in (1, 3, 12, 24, 60):
        assert model.step_seconds(n, 0, ()) == pytest.approx(1e-3 + n * 1e-4, rel=1e-3)
