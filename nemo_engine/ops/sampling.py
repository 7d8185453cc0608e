"""Choosing tokens from logits: addressed noise, the draw, penalties, and ranking tokens by log-probability.

Every function treats each row on its own, and adds only integers, so that a row's result has the same bits whatever
stands in the other rows and however a device splits the work. Must not know requests, slots or sampling parameters.

The noise
---------
Token ``t`` of a row with key ``k`` gets the exponential variate ``E(k, t)``; nothing is consumed, so any one can be
computed anew, anywhere. All integers are unsigned and wrap; ``>>`` shifts in zeros::

    mix64(z)  = z ^= z >> 30; z *= 0xbf58476d1ce4e5b9; z ^= z >> 27; z *= 0x94d049bb133111eb; z ^ z >> 31
    mix32(x)  = x ^= x >> 16; x *= 0x21f0aaad; x ^= x >> 15; x *= 0xd35a2d97; x ^ x >> 15
    seed_key  = mix64(seed + 0x9e3779b97f4a7c15)                            64 bits, once per request
    k         = mix64(seed_key + 0x9e3779b97f4a7c15 * position)             64 bits, once per row
    x(k, t)   = mix32(mix32(t ^ (k mod 2^32)) ^ (k >> 32))                  32 bits, per token
    u(k, t)   = min((float32(x) + 0.5) * 2^-32, 1 - 2^-24)                  float32, round to nearest
    E(k, t)   = -log1p(-u)

mix64 is the finaliser of SplitMix64 (Steele, Lea and Flood 2014), mix32 that of Wellons' hash-prospector with the least
known bias. ``u`` is finest near 0, where ``E`` is small and wins. ``-log(E)`` is Gumbel noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX64_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MIX32_FACTORS = (0x21F0AAAD, 0xD35A2D97)
_DIGIT_BITS = 11  # of a key, per pass of the radix selection: 3 passes in fp32, 6 in fp64
_MASS_BITS = 40  # the most likely token weighs 2^40: 2^22 tokens cannot overflow int64, and 2^-40 is lost per token
_BLOCK_ELEMENTS = 1 << 23  # logits drawn from at once: bounds the temporaries to some 50 bytes each


def _signed(value: int, bits: int) -> int:
    """The two's complement reading of an unsigned ``bits``-bit integer, which is what torch's integers hold."""
    return value - (1 << bits) if value >= 1 << (bits - 1) else value


def seed_key(seed: int) -> int:
    """The key of a request's noise as a signed 64-bit integer. ``seed``: any integer, taken modulo 2^64."""
    mask = (1 << 64) - 1
    z = (seed + _GOLDEN) & mask
    z = ((z ^ (z >> 30)) * _MIX64_FACTORS[0]) & mask
    z = ((z ^ (z >> 27)) * _MIX64_FACTORS[1]) & mask
    return _signed(z ^ (z >> 31), 64)


def row_keys(seed_keys: Tensor, positions: Tensor) -> Tensor:
    """``k`` of the module's docstring. seed_keys, positions: (R,) int64 -> (R,) int64."""
    z = seed_keys + positions * _signed(_GOLDEN, 64)
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX64_FACTORS[0], 64)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX64_FACTORS[1], 64)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """The unsigned shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def noise_bits(keys: Tensor, vocab_size: int) -> Tensor:
    """``x(k, t)`` for every token. keys: (R,) int64 -> (R, V) int32 holding the 32 bits."""
    low = keys.to(torch.int32).unsqueeze(1)
    high = (keys >> 32).to(torch.int32).unsqueeze(1)
    x = torch.arange(vocab_size, dtype=torch.int32, device=keys.device) ^ low
    shifted = torch.empty_like(x)
    _mix32_(x, shifted)
    x ^= high
    _mix32_(x, shifted)
    return x


def _mix32_(x: Tensor, shifted: Tensor) -> None:
    for shift, factor in zip((16, 15), _MIX32_FACTORS, strict=True):
        torch.bitwise_right_shift(x, shift, out=shifted)
        x ^= shifted.bitwise_and_((1 << (32 - shift)) - 1)
        x *= _signed(factor, 32)
    torch.bitwise_right_shift(x, 15, out=shifted)
    x ^= shifted.bitwise_and_((1 << 17) - 1)


def log_exponential(keys: Tensor, vocab_size: int) -> Tensor:
    """``log(E(k, t))``, the Gumbel noise with its sign turned. keys: (R,) int64 -> (R, V) fp32."""
    u = noise_bits(keys, vocab_size).view(torch.uint32).to(torch.float32)
    return u.add_(0.5).mul_(-(2.0**-32)).clamp_(min=2.0**-24 - 1.0).log1p_().neg_().log_()


def draw(
    logits: Tensor,
    keys: Tensor,
    temperature: Tensor,
    min_p: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    max_top_k: int = 0,
) -> Tensor:
    """Draw one token per row from softmax(logits / temperature), cut to what min_p, top_k and top_p leave.

    The draw is Gumbel-max, ``argmax((logits - max) / temperature - log(E))``; the maximum comes off before the division
    so that a low temperature costs no precision. With ``distance = (max - logits) / temperature``, each filter is an
    upper limit on the distance, so tokens of equal logits are kept or dropped together:

    * min_p keeps a probability of at least ``min_p`` times the highest: ``distance <= -log(min_p)``.
    * top_k keeps the k nearest, and what ties with the k-th.
    * top_p acts on what the other two leave, renormalised: it keeps the smallest set of nearest tokens whose mass
      reaches ``top_p`` (so the token that crosses it is kept), and what ties with the farthest of them. Masses are
      ``floor(2^40 exp(-distance))``, summed in integers.

    logits: (R, V) fp32 or fp64, -inf where masked; at least one finite per row and no NaN or +inf, or else that row's
    result (only) is meaningless, though in range. keys: (R,) int64. temperature, min_p, top_p: (R,) fp64. top_k: (R,)
    int64, 1 to V. Off is min_p 0, top_k V, top_p 1, or None for all rows. max_top_k: the highest top_k below V, 0 if
    none. -> (R,) int64.
    """
    assert logits.dtype in (torch.float32, torch.float64), logits.dtype
    num_rows = max(1, _BLOCK_ELEMENTS // max(logits.shape[1], 1 << _DIGIT_BITS))
    if len(logits) <= num_rows:
        return _draw_block(logits, keys, temperature, min_p, top_k, top_p, max_top_k)
    blocks = []
    for start in range(0, len(logits), num_rows):
        rows = slice(start, start + num_rows)
        cuts = [None if value is None else value[rows] for value in (min_p, top_k, top_p)]
        blocks.append(_draw_block(logits[rows], keys[rows], temperature[rows], cuts[0], cuts[1], cuts[2], max_top_k))
    return torch.cat(blocks)


def _draw_block(
    logits: Tensor,
    keys: Tensor,
    temperature: Tensor,
    min_p: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    max_top_k: int,
) -> Tensor:
    dtype = logits.dtype
    best = logits.amax(dim=1, keepdim=True)
    # The distance is never negative; abs only turns -0.0 into 0.0, since -0.0 has other bits.
    distance = (best - logits).abs_().div_(temperature.to(dtype).unsqueeze(1))
    limit = None if min_p is None else (-min_p.log()).to(dtype).unsqueeze(1)
    if max_top_k:
        assert top_k is not None
        farthest = _kth_distance(distance, top_k.unsqueeze(1), max_top_k)
        limit = farthest if limit is None else torch.minimum(limit, farthest)
    if top_p is not None:
        mass = (-distance).exp_().mul_(2.0**_MASS_BITS).to(torch.int64)
        if limit is not None:
            mass *= distance <= limit
        total = mass.sum(dim=1, keepdim=True)
        target = (total * top_p.unsqueeze(1)).ceil_().to(torch.int64).clamp_(min=1)
        farthest = _reach_(distance, mass, torch.minimum(target, total))
        # Off must be off exactly: the mass of the least likely tokens rounds to 0.
        farthest.masked_fill_(top_p.unsqueeze(1) >= 1.0, torch.inf)
        limit = farthest if limit is None else torch.minimum(limit, farthest)
    cost = log_exponential(keys, logits.shape[1]) + distance
    if limit is not None:
        cost.masked_fill_(distance > limit, torch.inf)
    return cost.argmin(dim=1)


def _kth_distance(distance: Tensor, top_k: Tensor, max_top_k: int) -> Tensor:
    """The top_k-th smallest distance per row. distance: (R, V); top_k: (R, 1) -> (R, 1), +inf where top_k is off."""
    vocab_size = distance.shape[1]
    if max_top_k <= vocab_size // 16:
        nearest = distance.topk(max_top_k, dim=1, largest=False).values
        kth = nearest.gather(1, top_k.clamp(max=max_top_k) - 1)
    else:
        kth = _reach_(distance, torch.ones_like(distance, dtype=torch.int32), top_k)
    return kth.masked_fill_(top_k >= vocab_size, torch.inf)


def _reach_(distance: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The smallest distance within which the weights of a row add up to ``target``.

    A radix selection from the highest bits down: the bits of non-negative floats sort like the floats. It needs no
    sort, and sums integers, so no order of summation can change the result. distance: (R, V) fp32 or fp64, >= 0.
    weight: (R, V) int32 or int64, >= 0, and used up. target: (R, 1) int64, from 1 to the row's weight. -> (R, 1), an
    element of the row.
    """
    bits, num_bits = (torch.int32, 31) if distance.dtype is torch.float32 else (torch.int64, 63)
    key = distance.view(bits)
    digit = torch.empty_like(key)
    index = torch.empty_like(key, dtype=torch.int64)  # what scatter_add_ asks for
    prefix = torch.zeros_like(target)
    num_buckets = 1 << _DIGIT_BITS
    for shift in reversed(range(0, num_bits, _DIGIT_BITS)):
        torch.bitwise_right_shift(key, shift, out=digit).bitwise_and_(num_buckets - 1)
        buckets = torch.zeros(len(key), num_buckets, dtype=weight.dtype, device=key.device)
        buckets.scatter_add_(1, index.copy_(digit), weight)
        reached = buckets.cumsum(dim=1)
        bucket = (reached < target).sum(dim=1, keepdim=True).clamp_(max=num_buckets - 1)
        target = target - (reached - buckets).gather(1, bucket)
        prefix = (prefix << _DIGIT_BITS) | bucket
        if shift:
            weight *= digit == bucket.to(bits)
    return prefix.to(bits).view(distance.dtype)


def apply_penalties_(
    logits: Tensor,
    output_counts: Tensor,
    frequency: Tensor,
    presence: Tensor,
    repetition: Tensor | None = None,
    prompt_mask: Tensor | None = None,
) -> None:
    """Change ``logits`` by the repetition, then the frequency and the presence penalty, in place.

    Repetition divides the positive logits of tokens in prompt or output, and multiplies the others (Keskar et al.
    2019). Frequency is subtracted once per occurrence in the output, presence once if there is any. -inf stays, and
    nothing else becomes infinite. logits: (R, V) fp32 or fp64. output_counts: (R, V) int32. frequency, presence,
    repetition: (R,) fp64. prompt_mask: (R, V) bool, given if repetition is.
    """
    dtype = logits.dtype
    is_in_output = output_counts > 0
    if repetition is not None:
        assert prompt_mask is not None
        finite = torch.finfo(dtype)
        is_masked = logits == -torch.inf
        factor = repetition.clamp(finite.tiny, finite.max).to(dtype).unsqueeze(1)
        changed = torch.where(logits > 0, logits / factor, logits * factor).clamp_(finite.min, finite.max)
        logits.copy_(torch.where((is_in_output | prompt_mask) & ~is_masked, changed, logits))
    logits -= frequency.to(dtype).unsqueeze(1) * output_counts
    logits -= presence.to(dtype).unsqueeze(1) * is_in_output


def top_tokens(values: Tensor, k: int) -> Tensor:
    """The ids of the k highest values of each row, highest first; of equal ones the lower id first.

    ``torch.topk`` leaves open which of equal values it takes, and logits computed in bf16 often are equal.
    values: (R, V) fp32 or fp64. k: 1 to V. -> (R, k) int64.
    """
    vocab_size = values.shape[1]
    if values.dtype is not torch.float32 or k > vocab_size // 8:
        return values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    # One integer per token: the float's bits made to sort as integers, then the id, the lower the better.
    bits = (values + 0.0).view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64) << 32
    order -= torch.arange(vocab_size, device=values.device)
    return order.topk(k, dim=1).indices


def num_at_least(values: Tensor, threshold: Tensor) -> Tensor:
    """How many values of its row reach each threshold: vLLM's rank. values: (R, V); threshold: (R, N) -> (R, N)."""
    if threshold.shape[1] == 1:
        return (values >= threshold).sum(dim=1, keepdim=True)
    ascending = values.sort(dim=1).values
    return values.shape[1] - torch.searchsorted(ascending, threshold.contiguous())
