"""Prompt lookup: drafts out of a request's own tokens, and how many of them were right; one program a run of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 2048  # places that are compared at once
_NOT_TAKEN, _NOT_DRAFTED = tl.constexpr(-3), tl.constexpr(-4)


@triton.jit(do_not_specialize=["max_drafts"])
def _draft_kernel(
    ahead_ptr, token_ids_ptr, num_computed_ptr, draft_until_ptr, slots_ptr, ids_stride, max_drafts,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0)
    slot = tl.load(slots_ptr + run * WIDTH)
    last = tl.load(num_computed_ptr + slot)
    row_ptr = token_ids_ptr + slot * ids_stride
    room = tl.minimum(tl.load(draft_until_ptr + slot) - 2 - last, max_drafts)
    key0 = tl.load(row_ptr + last)
    key1 = tl.load(row_ptr + last - 1, mask=last >= 1, other=0)
    key2 = tl.load(row_ptr + last - 2, mask=last >= 2, other=0)
    key3 = tl.load(row_ptr + last - 3, mask=last >= 3, other=0)
    best = tl.full((), -1, tl.int64)  # the longest match and, among equal ones, the latest place: one number
    for start in range(0, tl.where(room > 0, last, 0), BLOCK):
        place = start + tl.arange(0, BLOCK)
        is_known = place < last
        is_0 = is_known & (tl.load(row_ptr + place, mask=is_known, other=0) == key0)
        is_1 = is_0 & (place >= 1)
        is_1 = is_1 & (tl.load(row_ptr + place - 1, mask=is_1, other=0) == key1)
        is_2 = is_1 & (place >= 2)
        is_2 = is_2 & (tl.load(row_ptr + place - 2, mask=is_2, other=0) == key2)
        is_3 = is_2 & (place >= 3)
        is_3 = is_3 & (tl.load(row_ptr + place - 3, mask=is_3, other=0) == key3)
        matched = 2 + is_2.to(tl.int64) + is_3.to(tl.int64)
        best = tl.maximum(best, tl.max(tl.where(is_1, (matched << 32) + place, -1), 0))
    count = tl.where(best >= 0, room, 0)
    end = tl.where(best >= 0, best & 0xFFFFFFFF, 0)
    step = tl.arange(0, WIDTH)
    is_draft = (step > 0) & (step <= count)
    source = end + 1 + tl.maximum(step - 1, 0) % tl.maximum(last - end, 1)
    drafts = tl.load(row_ptr + source, mask=is_draft, other=0)
    tl.device_assert(last + step < ids_stride, "a draft lies outside the slot's row", mask=is_draft)
    tl.store(row_ptr + last + step, drafts, mask=is_draft)
    tl.store(ahead_ptr + run * WIDTH + step, tl.minimum(step, count))


def draft_(
    token_ids: torch.Tensor,
    num_computed: torch.Tensor,
    draft_until: torch.Tensor,
    slots: torch.Tensor,
    width: int,
    max_drafts: int,
) -> torch.Tensor:
    """Write drafts behind the last known token of each run's slot: what followed the latest earlier place at which its
    last 4 tokens occurred, or else its last 3, or else its last 2.

    token_ids: (S, L) int32, modified; num_computed, draft_until: (S,) int64: the place of the last known token, and the
    length that tokens sampled in this step must not exceed. slots: (R,) int64, in runs of ``width`` (2, 4 or 8) rows,
    each of the slot of its first. Returns (R,) int64: how many places after the last known token each row computes;
    rows beyond the drafts repeat the last.
    """
    ahead = torch.empty_like(slots)
    if slots.shape[0]:
        _draft_kernel[(slots.shape[0] // width,)](
            ahead, token_ids, num_computed, draft_until, slots, token_ids.stride(0), max_drafts,
            WIDTH=width, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return ahead


@triton.jit
def _accept_kernel(
    token_ids_ptr, num_computed_ptr, slots_ptr, lens_ptr, tokens_ptr, ids_stride, WIDTH: tl.constexpr
):  # fmt: skip
    run = tl.program_id(0)
    slot = tl.load(slots_ptr + run * WIDTH)
    last = tl.load(num_computed_ptr + slot)
    count = tl.maximum(tl.load(lens_ptr + run * WIDTH + WIDTH - 1) - 1 - last, 0)
    step = tl.arange(0, WIDTH)
    chosen = tl.load(tokens_ptr + run * WIDTH + step)
    row_ptr = token_ids_ptr + slot * ids_stride
    drafts = tl.load(row_ptr + last + 1 + step, mask=step < count, other=0)
    is_right = (step < count) & (drafts == chosen)
    taken = 1 + tl.min(tl.where(is_right, WIDTH, step), 0)
    newest = tl.sum(tl.where(step == taken - 1, chosen, 0), 0)
    if slot > 0:
        tl.store(row_ptr + last + taken, tl.maximum(newest, 0).to(tl.int32))
        tl.store(num_computed_ptr + slot, last + taken)
    code = tl.where(step <= count, _NOT_TAKEN, _NOT_DRAFTED)
    tl.store(tokens_ptr + run * WIDTH + step, tl.where(step < taken, chosen, code))


def accept_(
    token_ids: torch.Tensor,
    num_computed: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    tokens: torch.Tensor,
    width: int,
) -> None:
    """Take of each run the tokens that follow from nothing but taken ones, and enter them into the table.

    token_ids: (S, L) int32, with the drafts that ``draft_`` wrote, and num_computed: (S,) int64, both modified. slots,
    seq_lens: (R,) int64, in runs of ``width``: each row's slot, and its length when the step is done. tokens: (R,)
    int64, modified: chosen behind each row; those that are not taken become -3, or -4 in rows without a draft. Failures
    (negative) are entered as 0, and nothing follows them. Runs of slot 0 change nothing but ``tokens``.
    """
    if slots.shape[0]:
        _accept_kernel[(slots.shape[0] // width,)](
            token_ids, num_computed, slots, seq_lens, tokens, token_ids.stride(0), WIDTH=width, num_warps=1
        )
