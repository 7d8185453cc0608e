"""The requests that wait for a slot and pages, the most urgent first, and among equals one of each client in turn."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator
from heapq import merge

from nemo_engine.scheduler.request import Request, by_urgency


class WaitingQueue:
    """Ordered by priority, then by turns of the clients, then by arrival.

    A preempted request goes ahead of all of its priority that have not run yet, so what is computed anew is the least.
    """

    def __init__(self) -> None:
        self._preempted: list[Request] = []  # the most urgent first
        # Requests that have not run, by priority, by client in the order of turns, and by arrival. No entry is empty.
        self._new: dict[int, dict[str, dict[int, Request]]] = {}
        self._priorities: list[int] = []  # the keys of _new, the smallest first
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, request: Request) -> None:
        """Add ``request``."""
        self._count += 1
        if request.num_preemptions:
            insort(self._preempted, request, key=by_urgency)
            return
        if request.priority not in self._new:
            self._new[request.priority] = {}
            insort(self._priorities, request.priority)
        self._new[request.priority].setdefault(request.client, {})[request.arrival] = request

    def first(self) -> Request:
        """The most urgent request; the queue must not be empty."""
        if self._preempted and not (self._priorities and self._priorities[0] < self._preempted[0].priority):
            return self._preempted[0]
        clients = self._new[self._priorities[0]]
        return next(iter(next(iter(clients.values())).values()))

    def __iter__(self) -> Iterator[Request]:
        """The requests as ``first`` and ``pop`` would give them if no other came."""
        new = (request for priority in self._priorities for request in _in_turns(self._new[priority]))
        return merge(self._preempted, new, key=lambda request: (request.priority, not request.num_preemptions))

    def pop(self) -> None:
        """Take the first request out; it is the next client's turn."""
        request = self.first()
        self.remove(request)
        clients = self._new.get(request.priority, {})
        if not request.num_preemptions and request.client in clients:
            clients[request.client] = clients.pop(request.client)  # goes to the end of the order

    def remove(self, request: Request) -> None:
        """Take out a request that waits."""
        self._count -= 1
        if request.num_preemptions:
            self._preempted.remove(request)
            return
        clients = self._new[request.priority]
        del clients[request.client][request.arrival]
        if not clients[request.client]:
            del clients[request.client]
        if not clients:
            del self._new[request.priority]
            self._priorities.remove(request.priority)

    def count_of(self, client: str) -> int:
        """How many requests of ``client`` wait that have not run yet. From any thread."""
        return sum(len(clients.get(client, ())) for clients in list(self._new.values()))


def _in_turns(clients: dict[str, dict[int, Request]]) -> Iterator[Request]:
    queues = deque(iter(requests.values()) for requests in clients.values())
    while queues:
        request = next(queues[0], None)
        if request is None:
            queues.popleft()
        else:
            yield request
            queues.rotate(-1)
