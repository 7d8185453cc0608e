"""What a step computes on the device: inputs from the request table, the model, the choice of tokens, and the table's
advance.

Nothing here reads from the device, so all of it can be captured into a graph. Must not know plans, but for whose
prompts are reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from nemo_engine.model.nemo import ModelInputs, Nemo
from nemo_engine.ops import Ops
from nemo_engine.ops.attention import AttentionMeta, Workspace
from nemo_engine.ops.fused import Sum
from nemo_engine.runner.kv_cache import KVCache
from nemo_engine.runner.request_table import RequestTable
from nemo_engine.runner.sampler import Masks, Report, Sampler
from nemo_engine.runner.step_rows import StepRows
from nemo_engine.step import StepPlan

# Of the N rows of a step that sample: logits (N, V), slots (N,), positions of the tokens that they choose (N,); and the
# new lengths of all its rows (R,).
Logits = tuple[Tensor, Tensor, Tensor, Tensor]
PROMPT_LOGPROB_ROWS = 256  # logits computed at once for prompt log-probabilities: bounds their memory


@dataclass(slots=True, eq=False)
class StepCompute:
    """The parts of the device half, and what a step does with them."""

    model: Nemo
    ops: Ops
    kv_cache: KVCache
    table: RequestTable
    sampler: Sampler
    max_drafts: int = 0  # behind a decode row of a wide step
    workspace: Workspace = field(default_factory=Workspace)

    def draft(self, slots: Tensor, width: int) -> Tensor:
        """Write drafts into the table for the decode rows ``slots`` of a wide step; see ``draft_``."""
        table, max_drafts = self.table, min(self.max_drafts, width - 1)
        return self.ops.draft_(table.token_ids, table.num_computed, table.draft_until, slots, width, max_drafts)

    def forward(self, rows: StepRows, ahead: Tensor | None = None) -> tuple[Sum, Tensor]:
        """Run the model.

        ahead: what ``draft`` returned, where it was called before. Returns what the model makes of the tokens, (T, H),
        and each row's new length (R,).
        """
        table = self.table
        if ahead is None and rows.width > 1:
            ahead = self.draft(rows.slots[: rows.num_decodes], rows.width)
        runs = {} if ahead is None else {"ahead": ahead, "width": rows.width}
        ids, positions, mapping, seq_lens = self.ops.build_batch_(
            table.token_ids, table.num_computed, table.page_table, rows.slots, rows.starts, rows.new_index,
            rows.new_page, self.kv_cache.page_size, rows.num_tokens, rows.longest, **runs,
        )  # fmt: skip
        meta = AttentionMeta(
            rows.num_decodes, rows.starts, seq_lens, table.page_table, rows.slots, self.kv_cache.page_size,
            rows.num_pages, rows.longest, self.workspace, rows.prefill_pages, rows.width, rows.max_queries,
            rows.max_pages,
        )  # fmt: skip
        return self.model.forward(ModelInputs(ids, positions, mapping, meta), self.kv_cache.layers), seq_lens

    def logits(self, rows: StepRows, hidden: Sum, seq_lens: Tensor) -> Logits:
        """The logits of the rows that sample; hidden, seq_lens: as ``forward`` returned them."""
        slot_ids, positions, last = rows.slots, seq_lens, None
        if not len(rows.sampled) == len(rows.slots) == rows.num_tokens:
            last = rows.starts[1:][rows.sampled] - 1
            slot_ids, positions = slot_ids[rows.sampled], positions[rows.sampled]
        if not len(slot_ids):
            return hidden.x.new_empty(0, self.model.config.vocab_size), slot_ids, positions, seq_lens
        return self.model.logits(hidden, last), slot_ids, positions, seq_lens

    def choose(
        self, rows: StepRows, slots: tuple[int, ...], results: Logits, masks: Masks
    ) -> tuple[Tensor, list[Report]]:
        """Sample the first of the rows that sample, which are of ``slots``, and end the step. Others are padding."""
        rows, seq_lens = rows.first(len(slots)), results[3]
        logits, slot_ids, positions = (part[: len(slots)] for part in results[:3])
        tokens, reports = self.sampler.sample(logits, slots, slot_ids, positions, self.table.token_ids, masks)
        self.advance(rows, seq_lens[: len(rows.slots)], tokens)
        return tokens, reports

    def advance(self, rows: StepRows, seq_lens: Tensor, tokens: Tensor) -> None:
        """End the step: the rows' new lengths, and the tokens of those that sampled, enter the table.

        In a wide step, those of ``tokens`` that are not taken become codes.
        """
        table, slots, sampled = self.table, rows.slots, rows.sampled
        if rows.width > 1:
            count = rows.num_decodes
            self.accept(slots[:count], seq_lens[:count], tokens[:count], rows.width)
            if len(slots) == count:
                return
            slots, seq_lens, sampled, tokens = slots[count:], seq_lens[count:], sampled[count:] - count, tokens[count:]
        self.ops.advance_(table.token_ids, table.num_computed, slots, seq_lens, sampled, tokens)

    def accept(self, slots: Tensor, seq_lens: Tensor, tokens: Tensor, width: int) -> None:
        """``advance`` for the decode rows of a wide step; see ``accept_``."""
        self.ops.accept_(self.table.token_ids, self.table.num_computed, slots, seq_lens, tokens, width)

    def prompt_reports(self, plan: StepPlan, prompt_lens: Mapping[int, int], hidden: Sum) -> dict[int, list[Report]]:
        """Log-probabilities of prompt tokens, by the index of their prefill in ``plan``. prompt_lens: of the slots that
        want them.
        """
        by_prefill: dict[int, list[Report]] = {}
        begin = len(plan.decode_slots) * plan.width
        for index, row in enumerate(plan.prefills):
            prompt_len = prompt_lens.get(row.slot, 0)
            count = min(row.num_tokens, prompt_len - 1 - row.start)  # positions whose next token is a prompt token
            reports = []
            for first in range(0, count, PROMPT_LOGPROB_ROWS):
                last = min(first + PROMPT_LOGPROB_ROWS, count)
                logits = self.model.logits(hidden, slice(begin + first, begin + last))
                targets = self.table.token_ids[row.slot, row.start + first + 1 : row.start + last + 1].long()
                reports.append(self.sampler.report_prompt(logits, targets, row.slot))
            if reports:
                by_prefill[index] = reports
            begin += row.num_tokens
        return by_prefill
