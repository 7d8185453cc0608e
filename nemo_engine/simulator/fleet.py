"""Replicas in step with the arrivals: those that come, are lost, or are given back, and which of them is run when.

A router sees of a replica only which requests have ended. So a replica may stay behind as long as none of its requests
can have ended, and is run when that time has come, or when a request is sent to it: the work of an arrival does not
grow with the replicas.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush

from nemo_engine.simulator.feed import Conversation
from nemo_engine.simulator.replica import Replica
from nemo_engine.simulator.routing import Router
from nemo_engine.simulator.scheduler import SimulatedRequest


@dataclass(frozen=True, slots=True)
class Load:
    """What an autoscaler sees: replicas that are up, requests that run and that wait on them, and their slots."""

    replicas: int
    running: int
    waiting: int
    kv_use: float  # of the fullest
    slots: int  # of a replica


@dataclass(frozen=True, slots=True)
class Changes:
    """What happens to the replicas.

    losses_per_hour: the part of the replicas that is lost, at random times of ``seed``; another comes in the place of
    each. boot_s: until a new replica takes requests. retry_s: until a client asks again whose request was lost with a
    replica. wanted: how many replicas a load wants, asked every ``period_s``; more are started when it has wanted more
    for ``upscale_s``, and given back when it has wanted fewer for ``downscale_s``.
    """

    losses_per_hour: float = 0.0
    boot_s: float = 60.0
    retry_s: float = 0.5
    wanted: Callable[[Load], int] | None = None
    period_s: float = 10.0
    upscale_s: float = 30.0
    downscale_s: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("losses_per_hour", "boot_s", "retry_s", "upscale_s", "downscale_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, got {getattr(self, name)}")
        if not 0 < self.period_s < math.inf:
            raise ValueError(f"period_s must be finite and greater than 0, got {self.period_s}")


@dataclass(eq=False, slots=True)
class Fleet:
    """All replicas that there ever were, by number, and the requests that are unfinished on each."""

    changes: Changes
    router: Router
    new_replica: Callable[[Callable[[SimulatedRequest, float], None]], Replica]
    on_finish: Callable[[SimulatedRequest, float], None]
    slots: int
    replicas: list[Replica] = field(default_factory=list)
    counts: list[tuple[float, int]] = field(default_factory=list)  # (time, replicas that take requests from then on)
    num_lost_replicas: int = 0
    num_lost_requests: int = 0
    _open: list[dict[Conversation, float]] = field(default_factory=list)  # with the arrival
    _bounds: list[float] = field(default_factory=list)
    _heap: list[tuple[float, int]] = field(
        default_factory=list
    )  # (time before which none of its requests ends, number)
    _events: list[tuple[float, str]] = field(default_factory=list)  # that come: "up", "loss" and "look"
    _num_booting: int = 0
    _wants_since: tuple[int, float] = (0, 0.0)  # 1 for more, -1 for fewer, 0 for neither; since when
    _random: random.Random = field(init=False)

    def start(self, count: int, now: float) -> None:
        """``count`` replicas are up, and the changes begin."""
        self._random = random.Random(f"losses {self.changes.seed}")
        for _ in range(count):
            self._add(now)
        self._plan_loss(now)
        if self.changes.wanted is not None:
            heappush(self._events, (now + self.changes.period_s, "look"))

    # ---- requests

    def submit(
        self, number: int, conversation: Conversation, arrived_s: float, now: float, priority: int,
        make: Callable[[], SimulatedRequest],
    ) -> None:  # fmt: skip
        """A request that the router has sent to a replica at ``now``."""
        replica = self.replicas[number]
        replica.run_until(now)
        self._open[number][conversation] = arrived_s
        replica.submit(now, priority, make)
        self._note_bound(number)

    def advance(self, limit: float, has_feedback: bool) -> bool:
        """Have every request end that ends before ``limit``. With feedback, where an end may bring an arrival, up to
        the first that ends; returns whether there was one.
        """
        while self._heap and self._heap[0][0] < limit:
            bound, number = heappop(self._heap)
            if bound != self._bounds[number]:
                continue
            replica = self.replicas[number]
            before = replica.num_unfinished
            target = limit
            if has_feedback and self._heap:
                # At least one step, also where two are at the same time, however late that is.
                target = min(limit, max(self._heap[0][0], math.nextafter(replica.now, math.inf)))
            replica.run_until(target, max_ends=1 if has_feedback else math.inf)
            self._note_bound(number)
            if has_feedback and replica.num_unfinished < before:
                return True
        return False

    def is_busy(self) -> bool:
        """Whether a request is unfinished."""
        return any(map(len, self._open))

    def replica_seconds(self, start: float, end: float) -> float:
        """Seconds from ``start`` to ``end``, those of all replicas added up."""
        until = [when for when, _ in self.counts[1:]] + [end]
        return sum(
            count * max(0.0, min(after, end) - max(when, start)) for (when, count), after in zip(self.counts, until)
        )

    def _note_bound(self, number: int) -> None:
        bound = self._bounds[number] = self.replicas[number].earliest_end()
        if bound < math.inf:
            heappush(self._heap, (bound, number))

    # ---- replicas

    def next_change(self) -> float:
        """When the next one comes; infinity if none does."""
        return self._events[0][0] if self._events else math.inf

    def change(self) -> tuple[float, list[tuple[Conversation, float]]]:
        """Let the next change happen. Returns when, and the requests that were lost by it, with their arrivals."""
        now, kind = heappop(self._events)
        lost: list[tuple[Conversation, float]] = []
        if kind == "up":
            self._num_booting -= 1
            self._add(now)
        elif kind == "look":
            self._scale(now)
            heappush(self._events, (now + self.changes.period_s, "look"))
        else:
            lost = self._lose(now)
            self._plan_loss(now)
        return now, lost

    def _add(self, now: float) -> None:
        number = len(self.replicas)

        def finished(request: SimulatedRequest, end: float) -> None:
            del self._open[number][request.origin]
            self.router.ended(number)
            self.on_finish(request, end)

        self.replicas.append(self.new_replica(finished))
        self._open.append({})
        self._bounds.append(math.inf)
        self.router.add(number)
        self.counts.append((now, len(self.router.up)))

    def _remove(self, number: int, now: float) -> None:
        self.router.remove(number)
        self.counts.append((now, len(self.router.up)))

    def _boot(self, now: float) -> None:
        self._num_booting += 1
        heappush(self._events, (now + self.changes.boot_s, "up"))

    def _plan_loss(self, now: float) -> None:
        rate = self.changes.losses_per_hour * len(self.router.up) / 3600
        if rate:
            heappush(self._events, (now + self._random.expovariate(rate), "loss"))

    def _lose(self, now: float) -> list[tuple[Conversation, float]]:
        if len(self.router.up) == 1:  # the last one stays: nobody would take the requests
            return []
        number = self._random.choice(self.router.up)
        self._remove(number, now)
        self._boot(now)
        self._bounds[number] = math.inf
        lost, self._open[number] = list(self._open[number].items()), {}
        self.num_lost_replicas += 1
        self.num_lost_requests += len(lost)
        return lost

    def _scale(self, now: float) -> None:
        """As Ray Serve's autoscaler: a wish counts once it has lasted."""
        changes, up = self.changes, self.router.up
        assert changes.wanted is not None
        for number in up:  # one that is behind has not looked at its last requests, which would count as waiting
            self.replicas[number].run_until(now)
            self._note_bound(number)
        schedulers = [self.replicas[number].scheduler for number in up]
        unfinished = sum(self.replicas[number].num_unfinished for number in up)
        running = sum(len(scheduler.running) for scheduler in schedulers)
        kv_use = max(1 - scheduler.kv.pool.num_free / scheduler.kv.pool.num_pages for scheduler in schedulers)
        have = len(up) + self._num_booting
        wish = changes.wanted(Load(len(up), running, unfinished - running, kv_use, self.slots))
        direction = (wish > have) - (wish < have)
        if direction != self._wants_since[0]:
            self._wants_since = (direction, now)
        if not direction or now - self._wants_since[1] < (changes.upscale_s if direction > 0 else changes.downscale_s):
            return
        self._wants_since = (0, now)
        for _ in range(wish - have):
            self._boot(now)
        for _ in range(min(have - wish, len(up) - 1)):  # those that came last finish what they have
            self._remove(up[-1], now)
