"""A whole simulation: arrivals, replicas, and what comes out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nemo_engine.planner.roofline import StepCost
from nemo_engine.simulator.feed import Contents, Conversation, Encode, Feed
from nemo_engine.simulator.fleet import Changes, Fleet
from nemo_engine.simulator.replica import EngineShape, Replica
from nemo_engine.simulator.results import Results, Tally
from nemo_engine.simulator.routing import Router
from nemo_engine.simulator.scheduler import SimulatedRequest
from nemo_engine.workload import Arrivals, Item, Limits


@dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated besides the workload.

    ``replicas``: at the start. ``changes``: what happens to them later. ``use_priorities``: scheduling_policy
    "priority"; else all are equally urgent.
    """

    shape: EngineShape
    cost: StepCost
    replicas: int = 1
    routing: str = "round-robin"
    use_priorities: bool = False
    limits: Limits = Limits()
    changes: Changes = Changes()

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"replicas must be at least 1, got {self.replicas}")


def simulate(
    items: Iterable[Item],
    arrivals: Arrivals,
    setting: Setting,
    *,
    encode: Encode | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Results:
    """Run ``items`` to their end. progress: called now and then with requests that ended and the virtual time.

    A function of its arguments alone; ``Results.wall_s`` aside. Raises ``ValueError`` for an item that cannot be read.
    """
    return _Simulation(arrivals, setting, encode, progress).run(items)


class _Simulation:
    """The fleet in step with the arrivals: before a request is routed, all that ends before its time has ended."""

    def __init__(
        self,
        arrivals: Arrivals,
        setting: Setting,
        encode: Encode | None,
        progress: Callable[[int, float], None] | None,
    ) -> None:
        self.arrivals = arrivals
        self.setting = setting
        self.contents = Contents(encode)
        self.progress = progress
        self.tally = Tally(setting.limits)
        self.router = Router(setting.routing, setting.shape.num_pages)
        self.fleet = Fleet(setting.changes, self.router, self._new_replica, self._finished, setting.shape.max_num_seqs)
        self.feed: Feed | None = None
        self._lost: dict[Conversation, float] = {}  # those that ask again, with the time at which they first did

    def run(self, items: Iterable[Item]) -> Results:
        started = time.perf_counter()
        feed = self.feed = Feed(items, self.arrivals)
        fleet = self.fleet
        fleet.start(self.setting.replicas, 0.0 if feed.next_time() == math.inf else feed.next_time())
        count = 0
        while True:
            arrival = feed.next_time()
            due = min(arrival, fleet.next_change())
            has_feedback = feed.has_feedback or self.setting.changes.losses_per_hour > 0
            if fleet.advance(due, has_feedback):  # something ended that may bring an earlier arrival
                continue
            if arrival == math.inf and not fleet.is_busy():
                break
            if fleet.next_change() <= arrival:
                self._change()
                continue
            self._arrive(*feed.pop())
            count += 1
            if self.progress is not None and count % 256 == 0:
                self.progress(self.tally.num_finished, due)
        wall_s = time.perf_counter() - started
        return Results.of(self.tally, fleet, feed.num_items, wall_s)

    def _new_replica(self, on_finish: Callable[[SimulatedRequest, float], None]) -> Replica:
        interval = 1.0 if self.fleet.replicas else 1e-3  # only the first one's timeline is shown
        return Replica(self.setting.shape, self.setting.cost, on_finish, interval)

    def _change(self) -> None:
        now, lost = self.fleet.change()
        assert self.feed is not None
        for conversation, arrived_s in lost:
            self._lost[conversation] = arrived_s
            self.feed.again(conversation, now + self.setting.changes.retry_s)

    def _arrive(self, when: float, conversation: Conversation) -> None:
        item = conversation.item
        scheduler = self.fleet.replicas[0].scheduler
        arrived_s = self._lost.pop(conversation, when)
        num_prompt = self.contents.num_prompt_tokens(conversation)
        try:
            if num_prompt < 1:
                raise ValueError("a prompt must have at least 1 token, got 0")
            scheduler.max_total_tokens(num_prompt, item.turns[conversation.turn].output_tokens)
        except ValueError as error:
            self.tally.refuse(item.request_id, str(error))
            self._ended(conversation, None, when)
            return
        ready = self.contents.request(conversation, arrived_s) if self.router.needs_pages else None
        if ready is not None:
            scheduler.kv.extend_hashes(ready, (num_prompt - 1) // self.setting.shape.page_size)
        chosen = self.router.choose(item.request_id, () if ready is None else ready.page_hashes)
        make = self._maker(conversation, arrived_s, ready)
        priority = item.priority if self.setting.use_priorities else 0
        self.fleet.submit(chosen, conversation, arrived_s, when, priority, make)

    def _maker(
        self, conversation: Conversation, when: float, ready: SimulatedRequest | None
    ) -> Callable[[], SimulatedRequest]:
        def make() -> SimulatedRequest:
            request = ready or self.contents.request(conversation, when)
            if not self.setting.use_priorities:
                request.priority = 0
            return request

        return make

    def _finished(self, request: SimulatedRequest, now: float) -> None:
        self.tally.finish(request, now)
        conversation = request.origin
        assert isinstance(conversation, Conversation)
        is_last = conversation.turn + 1 == len(conversation.item.turns)
        self._ended(conversation, [] if is_last else request.token_ids, now)

    def _ended(self, conversation: Conversation, token_ids: list[int] | None, now: float) -> None:
        assert self.feed is not None
        self.feed.ended(conversation, token_ids, now)
