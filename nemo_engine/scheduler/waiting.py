"""The requests that wait for a slot and pages, the most urgent first."""

from __future__ import annotations

import heapq

from nemo_engine.scheduler.request import Request, RequestStatus


class WaitingQueue:
    """Ordered by priority, then arrival, so a preempted request goes ahead of all that came after it.

    A request that has finished while it waited is dropped when it surfaces.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Request]] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, request: Request) -> None:
        """Add ``request``."""
        heapq.heappush(self._heap, (request.priority, request.arrival, request))
        self._count += 1

    def first(self) -> Request:
        """The most urgent request; the queue must not be empty."""
        while self._heap[0][2].status is RequestStatus.FINISHED:
            heapq.heappop(self._heap)
        return self._heap[0][2]

    def pop(self) -> None:
        """Take the first request out."""
        heapq.heappop(self._heap)
        self._count -= 1

    def discard(self) -> None:
        """Some waiting request is about to be marked as finished."""
        self._count -= 1
