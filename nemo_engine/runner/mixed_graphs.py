"""Steps with prompts as CUDA graphs, for a short list of numbers of tokens: two launches for the whole step.

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
from nemo_engine.ops.cuda.prefill import widened_capacity
from nemo_engine.ops.quantize import FP8
from nemo_engine.runner.graphs import Capture, StepGraph
from nemo_engine.runner.step_compute import StepCompute
from nemo_engine.runner.step_rows import StepRows
from nemo_engine.runner.transfer import to_device
from nemo_engine.step import StepPlan

_TOKENS_PER_PROMPT = 16  # of a graph: it has a row for a prompt for so many
_MIN_PROMPTS = 4


def _max_pages(step: StepCompute) -> int | None:
    """The pages that rows of prompts and padding may have together; None for any number.

    CUDA's attention widens FP8 pages in turns, whose number the host must know: a graph has a single turn.
    """
    kv = step.kv_cache.layers[0]
    if kv.dtype != FP8 or ("paged_attention", "cuda") not in [(each.op, each.chosen) for each in step.ops.choices]:
        return None
    slots, width = step.table.page_table.shape
    return widened_capacity(slots, width, kv.num_heads, step.kv_cache.page_size) // kv.num_heads


@dataclass(frozen=True, slots=True)
class MixedShape:
    """The fixed numbers of a graph: tokens, decode rows, rows of prompts, rows of padding, rows that sample."""

    num_tokens: int
    num_decodes: int
    num_prompts: int
    num_pads: int
    num_sampled: int
    max_pad: int  # tokens of a row of padding
    page_size: int = 1
    max_pages: int | None = None  # of rows of prompts and padding together

    @classmethod
    def of(cls, num_tokens: int, step: StepCompute) -> MixedShape:
        """The shape of steps of up to ``num_tokens`` tokens."""
        num_slots, max_len = step.table.num_slots, step.table.token_ids.shape[1]
        num_decodes = min(num_tokens, num_slots)
        num_prompts = min(num_slots, max(_MIN_PROMPTS, num_tokens // _TOKENS_PER_PROMPT))
        num_pads, page_size = -(-num_tokens // max_len), step.kv_cache.page_size
        max_pages = _max_pages(step)
        return cls(num_tokens, num_decodes, num_prompts, num_pads, num_decodes, max_len, page_size, max_pages)

    @property
    def num_rows(self) -> int:
        """Rows of all kinds."""
        return self.num_decodes + self.num_prompts + self.num_pads

    def holds(self, plan: StepPlan, num_pages: Sequence[int]) -> bool:
        """Whether it serves ``plan``. num_pages: of each slot."""
        return (
            plan.width == 1
            and plan.num_tokens <= self.num_tokens
            and len(plan.decode_slots) <= self.num_decodes
            and len(plan.prefills) <= self.num_prompts
            and (self.max_pages is None or self._count_pages(plan, num_pages) <= self.max_pages)
        )

    def _count_pages(self, plan: StepPlan, num_pages: Sequence[int]) -> int:
        pads = sum([-(-pad // self.page_size) for pad in self._pads(plan)])
        return pads + sum([num_pages[row.slot] for row in plan.prefills])

    def _pads(self, plan: StepPlan) -> list[int]:
        rest = self.num_tokens - plan.num_tokens
        return [max(0, min(self.max_pad, rest - self.max_pad * index)) for index in range(self.num_pads)]

    def pack(self, plan: StepPlan, new_pages: dict[int, tuple[int, int]]) -> list[int]:
        """The words of ``plan``, padded."""
        decodes, prompts = plan.decode_slots, plan.prefills
        num_empty, num_left = self.num_decodes - len(decodes), self.num_prompts - len(prompts)
        slots = [*decodes, *[0] * num_empty, *[row.slot for row in prompts], *[0] * (num_left + self.num_pads)]
        counts = [1] * len(decodes) + [0] * num_empty + [row.num_tokens for row in prompts]
        counts += [0] * num_left + self._pads(plan)
        sampled = [*range(len(decodes))]
        sampled += [self.num_decodes + index for index, row in enumerate(prompts) if row.samples]
        sampled += [self.num_rows - 1] * (self.num_sampled - len(sampled))
        return StepRows.pack(slots, counts, new_pages, sampled)

    def rows(self, words: Tensor, max_pages: int) -> StepRows:
        """``words``, as ``pack`` lays them out. max_pages: of a row."""
        rows = StepRows.of(words, self.num_rows, self.num_decodes, self.num_tokens, self.num_tokens, max_pages)
        return replace(rows, max_queries=self.num_tokens, max_pages=self.max_pages)


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
