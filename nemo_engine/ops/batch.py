"""A step's inputs, derived on the device from the request table; and the table's advance when the step is done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_engine.ops.op import Case, Impl, Op, cpu_runs, triton_runs


def build_batch_(
    token_ids: Tensor,
    num_computed: Tensor,
    page_table: Tensor,
    slots: Tensor,
    starts: Tensor,
    new_index: Tensor,
    new_page: Tensor,
    page_size: int,
    num_tokens: int,
    longest: int,
    ahead: Tensor | None = None,
    width: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row i computes the next ``starts[i + 1] - starts[i]`` tokens, at most ``longest``, of slot ``slots[i]``.

    token_ids: (S, L) int32; num_computed: (S,) int64; page_table: (S, P) int64, modified: entry ``new_index[i]`` of row
    i's slot becomes ``new_page[i]`` unless that is negative. slots, new_index, new_page: (R,) int64; starts: (R + 1,)
    int64, from 0 to ``num_tokens``. Only slot 0, which is padding, may occur in several rows; it takes no new page.
    ahead: of a wide step, (W,) int64 as ``draft_`` returns it: the first W rows are runs of ``width`` rows of one
    token, which begin so much further on; those that repeat the row before them are placed in page 0. Returns ids,
    positions and places ``page * page_size + offset`` of the tokens, (T,) int64 each, and (R,) int64: each row's length
    when the step is done.
    """
    is_new = new_page >= 0
    # What is not new is written to slot 0's first entry, which is page 0.
    page_table[slots * is_new, new_index * is_new] = new_page * is_new
    first, counts = num_computed[slots], starts.diff()
    if ahead is not None:
        first[: len(ahead)] += ahead
    if num_tokens == len(slots) and longest == 1:
        slot, positions = slots, first
    else:
        row = torch.repeat_interleave(counts, output_size=num_tokens)
        slot = slots[row]
        positions = torch.arange(num_tokens, device=slots.device) + (first - starts[:-1])[row]
    ids = token_ids[slot, positions].long()
    mapping = page_table[slot, positions // page_size] * page_size + positions % page_size
    if ahead is not None:
        mapping[: len(ahead)] *= ahead == torch.arange(len(ahead), device=slots.device) % width
    return ids, positions, mapping, first + counts


def advance_(
    token_ids: Tensor, num_computed: Tensor, slots: Tensor, seq_lens: Tensor, sampled: Tensor, tokens: Tensor
) -> None:
    """Enter the end of a step into the table: ``num_computed[slots] = seq_lens``, and each sampled token after its
    row's last one.

    token_ids: (S, L) int32, num_computed: (S,) int64, both modified; slots, seq_lens: (R,) int64; sampled: (N,) int64,
    the rows that sampled; tokens: (N,) int64, failures (negative) being entered as 0. Rows of slot 0, which is padding,
    leave it at length 0 and token 0.
    """
    num_computed[slots] = seq_lens * (slots > 0)
    slot = slots[sampled]
    is_real = slot > 0
    token_ids[slot, seq_lens[sampled] * is_real] = (tokens.clamp(min=0) * is_real).to(torch.int32)


def _table(num_slots: int, max_len: int, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_slots)
    token_ids = torch.randint(0, 131072, (num_slots, max_len), generator=generator, dtype=torch.int32)
    page_table = torch.randint(1, 10_000_000, (num_slots, -(-max_len // page_size)), generator=generator)
    num_computed = torch.randint(0, max_len - 70, (num_slots,), generator=generator)
    token_ids[0, 0], page_table[0], num_computed[0] = 0, 0, 0
    return token_ids, num_computed, page_table


def _batch_cases() -> Iterator[Case]:
    for name, page_size, counts in (
        ("no rows", 16, []),
        ("one decode", 16, [1]),
        ("decodes with padding", 64, [1] * 9 + [-1] * 7),
        ("a prefill", 16, [65]),
        ("mixed", 32, [1, 1, 1, 17, 64, 1, 3]),
        ("more than a block", 128, [1, 600]),
    ):

        def make(dtype: torch.dtype, page_size: int = page_size, counts: list[int] = counts) -> tuple[Any, ...]:
            rows = len(counts)
            token_ids, num_computed, page_table = _table(rows + 3, 1000, page_size)
            num_computed.clamp_(max=900 - max([*counts, 1]))
            generator = torch.Generator().manual_seed(rows)
            slots = (1 + torch.randperm(rows + 2, generator=generator))[:rows]
            slots[torch.tensor(counts, dtype=torch.int64) < 0] = 0
            lengths = [abs(count) for count in counts]
            starts = torch.tensor([0, *lengths]).cumsum(0)
            new_page = torch.where(slots > 0, torch.randint(-2, 3, (rows,), generator=generator), -1)
            new_index = num_computed[slots] // page_size
            total, longest = sum(lengths), max(lengths, default=0)
            return token_ids, num_computed, page_table, slots, starts, new_index, new_page, page_size, total, longest

        yield Case(name, make)
    for name, num_runs, width, counts in (("a run", 1, 2, []), ("runs, padding and prefills", 7, 4, [17, 1, 300])):

        def make_wide(
            dtype: torch.dtype, num_runs: int = num_runs, width: int = width, counts: list[int] = counts
        ) -> tuple[Any, ...]:
            num_rows, generator = num_runs * width, torch.Generator().manual_seed(width)
            token_ids, num_computed, page_table = _table(num_runs + len(counts) + 3, 1000, 16)
            num_computed.clamp_(max=600)
            slots = 1 + torch.randperm(num_runs + len(counts) + 2, generator=generator)[: num_runs + len(counts)]
            if num_runs > 4:
                slots[1] = slots[4] = 0
            new_page = torch.where(slots > 0, torch.randint(-2, 3, slots.shape, generator=generator), -1)
            new_index = (num_computed[slots] + 1) // 16
            repeats = torch.tensor([width] * num_runs + [1] * len(counts))
            num_drafts = torch.randint(0, width, (num_runs, 1), generator=generator) * (slots[:num_runs, None] > 0)
            ahead = torch.arange(width).minimum(num_drafts).flatten()
            slots, new_index, new_page = (x.repeat_interleave(repeats) for x in (slots, new_index, new_page))
            if num_runs > 4:
                slots[1:width], new_page[1:width], ahead[1:width] = 0, -1, 0
            starts = torch.tensor([0, *[1] * num_rows, *counts]).cumsum(0)
            total, longest = num_rows + sum(counts), max(counts, default=1)
            return (
                token_ids, num_computed, page_table, slots, starts, new_index, new_page, 16, total, longest, ahead,
                width,
            )  # fmt: skip

        yield Case(name, make_wide)


def _advance_cases() -> Iterator[Case]:
    for rows, sampled in ((0, 0), (1, 1), (5, 0), (7, 3), (200, 150)):

        def make(dtype: torch.dtype, rows: int = rows, sampled: int = sampled) -> tuple[Any, ...]:
            token_ids, num_computed, _ = _table(rows + 3, 100, 16)
            generator = torch.Generator().manual_seed(rows)
            slots = (1 + torch.randperm(rows + 2, generator=generator))[:rows]
            if rows > 4:
                slots[1] = slots[3] = 0
            tokens = torch.randint(-2, 131072, (sampled,), generator=generator)
            order = torch.randperm(rows, generator=generator)[:sampled].sort().values
            return token_ids, num_computed, slots, torch.randint(1, 100, (rows,), generator=generator), order, tokens

        yield Case(f"{rows} rows, {sampled} sampled", make)


def _batch_cost(token_ids: Tensor, *rest: Any) -> tuple[int, int]:
    slots, num_tokens = rest[2], rest[7]
    return 48 * len(slots) + 36 * num_tokens, 6 * num_tokens


def _advance_cost(
    token_ids: Tensor, num_computed: Tensor, slots: Tensor, seq_lens: Tensor, sampled: Tensor, tokens: Tensor
) -> tuple[int, int]:
    return 24 * len(slots) + 36 * len(sampled), len(slots)


BUILD_BATCH = Op(
    "build_batch_",
    build_batch_,
    (
        Impl("triton", "nemo_engine.kernels.batch:build_batch_", triton_runs),
        Impl("cpu", "nemo_engine.ops.cpu.compiled:build_batch_", cpu_runs),
    ),
    _batch_cases,
    _batch_cost,
)
ADVANCE = Op(
    "advance_",
    advance_,
    (
        Impl("triton", "nemo_engine.kernels.batch:advance_", triton_runs),
        Impl("cpu", "nemo_engine.ops.cpu.compiled:advance_", cpu_runs),
    ),
    _advance_cases,
    _advance_cost,
)
