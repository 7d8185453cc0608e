"""``DecodeSet``: requests that decode in a step, and the views of them that planning and committing need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nemo_engine.scheduler.request import Request


@dataclass(frozen=True, slots=True)
class DecodeSet:
    """The decoding requests in row order, and the views of them that a step needs; replaced whole when one joins or leaves."""

    requests: list[Request]
    slots: tuple[int, ...]
    token_lists: list[list[int]]

    @classmethod
    def of(cls, requests: Iterable[Request]) -> DecodeSet:
        """Views of ``requests`` as of now."""
        members = list(requests)
        return cls(members, tuple([r.slot for r in members]), [r.token_ids for r in members])
