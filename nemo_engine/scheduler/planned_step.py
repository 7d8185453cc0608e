"""``PlannedStep``: what the scheduler decided for one step, and keeps until the step is committed."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_engine.scheduler.constrained import mask_of
from nemo_engine.scheduler.decode_set import DecodeSet
from nemo_engine.scheduler.request import Request, RequestStatus
from nemo_engine.step import PrefillRow, SlotFill, StepPlan


@dataclass(slots=True)
class PlannedStep:
    """A step, filled in while it is planned."""

    step_id: int
    decodes: DecodeSet
    last: list[Request]  # for these, the token of this step is the last that they may have
    num_departures: int  # of the running set when the step was planned
    budget: int  # tokens that it may still take
    constrained: list[Request]  # that sample in this step, under a mask
    new_pages: list[tuple[int, int, int]]
    prefills: list[tuple[Request, PrefillRow]] = field(default_factory=list)
    admitted: list[tuple[Request, int]] = field(default_factory=list)  # and how many of its tokens the cache had

    def plan(self) -> StepPlan:
        """The step as the device half gets it; to be asked for before anything else changes."""
        rows = tuple([row for _, row in self.prefills]) if self.prefills else ()
        fills = tuple([_slot_fill(*entry) for entry in self.admitted]) if self.admitted else ()
        masks = tuple([(request.slot, mask_of(request)) for request in self.constrained]) if self.constrained else ()
        return StepPlan(self.step_id, self.decodes.slots, rows, fills, tuple(self.new_pages), masks)

    def counts_for(self, request: Request) -> bool:
        """Whether what was computed for ``request`` counts: it has neither finished nor been preempted since."""
        return request.status is RequestStatus.RUNNING and request.admitted_step <= self.step_id


def _slot_fill(request: Request, num_cached_tokens: int) -> SlotFill:
    return SlotFill(
        slot=request.slot,
        token_ids=request.token_ids[:],
        num_prompt_tokens=request.num_prompt_tokens,
        num_computed_tokens=num_cached_tokens,
        pages=tuple(request.pages),
        params=request.params,
        seed=request.seed,
        stop_token_ids=request.stop_token_ids,
        bad_words_token_ids=request.bad_words_token_ids,
    )
