"""A whole simulation: arrivals, replicas and results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nemo_engine.planner.roofline import StepCost
from nemo_engine.simulator.feed import Contents, Conversation, Encode, Feed
from nemo_engine.simulator.replica import EngineShape, Replica
from nemo_engine.simulator.results import Results, Tally
from nemo_engine.simulator.routing import Router
from nemo_engine.simulator.scheduler import SimulatedRequest
from nemo_engine.workload import Arrivals, Item, Limits


@dataclass(frozen=True, slots=True)
class Setting:
    """The setting of a simulation, without the workload.

    ``use_priorities``: as scheduling_policy "priority"; otherwise all requests are equally urgent.
    """

    shape: EngineShape
    cost: StepCost
    replicas: int = 1
    routing: str = "round-robin"
    use_priorities: bool = False
    limits: Limits = Limits()

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
    """Run ``items`` to their end. progress: called now and then with the number of ended requests and the virtual time.

    The results depend on the arguments alone, except ``wall_s``. Raises ``ValueError`` for an item that cannot be read.
    """
    return _Simulation(arrivals, setting, encode, progress).run(items)


class _Simulation:
    """Keeps replicas and arrivals in step: before a request is routed, every replica has reached its arrival."""

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
        self.router = Router(setting.routing)
        self.replicas = [Replica(setting.shape, setting.cost, self._finished) for _ in range(setting.replicas)]
        self.feed: Feed | None = None

    def run(self, items: Iterable[Item]) -> Results:
        started = time.perf_counter()
        feed = self.feed = Feed(items, self.arrivals)
        count = 0
        while True:
            due = feed.next_time()
            if self._advance(due):  # something ended that may bring an earlier arrival
                continue
            if due == float("inf"):
                break
            self._arrive(*feed.pop())
            count += 1
            if self.progress is not None and count % 256 == 0:
                self.progress(self.tally.num_finished, due)
        wall_s = time.perf_counter() - started
        return Results.of(self.tally, self.replicas, feed.num_items, wall_s)

    def _advance(self, limit: float) -> bool:
        """Bring all replicas to ``limit``; returns whether ``limit`` has to be looked at again."""
        assert self.feed is not None
        if not self.feed.has_feedback:
            for replica in self.replicas:
                replica.run_until(limit)
            return False
        # A request that ends on one replica may bring an arrival for another, so the replica that is behind goes first.
        busy = [replica for replica in self.replicas if replica.num_unfinished and replica.now < limit]
        if not busy:
            return False
        if len(busy) == 1:
            busy[0].run_until(limit, max_ends=1)
            return True
        busy.sort(key=lambda replica: replica.now)
        # Go on by at least one step, even if two replicas are at the same time and late.
        target = max(busy[1].now, math.nextafter(busy[0].now, math.inf))
        busy[0].run_until(min(limit, target), max_ends=1)
        return True

    def _arrive(self, when: float, conversation: Conversation) -> None:
        item = conversation.item
        scheduler = self.replicas[0].scheduler
        num_prompt = self.contents.num_prompt_tokens(conversation)
        try:
            if num_prompt < 1:
                raise ValueError("a prompt must have at least 1 token, got 0")
            scheduler.max_total_tokens(num_prompt, item.turns[conversation.turn].output_tokens)
        except ValueError as error:
            self.tally.refuse(item.request_id, str(error))
            self._ended(conversation, None, when)
            return
        ready = self.contents.request(conversation, when) if self.router.needs_request else None
        replica = self.replicas[self.router.choose(self.replicas, ready)]
        make = self._maker(conversation, when, ready)
        replica.submit(when, item.priority if self.setting.use_priorities else 0, make)

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
