"""The noise of a draw, computed anew wherever it is wanted: as nemo_engine/ops/sampling.py defines it."""

from __future__ import annotations

import triton
import triton.language as tl

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def row_key(seed_key, position):
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
def uniform(key, token):
    """``u`` of the noise's definition, fp32."""
    x = _mix32(_mix32(token.to(tl.uint32) ^ key.to(tl.uint32)) ^ (key >> 32).to(tl.uint32))
    return tl.minimum((x.to(tl.float32) + 0.5) * (2.0**-32), 1.0 - 2.0**-24)


@triton.jit
def log_exponential(key, token):
    """log(E): E = -log1p(-u) is log(1 - u), made up for the rounding of 1 - u."""
    u = uniform(key, token)
    rest = 1.0 - u
    taken = 1.0 - rest
    is_tiny = taken == 0.0
    exact = -tl.log(rest) * tl.div_rn(u, tl.where(is_tiny, 1.0, taken))
    return tl.log(tl.where(is_tiny, u, exact))
