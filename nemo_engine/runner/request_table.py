"""What the device knows of each request: its tokens, how many are computed, and its pages, in rows at fixed addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_engine.step import SlotFill, StepPlan


class RequestTable:
    """Rows 1 to ``num_slots``; row 0 is padding. The host sends differences; the step itself advances the rows.

    ``token_ids`` (S + 1, max_len) int32; ``num_computed`` (S + 1,) int64; ``page_table`` (S + 1, max_pages) int64.
    Entries past what a row holds mean nothing. On the CPU, memory is taken as rows grow.
    """

    def __init__(self, num_slots: int, max_len: int, page_size: int, device: torch.device) -> None:
        max_pages = -(-max_len // page_size)
        self.device = device
        self.token_ids: Tensor = torch.empty(num_slots + 1, max_len, dtype=torch.int32, device=device)
        self.num_computed: Tensor = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self.page_table: Tensor = torch.empty(num_slots + 1, max_pages, dtype=torch.int64, device=device)
        self.num_pages: list[int] = [0] * (num_slots + 1)  # on the host: pages of each row

    def apply(self, plan: StepPlan) -> None:
        """Enter the new requests and pages of ``plan``."""
        for fill in plan.fills:
            self._fill(fill)
        if plan.new_pages:
            slots, indices, pages = torch.tensor(plan.new_pages, device=self.device).unbind(1)
            self.page_table[slots, indices] = pages
            for slot, index, _ in plan.new_pages:
                self.num_pages[slot] = index + 1

    def _fill(self, fill: SlotFill) -> None:
        slot = fill.slot
        self.token_ids[slot, : len(fill.token_ids)] = torch.tensor(
            fill.token_ids, dtype=torch.int32, device=self.device
        )
        self.page_table[slot, : len(fill.pages)] = torch.tensor(fill.pages, dtype=torch.int64, device=self.device)
        self.num_computed[slot] = fill.num_computed_tokens
        self.num_pages[slot] = len(fill.pages)
