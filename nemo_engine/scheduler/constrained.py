"""Requests with a grammar, whose next token is chosen under a mask.

A mask follows from the token before it, which the host learns when a step is committed. So a constrained request sits
out while one of its steps is in flight. With d steps in flight it takes part in every d-th step, all constrained
requests in the same one, so that one step in d uploads masks and the other requests are not disturbed.
"""

from __future__ import annotations

from nemo_engine.outputs import GRAMMAR_TOO_COMPLEX
from nemo_engine.scheduler.request import Request


def mask_of(request: Request) -> tuple[bytes, str | None]:
    """What may come next, and no error; or no mask at all, which allows nothing, and why the grammar has none."""
    assert request.grammar is not None
    try:
        return request.grammar.mask(), None
    except Exception as error:
        return b"", _describe(error)


def refusal(request: Request, token_id: int) -> str | None:
    """Give ``token_id`` to the grammar; returns why the grammar does not take it, None if it does."""
    assert request.grammar is not None
    try:
        request.grammar.accept(token_id)
    except Exception as error:
        return _describe(error)
    return None


def _describe(error: Exception) -> str:
    if str(error).startswith(GRAMMAR_TOO_COMPLEX):
        return str(error)
    return f"the grammar of structured_outputs failed: {type(error).__name__}: {error}"
