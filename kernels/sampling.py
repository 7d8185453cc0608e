"""A token per row of logits: a pass over all of them that leaves two numbers per sub-block, then a look at a few.

Sampling needs the whole row only to learn where the good tokens lie. ``_survey_kernel`` notes of every sub-block (128
tokens, of large vocabularies more) the highest logit and, as its row needs it, the mass or the best cost of a draw.
From these ``_choose_kernel`` knows bounds that surely hold what can be chosen; it gathers the tokens within them, with
a histogram of their distances. Where counts or masses reach what top_k or top_p ask for, one more pass, over what was
gathered, keeps the tokens of that bucket, among which bisection decides, and takes the lowest cost of nearer ones.
Nothing is sorted.

The noise, penalties and filters are those of the definition, ``sample_``: its draw is the argmin of ``distance +
log(E)``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .noise import row_key, uniform
from .nucleus import choose_near
from .selection import (
    BUCKETS,
    FIRST_SHIFT,
    INF,
    LARGEST_BITS,
    MOST_PROGRAMS,
    NO_MASS,
    SURVEY_TOKENS,
    TILE_TOKENS,
    TWO_OCTAVES,
    clear,
    float_bits,
    list_near,
    listed_tokens,
    reach,
    sub_blocks,
    tally,
)

_NOT_FINITE = tl.constexpr(-1)  # the engine's codes of rows that fail
_ALL_MASKED = tl.constexpr(-2)
_LARGEST = tl.constexpr(3.4028234663852886e38)  # finite fp32
_SMALLEST = tl.constexpr(1.1754943508222875e-38)  # normal fp32


@triton.jit
def _penalised(x, mask, counts_ptr, prompt_ptr, repetition, frequency, presence):
    """Logits after the penalties; counts_ptr and prompt_ptr point to those of the tokens of x."""
    count = tl.load(counts_ptr, mask=mask, other=0)
    in_prompt = tl.load(prompt_ptr, mask=mask, other=0) != 0
    factor = tl.minimum(tl.maximum(repetition, _SMALLEST), _LARGEST)
    factor = tl.full(x.shape, 0.0, tl.float32) + factor.to(tl.float32)
    changed = tl.where(x > 0.0, tl.div_rn(x, factor), x * factor)
    changed = tl.minimum(tl.maximum(changed, -_LARGEST), _LARGEST)
    x = tl.where(((count > 0) | in_prompt) & (x > -INF), changed, x)
    x = x - frequency.to(tl.float32) * count.to(tl.float32)
    return x - tl.where(count > 0, presence.to(tl.float32), 0.0)


@triton.jit(do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"])
def _survey_kernel(
    best_ptr, note_ptr, logits_ptr, slots_ptr, positions_ptr, temperature_ptr, min_p_ptr, top_k_ptr, top_p_ptr,
    seeds_ptr, frequency_ptr, presence_ptr, repetition_ptr, counts_ptr, prompt_ptr, stride, vocab_size,
    SUB: tl.constexpr, NUM_SUBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per sub-block its highest logit, +inf if one is NaN or +inf, and a note: the mass exp((x - highest) / T) of its
    tokens if the row is cut by top_p alone, or the lowest E exp((highest - x) / T) if nothing cuts the row.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    sub = tl.program_id(1) * (BLOCK // SUB) + tl.arange(0, BLOCK // SUB)
    token = sub[:, None] * SUB + tl.arange(0, SUB)[None, :]
    mask = token < vocab_size
    x = tl.load(logits_ptr + row * stride + token, mask=mask, other=-INF).to(tl.float32)
    is_bad = tl.max((x < INF).to(tl.int32) ^ 1, axis=1) > 0
    repetition = tl.load(repetition_ptr + slot)
    frequency = tl.load(frequency_ptr + slot)
    presence = tl.load(presence_ptr + slot)
    if (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0):
        of_row = slot * vocab_size + token
        x = _penalised(x, mask, counts_ptr + of_row, prompt_ptr + of_row, repetition, frequency, presence)
    best = tl.where(is_bad, INF, tl.max(x, axis=1))
    place = row * NUM_SUBS + sub
    tl.store(best_ptr + place, best, mask=sub < NUM_SUBS)
    temperature = tl.load(temperature_ptr + slot)
    if temperature > 0.0:
        is_cut = (tl.load(min_p_ptr + slot) > 0.0) | (tl.load(top_k_ptr + slot) < vocab_size)
        base = tl.where(tl.abs(best) < INF, best, 0.0)
        x = tl.where(is_bad[:, None], -INF, x)
        distance = (base[:, None] - x) / temperature.to(tl.float32)
        if not is_cut:
            if tl.load(top_p_ptr + slot) < 1.0:
                tl.store(note_ptr + place, tl.sum(tl.exp(-distance), axis=1), mask=sub < NUM_SUBS)
            else:
                key = row_key(tl.load(seeds_ptr + slot), tl.load(positions_ptr + row))
                u = uniform(key, token)
                variate = tl.where(u < 2.0**-8, u + 0.5 * u * u, -tl.log(1.0 - u))  # to 1e-4 of itself
                cost = tl.where(mask, variate * tl.exp(tl.minimum(distance, 80.0)), INF)
                tl.store(note_ptr + place, tl.min(cost, axis=1), mask=sub < NUM_SUBS)


@triton.jit
def _logits(logits_row, counts_row, prompt_row, repetition, frequency, presence, token, vocab_size):
    """Logits of tokens after penalties, fp32, -inf beyond the vocabulary: the very numbers that the survey saw."""
    mask = token < vocab_size
    x = tl.load(logits_row + token, mask=mask, other=-INF).to(tl.float32)
    if (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0):
        x = _penalised(x, mask, counts_row + token, prompt_row + token, repetition, frequency, presence)
    return x


@triton.jit
def _distance(best, x, temperature):
    """As the definition rounds it; abs turns -0.0 into 0.0, since -0.0 has other bits."""
    return tl.div_rn(tl.abs(best - x), tl.zeros_like(x) + temperature)


@triton.jit
def _top_p_bound(nearest, sums, total, top_p, SUB: tl.constexpr):
    """A distance that surely holds ``top_p`` of the mass ``total``; NO_MASS if only all tokens with a mass surely do.

    nearest, sums: of each sub-block, the distance of its best token and the mass of all its tokens.
    """
    needed = (total * top_p).to(tl.float32) * 1.00001  # sums are in fp32
    low = 0.0
    high = NO_MASS
    for _ in range(12):
        middle = 0.5 * (low + high)
        surely = tl.maximum(tl.exp(-nearest), sums - (SUB - 1) * tl.exp(tl.zeros_like(nearest) - middle))
        is_enough = tl.sum(tl.where(nearest <= middle, surely, 0.0), axis=0) >= needed
        low = tl.where(is_enough, low, middle)
        high = tl.where(is_enough, middle, high)
    return high


@triton.jit
def _collect(
    is_near, bound, first, is_ranked, best, temperature, subs_ptr, near_ptr, ids_ptr, bins_ptr, masses_ptr, logits_row,
    counts_row, prompt_row, repetition, frequency, presence, vocab_size,
    SUB: tl.constexpr, NUM_SUBS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the distances and the ids of the tokens within ``bound`` of the sub-blocks that are near, ids ascending,
    with a histogram from ``first`` on if they are ranked; returns how many.
    """
    clear(bins_ptr, masses_ptr)
    num_near = list_near(is_near, subs_ptr, NUM_SUBS)
    count = 0
    for start in range(0, num_near, TILE // SUB):
        token = listed_tokens(subs_ptr, start, num_near, SUB, NUM_SUBS, TILE)
        x = _logits(logits_row, counts_row, prompt_row, repetition, frequency, presence, token, vocab_size)
        distance = tl.reshape(_distance(best, x, temperature), [TILE])
        token = tl.reshape(token, [TILE])
        is_kept = (distance <= bound) & (distance < INF)
        target = count + tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
        tl.store(near_ptr + target, distance, mask=is_kept)
        tl.store(ids_ptr + target, token, mask=is_kept)
        tally(bins_ptr, masses_ptr, distance, is_kept & is_ranked, first, FIRST_SHIFT)
        count += tl.sum(is_kept.to(tl.int32), axis=0)
    tl.debug_barrier()
    return count


@triton.jit
def _drawn(
    highest, best, temperature, min_p, top_k, top_p, key, note_ptr, subs_ptr, near_ptr, ids_ptr, bins_ptr, masses_ptr,
    logits_row, counts_row, prompt_row, repetition, frequency, presence, vocab_size,
    SUB: tl.constexpr, NUM_SUBS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The token with the lowest distance + log(E) of what the filters keep, of equal ones the lowest id."""
    sub = tl.arange(0, NUM_SUBS)
    nearest = _distance(best, highest, temperature)
    bound = tl.full((), INF, tl.float32)
    whole = tl.full((), 0.0, tl.float64)
    is_cut = (min_p > 0.0) | (top_k < vocab_size)
    is_ranked = (top_k < vocab_size) | (top_p < 1.0)
    if is_cut | (top_p < 1.0):
        if min_p > 0.0:
            bound = tl.abs(tl.log(min_p)).to(tl.float32)
        if top_k <= tl.sum((nearest < INF).to(tl.int32), axis=0):  # that many sub-blocks have a token each
            ones = (sub >= 0).to(tl.int32)
            infinity = float_bits(tl.full((), INF, tl.float32))
            farthest = reach(top_k, infinity * 0, infinity, float_bits(nearest), ones)
            bound = tl.minimum(bound, farthest.to(tl.float32, bitcast=True))
        if top_p < 1.0:
            bound = tl.minimum(bound, NO_MASS)
            if not is_cut:
                sums = tl.load(note_ptr + sub, mask=nearest < INF, other=0.0)
                exact = tl.exp(-nearest).to(tl.float64) * sums.to(tl.float64)
                total = tl.sum(exact, axis=0)
                bound = _top_p_bound(nearest, exact.to(tl.float32), total, top_p, SUB)
                whole = tl.where(bound < NO_MASS, total, 0.0)
        is_near = (nearest <= bound) & (nearest < INF)
    else:
        cost = nearest + tl.log(tl.load(note_ptr + sub, mask=nearest < INF, other=1.0))
        is_near = cost <= tl.min(cost, axis=0) + 1e-3  # the survey's costs are surely that good
    # Every sub-block has a token as near as ``far``, so few tokens are as near as a quarter of it; what top_k and top_p
    # cut is rarely 4 times as far: there buckets are fine.
    far = tl.max(tl.where(nearest < INF, float_bits(nearest), 0), axis=0)
    top = tl.minimum(float_bits(bound), tl.minimum(far, LARGEST_BITS - TWO_OCTAVES) + TWO_OCTAVES)
    first = tl.maximum(top - (BUCKETS << FIRST_SHIFT) + 1, 0)
    count = _collect(
        is_near, bound, first, is_ranked, best, temperature, subs_ptr, near_ptr, ids_ptr, bins_ptr, masses_ptr,
        logits_row, counts_row, prompt_row, repetition, frequency, presence, vocab_size, SUB, NUM_SUBS, TILE,
    )  # fmt: skip
    return choose_near(
        bound, first, whole, top_k, top_p, key, near_ptr, ids_ptr, bins_ptr, masses_ptr, count, vocab_size, TILE
    )


@triton.jit
def _choose(
    row, tokens_ptr, best_ptr, note_ptr, subs_ptr, near_ptr, ids_ptr, bins_ptr, masses_ptr, logits_ptr, slots_ptr,
    positions_ptr, temperature_ptr, min_p_ptr, top_k_ptr, top_p_ptr, seeds_ptr, frequency_ptr, presence_ptr,
    repetition_ptr, counts_ptr, prompt_ptr, stride, vocab_size,
    SUB: tl.constexpr, NUM_SUBS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Choose the token of ``row``, and count it if the row has penalties."""
    slot = tl.load(slots_ptr + row)
    temperature = tl.load(temperature_ptr + slot)
    repetition = tl.load(repetition_ptr + slot)
    frequency = tl.load(frequency_ptr + slot)
    presence = tl.load(presence_ptr + slot)
    logits_row = logits_ptr + row * stride
    counts_row = counts_ptr + slot * vocab_size
    prompt_row = prompt_ptr + slot * vocab_size
    sub = tl.arange(0, NUM_SUBS)
    highest = tl.load(best_ptr + row * NUM_SUBS + sub, mask=sub * SUB < vocab_size, other=-INF)
    best = tl.max(highest, axis=0)
    token = tl.full((), _NOT_FINITE, tl.int32)
    if best == -INF:
        token = tl.full((), _ALL_MASKED, tl.int32)
    elif best < INF:
        if temperature > 0.0:
            key = row_key(tl.load(seeds_ptr + slot), tl.load(positions_ptr + row))
            token = _drawn(
                highest, best, temperature.to(tl.float32), tl.load(min_p_ptr + slot), tl.load(top_k_ptr + slot),
                tl.load(top_p_ptr + slot), key, note_ptr + row * NUM_SUBS, subs_ptr, near_ptr, ids_ptr, bins_ptr,
                masses_ptr, logits_row, counts_row, prompt_row, repetition, frequency, presence, vocab_size, SUB,
                NUM_SUBS, TILE,
            )  # fmt: skip
        else:
            first = tl.min(tl.where(highest == best, sub, NUM_SUBS), axis=0)
            ids = first * SUB + tl.arange(0, SUB)
            x = _logits(logits_row, counts_row, prompt_row, repetition, frequency, presence, ids, vocab_size)
            token = tl.min(tl.where(x == best, ids, 0x7FFFFFFF), axis=0)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    if (token >= 0) & ((repetition != 1.0) | (frequency != 0.0) | (presence != 0.0)):
        tl.store(counts_row + token, tl.load(counts_row + token) + 1)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["slots_ptr", "positions_ptr"])
def _choose_kernel(
    tokens_ptr, best_ptr, note_ptr, subs_ptr, near_ptr, ids_ptr, bins_ptr, masses_ptr, logits_ptr, slots_ptr,
    positions_ptr, temperature_ptr, min_p_ptr, top_k_ptr, top_p_ptr, seeds_ptr, frequency_ptr, presence_ptr,
    repetition_ptr, counts_ptr, prompt_ptr, stride, vocab_size, num_rows,
    SUB: tl.constexpr, NUM_SUBS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    subs_ptr += program * NUM_SUBS
    near_ptr += program * (vocab_size + TILE)
    ids_ptr += program * (vocab_size + TILE)
    bins_ptr += program * BUCKETS
    masses_ptr += program * BUCKETS
    for row in range(program, num_rows, tl.num_programs(0)):
        _choose(
            row, tokens_ptr, best_ptr, note_ptr, subs_ptr, near_ptr, ids_ptr, bins_ptr, masses_ptr, logits_ptr,
            slots_ptr, positions_ptr, temperature_ptr, min_p_ptr, top_k_ptr, top_p_ptr, seeds_ptr, frequency_ptr,
            presence_ptr, repetition_ptr, counts_ptr, prompt_ptr, stride, vocab_size, SUB, NUM_SUBS, TILE,
        )  # fmt: skip
        tl.debug_barrier()  # the next row writes where this one read


def sample_(
    logits: torch.Tensor, slot_ids: torch.Tensor, positions: torch.Tensor, params: Any, facts: object = None
) -> torch.Tensor:
    """Choose the token of each row as the operation ``sample_`` defines it; -1 where its logits hold NaN or +inf, -2
    where all are -inf.

    logits: (R, V) bf16, fp16 or fp32, rows dense, V at most 2^22, not changed. slot_ids, positions: (R,) int64. params:
    the ``SlotParams`` of all slots; ``output_counts`` of rows with penalties is added to. ``facts`` are for CPUs.
    Returns (R,) int64.

    Where top_p alone cuts a row, its mass is a sum of fp32 exponentials, which is off by some 1e-7. Scratch memory: 8 V
    bytes and 40 KiB for each of at most 132 rows.
    """
    rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 and logits.dtype != torch.float64, (logits.stride(), logits.dtype)
    assert vocab_size <= 1 << 22, vocab_size
    assert slot_ids.shape == positions.shape == (rows,) and slot_ids.is_contiguous() and positions.is_contiguous()
    assert params.output_counts.shape == params.prompt_mask.shape == (len(params.temperature), vocab_size)
    assert params.output_counts.is_contiguous() and params.prompt_mask.is_contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if not rows:
        return tokens
    sub, num_subs = sub_blocks(vocab_size)
    programs, block = min(rows, MOST_PROGRAMS), max(SURVEY_TOKENS, sub)

    def scratch(height: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(height, width, dtype=dtype, device=logits.device)

    best, note = scratch(rows, num_subs), scratch(rows, num_subs)
    inputs = (
        logits, slot_ids, positions, params.temperature, params.min_p, params.top_k, params.top_p, params.seed_keys,
        params.frequency, params.presence, params.repetition, params.output_counts,
        params.prompt_mask.view(torch.uint8), logits.stride(0), vocab_size,
    )  # fmt: skip
    # Penalties are not fused into multiply-adds, so that they round as the definition's do.
    _survey_kernel[(rows, triton.cdiv(vocab_size, block))](
        best, note, *inputs, SUB=sub, NUM_SUBS=num_subs, BLOCK=block, num_warps=8, enable_fp_fusion=False
    )
    tile, buckets = max(TILE_TOKENS, sub), BUCKETS.value
    _choose_kernel[(programs,)](
        tokens, best, note, scratch(programs, num_subs, torch.int32), scratch(programs, vocab_size + tile),
        scratch(programs, vocab_size + tile, torch.int32), scratch(programs, buckets, torch.int32),
        scratch(programs, buckets, torch.int64), *inputs, rows,
        SUB=sub, NUM_SUBS=num_subs, TILE=tile, num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return tokens
