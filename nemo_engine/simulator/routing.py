"""``Router``: decides which replica takes a request. Like a real one it knows what it has sent where and what has
ended, and nothing of what the replicas hold.
"""

from __future__ import annotations

from bisect import bisect, insort
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from hashlib import blake2b

ROUTINGS = ("round-robin", "least-loaded", "prefix-aware", "session-affinity")
# requests by which the replica with the longest prefix may be ahead of the least loaded, and half as many again as that
# has
_SLACK = 8
_AWAY = 1 << 40  # added to the load of a replica that takes nothing
_POINTS = 100  # of a replica on the ring of sessions


class Router:
    """``routing``: in turn; to the replica with the fewest unfinished requests; to the one that was sent most of the
    prompt before, unless it is far more loaded than another; or to the one that a consistent hash gives the session.

    ``num_pages``: of a replica. It may still have that much of what it was sent.
    """

    def __init__(self, routing: str, num_pages: int) -> None:
        if routing not in ROUTINGS:
            raise ValueError(f"routing must be one of {', '.join(ROUTINGS)}, got {routing!r}")
        self.routing = routing
        self.up: list[int] = []  # the replicas that take requests
        self._loads: list[int] = []  # unfinished requests
        self._next = 0
        self._ring: list[tuple[int, int]] = []  # (point, replica)
        self._sent = _SentPrefixes(num_pages)

    @property
    def needs_pages(self) -> bool:
        """Whether ``choose`` looks at the hashes of pages."""
        return self.routing == "prefix-aware"

    def add(self, replica: int) -> None:
        """``replica``, the number of all before it, takes requests from now on."""
        assert replica == len(self._loads)
        self._loads.append(0)
        self.up.append(replica)
        for point in range(_POINTS):
            insort(self._ring, (_point(f"{replica}/{point}"), replica))

    def remove(self, replica: int) -> None:
        """``replica`` takes no more requests. It must not be the last one."""
        self.up.remove(replica)
        assert self.up
        self._loads[replica] += _AWAY
        self._ring = [entry for entry in self._ring if entry[1] != replica]
        self._sent.forget(replica)

    def ended(self, replica: int) -> None:
        """A request there has ended."""
        self._loads[replica] -= 1

    def choose(self, session: str, pages: Sequence[Hashable]) -> int:
        """The replica for a request of ``session``; ``pages``: hashes of its prompt's, if needed."""
        chosen = self._choose(session, pages)
        self._loads[chosen] += 1
        if pages:
            self._sent.note(chosen, pages)
        return chosen

    def _choose(self, session: str, pages: Sequence[Hashable]) -> int:
        if self.routing == "session-affinity":
            place = bisect(self._ring, (_point(session), 0))
            return self._ring[place % len(self._ring)][1]
        self._next %= len(self.up)
        first = self.up[self._next]
        self._next += 1
        if self.routing == "round-robin":
            return first
        loads = self._loads
        lowest = min(loads)
        least = loads.index(lowest, first if lowest in loads[first:] else 0)
        holders = self._sent.holders(pages)
        if holders:
            best = min(holders, key=loads.__getitem__)
            if loads[best] <= 1.5 * lowest + _SLACK:
                return best
        return least


class _SentPrefixes:
    """Which replicas were sent a page: of each the last ``num_pages``."""

    def __init__(self, num_pages: int) -> None:
        self._num_pages = num_pages
        self._holders: dict[Hashable, dict[int, None]] = {}
        self._recent: dict[int, OrderedDict[Hashable, None]] = {}

    def holders(self, pages: Sequence[Hashable]) -> Mapping[int, None]:
        """The replicas with the longest beginning of ``pages``."""
        replicas: Mapping[int, None] = {}
        for page in pages:
            holders = self._holders.get(page)
            if holders is None:
                break
            replicas = holders
        return replicas

    def note(self, replica: int, pages: Sequence[Hashable]) -> None:
        """``replica`` is sent ``pages``. A prefix outlives what follows it, as in the cache."""
        recent = self._recent.setdefault(replica, OrderedDict())
        for page in reversed(pages):
            if page in recent:
                recent.move_to_end(page)
            else:
                recent[page] = None
                self._holders.setdefault(page, {})[replica] = None
        while len(recent) > self._num_pages:
            self._drop(recent.popitem(last=False)[0], replica)

    def forget(self, replica: int) -> None:
        """``replica`` is gone."""
        for page in self._recent.pop(replica, ()):
            self._drop(page, replica)

    def _drop(self, page: Hashable, replica: int) -> None:
        holders = self._holders[page]
        del holders[replica]
        if not holders:
            del self._holders[page]


def _point(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())
