"""The requests that hold a slot: which of them prefill, decode or drain, and in which step something is due for them.

A decoding request computes one token in every step, position ``step_id + decode_offset``. So the steps in which it needs a
page or computes its last token are known when it starts to decode; they are noted in two calendars, and a step in which
nothing is due costs nothing per request. A request that leaves is taken off both: it may have ended long before they are due.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, KeysView
from operator import attrgetter

from nemo_engine.scheduler.constrained import ConstrainedSet
from nemo_engine.scheduler.decode_set import DecodeSet
from nemo_engine.scheduler.request import Request, RequestStatus

URGENCY = attrgetter("priority", "arrival")  # the smallest is the most urgent
_Calendar = dict[int, dict[Request, None]]  # step id -> the requests for which it is due, at least one


class RunningSet:
    """Slots and the requests in them. A request is *prefilling* until the step that computes all its known tokens is
    planned, then *decoding*, and *draining* from the plan of its last step until that is committed. With a grammar, it is
    *constrained* where others are decoding.
    """

    def __init__(self, max_num_seqs: int, page_size: int) -> None:
        self.prefilling: list[Request] = []  # the most urgent first
        self.num_departures = 0  # times a request left; while it stands still, nobody in a launched step has gone
        self.num_watched = 0  # requests with repetition detection
        self.constrained: ConstrainedSet = ConstrainedSet(page_size)
        self._max_num_seqs = max_num_seqs
        self._page_size = page_size
        self._decoding: dict[Request, None] = {}
        self._draining: dict[Request, None] = {}
        self._decode_set: DecodeSet | None = None  # made when it is asked for
        self._free_slots = list(range(max_num_seqs, 0, -1))
        self._page_due: _Calendar = {}
        self._last_due: _Calendar = {}
        self._num_with_stop_id: dict[int, int] = {}

    def __len__(self) -> int:
        return self._max_num_seqs - len(self._free_slots)

    @property
    def has_free_slot(self) -> bool:
        """Whether another request can enter."""
        return bool(self._free_slots)

    @property
    def stop_token_ids(self) -> KeysView[int]:
        """Stop token ids of any request here, as a set-like view."""
        return self._num_with_stop_id.keys()

    @property
    def decode_set(self) -> DecodeSet:
        """The decoding requests; the same object while they do not change."""
        if self._decode_set is None:
            self._decode_set = DecodeSet(self._decoding)
        return self._decode_set

    def requests(self) -> list[Request]:
        """All requests that hold a slot."""
        return [*self._decoding, *self.constrained.requests, *self.prefilling, *self._draining]

    def is_decoding(self, request: Request) -> bool:
        """Whether ``request`` takes part in every step."""
        return request in self._decoding

    def enter(self, request: Request, step_id: int) -> None:
        """Give ``request`` a slot; it starts to prefill."""
        request.status = RequestStatus.RUNNING
        request.slot = self._free_slots.pop()
        request.admitted_step = step_id
        request.is_sound = False
        insort(self.prefilling, request, key=URGENCY)
        for token_id in request.stop_token_ids:
            self._num_with_stop_id[token_id] = self._num_with_stop_id.get(token_id, 0) + 1
        self.num_watched += request.params.repetition_detection is not None

    def end_prefill(self, request: Request, step_id: int) -> bool:
        """Step ``step_id`` computes all known tokens of ``request``: it decodes from the next step on.

        Returns whether that step's token is already its last.
        """
        self.prefilling.remove(request)
        if request.num_computed_tokens >= request.max_total_tokens - 1:
            self._draining[request] = None
            return True
        if request.grammar is not None:
            self.constrained.add(request, step_id)
            return False
        request.decode_offset = request.num_computed_tokens - (step_id + 1)
        self._decoding[request] = None
        self._decode_set = None
        # The last token is sampled from the position before the last, max_total_tokens - 2.
        request.last_due = request.max_total_tokens - 2 - request.decode_offset
        self._last_due.setdefault(request.last_due, {})[request] = None
        self.note_next_page(request)
        return False

    def note_next_page(self, request: Request) -> None:
        """Put the step in which ``request``, without a grammar, outgrows its pages on the calendar, if it ever does."""
        position = len(request.pages) * self._page_size
        if position <= request.max_total_tokens - 2:
            request.page_due = position - request.decode_offset
            self._page_due.setdefault(request.page_due, {})[request] = None

    def note_next_pages(self, requests: Iterable[Request], step_id: int) -> None:
        """As ``note_next_page``, of requests that just got a page in step ``step_id``; those that a grammar may hold up are passed over."""
        next_due = step_id + self._page_size
        later: dict[Request, None] = {}
        for request in requests:
            if next_due + request.decode_offset <= request.max_total_tokens - 2 and request.grammar is None:
                request.page_due = next_due
                later[request] = None
        if later:
            self._page_due.setdefault(next_due, {}).update(later)

    def take_page_due(self, step_id: int, ready: list[Request]) -> list[Request]:
        """The decoding requests that need a page in this step, those of the constrained ``ready`` too, the most urgent first."""
        due = list(self._page_due.pop(step_id, ()))
        if ready:
            due += self.constrained.outgrown(ready)
        if len(due) > 1:
            due.sort(key=URGENCY)
        return due

    def take_last_due(self, step_id: int) -> list[Request]:
        """The decoding requests for which this step is the last; they drain from now on."""
        due = list(self._last_due.pop(step_id, ()))
        for request in due:
            del self._decoding[request]
            self._draining[request] = None
            request.num_computed_tokens = step_id + request.decode_offset + 1
            self._decode_set = None
        return due

    def launch_constrained(self, ready: list[Request], step_id: int) -> list[Request]:
        """Step ``step_id`` computes a token of each of ``ready``; returns those for which it is the last, and which now drain."""
        last = self.constrained.launch(ready, step_id)
        for request in last:
            self.constrained.remove(request)
            self._draining[request] = None
        return last

    def least_urgent(self) -> Request:
        """Whom to preempt: of those with steps to come, the one with the largest priority number, the newest of them."""
        return max([*self._decoding, *self.constrained.requests, *self.prefilling], key=URGENCY)

    def leave(self, request: Request) -> None:
        """Take back the slot. Steps in flight may still write to it: later steps run after those."""
        self.constrained.forget_joined()
        if request in self._decoding:
            del self._decoding[request]
            self._decode_set = None
        elif request in self.constrained.requests:
            self.constrained.remove(request)
        elif request in self._draining:
            del self._draining[request]
        else:
            self.prefilling.remove(request)
        for calendar, due in ((self._page_due, request.page_due), (self._last_due, request.last_due)):
            noted = calendar.get(due)
            if noted is not None and request in noted:
                del noted[request]
                if not noted:
                    del calendar[due]
        self.num_departures += 1
        self._free_slots.append(request.slot)
        for token_id in request.stop_token_ids:
            self._num_with_stop_id[token_id] -= 1
            if self._num_with_stop_id[token_id] == 0:
                del self._num_with_stop_id[token_id]
        self.num_watched -= request.params.repetition_detection is not None

    def check(self) -> None:
        """Assert the invariants of slots and lists. O(everything); for tests."""
        running = self.requests()
        slots = [request.slot for request in running]
        assert len(set(slots)) == len(slots) and not set(slots) & set(self._free_slots)
        assert len(slots) + len(self._free_slots) == self._max_num_seqs
        assert all(request.status is RequestStatus.RUNNING for request in running)
        stop_ids = {token_id for request in running for token_id in request.stop_token_ids}
        assert stop_ids == set(self.stop_token_ids)
        assert self.num_watched == sum(request.params.repetition_detection is not None for request in running)
