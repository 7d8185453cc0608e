"""Whose waiting request is next: one of each client in turn, within a priority."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from nemo_engine.sampling_params import SamplingParams
from nemo_engine.scheduler import Request, Scheduler
from nemo_engine.scheduler.waiting import WaitingQueue
from nemo_engine.step import StepResult


def scheduler(max_num_seqs: int = 1, num_pages: int = 64) -> Scheduler:
    return Scheduler(
        num_pages=num_pages, page_size=4, max_num_seqs=max_num_seqs, max_num_batched_tokens=8, max_model_len=64
    )


def request(name: str, priority: int = 0, max_tokens: int = 1, prompt: Iterable[int] = (1, 2)) -> Request:
    """``name`` is the client's letter and a number."""
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(name, list(prompt), params, priority=priority, client=name[0])


def order_of_ends(of: Scheduler) -> list[str]:
    """Runs everything; with one slot and one token each, the order of the ends is that of the admissions."""
    ended = []
    while of.has_unfinished():
        plan = of.schedule()
        assert plan is not None
        samples = len(plan.decode_slots) + sum(row.samples for row in plan.prefills)
        ended += [one.request_id for one in of.commit(StepResult(plan.step_id, [5] * samples)).finished]
    return ended


def test_clients_take_turns() -> None:
    engine = scheduler()
    for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1"):
        engine.add(request(name))
    assert order_of_ends(engine) == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


def test_many_requests_of_one_do_not_make_another_wait_for_all_of_them() -> None:
    engine = scheduler()
    for index in range(400):
        engine.add(request(f"a{index}"))
    engine.add(request("b"))
    assert order_of_ends(engine).index("b") == 1


def test_who_comes_back_stands_behind_those_who_wait() -> None:
    queue = WaitingQueue()
    for arrival, name in enumerate(("a1", "b1", "b2")):
        one = request(name)
        one.arrival = arrival
        queue.push(one)
    taken = []
    for name in ("a2", "a3", None, None, None):
        taken.append(queue.first().request_id)
        queue.pop()
        if name:
            late = request(name)
            late.arrival = 10 + len(taken)
            queue.push(late)
    assert taken == ["a1", "b1", "a2", "b2", "a3"] and len(queue) == 0


def test_turns_are_taken_within_a_priority() -> None:
    engine = scheduler()
    for name, priority in (("a1", 0), ("a2", 0), ("a3", -1), ("a4", -1), ("b1", 0), ("b2", -1), ("b3", 1)):
        engine.add(request(name, priority))
    assert order_of_ends(engine) == ["a3", "b2", "a4", "a1", "b1", "a2", "b3"]


def test_a_preempted_request_does_not_wait_for_its_turn() -> None:
    engine = scheduler(max_num_seqs=2, num_pages=6)
    for name in ("a1", "a2"):
        engine.add(request(name, max_tokens=14, prompt=range(4)))
    plan = engine.schedule()
    assert plan is not None and len(plan.prefills) == 2
    engine.commit(StepResult(plan.step_id, [5] * 2))
    for name in ("b1", "c1", "a3"):
        engine.add(request(name, max_tokens=14, prompt=range(4)))
    assert order_of_ends(engine)[:2] == ["a1", "a2"]
    assert engine.stats().total_preemptions > 0


def in_order(waiting: dict[int, list[Request]], turns: dict[int, list[str]]) -> list[Request]:
    """How those that wait would come if nobody else did: a round of each client after the other."""
    found = []
    for priority, level in sorted(waiting.items()):
        left = {client: [one for one in level if one.client == client] for client in turns[priority]}
        while any(left.values()):
            found += [mine.pop(0) for mine in left.values() if mine]
    return found


@pytest.mark.parametrize("seed", range(20))
def test_random_queues_against_a_plain_model(seed: int) -> None:
    dice = random.Random(seed)
    queue = WaitingQueue()
    waiting: dict[int, list[Request]] = {}  # by priority, in the order of arrival
    turns: dict[int, list[str]] = {}  # the clients that wait, in the order of their turns
    for arrival in range(400):
        action = dice.random()
        everyone = [one for level in waiting.values() for one in level]
        assert len(queue) == len(everyone)
        for client in "abc":
            assert queue.count_of(client) == sum(one.client == client for one in everyone)
        if action < 0.55 or not everyone:
            one = request(dice.choice("abc") + str(arrival), dice.choice([-3, 0, 7]))
            one.arrival = arrival
            queue.push(one)
            waiting.setdefault(one.priority, []).append(one)
            clients = turns.setdefault(one.priority, [])
            if one.client not in clients:
                clients.append(one.client)
            continue
        if arrival % 10 == 0:
            assert list(queue) == in_order(waiting, turns)
        if action < 0.85:
            priority = min(priority for priority, level in waiting.items() if level)
            client = turns[priority][0]
            one = next(one for one in waiting[priority] if one.client == client)
            assert queue.first() is one
            queue.pop()
            turns[priority] = [*turns[priority][1:], client]
        else:
            one = dice.choice(everyone)
            queue.remove(one)
        waiting[one.priority].remove(one)
        left = {other.client for other in waiting[one.priority]}
        turns[one.priority] = [client for client in turns[one.priority] if client in left]


def test_the_queue_tells_who_comes_next() -> None:
    queue = WaitingQueue()
    for arrival, (name, priority, preemptions) in enumerate(
        [("a1", 0, 0), ("a2", 0, 0), ("b1", 0, 0), ("a3", 0, 1), ("c1", 5, 1), ("c2", 5, 0), ("d1", -1, 0)]
    ):
        one = request(name, priority)
        one.arrival, one.num_preemptions = arrival, preemptions
        queue.push(one)
    shown = [one.request_id for one in queue]
    taken = []
    while queue:
        taken.append(queue.first().request_id)
        queue.pop()
    assert shown == taken == ["d1", "a3", "a1", "b1", "a2", "c1", "c2"]
