"""Selection without a sort, by histograms of the bits of floats and bisection; and how a row is divided into
sub-blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
SURVEY_TOKENS = 4096  # of a program that passes over all tokens
MASS_ONE = tl.constexpr(float(1 << 40))  # the mass of the likeliest token
NO_MASS = tl.constexpr(28.0)  # a distance from which on floor(2^40 exp(-distance)) is 0
TILE_TOKENS = 2048  # tokens that are gathered, or decided on in registers, at once
MOST_PROGRAMS = 132  # that decide on rows, at most; each has room for a row, so this bounds the memory
BUCKETS = tl.constexpr(2048)  # of a histogram
FIRST_SHIFT = tl.constexpr(14)  # of the first one: 512 buckets to an octave, over 4 octaves
TWO_OCTAVES = tl.constexpr(2 << 23)  # of a float's bits
LARGEST_BITS = tl.constexpr(0x7F7FFFFF)
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
def reach(target, low, high, bits, weight):
    """The smallest distance (bits), from ``low`` to ``high``, within which the weights add up to ``target``."""
    while low < high:
        middle = low + (high - low) // 2
        if tl.sum(tl.where(bits <= middle, weight, 0), axis=0) >= target:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def clear(counts_ptr, masses_ptr):
    """Empty a histogram."""
    bucket = tl.arange(0, BUCKETS)
    tl.debug_barrier()
    tl.store(counts_ptr + bucket, tl.zeros([BUCKETS], tl.int32))
    tl.store(masses_ptr + bucket, tl.zeros([BUCKETS], tl.int64))
    tl.debug_barrier()


@triton.jit
def tally(counts_ptr, masses_ptr, distance, is_counted, first, shift):
    """Add distances to a histogram of their bits: those from ``first`` on by 2^shift, what is nearer in the first
    bucket, what is farther than all buckets in the last. Integers, which add in any order.
    """
    bucket = tl.minimum(tl.maximum(float_bits(distance) - first, 0) >> shift, BUCKETS - 1)
    tl.atomic_add(counts_ptr + bucket, is_counted.to(tl.int32), mask=is_counted, sem="relaxed", scope="cta")
    tl.atomic_add(masses_ptr + bucket, mass_of(distance), mask=is_counted, sem="relaxed", scope="cta")


@triton.jit
def cross(counts_ptr, masses_ptr, target, low, high, first, shift, count, mass, BY_MASS: tl.constexpr):
    """The bucket in which the weight, with ``count`` and ``mass`` of nearer tokens, reaches ``target``: (the lowest of
    its bits, the highest; count and mass of nearer tokens; of its own). low, high: of the histogram.
    """
    bucket = tl.arange(0, BUCKETS)
    counts = tl.load(counts_ptr + bucket).to(tl.int64)
    masses = tl.load(masses_ptr + bucket)
    if BY_MASS:
        reached = mass + tl.cumsum(masses, axis=0)
    else:
        reached = count + tl.cumsum(counts, axis=0)
    index = tl.minimum(tl.sum((reached < target).to(tl.int32), axis=0), BUCKETS - 1)
    begin = first + (index.to(tl.int64) << shift)
    end = begin + (tl.full((), 1, tl.int64) << shift) - 1
    count += tl.sum(tl.where(bucket < index, counts, 0), axis=0)
    mass += tl.sum(tl.where(bucket < index, masses, 0), axis=0)
    inside = tl.sum(tl.where(bucket == index, counts, 0), axis=0)
    inside_mass = tl.sum(tl.where(bucket == index, masses, 0), axis=0)
    new_low = tl.where(index == 0, low, begin.to(tl.int32))
    new_high = tl.where(index == BUCKETS - 1, high, tl.minimum(end, high).to(tl.int32))
    return new_low, new_high, count, mass, inside, inside_mass


@triton.jit
def pin_down(
    counts_ptr, masses_ptr, near_ptr, num_near, target, low, high, count, mass, inside_mass,
    BY_MASS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The distance (bits) at which the weight reaches ``target``, from ``low`` to ``high``, by histograms of ever
    narrower ranges of the ``num_near`` distances at near_ptr; and the mass of all tokens within it.
    """
    while low < high:
        shift = tl.full((), 0, tl.int32)
        while ((high - low) >> shift) >= BUCKETS:
            shift += 1
        clear(counts_ptr, masses_ptr)
        for start in range(0, num_near, TILE):
            place = start + tl.arange(0, TILE)
            distance = tl.load(near_ptr + place, mask=place < num_near, other=INF)
            bits = float_bits(distance)
            is_inside = (place < num_near) & (bits >= low) & (bits <= high)
            tally(counts_ptr, masses_ptr, distance, is_inside, low, shift)
        tl.debug_barrier()
        low, high, count, mass, inside, inside_mass = cross(
            counts_ptr, masses_ptr, target, low, high, low, shift, count, mass, BY_MASS
        )
    return low, mass + inside_mass
