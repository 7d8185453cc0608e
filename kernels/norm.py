"""RMSNorm with the addition of the residual in the same pass. One program per row; a row stays in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rms_norm_kernel(
    y_ptr,
    sum_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    x_stride,
    residual_stride,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
    y = normed.to(tl.float32) * weight.to(tl.float32)
    tl.store(y_ptr + row * width + column, y.to(x.dtype), mask=mask)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``y = x / sqrt(mean(x^2) + eps) * weight``, after ``x += residual`` if there is one; returns (y, x).

    x, residual: (T, H) bf16, fp16 or fp32, rows dense; weight: (H,), dense. Statistics in fp32.
    """
    rows, width = x.shape
    assert x.stride(1) == 1 and weight.is_contiguous(), (x.shape, x.stride(), weight.stride())
    assert residual is None or (residual.shape == x.shape and residual.stride(1) == 1)
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(y)
    if rows:
        block = triton.next_power_of_2(width)
        _rms_norm_kernel[(rows,)](
            y,
            total,
            x,
            x if residual is None else residual,
            weight,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            width,
            eps,
            HAS_RESIDUAL=residual is not None,
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),  # 16 elements a thread
        )
    return y, total
