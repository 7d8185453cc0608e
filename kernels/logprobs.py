"""Log-probabilities of a chosen token and of the likeliest ones, without a sort: one pass over the logits, then a few sub-blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SUB = tl.constexpr(128)  # tokens of a sub-block
_SCAN_SUBS = 32  # sub-blocks of one program of the pass over all logits
_NO_TOKEN = tl.constexpr(1 << 30)
MOST_BEST = 64  # tokens are taken out one after the other


@triton.jit
def _scan_kernel(
    max_ptr, sum_ptr, rank_ptr, logits_ptr, chosen_ptr, stride, vocab, num_subs, num_blocks, SUBS: tl.constexpr
):
    """Per sub-block its maximum and the sum of exp(logit - maximum); per program, how many logits reach the chosen token's."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    sub = block * SUBS + tl.arange(0, SUBS)
    token = sub[:, None] * SUB + tl.arange(0, SUB)[None, :]
    mask = token < vocab
    x = tl.load(logits_ptr + row * stride + token, mask=mask, other=float("-inf")).to(tl.float32)
    chosen = tl.maximum(tl.load(chosen_ptr + row), 0)
    threshold = tl.load(logits_ptr + row * stride + chosen).to(tl.float32)
    best = tl.max(x, 1)
    base = tl.where(best == float("-inf"), 0.0, best)
    place = row * num_subs + sub
    tl.store(max_ptr + place, best, mask=sub < num_subs)
    tl.store(sum_ptr + place, tl.sum(tl.exp(x - base[:, None]), 1), mask=sub < num_subs)
    reaches = tl.sum((mask & (x >= threshold)).to(tl.int32), 1)
    tl.store(rank_ptr + row * num_blocks + block, tl.sum(reaches, 0))


@triton.jit(do_not_specialize=["k"])
def _top_kernel(
    ids_ptr, values_ptr, ranks_ptr, max_ptr, sum_ptr, rank_ptr, logits_ptr, chosen_ptr, stride, vocab, num_subs,
    num_blocks, k, SUBS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One row. The likeliest token is taken out k times: only its sub-block is read again, for the next maximum there."""
    row = tl.program_id(0).to(tl.int64)
    sub = tl.arange(0, SUBS)
    maxima = tl.load(max_ptr + row * num_subs + sub, mask=sub < num_subs, other=float("-inf"))
    sums = tl.load(sum_ptr + row * num_subs + sub, mask=sub < num_subs, other=0.0)
    best = tl.max(maxima, 0)
    # In log-softmax's order: the logarithm of the sum comes off last.
    log_sum = tl.log(tl.sum(sums * tl.exp(maxima - best), 0))
    chosen = tl.maximum(tl.load(chosen_ptr + row), 0)
    logits_row = logits_ptr + row * stride
    out = row * (k + 1)
    block = tl.arange(0, BLOCKS)
    reaches = tl.load(rank_ptr + row * num_blocks + block, mask=block < num_blocks, other=0)
    tl.store(ids_ptr + out, chosen)
    tl.store(values_ptr + out, tl.load(logits_row + chosen).to(tl.float32) - best - log_sum)
    tl.store(ranks_ptr + out, tl.sum(reaches, 0))
    last_value = float("inf")
    last_token = -1
    valid = sub < num_subs
    for i in range(0, k):
        value = tl.max(tl.where(valid, maxima, float("-inf")), 0)
        first = tl.min(tl.where(valid & (maxima == value), sub, SUBS - 1), 0)
        token = first * SUB + tl.arange(0, SUB)
        x = tl.load(logits_row + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
        # Taken are the tokens above the last one's logit, and its equals up to it.
        is_left = (token < vocab) & ((x < last_value) | ((x == last_value) & (token > last_token)))
        taken = tl.min(tl.where(is_left & (x == value), token, _NO_TOKEN), 0)
        tl.store(ids_ptr + out + 1 + i, tl.minimum(taken, vocab - 1))
        tl.store(values_ptr + out + 1 + i, value - best - log_sum)
        tl.store(ranks_ptr + out + 1 + i, i + 1)
        is_left = is_left & (token != taken)
        maxima = tl.where(sub == first, tl.max(tl.where(is_left, x, float("-inf")), 0), maxima)
        valid = valid & ((sub != first) | (tl.sum(is_left.to(tl.int32), 0) > 0))
        last_value = value
        last_token = taken


def top_logprobs(
    logits: torch.Tensor, chosen: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the chosen token and of the k likeliest, likeliest first, of equal ones the lower id first.

    logits: (R, V) bf16, fp16 or fp32, rows dense; chosen: (R,) int64, negative read as 0; k: at most 64 and V. Returns (R, 1 + k) each: ids
    int64; log-probabilities fp32; ranks int64, the chosen one's being the number of logits that reach its own. Rows with NaN give numbers
    that mean nothing.
    """
    rows, vocab = logits.shape
    assert logits.stride(1) == 1 and 0 <= k <= min(MOST_BEST, vocab), (logits.shape, logits.stride(), k)
    num_subs = triton.cdiv(vocab, SUB.value)
    num_blocks = triton.cdiv(num_subs, _SCAN_SUBS)
    device = logits.device
    ids, ranks = (torch.empty(rows, 1 + k, dtype=torch.int64, device=device) for _ in range(2))
    values = torch.empty(rows, 1 + k, dtype=torch.float32, device=device)
    maxima, sums = (torch.empty(rows, num_subs, dtype=torch.float32, device=device) for _ in range(2))
    reaches = torch.empty(rows, num_blocks, dtype=torch.int32, device=device)
    if rows:
        _scan_kernel[(rows, num_blocks)](
            maxima, sums, reaches, logits, chosen, logits.stride(0), vocab, num_subs, num_blocks,
            SUBS=_SCAN_SUBS, num_warps=8,
        )  # fmt: skip
        _top_kernel[(rows,)](
            ids, values, ranks, maxima, sums, reaches, logits, chosen, logits.stride(0), vocab, num_subs, num_blocks, k,
            SUBS=triton.next_power_of_2(num_subs), BLOCKS=triton.next_power_of_2(num_blocks), num_warps=4,
        )  # fmt: skip
    return ids, values, ranks
