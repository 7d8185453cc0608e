"""A token per row of logits: a pass over all of them that leaves two numbers per sub-block, and one that looks again where it must.

Sampling needs the whole row only to learn where the good tokens lie. ``_survey_kernel`` notes of every sub-block (128 tokens, of large vocabularies
more) the highest logit and, as its row needs it, the mass or the best cost of a draw. From these ``_choose_kernel`` knows bounds that surely hold
what can be chosen; it gathers the tokens within them and decides exactly, by bisection on the bits of floats. Nothing is sorted.

The noise, penalties and filters are those of the definition, ``sample_``: its draw is the argmin of ``distance + log(E)``.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 4096  # tokens of a program of the survey
_TILE = 2048  # tokens that are gathered, or decided on in registers, at once
_PROGRAMS = 132  # of the choice, at most; each has room for a row, so this bounds the memory
_MOST_SUBS = 1024
_NOT_FINITE = tl.constexpr(-1)  # the engine's codes of rows that fail
_ALL_MASKED = tl.constexpr(-2)
_INF = tl.constexpr(float("inf"))
_INF_BITS = tl.constexpr(0x7F800000)
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MASS_ONE = tl.constexpr(float(1 << 40))  # the mass of the likeliest token
_NO_MASS = tl.constexpr(28.0)  # a distance from which on floor(2^40 exp(-distance)) is 0
_LARGEST = tl.constexpr(3.4028234663852886e38)  # finite fp32
_SMALLEST = tl.constexpr(1.1754943508222875e-38)  # normal fp32


@triton.jit
def _row_key(seed_key, position):
    """``k`` of the noise's definition."""
    z = seed_key.to(tl.uint64) + position.to(tl.uint64) * _GOLDEN
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def _uniform(key, token):
    """``u`` of the noise's definition, fp32."""
    x = _mix32(_mix32(token.to(tl.uint32) ^ key.to(tl.uint32)) ^ (key >> 32).to(tl.uint32))
    return tl.minimum((x.to(tl.float32) + 0.5) * (2.0**-32), 1.0 - 2.0**-24)


@triton.jit
def _log_exponential(key, token):
    """log(E): E = -log1p(-u) is log(1 - u), made up for the rounding of 1 - u."""
    u = _uniform(key, token)
    rest = 1.0 - u
    taken = 1.0 - rest
    is_tiny = taken == 0.0
    exact = -tl.log(rest) * tl.div_rn(u, tl.where(is_tiny, 1.0, taken))
    return tl.log(tl.where(is_tiny, u, exact))


@triton.jit
def _penalised(x, mask, counts_ptr, prompt_ptr, repetition, frequency, presence):
    """Logits after the penalties; counts_ptr and prompt_ptr point to those of the tokens of x."""
    count = tl.load(counts_ptr, mask=mask, other=0)
    in_prompt = tl.load(prompt_ptr, mask=mask, other=0) != 0
    factor = tl.minimum(tl.maximum(repetition, _SMALLEST), _LARGEST)
    factor = tl.full(x.shape, 0.0, tl.float32) + factor.to(tl.float32)
    changed = tl.where(x > 0.0, tl.div_rn(x, factor), x * factor)
    changed = tl.minimum(tl.maximum(changed, -_LARGEST), _LARGEST)
    is_changed = (repetition != 1.0) & ((count > 0) | in_prompt) & (x > -_INF)
    x = tl.where(is_changed, changed, x)
    x = x - frequency.to(tl.float32) * count.to(tl.float32)
    return x - tl.where(count > 0, presence.to(tl.float32), 0.0)


@triton.jit
def _survey_kernel(
    best_ptr, note_ptr, logits_ptr, slots_ptr, positions_ptr, temperature_ptr, min_p_ptr, top_k_ptr, top_p_ptr,
    seeds_ptr, frequency_ptr, presence_ptr, repetition_ptr, counts_ptr, prompt_ptr, stride, vocab_size,
    SUB: tl.constexpr, NUM_SUBS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per sub-block its highest logit, +inf if one is NaN or +inf, and a note: the mass exp((x - highest) / T) of its tokens if the
    row is cut by top_p alone, or the lowest E exp((highest - x) / T) if nothing cuts the row."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    sub = tl.program_id(1) * (BLOCK // SUB) + tl.arange(0, BLOCK // SUB)
    token = sub[:, None] * SUB + tl.arange(0, SUB)[None, :]
    mask = token < vocab_size
    x = tl.load(logits_ptr + row * stride + token, mask=mask, other=-_INF).to(tl.float32)
    is_bad = tl.max((x < _INF).to(tl.int32) ^ 1, axis=1) > 0
    repetition = tl.load(repetition_ptr + slot)
    frequency = tl.load(frequency_ptr + slot)
    presence = tl.load(presence_ptr + slot)
    if (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0):
        of_row = slot * vocab_size + token
        x = _penalised(x, mask, counts_ptr + of_row, prompt_ptr + of_row, repetition, frequency, presence)
    best = tl.where(is_bad, _INF, tl.max(x, axis=1))
    place = row * NUM_SUBS + sub
    tl.store(best_ptr + place, best, mask=sub < NUM_SUBS)
    temperature = tl.load(temperature_ptr + slot)
    if temperature > 0.0:
        is_cut = (tl.load(min_p_ptr + slot) > 0.0) | (tl.load(top_k_ptr + slot) < vocab_size)
        base = tl.where(tl.abs(best) < _INF, best, 0.0)
        x = tl.where(is_bad[:, None], -_INF, x)
        distance = (base[:, None] - x) / temperature.to(tl.float32)
        if not is_cut:
            if tl.load(top_p_ptr + slot) < 1.0:
                tl.store(note_ptr + place, tl.sum(tl.exp(-distance), axis=1), mask=sub < NUM_SUBS)
            else:
                key = _row_key(tl.load(seeds_ptr + slot), tl.load(positions_ptr + row))
                u = _uniform(key, token)
                variate = tl.where(u < 2.0**-8, u + 0.5 * u * u, -tl.log(1.0 - u))  # to 1e-4 of itself
                cost = tl.where(mask, variate * tl.exp(tl.minimum(distance, 80.0)), _INF)
                tl.store(note_ptr + place, tl.min(cost, axis=1), mask=sub < NUM_SUBS)


@triton.jit
def _mass(distance):
    return (tl.exp(-distance) * _MASS_ONE).to(tl.int64)


@triton.jit
def _bits(distance):
    """Bits of fp32, which of what is not negative sort as the floats do."""
    return distance.to(tl.int32, bitcast=True)


@triton.jit
def _within(limit, bits, weight, near_ptr, count, TILE: tl.constexpr, BY_MASS: tl.constexpr):
    """The weight of what is not farther than ``limit`` (bits): 1 each, or its mass."""
    reached = tl.sum(tl.where(bits <= limit, weight, 0), axis=0)
    for start in range(TILE, count, TILE):
        place = start + tl.arange(0, TILE)
        distance = tl.load(near_ptr + place, mask=place < count, other=_INF)
        is_within = (_bits(distance) <= limit) & (place < count)
        if BY_MASS:
            reached += tl.sum(tl.where(is_within, _mass(distance), 0), axis=0)
        else:
            reached += tl.sum(is_within.to(tl.int32), axis=0)
    return reached


@triton.jit
def _reach(target, high, bits, weight, near_ptr, count, TILE: tl.constexpr, BY_MASS: tl.constexpr):
    """The smallest distance (bits), at most ``high``, within which the weights add up to ``target``.

    The first TILE of ``count`` distances are in registers: ``bits``, with their ``weight``; the others at near_ptr.
    """
    low = high * 0
    while low < high:
        middle = low + (high - low) // 2
        if _within(middle, bits, weight, near_ptr, count, TILE, BY_MASS) >= target:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def _bound(nearest, sums, min_p, top_k, top_p, is_cut, NUM_SUBS: tl.constexpr, SUB: tl.constexpr):
    """A distance that surely holds all that the filters keep. nearest: (NUM_SUBS,), of each sub-block's best token; sums: their masses."""
    bound = nearest.dtype.to_ir and None if False else tl.min(nearest, axis=0) + _INF
    return bound
