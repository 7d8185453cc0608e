"""The requests that wait for a slot and pages, the most urgent first, and among equals one of each client in turn."""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter

from nemo_engine.scheduler.request import Request


class WaitingQueue:
    """Ordered by priority, then by turns of the clients, then by arrival.

    A preempted request goes ahead of all of its priority that have not run yet, so what is computed anew is the least.
    """

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}  # by priority; none is empty
        self._priorities: list[int] = []  # of the levels, the smallest first
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, request: Request) -> None:
        """Add ``request``."""
        level = self._levels.get(request.priority)
        if level is None:
            level = self._levels[request.priority] = _Level()
            insort(self._priorities, request.priority)
        level.push(request)
        self._count += 1

    def first(self) -> Request:
        """The most urgent request; the queue must not be empty."""
        return self._levels[self._priorities[0]].first()

    def pop(self) -> None:
        """Take the first request out; it is the next client's turn."""
        request = self.first()
        self._levels[request.priority].end_turn(request)
        self.remove(request)

    def remove(self, request: Request) -> None:
        """Take out a request that waits."""
        level = self._levels[request.priority]
        level.remove(request)
        if not level:
            del self._levels[request.priority]
            del self._priorities[bisect_left(self._priorities, request.priority)]
        self._count -= 1

    def count_of(self, client: str) -> int:
        """How many requests of ``client`` wait that have not run yet. From any thread."""
        return sum(level.count_of(client) for level in list(self._levels.values()))


class _Level:
    """The waiting requests of one priority."""

    def __init__(self) -> None:
        self._preempted: list[Request] = []  # by arrival
        # In the order of their turns, each client's by arrival; a client without requests has no entry.
        self._clients: dict[str, dict[int, Request]] = {}

    def __bool__(self) -> bool:
        return bool(self._preempted or self._clients)

    def push(self, request: Request) -> None:
        if request.num_preemptions:
            insort(self._preempted, request, key=attrgetter("arrival"))
        else:
            self._clients.setdefault(request.client, {})[request.arrival] = request

    def first(self) -> Request:
        if self._preempted:
            return self._preempted[0]
        return next(iter(next(iter(self._clients.values())).values()))

    def end_turn(self, request: Request) -> None:
        """``request`` is about to leave by its turn: those of its client that stay go behind the other clients'."""
        if not request.num_preemptions:
            self._clients[request.client] = self._clients.pop(request.client)

    def remove(self, request: Request) -> None:
        if request.num_preemptions:
            self._preempted.remove(request)
            return
        requests = self._clients[request.client]
        del requests[request.arrival]
        if not requests:
            del self._clients[request.client]

    def count_of(self, client: str) -> int:
        return len(self._clients.get(client, ()))
