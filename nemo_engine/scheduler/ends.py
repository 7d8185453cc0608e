"""How requests end: what a token means for its request, and what a broken step means for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite

from nemo_engine.outputs import NO_TOKEN_LEFT, FinishReason
from nemo_engine.sampling_params import RepetitionDetection
from nemo_engine.scheduler.constrained import refusal
from nemo_engine.scheduler.request import Request, RequestStatus
from nemo_engine.scheduler.waiting import WaitingQueue
from nemo_engine.step import TOKEN_ALL_MASKED, TOKEN_NOT_FINITE, TokenLogprobs

ERRORS = {
    TOKEN_NOT_FINITE: "the model's logits are not finite (NaN or infinity): the weights or the cache are damaged",
    TOKEN_ALL_MASKED: NO_TOKEN_LEFT,
}


def failure_of(request: Request, token_id: int, mask_errors: Mapping[Request, str]) -> str | None:
    """Why ``request`` cannot go on with ``token_id``; None if it can, and its grammar has then taken the token in."""
    if token_id < 0:
        return mask_errors.get(request) or ERRORS[token_id]
    if request.grammar is not None and token_id not in request.stop_token_ids:
        return refusal(request, token_id)
    return None


def is_finite(entries: Iterable[TokenLogprobs]) -> bool:
    """Whether the logits behind ``entries`` were finite: a NaN or +inf among a row's logits spoils all its log-probabilities."""
    return all(isfinite(entry.logprobs[0]) for entry in entries)


def end_of(request: Request, token_id: int) -> tuple[FinishReason, int | None] | None:
    """Finish and stop reason if ``request`` ends with ``token_id``, its last token by now, whatever its length."""
    if token_id in request.stop_token_ids:
        return "stop", None if token_id in request.eos_token_ids else token_id
    if request.grammar is not None and not request.eos_token_ids and request.grammar.is_finished:
        return "stop", None
    rule = request.params.repetition_detection
    if rule is not None and ends_in_repetition(request.token_ids, request.num_output_tokens, rule):
        return "repetition", None
    return None


def ends_in_repetition(token_ids: Sequence[int], num_output_tokens: int, rule: RepetitionDetection) -> bool:
    """Whether the last output tokens are ``rule.min_count`` copies of one pattern of an allowed size.

    Cost: at most ``max_pattern_size * min_count`` comparisons per pattern size, whatever the length of the output.
    """
    for size in range(max(1, rule.min_pattern_size), rule.max_pattern_size + 1):
        span = size * rule.min_count
        if span > num_output_tokens:
            return False
        start = len(token_ids) - span
        if all(token_ids[i] == token_ids[i + size] for i in range(len(token_ids) - size - 1, start - 1, -1)):
            return True
    return False


def restart(requests: Iterable[Request], message: str, or_first: bool) -> tuple[WaitingQueue, list[Request]]:
    """After a failure: a new queue of the requests that wait, and those that ran, which end with ``message``.

    ``or_first``: if none ran, the first of those that wait ends.
    """
    waiting, ended = WaitingQueue(), []
    for request in requests:
        request.pages, request.num_hashed_pages, request.pages_wanted, request.hash_wanted = [], 0, 0, None
        request.num_computed_tokens = request.compute_limit = 0
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
