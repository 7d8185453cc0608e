"""The requests that wait for a slot and pages, the most urgent first."""

from __future__ import annotations

import heapq

from nemo_engine.scheduler.request import Request

_FEW = 16  # keys of requests that have gone, that may stay whatever the number of requests


class WaitingQueue:
    """Ordered by priority, then arrival, so a preempted request goes ahead of all that came after it.

    The heap holds keys alone. That of a request which has gone is dropped when it surfaces, or with others once they are the larger part.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int]] = []
        self._requests: dict[tuple[int, int], Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def requests(self) -> list[Request]:
        """All, in no order."""
        return list(self._requests.values())

    def push(self, request: Request) -> None:
        """Add ``request``."""
        key = (request.priority, request.arrival)
        self._requests[key] = request
        heapq.heappush(self._heap, key)

    def first(self) -> Request:
        """The most urgent request; the queue must not be empty."""
        while self._heap[0] not in self._requests:
            heapq.heappop(self._heap)
        return self._requests[self._heap[0]]

    def remove(self, request: Request) -> None:
        """Take ``request``, which waits, out. O(1) on average; the first costs O(log n)."""
        key = (request.priority, request.arrival)
        del self._requests[key]
        if self._heap[0] == key:
            heapq.heappop(self._heap)
        elif len(self._heap) > 2 * len(self._requests) + _FEW:
            self._heap = sorted(self._requests)
