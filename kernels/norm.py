"""RMSNorm with the addition of the residual in the same pass, and FP8 quantisation if asked.

A row stays in one program's registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .device import dependent, wait_for_previous
from .fp8 import quantize_row


@triton.jit
def _rms_norm_kernel(
    y_ptr, scales_ptr, sum_ptr, x_ptr, residual_ptr, weight_ptr, scale_ptr, x_stride, residual_stride, width, eps,
    HAS_RESIDUAL: tl.constexpr, QUANTISE: tl.constexpr, IS_STATIC: tl.constexpr, BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0)
    x = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + column, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)  # rounded: it is what the next residual is
        tl.store(sum_ptr + row * width + column, x, mask=mask)
    wide = x.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=0) / width
    normed = (wide * tl.rsqrt(mean_square + eps)).to(x.dtype)
    y = (normed.to(tl.float32) * weight.to(tl.float32)).to(x.dtype)
    if QUANTISE:
        y, scale = quantize_row(y, scale_ptr, IS_STATIC)
        tl.store(scales_ptr + row, scale)
    tl.store(y_ptr + row * width + column, y, mask=mask)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``y = x / sqrt(mean(x^2) + eps) * weight``, after ``x += residual`` if there is one; returns (y, x).

    x, residual: (T, H) bf16, fp16 or fp32, rows dense; weight: (H,), dense. Statistics in fp32. H is at most 16,384.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return y, _launch(y, None, x, weight, eps, residual, None)


def rms_norm_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``rms_norm``, its y quantised per token; returns (y (T, H) FP8 e4m3, scales (T, 1) fp32, x).

    ``scale``: () fp32, to use it for all.
    """
    y = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    return y, scales, _launch(y, scales, x, weight, eps, residual, scale)


def _launch(
    y: torch.Tensor,
    scales: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """Fill ``y`` and ``scales``; returns the sum of x and residual."""
    rows, width = x.shape
    assert x.stride(1) == 1 and weight.is_contiguous(), (x.shape, x.stride(), weight.stride())
    assert residual is None or (residual.shape == x.shape and residual.stride(1) == 1)
    total = x if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows:
        block = triton.next_power_of_2(width)
        _rms_norm_kernel[(rows,)](
            y, scales, total, x, residual, weight, scale, x.stride(0), 0 if residual is None else residual.stride(0),
            width, eps, HAS_RESIDUAL=residual is not None, QUANTISE=scales is not None, IS_STATIC=scale is not None,
            BLOCK=block, num_warps=min(16, max(1, block // 512)),  # 16 elements a thread
            **dependent(x.device),
        )  # fmt: skip
    return total
