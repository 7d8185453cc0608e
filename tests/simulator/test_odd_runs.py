"""Whole simulations that are odd: ties, tiny caches, more replicas than requests, what can never run, and input that is
refused.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable
from typing import Any

import pytest

from nemo_engine.simulator import ROUTINGS, EngineShape, Results, Setting, simulate
from nemo_engine.workload import Arrivals, Item, Turn
from tests.simulator.costs import SimpleCost

SHAPE = EngineShape(
    num_pages=100, page_size=16, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=400,
    enable_prefix_caching=True, pipeline_depth=2,
)  # fmt: skip


def run(items: Iterable[Item], arrivals: Arrivals | None = None, shape: EngineShape = SHAPE, **options: Any) -> Results:
    return simulate(items, arrivals or Arrivals("file"), Setting(shape, options.pop("cost", SimpleCost()), **options))


def item(name: str, prompt: int, output: int, when: float = 0.0, **options: Any) -> Item:
    return Item(name, (Turn(prompt, output, prompt),), when, **options)


def odd_items(rng: random.Random, limit: int) -> list[Item]:
    """``limit``: tokens of the longest request that can run."""
    now, items = rng.choice([0.0, 5.0, 1e6]), []
    for index in range(rng.choice([0, 1, 7, 25, 40])):
        now += rng.choice([0, 0, 0, 0.01, 0.3])
        turns = []
        for _ in range(rng.choice([1, 1, 1, 1, 4])):
            count, output = [rng.randint(1, max(1, rng.choice([40, limit // 2, limit // 3]))) for _ in range(2)]
            turns.append(Turn(count, output, count, rng.choice([0, 0, 0, 0.5])))
        prefix = rng.choice([None, None, None, "a", "b", "c"])
        items.append(Item(f"{index}", tuple(turns), now, prefix, 17 if prefix else 0, rng.choice([0, 1, -3])))
    return items


@pytest.mark.parametrize("first_seed", range(0, 200, 50))
def test_odd_settings_keep_their_books(first_seed: int) -> None:
    num_refused = num_preemptions = 0
    for seed in range(first_seed, first_seed + 50):
        rng = random.Random(seed)
        max_num_seqs = rng.choice([1, 4, 8])
        shape = EngineShape(
            num_pages=rng.choice([1, 4, 8, 40]),
            page_size=rng.choice([1, 2, 16]),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + rng.choice([0, 1, 8, 50]),
            max_model_len=rng.choice([4, 80, 400, 400]),
            enable_prefix_caching=rng.random() < 0.6,
            pipeline_depth=rng.choice([1, 2]),
        )
        limit = min(shape.max_model_len, shape.num_pages * shape.page_size + 1)
        items = odd_items(rng, limit)
        arrivals = rng.choice(
            [
                Arrivals("file"),
                Arrivals("closed", concurrency=rng.choice([1, 3, 50])),
                Arrivals("poisson", 5.0),
                Arrivals("poisson", 1e4),
            ]
        )
        cost = rng.choice([SimpleCost(), SimpleCost(0, 0, 0), SimpleCost(1e-3, 0, 1e-7, 1e-2)])
        options: dict[str, Any] = {
            "cost": cost, "replicas": rng.choice([1, 1, 2, 40]), "routing": rng.choice(ROUTINGS), "use_priorities":
            rng.random() < 0.5,
        }  # fmt: skip
        found = run(items, arrivals, shape, **options)
        finished, refused, tokens = 0, 0, 0
        for one in items:  # a conversation goes on until it would be too long
            length = one.prefix_tokens
            for turn in one.turns:
                length += (turn.num_tokens or 0) + turn.output_tokens
                if length > limit:
                    refused += 1
                    break
                finished, tokens = finished + 1, tokens + turn.output_tokens
        assert (found.num_items, found.num_finished, found.num_refused) == (len(items), finished, refused), seed
        assert found.itl.count == tokens - finished and found.ttft.count == found.e2e.count == finished, seed
        assert found.output_tokens_per_s * found.duration_s == pytest.approx(tokens if found.duration_s else 0), seed
        assert found.ttft.least >= 0 and found.queue.least >= 0 and found.recomputed_tokens >= 0, seed
        assert 0 <= found.mean_kv_used <= found.peak_kv_used + 1e-9 <= 1 + 1e-9, seed
        assert found.mean_decode_rows <= found.mean_running + 1e-9 <= max_num_seqs + 1e-6, seed
        assert found.busy_fraction <= 1 + 1e-9, seed
        json.dumps(found.as_json(), allow_nan=False)
        num_refused += refused
        num_preemptions += found.num_preemptions
    assert num_refused > 20 and num_preemptions > 5  # or nothing was tried


@pytest.mark.parametrize("when", [0.0, 3e7])
def test_replicas_at_the_very_same_time_go_on(when: float) -> None:
    """Also where the smallest step of the clock is far above a picosecond."""
    items = [Item(f"{index}", (Turn(20, 5, 20), Turn(20, 5, 20)), when) for index in range(6)]
    found = run(items, replicas=2)
    assert found.num_finished == 12 and found.duration_s == pytest.approx(run(items, replicas=2).duration_s)


def test_no_prefix_is_taken_for_another() -> None:
    apart = [item(name, 8, 2, 10.0 * index, prefix=name, prefix_tokens=64) for index, name in enumerate("abcdef")]
    assert run(apart).prefix_hit_rate == 0
    again = [dataclasses.replace(one, arrival_s=(one.arrival_s or 0.0) + 100) for one in apart]
    assert run([*apart, *again]).prefix_hit_rate == pytest.approx(64 / 72 / 2)


def test_means_are_over_all_replicas_and_the_time_from_first_to_last() -> None:
    found = [
        run([item("a", 10, 200, when)], replicas=replicas) for when, replicas in ((0.0, 1), (500.0, 1), (500.0, 4))
    ]
    alone, late, of_four = found
    assert alone.mean_running == pytest.approx(1.0) and late.mean_running == pytest.approx(1.0)
    assert of_four.mean_running == pytest.approx(0.25) and of_four.busy_fraction == pytest.approx(
        late.busy_fraction / 4
    )
    assert of_four.mean_kv_used == pytest.approx(alone.mean_kv_used / 4) and of_four.peak_kv_used == alone.peak_kv_used


def test_arrivals_of_a_file_are_in_order() -> None:
    with pytest.raises(
        ValueError, match=r"request 'b': arrival_s must not be before that of the item before it \(2.0\), got 1.0"
    ):
        run([item("a", 5, 5, 2.0), item("b", 5, 5, 1.0)])


def test_a_prompt_of_nothing_is_refused() -> None:
    items = [Item("a", (Turn("?", 5),), 0.0), Item("b", (Turn("abc", 5),), 0.0)]
    found = simulate(
        items, Arrivals("file"), Setting(SHAPE, SimpleCost()), encode=lambda text: [] if text == "?" else [1, 2, 3]
    )
    assert (found.num_finished, found.num_refused) == (1, 1)
    assert found.first_refusal == "request 'a': a prompt must have at least 1 token, got 0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_pages": 0}, "num_pages must be at least 1, got 0"),
        ({"page_size": -1}, "page_size must be at least 1, got -1"),
        ({"max_num_batched_tokens": 3}, r"max_num_batched_tokens must be at least max_num_seqs \(4\), got 3"),
        ({"pipeline_depth": 3}, "pipeline_depth must be 1 or 2, got 3"),
    ],
)
def test_what_is_no_engine(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHAPE, **change)
