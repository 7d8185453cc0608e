"""``Router``: decides which replica takes a request."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_engine.scheduler import Request
from nemo_engine.simulator.replica import Replica

ROUTINGS = ("round-robin", "least-loaded", "prefix-aware")
# requests by which the replica with the longest prefix may be ahead of the least loaded, and half as many again as that
# has
_SLACK = 8


class Router:
    """``routing``: in turn; to the replica with the fewest unfinished requests; or to the one whose cache has most of
    the prompt, unless it is far more loaded than another. The router knows what replicas hold at that moment, which
    real ones can only guess.
    """

    def __init__(self, routing: str) -> None:
        if routing not in ROUTINGS:
            raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {routing!r}")
        self.routing = routing
        self._next = 0

    @property
    def needs_request(self) -> bool:
        """Whether ``choose`` looks at the tokens."""
        return self.routing == "prefix-aware"

    def choose(self, replicas: Sequence[Replica], request: Request | None) -> int:
        """The index of a replica."""
        count = len(replicas)
        first = self._next
        self._next = (first + 1) % count
        if self.routing == "round-robin" or count == 1:
            return first
        order = [(first + offset) % count for offset in range(count)]
        least = min(order, key=lambda index: replicas[index].num_unfinished)
        if self.routing == "least-loaded":
            return least
        assert request is not None
        lowest = replicas[least].num_unfinished
        matches = {index: replicas[index].num_matching_pages(request) for index in order}
        best = max(order, key=lambda index: (matches[index], -replicas[index].num_unfinished))
        is_near = replicas[best].num_unfinished <= 1.5 * lowest + _SLACK
        return best if matches[best] and is_near else least
