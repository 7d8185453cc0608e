"""What the device knows of each request: its tokens, how many are computed, and its pages, in rows at fixed
addresses.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from nemo_engine.step import SlotFill, StepPlan

_DTYPES = {"i": torch.int32, "q": torch.int64}  # of arrays, by their type code


class RequestTable:
    """Rows 1 to ``num_slots``; row 0 is padding: one token of id 0, in page 0.

    The host sends differences; the step advances the rows.

    ``token_ids`` (S + 1, max_len) int32; ``num_computed``, ``draft_until`` (S + 1,) int64; ``page_table`` (S + 1,
    max_pages) int64.
    Entries past what a row holds mean nothing. On the CPU, memory is taken as rows grow.
    """

    def __init__(
        self, num_slots: int, max_len: int, page_size: int, num_pages: int, vocab_size: int, device: torch.device
    ) -> None:
        max_pages = -(-max_len // page_size)
        self.device = device
        self.num_slots = num_slots
        self.token_ids: Tensor = torch.empty(num_slots + 1, max_len, dtype=torch.int32, device=device)
        # Together in memory, so that requests enter them by one operation. An even number of words keeps both aligned.
        self._state = torch.zeros(2, num_slots + 1 + (num_slots + 1) % 2, dtype=torch.int64, device=device)
        self.num_computed: Tensor
        self.draft_until: Tensor
        self.num_computed, self.draft_until = self._state[:, : num_slots + 1]
        self.page_table: Tensor = torch.empty(num_slots + 1, max_pages, dtype=torch.int64, device=device)
        self.token_ids[0].zero_()
        self.page_table[0].zero_()
        self.num_pages: list[int] = [0] * (num_slots + 1)  # on the host: pages of each row
        self._has_drafts = [False] * (num_slots + 1)
        self.highest_page = 0  # that a request ever had
        self.num_changes = 0  # fills and steps with new pages: while it stands still, so does ``num_pages``
        self._last_page = num_pages
        self._vocab_size = vocab_size

    def fill(self, fill: SlotFill) -> tuple[array[int], array[int], list[int]]:
        """A request enters a slot: what ``enter`` writes there, which is its tokens, its pages and its state.

        What a kernel could read or write out of bounds with is refused here, and then nothing has changed.
        """
        slot = fill.slot
        rows, length = self.token_ids.shape
        count = len(fill.token_ids)
        if not (0 < slot < rows and 0 < count <= length and 0 <= fill.num_computed_tokens < count):
            raise ValueError(
                f"slot {slot} (of 1 to {rows - 1}) cannot take {count} tokens (at most {length}), "
                f"{fill.num_computed_tokens} of them computed"
            )
        if len(fill.pages) > self.page_table.shape[1]:
            raise ValueError(f"slot {slot} cannot take {len(fill.pages)} pages, at most {self.page_table.shape[1]}")
        if not 0 <= fill.draft_until <= length:
            raise ValueError(f"slot {slot}: draft_until must be from 0 to {length}, got {fill.draft_until}")
        ids = _checked("token_ids", fill.token_ids, "i", 0, self._vocab_size - 1)
        pages = _checked("pages", fill.pages, "q", 1, self._last_page)
        self.num_changes += 1
        self._has_drafts[slot] = fill.draft_until > 0
        self.num_pages[slot] = len(pages)
        self.highest_page = max(self.highest_page, *pages) if pages else self.highest_page
        return ids, pages, [fill.num_computed_tokens, fill.draft_until]

    def enter(self, slots: Tensor, state: Tensor, rows: Iterable[tuple[int, Tensor, Tensor]]) -> None:
        """Write what ``fill`` returned, which is on the device now. slots: (F,) int64. state: (F, 2) int64. rows: of
        each slot its number, its tokens (int32) and its pages (int64).
        """
        self._state.index_copy_(1, slots, state.T)
        for slot, ids, pages in rows:
            self.token_ids[slot, : len(ids)] = ids
            self.page_table[slot, : len(pages)] = pages

    def rows_of(self, slots: tuple[int, ...], width: int) -> tuple[int, ...]:
        """The slots of a step's decode rows: in a wide step ``width`` for each of ``slots``, all but the first padding
        where the slot has no drafts.
        """
        if width == 1:
            return slots
        padding = (0,) * (width - 1)
        return tuple(
            [row for slot in slots for row in ([slot] * width if self._has_drafts[slot] else (slot, *padding))]
        )

    def take_new_pages(self, plan: StepPlan) -> dict[int, tuple[int, int]]:
        """The (index, page) that each slot of ``plan`` gets, which the step itself enters: at most one a slot."""
        taken = {}
        self.num_changes += bool(plan.new_pages)
        for slot, index, page in plan.new_pages:
            if not (0 < slot < len(self.num_pages) and 0 <= index < self.page_table.shape[1]):
                raise ValueError(f"new_pages: no place for page {index} of slot {slot}")
            if not 1 <= page <= self._last_page:
                raise ValueError(f"new_pages: pages must be from 1 to {self._last_page}, got {page}")
            if slot in taken:
                raise ValueError(f"new_pages: a step gives a slot one page at most, slot {slot} gets two")
            taken[slot] = (index, page)
            self.num_pages[slot] = index + 1
            self.highest_page = max(self.highest_page, page)
        return taken


def _checked(name: str, values: Sequence[int], typecode: str, low: int, high: int) -> array[int]:
    """``values`` as an array of ``typecode``; ``ValueError`` if they are not all from ``low`` to ``high``."""
    try:
        packed = array(typecode, values)
        ends = torch.frombuffer(packed, dtype=_DTYPES[typecode]).aminmax() if packed else (low, high)
    except OverflowError:
        ends = min(values), max(values)
    smallest, largest = map(int, ends)
    if not low <= smallest <= largest <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {smallest} to {largest}")
    return packed
