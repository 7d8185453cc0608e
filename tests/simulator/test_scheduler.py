"""Simulated decisions and times are those of the plain scheduler, driven step by step by a loop that is written here
once more.
"""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from unittest.mock import patch

import pytest

from nemo_engine.config import EngineConfig
from nemo_engine.planner.efficiency import Efficiencies
from nemo_engine.planner.gpus import find_gpu
from nemo_engine.planner.models import BUILT_IN, PlannedModel, formats_of
from nemo_engine.planner.roofline import Roofline, StepCost
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.scheduler import Request, Scheduler
from nemo_engine.simulator import replica as replica_module
from nemo_engine.simulator.replica import EngineShape, Replica
from nemo_engine.simulator.scheduler import ANSWER, SimulatedRequest, SteadyRun
from nemo_engine.simulator.statistics import Sketch
from nemo_engine.step import StepPlan, StepResult
from tests.scheduler.invariants import check
from tests.simulator.costs import SimpleCost


@dataclass(frozen=True)
class Arrival:
    time: float
    tokens: list[int]
    num_out: int
    priority: int


@dataclass
class Seen:
    """What a run came to."""

    plans: dict[int, StepPlan] = field(default_factory=dict)
    new_pages: dict[int, tuple[tuple[int, int, int], ...]] = field(default_factory=dict)
    firsts: dict[int, float] = field(default_factory=dict)
    ends: dict[int, float] = field(default_factory=dict)
    itl: Sketch = field(default_factory=lambda: Sketch())
    num_steps: int = 0
    hits: int = 0
    preemptions: int = 0
    recomputed: int = 0


def workload(rng: random.Random) -> tuple[EngineShape, list[Arrival]]:
    page_size = 16
    shape = EngineShape(
        num_pages=rng.choice([12, 20, 60]),
        page_size=page_size,
        max_num_seqs=rng.choice([1, 3, 8]),
        max_num_batched_tokens=rng.choice([8, 24, 500]),
        max_model_len=12 * page_size,
        enable_prefix_caching=rng.random() < 0.7,
        pipeline_depth=rng.choice([1, 2]),
    )
    heads = [[rng.randrange(9)] * rng.randrange(1, 60) for _ in range(3)]
    now, arrivals = 0.0, []
    for index in range(rng.randrange(1, 60)):
        now += rng.choice([0, 0, 1, 7, 300]) / 64
        tokens = rng.choice(heads)[:] if rng.random() < 0.5 else []
        tokens += [1000 + index] * rng.randrange(1, 60)
        arrivals.append(
            Arrival(now, tokens, rng.randrange(1, 12 * page_size - len(tokens)), rng.choice([0, 0, 0, -1, 2]))
        )
    return shape, arrivals


def odd_workload(rng: random.Random) -> tuple[EngineShape, list[Arrival]]:
    """Pages of a token, caches of a page, requests that fill all of the cache, many at one time."""
    page_size, most_pages = rng.choice([1, 2, 5]), rng.choice([1, 2, 7])
    max_num_seqs = rng.choice([1, 2, 6])
    shape = EngineShape(
        num_pages=most_pages * rng.choice([1, 1, 2, 3]),
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.choice([0, 1, 30]),
        max_model_len=most_pages * page_size + 1,  # the last token's key and value are never computed
        enable_prefix_caching=rng.random() < 0.7,
        pipeline_depth=rng.choice([1, 2]),
    )
    now, arrivals = 0.0, []
    for index in range(rng.randrange(1, 40)):
        now += rng.choice([0, 0, 0, 1, 40]) / 64
        tokens = [rng.choice([7, 7, index + 100])] * rng.randint(1, shape.max_model_len - 1)
        if arrivals and rng.random() < 0.4:  # what another one is about to generate goes on in the prompt
            earlier = rng.choice(arrivals[-3:])
            tokens = (earlier.tokens + [0] * rng.randint(0, earlier.num_out))[: shape.max_model_len - 1]
        num_out = rng.choice([1, shape.max_model_len - len(tokens)])
        arrivals.append(Arrival(now, tokens, num_out, rng.choice([0, 0, -1, 2])))
    return shape, arrivals


def reference(shape: EngineShape, arrivals: Sequence[Arrival], cost: SimpleCost) -> Seen:
    seen = Seen()
    now, free = 0.0, 0.0
    scheduler = Scheduler(
        num_pages=shape.num_pages, page_size=shape.page_size, max_num_seqs=shape.max_num_seqs,
        max_num_batched_tokens=shape.max_num_batched_tokens, max_model_len=shape.max_model_len,
        enable_prefix_caching=shape.enable_prefix_caching, clock=lambda: now,
    )  # fmt: skip
    to_come = deque(enumerate(arrivals))
    in_flight: deque[tuple[float, StepPlan]] = deque()
    computed: dict[int, int] = {}  # by slot
    most_computed: dict[Request, int] = {}
    token_times: dict[str, list[float]] = {}
    while to_come or scheduler.has_unfinished():
        if not scheduler.has_unfinished():
            now = max(now, to_come[0][1].time)
        while to_come and to_come[0][1].time <= now:
            index, arrival = to_come.popleft()
            params = SamplingParams(max_tokens=arrival.num_out, ignore_eos=True)
            scheduler.add(Request(str(index), arrival.tokens, params, priority=arrival.priority))
        plan = scheduler.schedule()
        if plan is not None:
            seen.plans[plan.step_id] = plan
            computed |= {fill.slot: fill.num_computed_tokens for fill in plan.fills}
            context = sum(computed[slot] + 1 for slot in plan.decode_slots)
            for slot in plan.decode_slots:
                computed[slot] += 1
            requests = {request.slot: request for request in scheduler.running.all()}
            for row in plan.prefills:
                computed[row.slot] += row.num_tokens
                end = min(row.start + row.num_tokens, most_computed.get(requests[row.slot], 0))
                seen.recomputed += max(0, end - row.start)
            for slot, request in requests.items():
                most_computed[request] = max(most_computed.get(request, 0), computed[slot])
            now += cost.host
            chunks = [(row.start, row.num_tokens) for row in plan.prefills]
            free = max(free, now) + cost.step_seconds(len(plan.decode_slots), context, chunks)
            in_flight.append((free, plan))
            if len(in_flight) < shape.pipeline_depth:
                continue
        end, plan = in_flight.popleft()
        now = max(now, end)
        rows = len(plan.decode_slots) + sum(row.samples for row in plan.prefills)
        committed = scheduler.commit(StepResult(plan.step_id, [0] * rows))
        check(scheduler)
        seen.num_steps += 1
        for request in committed.requests:
            token_times.setdefault(request.request_id, []).append(now)
        for request in committed.finished:
            times = token_times[request.request_id]
            assert len(times) == request.num_output_tokens
            seen.firsts[int(request.request_id)], seen.ends[int(request.request_id)] = times[0], now
    for times in token_times.values():
        for before, after in zip(times, times[1:]):
            seen.itl.add(after - before)
    stats = scheduler.stats()
    seen.hits, seen.preemptions = stats.total_prefix_hit_tokens, stats.total_preemptions
    assert stats.num_free_pages == shape.num_pages
    return seen


def simulated(
    shape: EngineShape, arrivals: Sequence[Arrival], cost: StepCost, is_stepwise: bool = False
) -> tuple[Seen, Replica]:
    """``is_stepwise``: every step is planned, none is passed over."""
    seen = Seen()

    def finished(request: SimulatedRequest, now: float) -> None:
        index = request.origin
        assert isinstance(index, int) and request.first_token_s is not None
        seen.firsts[index], seen.ends[index] = request.first_token_s, now
        assert request.max_total_tokens == len(arrivals[index].tokens) + arrivals[index].num_out
        assert request.token_ids == arrivals[index].tokens + [ANSWER] * arrivals[index].num_out

    replica = Replica(shape, cost, finished)
    scheduler = replica.scheduler
    schedule, num_passed_over = scheduler.schedule, 0
    last = 0  # the number of the step that was planned or passed over last

    def planned() -> StepPlan | None:
        nonlocal last
        plan = schedule()
        if plan is not None:
            last = plan.step_id + num_passed_over
            seen.plans[last] = dataclasses.replace(plan, step_id=last)
        check(scheduler)
        return plan

    class SeenRun(SteadyRun):
        def meet(self, step: int, may_grow: bool) -> bool:
            before = len(self._grown)
            is_met = super().meet(step, may_grow)
            if len(self._grown) > before:
                new_pages = [(r.slot, len(r.pages) - 1, r.pages[-1]) for r in self._grown[before:]]
                seen.new_pages[last + step + 1] = tuple(new_pages)
            return is_met

        def end(self, num_steps: int) -> None:
            nonlocal last, num_passed_over
            super().end(num_steps)
            last, num_passed_over = last + num_steps, num_passed_over + num_steps
            check(scheduler)

    scheduler.schedule = planned  # type: ignore[method-assign]
    if is_stepwise:
        replica._jump = lambda limit: False  # type: ignore[method-assign]
    with patch.object(replica_module, "SteadyRun", SeenRun):
        submit(replica, arrivals)
        replica.run_until(float("inf"))
    stats = replica.scheduler.stats()
    assert stats.num_free_pages == shape.num_pages and replica.num_unfinished == 0
    seen.itl, seen.num_steps = replica.itl, replica.num_steps
    seen.hits, seen.preemptions = stats.total_prefix_hit_tokens, stats.total_preemptions
    seen.recomputed = scheduler.num_recomputed_tokens
    return seen, replica


def submit(replica: Replica, arrivals: Sequence[Arrival]) -> None:
    for index, arrival in enumerate(arrivals):
        replica.run_until(arrival.time)

        def make(index: int = index, arrival: Arrival = arrival) -> SimulatedRequest:
            params = SamplingParams(max_tokens=arrival.num_out, ignore_eos=True)
            return SimulatedRequest(
                str(index), arrival.tokens, params, priority=arrival.priority, arrived_s=arrival.time, origin=index
            )

        replica.submit(arrival.time, arrival.priority, make)


@pytest.mark.parametrize(
    ("first_seed", "make", "least"),
    [
        *[(first, workload, (20, 500, 1000, 100)) for first in range(0, 120, 40)],
        (500, odd_workload, (10, 500, 100, 50)),
    ],
)
def test_decisions_and_times_are_those_of_the_plain_scheduler(
    first_seed: int,
    make: Callable[[random.Random], tuple[EngineShape, list[Arrival]]],
    least: tuple[int, int, int, int],
) -> None:
    num_preemptions = num_hits = num_jumped = num_grown = 0
    for seed in range(first_seed, first_seed + 40):
        shape, arrivals = make(random.Random(seed))
        cost = SimpleCost(host=random.Random(seed).choice([0.0, 1 / 1024, 1 / 8]))
        expected, (got, _) = reference(shape, arrivals, cost), simulated(shape, arrivals, cost)
        assert got.ends == expected.ends and got.firsts == expected.firsts, seed
        for name in ("num_steps", "hits", "preemptions", "recomputed"):
            assert getattr(got, name) == getattr(expected, name), (seed, name)
        assert got.plans == {step: expected.plans[step] for step in got.plans}, seed
        # What was not planned was passed over, because it repeats the step before.
        for step, plan in expected.plans.items():
            if step not in got.plans:
                assert not (plan.prefills or plan.fills), (seed, step)
                assert plan.new_pages == got.new_pages.get(step, ()), (seed, step)
        assert got.itl.count == expected.itl.count and got.itl.total == pytest.approx(expected.itl.total)
        assert got.itl.largest == expected.itl.largest and got.itl.least == expected.itl.least
        num_preemptions += got.preemptions
        num_hits += got.hits
        num_jumped += len(expected.plans) - len(got.plans)
        num_grown += sum(bool(plan.new_pages) for step, plan in expected.plans.items() if step not in got.plans)
    counts = (num_preemptions, num_hits, num_jumped, num_grown)
    assert all(count > at_least for count, at_least in zip(counts, least)), counts  # or nothing was tried


@pytest.mark.parametrize("first_seed", (1000, 1040))
def test_steps_that_are_passed_over_are_those_that_would_have_been_planned(first_seed: int) -> None:
    """Times to the last bit, also with a cost whose sums round; what is summed up differs by rounding only."""
    model, gpu = PlannedModel("nemo", BUILT_IN["nemo"]), find_gpu("h100")
    roofline = Roofline.of(model.config, formats_of(model, EngineConfig()), gpu, Efficiencies())
    num_planned = num_steps = num_preemptions = 0
    for seed in range(first_seed, first_seed + 40):
        rng = random.Random(seed)
        shape, arrivals = rng.choice([workload, odd_workload])(rng)
        cost = rng.choice([roofline, SimpleCost(1 / 70, 1 / 300, 1 / 7000, rng.choice([0.0, 1 / 900, 1 / 9]))])
        (got, replica), (expected, other) = simulated(shape, arrivals, cost), simulated(shape, arrivals, cost, True)
        assert (got.ends, got.firsts, got.num_steps) == (expected.ends, expected.firsts, expected.num_steps), seed
        assert (got.hits, got.preemptions) == (expected.hits, expected.preemptions), seed
        pages = {step: plan.new_pages for step, plan in expected.plans.items() if plan.new_pages}
        planned = {step: plan.new_pages for step, plan in got.plans.items() if plan.new_pages}
        assert got.new_pages | planned == pages, seed
        assert got.itl._buckets == expected.itl._buckets and got.itl.largest == expected.itl.largest
        assert got.itl.total == pytest.approx(expected.itl.total, rel=1e-12)
        assert (replica.num_decode_tokens, replica.num_prefill_tokens, replica.now) == (
            other.num_decode_tokens, other.num_prefill_tokens, other.now,
        ), seed  # fmt: skip
        assert replica.busy_s == pytest.approx(other.busy_s, rel=1e-12)
        for name in replica.timeline.names:
            assert replica.timeline.mean(name) == pytest.approx(other.timeline.mean(name), rel=1e-9), (seed, name)
            for place, place_expected in zip(replica.timeline.series(name), other.timeline.series(name), strict=True):
                assert place == pytest.approx(place_expected, rel=1e-9), (seed, name)
        num_planned += len(got.plans)
        num_steps += got.num_steps
        num_preemptions += got.preemptions
        assert len(expected.plans) == expected.num_steps
    assert num_preemptions > 20 and num_planned < 0.8 * num_steps  # or nothing was tried
