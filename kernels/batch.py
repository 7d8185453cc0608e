"""A step's inputs, derived on the device from the request table; and the table's advance when the step is done."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TOKENS = 256  # of one row, for one program
_ROWS = 128  # of one program of the advance


@triton.jit(do_not_specialize=["num_tokens", "num_wide"])
def _build_kernel(
    ids_ptr, positions_ptr, mapping_ptr, lens_ptr, token_ids_ptr, num_computed_ptr, page_table_ptr, slots_ptr,
    starts_ptr, new_index_ptr, new_page_ptr, ahead_ptr, ids_stride, table_stride, num_tokens, num_wide,
    PAGE_SIZE: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    block = tl.program_id(1)
    slot = tl.load(slots_ptr + row)
    start = tl.load(starts_ptr + row)
    count = tl.load(starts_ptr + row + 1) - start
    first = tl.load(num_computed_ptr + slot)
    repeats = False
    if WIDTH > 1:
        ahead = tl.load(ahead_ptr + row, mask=row < num_wide, other=0)
        repeats = (row < num_wide) & (ahead != row % WIDTH)
        first += ahead
    new_index = tl.load(new_index_ptr + row)
    new_page = tl.load(new_page_ptr + row)
    if block == 0:
        tl.store(lens_ptr + row, first + count)
        if new_page >= 0:
            tl.store(page_table_ptr + slot * table_stride + new_index, new_page)
    i = block * TOKENS + tl.arange(0, TOKENS)
    mask = i < count
    position = first + i
    index = position // PAGE_SIZE
    page = tl.load(page_table_ptr + slot * table_stride + index, mask=mask, other=0)
    page = tl.where((new_page >= 0) & (index == new_index), new_page, page)  # whether or not it is stored yet
    # With TRITON_DEBUG=1: the host has checked all this.
    tl.device_assert((start >= 0) & (start + count <= num_tokens), "a row lies outside the step")
    tl.device_assert(position < ids_stride, "a position lies outside the slot's row", mask=mask)
    tl.device_assert(page >= 0, "a page is negative", mask=mask)
    tl.store(ids_ptr + start + i, tl.load(token_ids_ptr + slot * ids_stride + position, mask=mask, other=0), mask=mask)
    tl.store(positions_ptr + start + i, position, mask=mask)
    place = page * PAGE_SIZE + position % PAGE_SIZE
    if WIDTH > 1:
        place = tl.where(repeats, 0, place)
    tl.store(mapping_ptr + start + i, place, mask=mask)


def build_batch_(
    token_ids: torch.Tensor,
    num_computed: torch.Tensor,
    page_table: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    new_index: torch.Tensor,
    new_page: torch.Tensor,
    page_size: int,
    num_tokens: int,
    longest: int,
    ahead: torch.Tensor | None = None,
    width: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row i computes the next ``starts[i + 1] - starts[i]`` tokens, at most ``longest``, of slot ``slots[i]``.

    token_ids: (S, L) int32; num_computed: (S,) int64; page_table: (S, P) int64, modified: entry ``new_index[i]`` of row
    i's slot becomes ``new_page[i]`` unless that is negative. slots, new_index, new_page: (R,) int64; starts: (R + 1,)
    int64, from 0 to ``num_tokens``. ahead: (W,) int64: the first W rows, of one token each, are runs of ``width`` rows
    of one slot, which begin so much further on; those that repeat the row before them are placed in page 0. Returns
    ids, positions and places ``page * page_size + offset`` of the tokens, (T,) int64 each, and (R,) int64: each row's
    length when the step is done.
    """
    rows = slots.shape[0]
    ids, positions, mapping = (torch.empty(num_tokens, dtype=torch.int64, device=slots.device) for _ in range(3))
    lens = torch.empty(rows, dtype=torch.int64, device=slots.device)
    if rows:
        _build_kernel[(rows, triton.cdiv(longest, _TOKENS))](
            ids, positions, mapping, lens, token_ids, num_computed, page_table, slots, starts, new_index, new_page,
            ahead, token_ids.stride(0), page_table.stride(0), num_tokens, 0 if ahead is None else ahead.shape[0],
            PAGE_SIZE=page_size, TOKENS=_TOKENS, WIDTH=width, num_warps=4,
        )  # fmt: skip
    return ids, positions, mapping, lens


@triton.jit(do_not_specialize=["num_rows", "num_sampled"])
def _advance_kernel(
    token_ids_ptr, num_computed_ptr, slots_ptr, lens_ptr, sampled_ptr, tokens_ptr, ids_stride, num_rows, num_sampled,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    slot = tl.load(slots_ptr + row, mask=is_row, other=0)
    tl.store(num_computed_ptr + slot, tl.load(lens_ptr + row, mask=is_row, other=0), mask=is_row & (slot > 0))
    is_sampled = row < num_sampled
    source = tl.load(sampled_ptr + row, mask=is_sampled, other=0)
    slot = tl.load(slots_ptr + source, mask=is_sampled, other=0)
    position = tl.load(lens_ptr + source, mask=is_sampled, other=0)
    token = tl.maximum(tl.load(tokens_ptr + row, mask=is_sampled, other=0), 0)
    tl.store(token_ids_ptr + slot * ids_stride + position, token.to(tl.int32), mask=is_sampled & (slot > 0))


def advance_(
    token_ids: torch.Tensor,
    num_computed: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    sampled: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """Enter the end of a step into the table: ``num_computed[slots] = seq_lens``, and each sampled token after its
    row's last one.

    token_ids: (S, L) int32, num_computed: (S,) int64, both modified; slots, seq_lens: (R,) int64; sampled: (N,) int64,
    the rows that sampled; tokens: (N,) int64, failures (negative) being entered as 0. Rows of slot 0 change nothing.
    """
    rows, count = slots.shape[0], sampled.shape[0]
    if rows:
        _advance_kernel[(triton.cdiv(rows, _ROWS),)](
            token_ids, num_computed, slots, seq_lens, sampled, tokens, token_ids.stride(0), rows, count,
            ROWS=_ROWS, num_warps=4,
        )  # fmt: skip
