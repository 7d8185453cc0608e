"""SiLU of the gate times the up projection, and the same with the result quantised to FP8 in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .device import dependent, wait_for_previous
from .fp8 import quantize_row

_BLOCK = 1024  # columns of one program where rows need not stay together: 8 elements a thread with 4 warps


@triton.jit
def _silu_mul_kernel(
    out_ptr, scales_ptr, gate_up_ptr, scale_ptr, stride, width,
    QUANTISE: tl.constexpr, IS_STATIC: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_up_ptr + row * stride + column, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * stride + width + column, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)  # rounded here, as the product of two operations would be
    y = (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)
    if QUANTISE:
        y, scale = quantize_row(y, scale_ptr, IS_STATIC)
        tl.store(scales_ptr + row, scale)
    tl.store(out_ptr + row * width + column, y, mask=mask)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``. gate_up: (T, 2 I) bf16, fp16 or fp32, rows dense, gate in the first half -> (T, I)."""
    rows, width = _shape(gate_up)
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        grid = (rows, triton.cdiv(width, _BLOCK))
        _silu_mul_kernel[grid](
            out, None, gate_up, None, gate_up.stride(0), width,
            QUANTISE=False, IS_STATIC=False, BLOCK=_BLOCK, num_warps=4, **dependent(gate_up.device),
        )  # fmt: skip
    return out


def silu_mul_fp8(gate_up: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``silu_mul``, quantised per token: (T, 2 I) -> (T, I) FP8 e4m3 and (T, 1) fp32.

    ``scale``: () fp32, to use it for all.

    I is at most 16,384: one program holds a row.
    """
    rows, width = _shape(gate_up)
    out = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=gate_up.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=gate_up.device)
    if rows:
        block = triton.next_power_of_2(width)
        _silu_mul_kernel[(rows, 1)](
            out, scales, gate_up, scale, gate_up.stride(0), width,
            QUANTISE=True, IS_STATIC=scale is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
            **dependent(gate_up.device),
        )  # fmt: skip
    return out, scales


def _shape(gate_up: torch.Tensor) -> tuple[int, int]:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1 and gate_up.shape[1] == 2 * width, (gate_up.shape, gate_up.stride())
    return rows, width
