"""A step's rows on the device: what each is, laid out in the words of one upload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class StepRows:
    """The R rows of a step, N of which sample: what the host knows of them, and tensors on the device, slices of one
    upload.
    """

    num_decodes: int  # the first rows, of one token each, in runs of ``width``
    num_tokens: int
    longest: int  # row, in tokens
    num_pages: int  # of the row that has the most, or more
    slots: Tensor  # (R,) int64
    starts: Tensor  # (R + 1,) int64: each row's first token
    new_index: Tensor  # (R,) int64: where in its page table a row gets a new page
    new_page: Tensor  # (R,) int64: that page, negative for none
    sampled: Tensor  # (N,) int64: the rows that sample
    prefill_pages: tuple[int, ...] | None = None  # of each row after the decodes; None: num_pages each, or less
    width: int = 1  # see ``StepPlan``
    max_queries: int | None = None  # see ``AttentionMeta``
    max_pages: int | None = None

    @classmethod
    def of(
        cls,
        words: Tensor,
        num_rows: int,
        num_decodes: int,
        num_tokens: int,
        longest: int,
        num_pages: int,
        prefill_pages: tuple[int, ...] | None = None,
        width: int = 1,
    ) -> StepRows:
        """Slice ``words``, laid out as ``pack`` does: each part begins at a multiple of 16 bytes, or kernels would be
        compiled anew.
        """
        whole = num_rows + num_rows % 2
        new_index = whole + num_rows // 2 * 2 + 2
        new_page, sampled = new_index + whole, new_index + 2 * whole
        return cls(
            num_decodes,
            num_tokens,
            longest,
            num_pages,
            slots=words[:num_rows],
            starts=words[whole : whole + num_rows + 1],
            new_index=words[new_index : new_index + num_rows],
            new_page=words[new_page : new_page + num_rows],
            sampled=words[sampled:],
            prefill_pages=prefill_pages,
            width=width,
        )

    def first(self, count: int) -> StepRows:
        """Without the rows that sample but the first ``count``, whole runs; where there are prompts, all rows stay."""
        if len(self.slots) > self.num_decodes:
            return replace(self, sampled=self.sampled[:count])
        return replace(
            self, num_decodes=count, num_tokens=count, slots=self.slots[:count], sampled=self.sampled[:count]
        )

    @staticmethod
    def pack(
        slots: Sequence[int], counts: Sequence[int], new_pages: dict[int, tuple[int, int]], sampled: Sequence[int]
    ) -> list[int]:
        """The words of rows with ``counts`` tokens each. new_pages: {slot: (index, page)}."""
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        entries = [new_pages.get(slot, (0, -1)) for slot in slots]
        odd, even = ([0], []) if len(slots) % 2 else ([], [0])  # what fills parts up
        return [
            *slots, *odd, *starts, *even, *[index for index, _ in entries], *odd, *[page for _, page in entries], *odd,
            *sampled,
        ]  # fmt: skip
