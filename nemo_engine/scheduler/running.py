"""The requests that hold a slot, and the slots."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

from nemo_engine.scheduler.request import Request, RequestStatus, by_urgency
from nemo_engine.scheduler.scheduled_step import ScheduledStep


class RunningRequests:
    """Every request that holds a slot is in one of four lists, by what the next steps do for it."""

    def __init__(self, max_num_seqs: int) -> None:
        self.prefilling: list[Request] = []  # the most urgent first
        self.decoding: list[Request] = []  # all known tokens are planned, so each step computes new ones; in row order
        self.constrained: list[Request] = []  # the same, of requests with a grammar
        self.ending: list[Request] = []  # their last step is planned
        self.free_slots = list(range(max_num_seqs, 0, -1))  # the next to be given is last

    def __len__(self) -> int:
        return len(self.decoding) + len(self.constrained) + len(self.ending) + len(self.prefilling)

    def all(self) -> list[Request]:
        """All requests that hold a slot, those that prefill last."""
        return [*self.decoding, *self.constrained, *self.ending, *self.prefilling]

    def enter(self, request: Request, now: float) -> None:
        """Give ``request``, which has its pages, a slot; it prefills."""
        if request.scheduled_ts is None:
            request.scheduled_ts = now
            request.num_cached_tokens = request.num_computed_tokens
        request.status = RequestStatus.RUNNING
        request.slot = self.free_slots.pop()
        request.is_sound = False
        insort(self.prefilling, request, key=by_urgency)

    def end_prefill(self, request: Request) -> None:
        """The step that is being planned computes the last known token of ``request``."""
        self.prefilling.remove(request)
        (self.decoding if request.grammar is None else self.constrained).append(request)

    def end_decode(self, request: Request) -> None:
        """No step is left to be planned for ``request``."""
        (self.decoding if request.grammar is None else self.constrained).remove(request)
        self.ending.append(request)

    def resume_decode(self, request: Request) -> None:
        """A wide step gave ``request`` fewer tokens than it might have: steps are left to be planned."""
        if request in self.ending:
            self.ending.remove(request)
            self.decoding.append(request)

    def leave(self, request: Request) -> None:
        """Take the slot from ``request``."""
        for requests in (self.decoding, self.constrained, self.ending, self.prefilling):
            if request in requests:
                requests.remove(request)
        self.free_slots.append(request.slot)

    def ready_to_decode(self, in_flight: Iterable[ScheduledStep]) -> list[Request]:
        """The requests that the next step decodes if they have steps and pages left, in row order.

        A request with a grammar needs a mask, and the mask depends on the request's last token, which is known once a
        step is committed. So such a request sits out while a step of its own is in flight. All requests with a grammar
        decode in the same step, one of d where d steps are in flight: masks are uploaded once in d steps.
        """
        if not self.constrained or any(step.has_constrained for step in in_flight):
            return self.decoding[:]
        return self.decoding + [r for r in self.constrained if r.num_computed_tokens < len(r.token_ids)]

    def least_urgent(self) -> Request:
        """The request to preempt: the newest of those with steps left and the largest priority number."""
        return max([request for request in self.all() if request.has_steps_left], key=by_urgency)
