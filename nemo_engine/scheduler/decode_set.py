"""``DecodeSet``: requests that decode in a step, and the views of them that planning and committing need."""

from __future__ import annotations

from collections.abc import Iterable

from nemo_engine.scheduler.request import Request


class DecodeSet:
    """The decoding requests in row order; replaced whole when one joins or leaves.

    A view is made when it is first asked for: ``slots`` in the plan of the first step, before any of the requests may have left.
    """

    __slots__ = ("_slots", "_token_lists", "requests")

    def __init__(self, requests: Iterable[Request]) -> None:
        self.requests = list(requests)
        self._slots: tuple[int, ...] | None = None
        self._token_lists: list[list[int]] | None = None

    @property
    def slots(self) -> tuple[int, ...]:
        """Of each request; always the same object."""
        if self._slots is None:
            self._slots = tuple([request.slot for request in self.requests])
        return self._slots

    @property
    def token_lists(self) -> list[list[int]]:
        """``token_ids`` of each request."""
        if self._token_lists is None:
            self._token_lists = [request.token_ids for request in self.requests]
        return self._token_lists
