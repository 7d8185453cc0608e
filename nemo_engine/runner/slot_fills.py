"""Requests that enter slots: all that they write on the device comes with the one upload of their step."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from nemo_engine.runner.request_table import RequestTable
from nemo_engine.runner.sampler import STATE_WORDS, Sampler
from nemo_engine.runner.transfer import staged, to_device
from nemo_engine.step import SlotFill

_TABLE_WORDS = 2  # of a slot's state in the table


class SlotFills:
    """The fills of a step, from the plan until they are entered into the request table and the sampler."""

    def __init__(self, table: RequestTable, sampler: Sampler) -> None:
        self._table = table
        self._sampler = sampler
        self._waiting: list[tuple[SlotFill, array[int], array[int], array[int]]] = []  # with tokens, pages and state

    def prepare(self, fills: Sequence[SlotFill]) -> None:
        """Take the fills of a step, and forget those of a step that failed. Raises ``ValueError`` for a bad one."""
        self._waiting.clear()
        for fill in fills:
            ids, pages, state = self._table.fill(fill)
            self._waiting.append((fill, ids, pages, array("q", state) + self._sampler.fill(fill)))

    def upload(self, words: Sequence[int], into: Tensor | None = None) -> Tensor:
        """``words`` on the device, (N,) int64, in ``into`` if it is given. What waits comes in the same upload, and is
        entered.
        """
        if self._waiting:
            entered = self._enter_with(words)
            return entered if into is None else into.copy_(entered)
        if into is None:
            return to_device(words, self._table.device)
        return into.copy_(staged(words, self._table.device), non_blocking=True)

    def _enter_with(self, words: Sequence[int]) -> Tensor:
        """Upload ``words`` and what waits behind them, enter that, and return ``words`` on the device.

        Layout behind ``words``, from an even place on: the slots, the state of each, and the tokens (two a word) and
        pages of each, all from an even place on.
        """
        waiting, count = self._waiting, len(self._waiting)
        parts = [array("q", words), array("q", [fill.slot for fill, *_ in waiting])]
        parts.append(array("q", b"".join([state.tobytes() for *_, state in waiting])))
        for _, ids, pages, _ in waiting:
            parts += [array("q", ids.tobytes() + bytes(4 * (len(ids) % 2))), pages]
        places, packed = [], bytearray()
        for part in parts:
            packed += bytes(len(packed) % 16)
            places.append(len(packed) // 8)
            packed += part.tobytes()
        uploaded = to_device(torch.frombuffer(packed, dtype=torch.int64), self._table.device)
        views = [uploaded[place : place + len(part)] for place, part in zip(places, parts, strict=True)]
        slots, state = views[1], views[2].view(count, _TABLE_WORDS + STATE_WORDS)
        rows = [
            (fill.slot, packed_ids.view(torch.int32)[: len(ids)], pages)
            for (fill, ids, *_), packed_ids, pages in zip(waiting, views[3::2], views[4::2], strict=True)
        ]
        self._table.enter(slots, state[:, :_TABLE_WORDS], rows)
        self._sampler.enter([fill for fill, *_ in waiting], slots, state[:, _TABLE_WORDS:], self._table.token_ids)
        waiting.clear()
        return views[0]
