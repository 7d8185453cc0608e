"""Log-probabilities of the best tokens of a row and of the one that was chosen, without a sort.

A pass over the row leaves of every sub-block its highest logit and the mass of its tokens; from these come the sum that
all probabilities share, and a bound that holds the best tokens. Few tokens lie within it; they are gathered, and the
best taken one by one. Another pass, over sub-blocks that have a token at least as likely as the chosen one, counts
those.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .selection import (
    INF,
    MOST_PROGRAMS,
    SURVEY_TOKENS,
    TILE_TOKENS,
    float_bits,
    list_near,
    listed_tokens,
    reach,
    sub_blocks,
)

_MOST_BEST = 64
_LEAST_KEY = tl.constexpr(-(1 << 63))


@triton.jit
def _survey_kernel(
    best_ptr, sums_ptr, logits_ptr, stride, vocab_size,
    SUB: tl.constexpr, NUM_SUBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per sub-block its highest logit and the sum of exp(x - highest), NaN if a logit is NaN or +inf."""
    row = tl.program_id(0).to(tl.int64)
    sub = tl.program_id(1) * (BLOCK // SUB) + tl.arange(0, BLOCK // SUB)
    token = sub[:, None] * SUB + tl.arange(0, SUB)[None, :]
    x = tl.load(logits_ptr + row * stride + token, mask=token < vocab_size, other=-INF).to(tl.float32)
    is_bad = tl.max((x < INF).to(tl.int32) ^ 1, axis=1) > 0
    x = tl.where(is_bad[:, None], 0.0, x)
    best = tl.max(x, axis=1)
    sums = tl.sum(tl.exp(x - tl.where(best > -INF, best, 0.0)[:, None]), axis=1)
    place = row * NUM_SUBS + sub
    tl.store(best_ptr + place, best, mask=sub < NUM_SUBS)
    tl.store(sums_ptr + place, tl.where(is_bad, float("nan"), sums), mask=sub < NUM_SUBS)


@triton.jit
def _key(value, token):
    """An integer that sorts by value, and of equal values the lower token higher."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def _collect(
    is_near, bound, base, log_sum, subs_ptr, keys_ptr, logits_row, vocab_size,
    SUB: tl.constexpr, NUM_SUBS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the keys of the tokens with a log-probability of at least ``bound`` of the sub-blocks that are near;
    returns how many.
    """
    num_near = list_near(is_near, subs_ptr, NUM_SUBS)
    count = 0
    for start in range(0, num_near, TILE // SUB):
        token = listed_tokens(subs_ptr, start, num_near, SUB, NUM_SUBS, TILE)
        mask = token < vocab_size
        x = tl.load(logits_row + token, mask=mask, other=-INF).to(tl.float32)
        value = x - base - log_sum
        is_kept = tl.reshape(mask & (value >= bound), [TILE])
        keys = tl.reshape(_key(value, token), [TILE])
        target = count + tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
        tl.store(keys_ptr + target, keys, mask=is_kept)
        count += tl.sum(is_kept.to(tl.int32), axis=0)
    tl.debug_barrier()
    return count


@triton.jit
def _take_best(ids_ptr, logprobs_ptr, keys_ptr, count, num_best, TILE: tl.constexpr):
    """Take the highest key, the next highest, and so on."""
    tile = tl.arange(0, TILE)
    first = tl.load(keys_ptr + tile, mask=tile < count, other=_LEAST_KEY)
    last = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    for index in range(num_best):
        key = tl.max(tl.where(first < last, first, _LEAST_KEY), axis=0)
        for start in range(TILE, count, TILE):
            keys = tl.load(keys_ptr + start + tile, mask=start + tile < count, other=_LEAST_KEY)
            key = tl.maximum(key, tl.max(tl.where(keys < last, keys, _LEAST_KEY), axis=0))
        order = (key >> 32).to(tl.int32)
        bits = tl.where(order < 0, order ^ 0x7FFFFFFF, order)
        tl.store(ids_ptr + index, 0x7FFFFFFF - (key & 0x7FFFFFFF))
        tl.store(logprobs_ptr + index, bits.to(tl.float32, bitcast=True))
        last = key


@triton.jit
def _report(
    row, ids_ptr, logprobs_ptr, ranks_ptr, shifts_ptr, best_ptr, sums_ptr, subs_ptr, keys_ptr, logits_ptr, chosen_ptr,
    stride, vocab_size, num_best, SUB: tl.constexpr, NUM_SUBS: tl.constexpr, TILE: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """All of a row's report but the chosen token's rank, for which it leaves 0 and the row's shifts."""
    sub = tl.arange(0, NUM_SUBS)
    is_sub = sub * SUB < vocab_size
    highest = tl.load(best_ptr + row * NUM_SUBS + sub, mask=is_sub, other=-INF)
    sums = tl.load(sums_ptr + row * NUM_SUBS + sub, mask=is_sub, other=0.0)
    best = tl.max(highest, axis=0)
    base = tl.where(best > -INF, best, 0.0)
    total = tl.sum(sums * tl.exp(highest - base), axis=0)
    is_good = total > 0.0  # false for NaN, and if all are -inf
    log_sum = tl.where(is_good, tl.log(tl.where(is_good, total, 1.0)), float("nan"))
    tl.store(shifts_ptr + 2 * row, base)
    tl.store(shifts_ptr + 2 * row + 1, log_sum)
    logits_row = logits_ptr + row * stride
    out = row * (num_best + 1)
    token = tl.maximum(tl.load(chosen_ptr + row), 0)
    tl.store(ids_ptr + out, token)
    tl.store(logprobs_ptr + out, tl.load(logits_row + token).to(tl.float32) - base - log_sum)
    item = tl.arange(0, MOST)
    tl.store(ranks_ptr + out, tl.full((), 0, tl.int64))
    tl.store(ranks_ptr + out + 1 + item, (item + 1).to(tl.int64), mask=item < num_best)
    if is_good & (num_best > 0):
        distance = tl.abs(base - highest)
        bound = tl.full((), -INF, tl.float32)
        if num_best <= tl.sum((distance < INF).to(tl.int32), axis=0):  # that many sub-blocks have a token each
            ones = (sub >= 0).to(tl.int32)
            infinity = float_bits(tl.full((), INF, tl.float32))
            farthest = reach(num_best, infinity * 0, infinity, float_bits(distance), ones)
            bound = -farthest.to(tl.float32, bitcast=True) - log_sum
        is_near = is_sub & (-distance - log_sum >= bound)
        count = _collect(is_near, bound, base, log_sum, subs_ptr, keys_ptr, logits_row, vocab_size, SUB, NUM_SUBS, TILE)
        _take_best(ids_ptr + out + 1, logprobs_ptr + out + 1, keys_ptr, count, num_best, TILE)
    elif num_best > 0:
        tl.store(ids_ptr + out + 1 + item, item.to(tl.int64), mask=item < num_best)
        tl.store(logprobs_ptr + out + 1 + item, tl.full((MOST,), float("nan"), tl.float32), mask=item < num_best)


@triton.jit(do_not_specialize=["num_best", "num_rows"], do_not_specialize_on_alignment=["chosen_ptr"])
def _report_kernel(
    ids_ptr, logprobs_ptr, ranks_ptr, shifts_ptr, best_ptr, sums_ptr, subs_ptr, keys_ptr, logits_ptr, chosen_ptr,
    stride, vocab_size, num_best, num_rows,
    SUB: tl.constexpr, NUM_SUBS: tl.constexpr, TILE: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    subs_ptr += program * NUM_SUBS
    keys_ptr += program * vocab_size
    for row in range(program, num_rows, tl.num_programs(0)):
        _report(
            row, ids_ptr, logprobs_ptr, ranks_ptr, shifts_ptr, best_ptr, sums_ptr, subs_ptr, keys_ptr, logits_ptr,
            chosen_ptr, stride, vocab_size, num_best, SUB, NUM_SUBS, TILE, MOST,
        )  # fmt: skip
        tl.debug_barrier()  # the next row writes where this one read


@triton.jit(do_not_specialize=["num_best"])
def _rank_kernel(
    ranks_ptr, logprobs_ptr, shifts_ptr, best_ptr, logits_ptr, stride, vocab_size, num_best,
    SUB: tl.constexpr, NUM_SUBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to the rank of a row's chosen token how many tokens of this block are at least as likely."""
    row = tl.program_id(0).to(tl.int64)
    sub = tl.program_id(1) * (BLOCK // SUB) + tl.arange(0, BLOCK // SUB)
    base = tl.load(shifts_ptr + 2 * row)
    log_sum = tl.load(shifts_ptr + 2 * row + 1)
    threshold = tl.load(logprobs_ptr + row * (num_best + 1))
    highest = tl.load(best_ptr + row * NUM_SUBS + sub, mask=sub * SUB < vocab_size, other=-INF)
    if tl.max(highest, axis=0) - base - log_sum >= threshold:
        token = sub[:, None] * SUB + tl.arange(0, SUB)[None, :]
        mask = token < vocab_size
        x = tl.load(logits_ptr + row * stride + token, mask=mask, other=-INF).to(tl.float32)
        is_counted = mask & (x - base - log_sum >= threshold)
        count = tl.sum(tl.sum(is_counted.to(tl.int32), axis=1), axis=0)
        tl.atomic_add(ranks_ptr + row * (num_best + 1), count.to(tl.int64))


def top_logprobs(logits: torch.Tensor, chosen: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of the chosen token and of the ``k`` likeliest, as the operation ``top_logprobs`` defines them;
    k at most 64.

    logits: (R, V) bf16, fp16 or fp32, rows dense, V at most 2^22. chosen: (R,) int64, negative is read as 0. Returns
    (R, 1 + k) each: ids int64, log-probabilities fp32, ranks int64. A row without a distribution gets NaN, ids 0 to k -
    1 and the chosen token's rank 0. Scratch memory: 8 V bytes for each of at most 132 rows.
    """
    rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 and logits.dtype != torch.float64, (logits.stride(), logits.dtype)
    assert 0 <= k <= min(_MOST_BEST, vocab_size) and vocab_size <= 1 << 22, (k, vocab_size)
    assert chosen.shape == (rows,) and chosen.is_contiguous(), (chosen.shape, chosen.stride())
    sub, num_subs = sub_blocks(vocab_size)
    programs, block = min(rows, MOST_PROGRAMS), max(SURVEY_TOKENS, sub)

    def empty(height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(height, width, dtype=dtype, device=logits.device)

    ids, logprobs, ranks = empty(rows, 1 + k, torch.int64), empty(rows, 1 + k), empty(rows, 1 + k, torch.int64)
    if not rows:
        return ids, logprobs, ranks
    best, sums, shifts = empty(rows, num_subs), empty(rows, num_subs), empty(rows, 2)
    grid = (rows, triton.cdiv(vocab_size, block))
    shape = {"SUB": sub, "NUM_SUBS": num_subs}
    _survey_kernel[grid](best, sums, logits, logits.stride(0), vocab_size, **shape, BLOCK=block, num_warps=4)
    _report_kernel[(programs,)](
        ids, logprobs, ranks, shifts, best, sums, empty(programs, num_subs, torch.int32),
        empty(programs, vocab_size, torch.int64), logits, chosen, logits.stride(0), vocab_size, k, rows,
        **shape, TILE=max(TILE_TOKENS, sub), MOST=_MOST_BEST, num_warps=8,
    )  # fmt: skip
    _rank_kernel[grid](
        ranks, logprobs, shifts, best, logits, logits.stride(0), vocab_size, k, **shape, BLOCK=block, num_warps=4
    )
    return ids, logprobs, ranks
