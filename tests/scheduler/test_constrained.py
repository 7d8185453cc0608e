"""Requests with a grammar: in which steps they take part, what breaks with them, and what it costs the others."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from nemo_engine.sampling_params import SamplingParams
from nemo_engine.scheduler import Request, Scheduler
from nemo_engine.step import TOKEN_ALL_MASKED, StepPlan, StepResult
from tests.scheduler.invariants import check
from tests.scheduler.scripted import ScriptedGrammar
from tests.scheduler.test_units import count_calls, make_scheduler, steady

FORM = {"regex": "as the grammar says"}


class Log:
    """A grammar that notes what is asked of it, and allows everything.

    ``breaks``: the method and the call at which it raises.
    """

    def __init__(self, breaks: tuple[str, int] = ("", 0), ends_after: int = 10**9) -> None:
        self.calls: list[str] = []
        self._breaks = breaks
        self._ends_after = ends_after

    def _note(self, name: str) -> None:
        self.calls.append(name)
        if (name, self.calls.count(name)) == self._breaks:
            raise RuntimeError("planted")

    def mask(self) -> bytes:
        self._note("mask")
        return b"\xff" * 4

    def accept(self, token_id: int) -> None:
        self._note("accept")

    @property
    def is_finished(self) -> bool:
        return self.calls.count("accept") >= self._ends_after


def make(
    name: str, grammar: Log | ScriptedGrammar | None, max_tokens: int = 40, prompt: int = 3, **more: Any
) -> Request:
    form = None if grammar is None else FORM
    params = SamplingParams(max_tokens=max_tokens, structured_outputs=form, **more)
    return Request(name, [5] * prompt, params, grammar=grammar, eos_token_ids=frozenset([2]))


def play(scheduler: Scheduler, depth: int, steps: int = 10**6, token: int = 7) -> list[tuple[StepPlan, set[str]]]:
    """Run with ``depth`` steps in flight, every row choosing ``token`` (or failing where its mask is empty): (plan, who
    is in it).
    """
    played: list[tuple[StepPlan, set[str]]] = []
    in_flight: deque[StepPlan] = deque()
    while (scheduler.has_unfinished() or in_flight) and len(played) < steps:
        plan = scheduler.schedule()
        check(scheduler)
        if plan is not None:
            by_slot = {request.slot: request.request_id for request in scheduler.running.all()}
            slots = [*plan.decode_slots, *[row.slot for row in plan.prefills]]
            played.append((plan, {by_slot[slot] for slot in slots}))
            in_flight.append(plan)
            if len(in_flight) < depth:
                continue
        commit(scheduler, in_flight.popleft(), token)
    while in_flight:
        commit(scheduler, in_flight.popleft(), token)
    return played


def commit(scheduler: Scheduler, plan: StepPlan, token: int) -> Any:
    slots = [*plan.decode_slots, *[row.slot for row in plan.prefills if row.samples]]
    empty = {slot for slot, mask in plan.masks if not mask}
    committed = scheduler.commit(StepResult(plan.step_id, [TOKEN_ALL_MASKED if s in empty else token for s in slots]))
    check(scheduler)
    return committed


def steps_of(name: str, played: Sequence[tuple[StepPlan, set[str]]]) -> list[int]:
    return [plan.step_id for plan, names in played if name in names]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_it_takes_part_in_every_depth_th_step_and_the_others_in_all(depth: int) -> None:
    scheduler = make_scheduler()
    for request in (make("free", None), make("a", Log()), make("b", Log())):
        scheduler.add(request)
    played = play(scheduler, depth, 30)
    assert steps_of("free", played) == list(range(1, 31))
    for name in "ab":
        assert {b - a for a, b in pairwise(steps_of(name, played))} == {depth}
    assert steps_of("a", played) == steps_of("b", played)


@pytest.mark.parametrize("before", [5, 6])
def test_those_that_come_later_join_the_others_in_one_step(before: int) -> None:
    scheduler = make_scheduler()
    scheduler.add(make("free", None))
    scheduler.add(make("a", Log()))
    in_flight: deque[StepPlan] = deque()
    together = []
    for step in range(20):
        if step == before:
            scheduler.add(make("b", Log()))
        plan = scheduler.schedule()
        assert plan is not None
        together.append({"a", "b"} & {r.request_id for r in scheduler.running.all() if r.slot in plan.decode_slots})
        in_flight.append(plan)
        if len(in_flight) == 2:
            commit(scheduler, in_flight.popleft(), 7)
    assert together[:before].count({"a"}) > 1
    assert together[before + 4 :].count({"a", "b"}) == (20 - before - 4) // 2
    assert {"a"} not in together[before + 4 :] and {"b"} not in together


def test_a_failure_that_a_preemption_made_void_is_forgotten() -> None:
    scheduler = make_scheduler()
    request = make("a", Log(("mask", 3)), 6)
    scheduler.add(request)
    play(scheduler, 1, 2)
    plan = scheduler.schedule()
    assert plan is not None and plan.masks == ((request.slot, b""),)
    scheduler.preempt(request)
    commit(scheduler, plan, 7)
    play(scheduler, 1, token=2)
    assert (request.finish_reason, request.error, request.num_output_tokens) == ("stop", None, 3)


def test_arrivals_do_not_hold_up_those_that_run() -> None:
    """A request with a grammar that is prefilled in every step would, if all had to wait for it."""
    scheduler = make_scheduler(max_num_seqs=20, num_pages=400)
    scheduler.add(make("a", Log(), 30))
    in_flight: deque[StepPlan] = deque()
    count = 0
    for step in range(18):
        scheduler.add(make(f"n{step}", Log(), 1))
        plan = scheduler.schedule()
        assert plan is not None
        count += 1 in plan.decode_slots
        in_flight.append(plan)
        if len(in_flight) == 2:
            commit(scheduler, in_flight.popleft(), 7)
    assert count == 8


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize("prompt", [1, 3, 4, 5])
def test_lengths_around_page_boundaries(depth: int, max_tokens: int, prompt: int) -> None:
    grammar = Log()
    scheduler = make_scheduler()
    request = make("a", grammar, max_tokens, prompt)
    scheduler.add(request)
    play(scheduler, depth)
    assert (request.finish_reason, request.num_output_tokens) == ("length", max_tokens)
    assert grammar.calls == ["mask", "accept"] * max_tokens
    assert scheduler.stats().num_free_pages == 100


@pytest.mark.parametrize("depth", [1, 2])
def test_a_preempted_request_goes_on_where_its_grammar_stands(depth: int) -> None:
    num_preemptions = num_discarded = 0
    for prompt in range(1, 6):
        scheduler = make_scheduler(num_pages=6)
        free = [make("f0", None, 15), make("f1", None, 12, prompt)]
        grammars = [Log(), Log()]
        requests = [make(f"r{i}", grammar, 13) for i, grammar in enumerate(grammars)]
        for request in free + requests:
            scheduler.add(request)
        play(scheduler, depth)
        for request, grammar in zip(requests, grammars, strict=True):
            assert request.num_output_tokens == grammar.calls.count("accept") == 13
            num_preemptions += request.num_preemptions
            num_discarded += grammar.calls.count("mask") - 13
        assert [request.num_output_tokens for request in free] == [15, 12] and scheduler.stats().num_free_pages == 6
    # With two steps in flight, a preemption throws a token away now and then: it is computed anew, under the same mask.
    assert num_preemptions > 3 and (num_discarded > 0) == (depth == 2)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("breaks", [("mask", 1), ("mask", 4), ("accept", 1), ("accept", 4)])
def test_a_grammar_that_breaks_ends_its_own_request(depth: int, breaks: tuple[str, int]) -> None:
    scheduler = make_scheduler()
    bad, good, free = make("bad", Log(breaks), 9), make("good", Log(), 9), make("free", None, 9)
    for request in (bad, good, free):
        scheduler.add(request)
    play(scheduler, depth)
    assert (bad.finish_reason, bad.num_output_tokens) == ("error", breaks[1] - 1)
    assert bad.error == "the grammar of structured_outputs failed: RuntimeError: planted"
    for request in (good, free):
        assert (request.finish_reason, request.num_output_tokens, request.error) == ("length", 9, None)
    assert scheduler.stats().num_free_pages == 100


@pytest.mark.parametrize("depth", [1, 2])
def test_the_end_of_a_grammar(depth: int) -> None:
    """It is the end-of-sequence token; where that is ignored, the request ends without it."""
    for ignore_eos, count in ((True, 4), (False, 9)):
        scheduler = make_scheduler()
        request = make("a", Log(ends_after=4), 9, ignore_eos=ignore_eos)
        scheduler.add(request)
        play(scheduler, depth)
        assert request.num_output_tokens == count and request.finish_reason == ("stop" if ignore_eos else "length")
    scheduler = make_scheduler()
    grammar = Log()
    request = make("a", grammar)
    scheduler.add(request)
    play(scheduler, depth, token=2)
    assert (request.token_ids[request.num_prompt_tokens :], request.finish_reason, request.stop_reason) == (
        [2],
        "stop",
        None,
    )
    assert grammar.calls == ["mask"]


@pytest.mark.parametrize("in_flight", [0, 1, 2])
def test_an_aborted_request_leaves_nothing_behind(in_flight: int) -> None:
    scheduler = make_scheduler()
    free = make("free", None, 12)
    scheduler.add(free)
    scheduler.add(make("a", Log()))
    play(scheduler, 1, 3)
    plans = [plan for plan in [scheduler.schedule() for _ in range(in_flight)] if plan is not None]
    assert len(plans) == in_flight
    assert scheduler.finish("a", "abort") is not None
    check(scheduler)
    for plan in plans:
        assert [request.request_id for request in commit(scheduler, plan, 7).requests] == ["free"]
    play(scheduler, 1)
    assert free.num_output_tokens == 12 and scheduler.stats().num_free_pages == 100


def test_a_request_that_came_back_to_another_slot_is_decoded_there() -> None:
    scheduler = make_scheduler(num_pages=7, max_num_seqs=3)
    first, second = make("first", Log(), 20), make("second", Log(), 12)
    scheduler.add(make("filler", None, 2))
    scheduler.add(first)
    scheduler.add(second)
    while scheduler.has_unfinished():
        plan = scheduler.schedule()
        if plan is None:
            continue
        running = {request.slot: request for request in scheduler.running.all()}
        assert {*plan.decode_slots, *[row.slot for row in plan.prefills]} <= set(running)
        assert {slot for slot, _ in plan.masks} <= set(running)
        commit(scheduler, plan, 7)
    assert first.num_preemptions + second.num_preemptions > 0
    assert first.num_output_tokens == 20 and second.num_output_tokens == 12


def test_slots_repeat_while_nothing_changes() -> None:
    scheduler = make_scheduler(page_size=64)
    scheduler.add(make("free", None))
    scheduler.add(make("a", Log()))
    plans = [plan for plan, _ in play(scheduler, 1, 12)][3:]
    assert all(a.decode_slots == b.decode_slots for a, b in pairwise(plans))


def test_a_step_after_a_constrained_request_is_as_cheap_as_before() -> None:
    calls = []
    for grammar in (None, Log()):
        scheduler = steady(8, 70)
        scheduler.finish("r7", "abort")
        scheduler.add(make("a", grammar, 3))
        play(scheduler, 1, 8)
        assert scheduler.stats().num_running == 7
        calls.append(count_calls(scheduler))
    assert calls[0] == calls[1]
