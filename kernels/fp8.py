"""What kernels that write FP8 (e4m3, largest number 448) share."""

from __future__ import annotations

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)
_TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal fp32: the scale of a row of zeros


@triton.jit
def quantize_row(y, scale_ptr, IS_STATIC: tl.constexpr):
    """(FP8 values, scale) of one row y, 0 where it is padded: its own scale, or the one at ``scale_ptr`` if IS_STATIC.

    The scale of a row with NaN or infinity is NaN.
    """
    wide = y.to(tl.float32)
    if IS_STATIC:
        scale = tl.load(scale_ptr)
    else:
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(wide), axis=0), FP8_MAX), _TINY)
    scale += tl.sum(wide * 0.0, axis=0)  # 0, but NaN if the row is not finite; maximum and max would lose it
    scaled = tl.clamp(tl.div_rn(wide, tl.zeros_like(wide) + scale), -FP8_MAX, FP8_MAX)
    return scaled.to(tl.float8e4nv), scale
