"""Which of the gathered tokens top_k and top_p keep, and the best of those: exactly, in one pass over them."""

from __future__ import annotations

import triton
import triton.language as tl

from .noise import log_exponential
from .selection import (
    BUCKETS,
    FIRST_SHIFT,
    INF,
    LARGEST_BITS,
    MASS_ONE,
    cross,
    float_bits,
    mass_of,
    pin_down,
    reach,
)

_NO_CUT = tl.constexpr(0x7FFFFFFF)  # farther than any distance's bits
_NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _target(mass, whole, top_p):
    """The mass that top_p asks for, of candidates with ``mass``. whole: the row's, 0 if that is the candidates'."""
    total = tl.where(whole > 0.0, whole * MASS_ONE, mass.to(tl.float64))
    return tl.minimum(tl.maximum(tl.ceil(total * top_p).to(tl.int64), 1), mass)


@triton.jit
def _lowest_cost(cost, token, distance, new_token, is_kept, key):
    """Per place, the lower cost and its token; of equal costs the lower token."""
    new_cost = tl.where(is_kept, distance + log_exponential(key, new_token), INF)
    is_better = is_kept & ((new_cost < cost) | ((new_cost == cost) & (new_token < token)))
    return tl.minimum(cost, new_cost), tl.where(is_better, new_token, token)


@triton.jit
def _look_again(
    cost, token, sure, k_low, k_high, p_low, p_high, key, near_ptr, ids_ptr, count, TILE: tl.constexpr,
):  # fmt: skip
    """Per place the lowest cost of collected tokens nearer than ``sure``, and its token. Those where top_k or top_p
    cuts are written behind the collected ones; returns how many, too.
    """
    num_kept = count * 0
    for start in range(0, count, TILE):
        place = start + tl.arange(0, TILE)
        distance = tl.load(near_ptr + place, mask=place < count, other=INF)
        new_token = tl.load(ids_ptr + place, mask=place < count, other=0)
        bits = float_bits(distance)
        is_open = ((bits >= k_low) & (bits <= k_high)) | ((bits >= p_low) & (bits <= p_high))
        is_open = is_open & (place < count)
        cost, token = _lowest_cost(cost, token, distance, new_token, (bits < sure) & (place < count), key)
        target = count + num_kept + tl.cumsum(is_open.to(tl.int32), axis=0) - 1
        tl.store(near_ptr + target, distance, mask=is_open)
        tl.store(ids_ptr + target, new_token, mask=is_open)
        num_kept += tl.sum(is_open.to(tl.int32), axis=0)
    tl.debug_barrier()
    return cost, token, num_kept


@triton.jit
def choose_near(
    bound, first, whole, top_k, top_p, key, near_ptr, ids_ptr, bins_ptr, masses_ptr, count, vocab_size,
    TILE: tl.constexpr,
):  # fmt: skip
    """The token with the lowest cost of those that top_k and top_p keep of the ``count`` collected ones."""
    tile = tl.arange(0, TILE)
    high = tl.minimum(float_bits(bound), LARGEST_BITS)
    zero = tl.full((), 0, tl.int64)
    # Where top_k and top_p cut, by bits, and what is nearer.
    k_low = tl.full((), _NO_CUT, tl.int32)
    k_high = tl.full((), _NO_CUT, tl.int32)
    p_low = tl.full((), _NO_CUT, tl.int32)
    p_high = tl.full((), _NO_CUT, tl.int32)
    k_count, k_mass, p_count, p_mass = zero, zero, zero, zero
    mass, num_open, k_inside_mass = zero, zero, zero
    if (top_k < vocab_size) & (count > top_k):
        k_low, k_high, k_count, k_mass, num_open, k_inside_mass = cross(
            bins_ptr, masses_ptr, top_k, high * 0, high, first, FIRST_SHIFT, zero, zero, BY_MASS=False
        )
    if top_p < 1.0:
        mass = tl.sum(tl.load(masses_ptr + tl.arange(0, BUCKETS)), axis=0)
        least = tl.where(k_low < _NO_CUT, k_mass, mass)
        most = tl.where(k_low < _NO_CUT, k_mass + k_inside_mass, mass)
        far_low, p_high, far_count, far_mass, far_inside, unused = cross(
            bins_ptr, masses_ptr, _target(most, whole, top_p), high * 0, high, first, FIRST_SHIFT, zero, zero,
            BY_MASS=True,
        )  # fmt: skip
        p_low, unused_high, p_count, p_mass, unused_inside, unused_mass = cross(
            bins_ptr, masses_ptr, tl.maximum(_target(least, whole, top_p), 1), high * 0, high, first, FIRST_SHIFT,
            zero, zero, BY_MASS=True,
        )  # fmt: skip
        num_open += far_count + far_inside - p_count
    cost = tl.full([TILE], INF, tl.float32)
    token = tl.full([TILE], _NO_TOKEN, tl.int32)
    begin = count * 0
    num_kept = count
    if count > TILE:
        sure = tl.minimum(k_low, p_low)
        if num_open > TILE:  # a distribution made to be hard
            if k_low < _NO_CUT:
                k_high, mass = pin_down(
                    bins_ptr, masses_ptr, near_ptr, count, top_k, k_low, k_high, k_count, k_mass, k_inside_mass,
                    BY_MASS=False, TILE=TILE,
                )  # fmt: skip
                sure = k_high + 1
                p_low = tl.where(p_low < _NO_CUT, 0, p_low)
                p_high = tl.where(p_low < _NO_CUT, k_high, p_high)
                p_mass = zero
                k_low = tl.full((), _NO_CUT, tl.int32)
            if p_low < _NO_CUT:
                p_high, mass = pin_down(
                    bins_ptr, masses_ptr, near_ptr, count, _target(mass, whole, top_p), p_low, p_high, zero, p_mass,
                    zero, BY_MASS=True, TILE=TILE,
                )  # fmt: skip
                sure = p_high + 1
                p_low = tl.full((), _NO_CUT, tl.int32)
        cost, token, num_kept = _look_again(
            cost, token, sure, k_low, k_high, p_low, p_high, key, near_ptr, ids_ptr, count, TILE
        )
        begin = count
    is_kept = tile < num_kept
    distance = tl.load(near_ptr + begin + tile, mask=is_kept, other=INF)
    new_token = tl.load(ids_ptr + begin + tile, mask=is_kept, other=0)
    bits = float_bits(distance)
    weight = tl.where(is_kept, mass_of(distance), 0)
    limit = tl.full((), LARGEST_BITS, tl.int32)
    if k_low < _NO_CUT:
        limit = reach(top_k - k_count, k_low, k_high, bits, (is_kept & (bits >= k_low)).to(tl.int64))
        mass = k_mass + tl.sum(tl.where((bits >= k_low) & (bits <= limit), weight, 0), axis=0)
    if p_low < _NO_CUT:
        target = _target(mass, whole, top_p) - p_mass
        limit = reach(target, p_low, p_high, bits, tl.where(bits >= p_low, weight, 0))
    cost, token = _lowest_cost(cost, token, distance, new_token, is_kept & (bits <= limit), key)
    return tl.min(tl.where(cost == tl.min(cost, axis=0), token, _NO_TOKEN), axis=0)
