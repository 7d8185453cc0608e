"""Which tokens may come next in a request, and what a token that came means for it: a failure, an end, or neither."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite

from nemo_engine.outputs import GRAMMAR_TOO_COMPLEX, NO_TOKEN_LEFT, FinishReason
from nemo_engine.sampling_params import RepetitionDetection
from nemo_engine.scheduler.request import Request
from nemo_engine.step import TOKEN_ALL_MASKED, TOKEN_NOT_FINITE, TokenLogprobs

ERRORS = {
    TOKEN_NOT_FINITE: "the model's logits are not finite (NaN or infinity): the weights or the cache are damaged",
    TOKEN_ALL_MASKED: NO_TOKEN_LEFT,
}


def mask_of(request: Request) -> bytes:
    """What the grammar of ``request`` allows next; b"", which allows nothing, if it fails, which sets
    ``mask_error``.
    """
    assert request.grammar is not None
    request.mask_error = None
    try:
        return request.grammar.mask()
    except Exception as error:
        request.mask_error = _grammar_error(error)
        return b""


def failure_of(request: Request, token_id: int) -> str | None:
    """Why ``request`` cannot go on with ``token_id``; None if it can, and its grammar has then taken the token in."""
    if token_id < 0:
        return request.mask_error or ERRORS[token_id]
    if request.grammar is not None and token_id not in request.stop_token_ids:
        try:
            request.grammar.accept(token_id)
        except Exception as error:
            return _grammar_error(error)
    return None


def end_of(request: Request) -> tuple[FinishReason, int | None] | None:
    """Finish and stop reason if ``request`` ends with its last token, whatever its length."""
    token_id = request.token_ids[-1]
    if token_id in request.stop_token_ids:
        return "stop", None if token_id in request.eos_token_ids else token_id
    if request.grammar is not None and not request.eos_token_ids and request.grammar.is_finished:
        return "stop", None
    rule = request.params.repetition_detection
    if rule is not None and ends_in_repetition(request.token_ids, request.num_output_tokens, rule):
        return "repetition", None
    return None


def is_finite(entries: Iterable[TokenLogprobs]) -> bool:
    """Whether the logits behind ``entries`` were finite: a NaN or +inf spoils all log-probabilities of its row."""
    return all(isfinite(entry.logprobs[0]) for entry in entries)


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


def _grammar_error(error: Exception) -> str:
    if str(error).startswith(GRAMMAR_TOO_COMPLEX):
        return str(error)
    return f"the grammar of structured_outputs failed: {type(error).__name__}: {error}"
