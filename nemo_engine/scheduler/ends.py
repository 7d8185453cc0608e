"""What a token that came out of a step means for its request: a failure, an end, or neither."""

from __future__ import annotations

from nemo_engine.outputs import NO_TOKEN_LEFT, FinishReason
from nemo_engine.scheduler.constrained import refusal
from nemo_engine.scheduler.repetition import ends_in_repetition
from nemo_engine.scheduler.request import Request
from nemo_engine.step import TOKEN_ALL_MASKED, TOKEN_NOT_FINITE

_ERRORS = {
    TOKEN_NOT_FINITE: "the model's logits are not finite (NaN or infinity): the weights or the cache are damaged",
    TOKEN_ALL_MASKED: NO_TOKEN_LEFT,
}


def failure_of(request: Request, token_id: int) -> str | None:
    """Why ``request`` cannot go on with ``token_id``, None if it can: its grammar has then taken the token in."""
    if token_id < 0:
        return request.error or _ERRORS[token_id]
    if request.grammar is not None and token_id not in request.stop_token_ids:
        return refusal(request, token_id)
    return None


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
