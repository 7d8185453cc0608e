"""What the device knows of each request: its tokens, how many are computed, and its pages, in rows at fixed
addresses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_engine.runner.transfer import to_device
from nemo_engine.step import SlotFill, StepPlan


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
        self.num_computed: Tensor = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self.draft_until: Tensor = torch.zeros_like(self.num_computed)
        self.page_table: Tensor = torch.empty(num_slots + 1, max_pages, dtype=torch.int64, device=device)
        self.token_ids[0].zero_()
        self.page_table[0].zero_()
        self.num_pages: list[int] = [0] * (num_slots + 1)  # on the host: pages of each row
        self._has_drafts = [False] * (num_slots + 1)
        self.highest_page = 0  # that a request ever had
        self.num_changes = 0  # fills and steps with new pages: while it stands still, so does ``num_pages``
        self._last_page = num_pages
        self._vocab_size = vocab_size

    def fill(self, fill: SlotFill) -> None:
        """A request enters a slot. What a kernel could read or write out of bounds with is refused here."""
        self.num_changes += 1
        slot, ids, pages = fill.slot, torch.tensor(fill.token_ids), torch.tensor(fill.pages)
        rows, length = self.token_ids.shape
        if not (0 < slot < rows and 0 < len(ids) <= length and 0 <= fill.num_computed_tokens < len(ids)):
            raise ValueError(
                f"slot {slot} (of 1 to {rows - 1}) cannot take {len(ids)} tokens (at most {length}), "
                f"{fill.num_computed_tokens} of them computed"
            )
        if not 0 <= fill.draft_until <= length:
            raise ValueError(f"slot {slot}: draft_until must be from 0 to {length}, got {fill.draft_until}")
        self._check("token_ids", ids, 0, self._vocab_size - 1)
        self._check("pages", pages, 1, self._last_page)
        self.token_ids[slot, : len(ids)] = to_device(ids, self.device, torch.int32)
        self.page_table[slot, : len(pages)] = to_device(pages, self.device)
        self.num_computed[slot] = fill.num_computed_tokens
        self.draft_until[slot] = fill.draft_until
        self._has_drafts[slot] = fill.draft_until > 0
        self.num_pages[slot] = len(pages)
        self.highest_page = max(self.highest_page, *fill.pages) if fill.pages else self.highest_page

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

    @staticmethod
    def _check(name: str, values: Tensor, low: int, high: int) -> None:
        if len(values) and not (low <= int(values.min()) and int(values.max()) <= high):
            raise ValueError(f"{name} must be from {low} to {high}, got {int(values.min())} to {int(values.max())}")
