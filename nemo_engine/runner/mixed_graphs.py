"""Steps with prompts as CUDA graphs, for a short list of numbers of tokens: one launch for the whole step.

A graph has fixed numbers of tokens, of decode rows, of rows after them and of rows that sample. A step that has fewer
is padded by rows that every kernel takes as they are: empty decode rows, which have neither query nor keys, empty rows
after them, and at the end the tokens that are left, as prompts of slot 0 in page 0, whose results nobody reads. Where
each row begins, and with it how many decode, is read from the uploaded words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from nemo_engine.checkpoint.progress import progress_bar
from nemo_engine.ops import Ops
from nemo_engine.runner.graphs import Capture, StepGraph
from nemo_engine.runner.step_compute import StepCompute
from nemo_engine.runner.step_rows import StepRows
from nemo_engine.runner.transfer import to_device
from nemo_engine.step import StepPlan

_TOKENS_PER_PROMPT = 16  # of a graph: it has a row for a prompt for so many
_MIN_PROMPTS = 4


def why_not_captured(ops: Ops) -> str | None:
    """Why steps with prompts run operation by operation; None if they can be captured."""
    chosen = next(choice.chosen for choice in ops.choices if choice.op == "paged_attention")
    if chosen == "cuda":
        return "paged_attention is cuda, which hands all empty rows of a padded step to one block"
    return None if chosen == "triton" else f"paged_attention is {chosen}, which takes numbers of rows from the host"


@dataclass(frozen=True, slots=True)
class MixedShape:
    """The fixed numbers of a graph: tokens, decode rows, rows of prompts, rows of padding, rows that sample."""

    num_tokens: int
    num_decodes: int
    num_prompts: int
    num_pads: int
    num_sampled: int
    max_pad: int  # tokens of a row of padding

    @classmethod
    def of(cls, num_tokens: int, step: StepCompute) -> MixedShape:
        """The shape of steps of up to ``num_tokens`` tokens."""
        num_slots, max_len = step.table.num_slots, step.table.token_ids.shape[1]
        num_decodes = min(num_tokens, num_slots)
        num_prompts = min(num_slots, max(_MIN_PROMPTS, num_tokens // _TOKENS_PER_PROMPT))
        return cls(num_tokens, num_decodes, num_prompts, -(-num_tokens // max_len), num_decodes, max_len)

    @property
    def num_rows(self) -> int:
        """Rows of all kinds."""
        return self.num_decodes + self.num_prompts + self.num_pads

    def holds(self, plan: StepPlan) -> bool:
        """Whether it serves ``plan``."""
        return (
            plan.width == 1
            and plan.num_tokens <= self.num_tokens
            and len(plan.decode_slots) <= self.num_decodes
            and len(plan.prefills) <= self.num_prompts
        )

    def pack(self, plan: StepPlan, new_pages: dict[int, tuple[int, int]]) -> list[int]:
        """The words of ``plan``, padded."""
        decodes, prompts = plan.decode_slots, plan.prefills
        num_empty, num_left = self.num_decodes - len(decodes), self.num_prompts - len(prompts)
        rest = self.num_tokens - plan.num_tokens
        pads = [max(0, min(self.max_pad, rest - self.max_pad * index)) for index in range(self.num_pads)]
        slots = [*decodes, *[0] * num_empty, *[row.slot for row in prompts], *[0] * (num_left + self.num_pads)]
        counts = [1] * len(decodes) + [0] * num_empty + [row.num_tokens for row in prompts] + [0] * num_left + pads
        sampled = [*range(len(decodes))]
        sampled += [self.num_decodes + index for index, row in enumerate(prompts) if row.samples]
        sampled += [self.num_rows - 1] * (self.num_sampled - len(sampled))
        return StepRows.pack(slots, counts, new_pages, sampled)

    def rows(self, words: Tensor, max_pages: int) -> StepRows:
        """``words``, as ``pack`` lays them out. max_pages: of a row."""
        rows = StepRows.of(words, self.num_rows, self.num_decodes, self.num_tokens, self.num_tokens, max_pages)
        return replace(rows, max_queries=self.num_tokens)


def capture_mixed(
    step: StepCompute, sizes: Sequence[int], capture: Capture
) -> tuple[tuple[MixedShape, StepGraph], ...]:
    """Graphs of steps of up to ``sizes`` tokens, the smallest first; the largest is captured first."""
    graphs = []
    with progress_bar("capture steps with prompts", len(sizes), None, unit="graphs") as advance:
        for num_tokens in sorted(sizes, reverse=True):
            shape = MixedShape.of(num_tokens, step)
            words = to_device(shape.pack(StepPlan(0, ()), {}), step.table.device)
            rows = shape.rows(words, step.table.page_table.shape[1])
            graphs.append((shape, StepGraph.of(step, words, rows, capture)))
            advance(1)
    return tuple(reversed(graphs))
