"""What a token that came out of a step means for its request: a failure, an end, or neither; and what a broken step means for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import isfinite

from nemo_engine.outputs import NO_TOKEN_LEFT, FinishReason
from nemo_engine.scheduler.constrained import refusal
from nemo_engine.scheduler.planned_step import PlannedStep
from nemo_engine.scheduler.repetition import ends_in_repetition
from nemo_engine.scheduler.request import Request, RequestStatus
from nemo_engine.scheduler.waiting import WaitingQueue
from nemo_engine.step import TOKEN_ALL_MASKED, TOKEN_NOT_FINITE, StepResult, TokenLogprobs

ERRORS = {
    TOKEN_NOT_FINITE: "the model's logits are not finite (NaN or infinity): the weights or the cache are damaged",
    TOKEN_ALL_MASKED: NO_TOKEN_LEFT,
}


@dataclass(slots=True)
class Committed:
    """What one committed step changed. ``token_ids[i]`` was appended to ``requests[i]``.

    ``prefilled`` are those of ``requests`` whose prompt (or, after a preemption, all known tokens) this step completed.
    ``logprobs`` maps an index into ``requests``; ``prompt_logprobs`` holds ``(request, first position, entries)``.
    ``finished`` requests have their ``finish_reason``; those in ``requests`` too got their last token in this step.
    After a failure nothing was committed: whatever ran has ended, and may have done so before in a step that was never reported.
    """

    requests: list[Request] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prefilled: list[Request] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: list[tuple[Request, int, list[TokenLogprobs]]] = field(default_factory=list)
    failure: str | None = None


def failure_of(request: Request, token_id: int) -> str | None:
    """Why ``request`` cannot go on with ``token_id``, None if it can: its grammar has then taken the token in."""
    if token_id < 0:
        return request.error or ERRORS[token_id]
    if request.grammar is not None and token_id not in request.stop_token_ids:
        return refusal(request, token_id)
    return None


def is_finite(entries: list[TokenLogprobs]) -> bool:
    """Whether the logits were, that ``entries`` are made of: where one is NaN or infinite, a row's log-probabilities are not finite."""
    return all(isfinite(entry.logprobs[0]) for entry in entries)


def end_of(request: Request, token_id: int) -> tuple[FinishReason, int | None] | None:
    """Finish and stop reason if ``request`` ends with ``token_id``, its last token by now."""
    if token_id in request.stop_token_ids:
        return "stop", None if token_id in request.eos_token_ids else token_id
    if request.grammar is not None and not request.eos_token_ids and request.grammar.is_finished:
        return "stop", None
    rule = request.params.repetition_detection
    if rule is not None and ends_in_repetition(request.token_ids, request.num_output_tokens, rule):
        return "repetition", None
    return None


def commit_each(
    step: PlannedStep,
    requests: list[Request],
    result: StepResult,
    to: Committed,
    end: Callable[..., None],
    discard: Callable[[Request], list[int]],
) -> set[int]:
    """Give each of ``requests`` its token; ``end(request, reason, stop_reason)`` is called for those that end with it.

    ``discard`` takes the pages from a request whose logits were not finite. Returns those that were in doubt.
    """
    bad: set[int] = set()
    for index, (request, token_id) in enumerate(zip(requests, result.token_ids)):
        if not step.counts_for(request):
            continue
        request.error = failure_of(request, token_id)
        request.is_sound = request.is_sound or token_id >= 0
        if request.error is not None:
            if token_id == TOKEN_NOT_FINITE:
                bad.update(discard(request))
            end(request, "error")
            to.finished.append(request)
            continue
        request.token_ids.append(token_id)
        if index in result.logprobs:
            to.logprobs[len(to.requests)] = result.logprobs[index]
        to.requests.append(request)
        to.token_ids.append(token_id)
        reasons = end_of(request, token_id)
        if reasons is not None:
            end(request, *reasons)
            to.finished.append(request)
    return bad


def restart(requests: Iterable[Request], message: str, or_first: bool) -> tuple[WaitingQueue, list[Request]]:
    """All that holds of ``requests`` after a failure: those that wait, without pages, and those that it ended, with ``message``.

    ``or_first``: if nobody ran, the first of those that wait ends.
    """
    waiting, ended = WaitingQueue(), []
    for request in requests:
        request.pages, request.num_hashed_pages, request.pages_wanted, request.hash_wanted = [], 0, 0, None
        request.num_computed_tokens = 0
        if request.status is RequestStatus.WAITING:
            waiting.push(request)
        else:
            ended.append(request)
    if or_first and not ended and waiting:
        ended.append(waiting.first())
        waiting.remove(ended[0])
    for request in ended:
        if request.status is not RequestStatus.FINISHED:
            request.finish_reason, request.stop_reason, request.error = "error", None, message
            request.status = RequestStatus.FINISHED
    return waiting, ended
