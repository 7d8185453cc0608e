"""What the scheduler keeps of a step from its plan to its commit, and what a commit changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nemo_engine.scheduler.request import Request
from nemo_engine.scheduler.token_rules import mask_of
from nemo_engine.step import PrefillRow, SlotFill, StepPlan, StepResult, TokenLogprobs


@dataclass(slots=True)
class StepOutput:
    """What one committed step changed. ``token_ids[i]`` was appended to ``requests[i]``; of a wide step, a request
    comes as often, one after the other, as it got a token.

    ``prefilled``: requests whose prompt (after a preemption, all known tokens) this step completed.
    ``logprobs`` maps an index into ``requests``; ``prompt_logprobs`` holds ``(request, first position, entries)``.
    ``finished`` requests have their ``finish_reason``; those in ``requests`` too got their last token in this step.
    ``failure``: why nothing was committed. ``finished`` are then all requests that were running; some of them may have
    ended before, in a step that was never reported.
    """

    requests: list[Request] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prefilled: list[Request] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: list[tuple[Request, int, list[TokenLogprobs]]] = field(default_factory=list)
    failure: str | None = None

    def add_tokens(self, requests: list[Request], result: StepResult, dropped: set[int]) -> None:
        """``requests`` have got the tokens of ``result``, but for those at the indices ``dropped``."""
        self.requests, self.token_ids, self.logprobs = requests, result.token_ids, dict(result.logprobs)
        if dropped:
            kept = [index for index in range(len(requests)) if index not in dropped]
            self.requests = [requests[index] for index in kept]
            self.token_ids = [result.token_ids[index] for index in kept]
            self.logprobs = {new: result.logprobs[old] for new, old in enumerate(kept) if old in result.logprobs}


@dataclass(slots=True)
class ScheduledStep:
    """The requests behind the rows of a plan."""

    step_id: int
    decodes: list[Request]  # those with a grammar last
    new_pages: list[tuple[int, int, int]]
    width: int = 1  # see ``StepPlan``
    planned_at: float = 0.0
    prefills: list[tuple[Request, PrefillRow]] = field(default_factory=list)
    fills: list[SlotFill] = field(default_factory=list)
    departed: set[Request] = field(default_factory=set)  # left their slot since: what the step gives them is dropped

    # Filled in by the commit:
    committed: StepOutput = field(default_factory=StepOutput)
    bad_pages: set[int] = field(default_factory=set)  # of requests that failed; others may have read them

    @property
    def has_constrained(self) -> bool:
        """Whether a request with a grammar decodes."""
        return bool(self.decodes) and self.decodes[-1].grammar is not None

    @property
    def sampling(self) -> list[Request]:
        """The requests for which the step chooses tokens, in the order of ``StepResult.token_ids``."""
        return self.decodes + [request for request, row in self.prefills if row.samples]

    def check(self, result: StepResult) -> None:
        """Assert that ``result`` is this step's."""
        count = len(self.sampling) + len(self.decodes) * (self.width - 1)
        assert (result.step_id, len(result.token_ids)) == (self.step_id, count), (result, self.step_id, count)

    def note_prefilled(self, token_ids: Sequence[int]) -> None:
        """``token_ids`` came out of this step: the requests that completed a prompt in it are sound if theirs is a
        token.
        """
        requests = self.sampling[len(self.decodes) :]
        for request, token_id in zip(requests, token_ids[len(token_ids) - len(requests) :]):
            if request not in self.departed:
                self.committed.prefilled.append(request)
                request.is_sound = token_id >= 0

    def fill_slot(self, request: Request) -> None:
        """``request`` enters its slot in this step."""
        self.fills.append(
            SlotFill(
                slot=request.slot,
                token_ids=request.token_ids[:],
                num_prompt_tokens=request.num_prompt_tokens,
                num_computed_tokens=request.num_computed_tokens,
                pages=tuple(request.pages),
                params=request.params,
                seed=request.seed,
                stop_token_ids=request.stop_token_ids,
                bad_words_token_ids=request.bad_words_token_ids,
                draft_until=0 if request.acceptance is None else request.max_total_tokens,
            )
        )

    def prefill(self, request: Request, max_tokens: int) -> PrefillRow:
        """Compute the next ``max_tokens`` known tokens of ``request``, or as many as are left."""
        start = request.num_computed_tokens
        count = min(max_tokens, len(request.token_ids) - start)
        request.num_computed_tokens += count
        samples = request.num_computed_tokens == len(request.token_ids)
        row = PrefillRow(request.slot, start, count, samples)
        self.prefills.append((request, row))
        return row

    def plan(self) -> StepPlan:
        """The step as the device half gets it, with the masks of the constrained requests that sample."""
        may_be_masked = self.sampling if self.has_constrained else self.sampling[len(self.decodes) :]
        return StepPlan(
            step_id=self.step_id,
            decode_slots=tuple([request.slot for request in self.decodes]),
            prefills=tuple([row for _, row in self.prefills]),
            fills=tuple(self.fills),
            new_pages=tuple(self.new_pages),
            masks=tuple([(request.slot, mask_of(request)) for request in may_be_masked if request.grammar is not None]),
            width=self.width,
        )
