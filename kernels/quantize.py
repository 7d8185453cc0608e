"""Quantisation of rows to FP8 (e4m3): tokens of activations, output channels of weights. One program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .device import dependent, wait_for_previous
from .fp8 import quantize_row


@triton.jit
def _quantize_kernel(
    q_ptr, scales_ptr, x_ptr, scale_ptr, stride, width,
    IS_STATIC: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    x = tl.load(x_ptr + row * stride + column, mask=mask, other=0.0)
    q, scale = quantize_row(x, scale_ptr, IS_STATIC)
    tl.store(scales_ptr + row, scale)
    tl.store(q_ptr + row * width + column, q, mask=mask)


def quantize_tokens(x: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row divided by its scale, ``max |row| / 448`` or the given one (() fp32), and rounded.

    x: (T, K) bf16, fp16 or fp32, rows dense, K at most 16,384 -> (T, K) FP8 e4m3 and (T, 1) fp32.
    """
    rows, width = x.shape
    assert x.stride(1) == 1, (x.shape, x.stride())
    q = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(width)
        _quantize_kernel[(rows,)](
            q, scales, x, scale, x.stride(0), width,
            IS_STATIC=scale is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
            **dependent(x.device),
        )  # fmt: skip
    return q, scales
