"""Selection without a sort, by bisection on the bits of floats; and how a row is divided into sub-blocks."""

from __future__ import annotations

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
SURVEY_TOKENS = 4096  # of a program that passes over all tokens
MASS_ONE = tl.constexpr(float(1 << 40))  # the mass of the likeliest token
NO_MASS = tl.constexpr(28.0)  # a distance from which on floor(2^40 exp(-distance)) is 0
TILE_TOKENS = 2048  # tokens that are gathered, or decided on in registers, at once
MOST_PROGRAMS = 132  # that decide on rows, at most; each has room for a row, so this bounds the memory
_MOST_SUBS = 1024


def sub_blocks(vocab_size: int) -> tuple[int, int]:
    """Tokens in a sub-block, and the number of sub-blocks rounded up: both powers of two."""
    sub = max(128, triton.next_power_of_2(triton.cdiv(vocab_size, _MOST_SUBS)))
    return sub, max(16, triton.next_power_of_2(triton.cdiv(vocab_size, sub)))


@triton.jit
def list_near(is_near, subs_ptr, NUM_SUBS: tl.constexpr):
    """Write the numbers of the sub-blocks that are near, in order; returns how many."""
    place = tl.cumsum(is_near.to(tl.int32), axis=0) - 1
    tl.store(subs_ptr + place, tl.arange(0, NUM_SUBS), mask=is_near)
    tl.debug_barrier()
    return tl.sum(is_near.to(tl.int32), axis=0)


@triton.jit
def listed_tokens(subs_ptr, start, num_near, SUB: tl.constexpr, NUM_SUBS: tl.constexpr, TILE: tl.constexpr):
    """The tokens of TILE / SUB listed sub-blocks from ``start`` on, (TILE / SUB, SUB); beyond the vocabulary where
    there are fewer.
    """
    item = start + tl.arange(0, TILE // SUB)
    sub = tl.load(subs_ptr + item, mask=item < num_near, other=NUM_SUBS)
    return sub[:, None] * SUB + tl.arange(0, SUB)[None, :]


@triton.jit
def mass_of(distance):
    """A token's mass, which sums exactly: floor(2^40 exp(-distance)), int64."""
    return (tl.exp(-distance) * MASS_ONE).to(tl.int64)


@triton.jit
def float_bits(distance):
    """Bits of fp32, which of what is not negative sort as the floats do."""
    return distance.to(tl.int32, bitcast=True)


@triton.jit
def within(limit, bits, weight, near_ptr, count, TILE: tl.constexpr, BY_MASS: tl.constexpr):
    """The weight of what is not farther than ``limit`` (bits): 1 each, or its mass."""
    reached = tl.sum(tl.where(bits <= limit, weight, 0), axis=0)
    for start in range(TILE, count, TILE):
        place = start + tl.arange(0, TILE)
        distance = tl.load(near_ptr + place, mask=place < count, other=INF)
        is_within = (float_bits(distance) <= limit) & (place < count)
        if BY_MASS:
            reached += tl.sum(tl.where(is_within, mass_of(distance), 0), axis=0)
        else:
            reached += tl.sum(is_within.to(tl.int32), axis=0)
    return reached


@triton.jit
def reach(target, high, bits, weight, near_ptr, count, TILE: tl.constexpr, BY_MASS: tl.constexpr):
    """The smallest distance (bits), at most ``high``, within which the weights add up to ``target``.

    The first TILE of ``count`` distances are in registers: ``bits``, with their ``weight``; the others at near_ptr.
    """
    low = tl.full((), 0, tl.int32)
    while low < high:
        middle = low + (high - low) // 2
        if within(middle, bits, weight, near_ptr, count, TILE, BY_MASS) >= target:
            high = middle
        else:
            low = middle + 1
    return low
