"""Several replicas: who gets a request, replicas that are lost, come and go, and that it does not matter which is run
when.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any

import pytest

from nemo_engine.scaling import replicas_wanted
from nemo_engine.simulator import ROUTINGS, Changes, EngineShape, Load, Results, Setting, simulate
from nemo_engine.simulator.replica import Replica
from nemo_engine.simulator.routing import Router
from nemo_engine.workload import Arrivals, Item, Turn
from tests.simulator.costs import SimpleCost

SHAPE = EngineShape(
    num_pages=300, page_size=16, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=2000,
    enable_prefix_caching=True, pipeline_depth=2,
)  # fmt: skip


def run(items: list[Item], shape: EngineShape = SHAPE, **options: Any) -> Results:
    return simulate(items, Arrivals("file"), Setting(shape, options.pop("cost", SimpleCost()), **options))


def conversations(seed: int, count: int, every_s: float = 0.5) -> list[Item]:
    rng, now, items = random.Random(seed), 0.0, []
    for index in range(count):
        now += rng.choice([0, 0, rng.expovariate(1 / every_s)])
        turns = []
        for _ in range(rng.choice([1, 2, 4])):
            tokens = rng.randint(1, 150)
            turns.append(Turn(tokens, rng.randint(1, 60), tokens, rng.choice([0, 0, 0.1, 2.0])))
        prefix = rng.choice([None, "a", "b"])
        items.append(Item(f"{index}", tuple(turns), now, prefix, 33 if prefix else 0, rng.choice([0, 1])))
    return items


def router(routing: str, count: int, num_pages: int = 100) -> Router:
    made = Router(routing, num_pages)
    for replica in range(count):
        made.add(replica)
    return made


@pytest.mark.parametrize("seed", range(8))
def test_a_replica_that_is_run_late_is_where_it_would_be(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replica is brought to every arrival, and no step is run before one of another replica that is due before
    it: times are the same to the last bit.
    """
    rng = random.Random(seed)
    shape = dataclasses.replace(
        SHAPE, num_pages=rng.choice([130, 300]), pipeline_depth=1 + seed % 2, max_num_seqs=rng.choice([2, 4, 8])
    )
    options: dict[str, Any] = {
        "replicas": rng.choice([2, 3, 9]), "routing": ROUTINGS[seed % 4], "use_priorities": rng.random() < 0.5,
        "cost": rng.choice([SimpleCost(), SimpleCost(1e-3, 1e-4, 1e-6, 1e-3)]),
        "changes": Changes(losses_per_hour=rng.choice([0, 60]), boot_s=5),
    }  # fmt: skip
    items = conversations(seed, 80)
    late = run(items, shape, **options).as_json()
    monkeypatch.setattr(Replica, "earliest_end", lambda self: self.now if self.num_unfinished else float("inf"))
    plain = run(items, shape, **options).as_json()
    for name, value in plain.items():
        if name in ("mean_kv_used", "mean_running", "mean_decode_rows", "busy_fraction", "most_busy", "itl_s"):
            assert late[name] == pytest.approx(value), name  # sums in another order
        elif name != "series" and "wall" not in name:
            assert late[name] == value, name


def test_a_replica_is_run_when_something_may_end_and_not_at_each_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[int] = Counter()
    plain = Replica.run_until

    def counting(self: Replica, *args: Any, **options: Any) -> None:
        counts[num_replicas] += 1
        plain(self, *args, **options)

    monkeypatch.setattr(Replica, "run_until", counting)
    for num_replicas in (2, 60):
        run(conversations(0, 100), replicas=num_replicas, routing="least-loaded")
    assert counts[60] < 2 * counts[2]


def test_in_turn_and_to_the_least_loaded() -> None:
    turns = router("round-robin", 3)
    assert [turns.choose("", ()) for _ in range(5)] == [0, 1, 2, 0, 1]
    turns.remove(1)
    assert sorted(turns.choose("", ()) for _ in range(4)) == [0, 0, 2, 2]
    least = router("least-loaded", 3)
    assert sorted(least.choose("", ()) for _ in range(6)) == [0, 0, 1, 1, 2, 2]
    least.ended(1)
    least.add(3)
    assert [least.choose("", ()) for _ in range(3)].count(3) == 2
    least.remove(3)
    assert 3 not in [least.choose("", ()) for _ in range(6)]


def test_a_session_stays_and_only_those_of_a_lost_replica_move() -> None:
    sessions = [f"{index}" for index in range(600)]
    ring = router("session-affinity", 6)
    before = {session: ring.choose(session, ()) for session in sessions}
    assert before == {session: ring.choose(session, ()) for session in sessions}
    assert min(Counter(before.values()).values()) > 50  # of 100 in the mean
    ring.remove(2)
    after = {session: ring.choose(session, ()) for session in sessions}
    assert {session for session in sessions if after[session] != before[session]} == {
        session for session in sessions if before[session] == 2
    }
    assert len({after[session] for session in sessions if before[session] == 2}) == 5, "one replica got them all"


def test_the_prefix_decides_until_its_holder_is_far_ahead() -> None:
    aware = router("prefix-aware", 3)
    (holder,) = {aware.choose("", ["a", "b"]) for _ in range(8)}
    assert aware.choose("", ["x"]) != holder
    assert [aware.choose("", ["a", "c"]) for _ in range(3)].count(holder) == 1, "it is far ahead of the least loaded"
    second = aware.choose("", ["a", "c"])
    assert second != holder, "of two with the prefix the less loaded one"
    aware.remove(second)
    assert aware.choose("", ["c", "a"]) != second


def test_what_a_replica_can_no_longer_have_is_forgotten_and_the_prefix_last() -> None:
    aware = router("prefix-aware", 2, num_pages=3)
    holder = aware.choose("", ["a", "b", "c"])
    other = aware.choose("", ["x"])
    assert other != holder
    assert aware.choose("", ["x", "y", "z", "w"]) == other
    aware.ended(other)
    aware.ended(other)
    assert aware.choose("", ["a"]) == holder
    for _ in range(2):
        aware.ended(holder)
    aware.choose("", ["x", "y", "z"])  # to its holder, which had room for three of four
    assert [aware._sent.holders([page]) != {} for page in "abcxyzw"] == [True, True, True, True, True, True, False]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_requests_of_a_lost_replica_are_asked_again_and_end(routing: str) -> None:
    items = conversations(3, 200)
    options: dict[str, Any] = {"replicas": 4, "routing": routing}
    calm = run(items, **options)
    found = run(items, **options, changes=Changes(losses_per_hour=300, boot_s=3, retry_s=0.25))
    assert found.num_finished == calm.num_finished == sum(len(item.turns) for item in items)
    assert found.num_lost_replicas > 3 and found.num_lost_requests > 3
    assert found.ttft.largest > 0.25 and found.e2e.mean > calm.e2e.mean
    up = [count for _, count in found.series["replicas"]]
    assert up[-1] <= 4 and min(up[3:]) >= 1 and found.replica_s < 4 * found.duration_s
    alone = run(items[:40], replicas=1, changes=Changes(losses_per_hour=3600))
    assert alone.num_lost_replicas == 0 and alone.num_finished > 0  # the last one stays


def test_replicas_come_with_a_load_that_lasts_and_go_after_it() -> None:
    def item(index: int, when: float) -> Item:
        return Item(f"{index}", (Turn(16, 40, 16),), when)

    rise = [item(index, 0.1 * index) for index in range(1500)]  # ten a second, of which a replica does some 2
    fall = [item(1500 + index, 150 + 5.0 * index) for index in range(60)]
    changes = Changes(
        boot_s=5, period_s=1, upscale_s=3, downscale_s=20,
        wanted=lambda load: replicas_wanted(load.replicas, load.running, load.waiting, load.kv_use, load.slots),
    )  # fmt: skip
    found = run([*rise, *fall], replicas=1, routing="least-loaded", changes=changes)
    times = found.series["replicas"]
    most = max(count for _, count in times)
    assert found.num_finished == 1560 and most > 4 and times[-1][1] <= most / 2
    assert times[1][0] == pytest.approx(1 + 3 + 5, abs=1.1)  # seen, lasted, started
    alone = run([*rise, *fall], replicas=1, routing="least-loaded")
    assert found.queue.quantile(0.9) < 0.3 * alone.queue.quantile(0.9)
    assert found.replica_s < most * found.duration_s


def test_requests_that_run_do_not_count_as_waiting() -> None:
    """Two long ones run on a replica that is behind when it is looked at."""
    seen: list[Load] = []

    def note(load: Load) -> int:
        seen.append(load)
        return load.replicas

    items = [Item(f"{index}", (Turn(16, 400, 16),), 0.0) for index in range(2)]
    run(items, changes=Changes(wanted=note, period_s=2.0))
    assert [(load.running, load.waiting) for load in seen[:3]] == [(2, 0)] * 3


@pytest.mark.parametrize(
    ("load", "wanted"),
    [
        ((1, 0, 0, 0.0, 8), 1), ((2, 3, 0, 0.1, 8), 1), ((2, 6, 0, 0.1, 8), 2), ((2, 16, 1, 0.5, 8), 3),
        ((2, 16, 100, 0.5, 8), 19), ((3, 12, 12, 0.95, 8), 6), ((3, 12, 0, 0.95, 8), 4), ((1, 0, 3, 0.95, 8), 3),
    ],
)  # fmt: skip
def test_how_many_replicas_a_load_wants(load: tuple[int, float, float, float, float], wanted: int) -> None:
    assert replicas_wanted(*load) == wanted


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"losses_per_hour": -1}, "losses_per_hour must be finite and at least 0, got -1"),
        ({"period_s": 0}, "period_s must be finite and greater than 0, got 0"),
    ],
)
def test_changes_that_are_none(change: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Changes(**change)  # type: ignore[arg-type]
