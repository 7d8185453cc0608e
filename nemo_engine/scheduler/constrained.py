"""Decoding requests whose next token depends on a grammar: they sit out while one of their steps is in flight.

A mask needs the token before it, which the host learns when a step is committed. So with d steps in flight such a request takes part in
every d-th step, all of them in the same one, and the other requests are not disturbed. With d = 1 it takes part in every step.
"""

from __future__ import annotations

from collections.abc import Iterable

from nemo_engine.scheduler.decode_set import DecodeSet
from nemo_engine.scheduler.request import Request


class ConstrainedSet:
    """The constrained requests that decode. Their ``num_computed_tokens`` is kept; the calendars know nothing of them."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self.requests: dict[Request, None] = {}
        self._launched_step = 0  # the last one in which they took part
        self._joined: tuple[DecodeSet, list[Request], DecodeSet] | None = None

    def add(self, request: Request, step_id: int) -> None:
        """``request``, whose known tokens step ``step_id`` computes, decodes once that is committed."""
        request.launched_step = step_id
        self.requests[request] = None
        self._joined = None  # of its slot before a preemption, perhaps

    def forget_joined(self) -> None:
        """A request leaves: nothing is to keep it."""
        self._joined = None

    def remove(self, request: Request) -> None:
        """``request`` leaves, or its last step is planned."""
        del self.requests[request]

    def ready(self, oldest_in_flight: int) -> list[Request]:
        """Those that the next step takes: none until their last common step is committed, then all of known tokens."""
        if self._launched_step >= oldest_in_flight:
            return []
        return [request for request in self.requests if request.launched_step < oldest_in_flight]

    def outgrown(self, ready: Iterable[Request]) -> list[Request]:
        """Those of ``ready`` that start a page with their next token."""
        return [request for request in ready if request.num_computed_tokens >= len(request.pages) * self._page_size]

    def launch(self, ready: list[Request], step_id: int) -> list[Request]:
        """Step ``step_id`` computes a token of each of ``ready``; returns those for which it is the last."""
        self._launched_step = step_id
        last = []
        for request in ready:
            request.launched_step = step_id
            request.num_computed_tokens += 1
            if request.num_computed_tokens >= request.max_total_tokens - 1:
                last.append(request)
        return last

    def join(self, decodes: DecodeSet, ready: list[Request]) -> DecodeSet:
        """``decodes`` and then ``ready``; the same object as long as both are what they were."""
        if self._joined is None or self._joined[0] is not decodes or self._joined[1] != ready:
            self._joined = (decodes, ready, DecodeSet([*decodes.requests, *ready]))
        return self._joined[2]


def mask_of(request: Request) -> bytes:
    """What may come next; nothing (b"") if the grammar breaks, which the step then reports as a row without a choice."""
    assert request.grammar is not None
    request.error = None
    try:
        return request.grammar.mask()
    except Exception as error:
        request.error = _failure(error)
        return b""


def refusal(request: Request, token_id: int) -> str | None:
    """Take ``token_id`` into the grammar; returns why it could not be."""
    assert request.grammar is not None
    try:
        request.grammar.accept(token_id)
    except Exception as error:
        return _failure(error)
    return None


def _failure(error: Exception) -> str:
    return f"the grammar of structured_outputs failed: {type(error).__name__}: {error}"
