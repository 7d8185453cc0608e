"""SiLU of the gate times the up projection. One program per row and block of columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # columns of one program: 8 elements a thread with 4 warps


@triton.jit
def _silu_mul_kernel(out_ptr, gate_up_ptr, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(gate_up_ptr + row * stride + column, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * stride + width + column, mask=mask, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)  # rounded here, as the product of two operations would be
    tl.store(out_ptr + row * width + column, (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=mask)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``. gate_up: (T, 2 I) bf16, fp16 or fp32, rows dense, gate in the first half -> (T, I)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1 and gate_up.shape[1] == 2 * width, (gate_up.shape, gate_up.stride())
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        grid = (rows, triton.cdiv(width, _BLOCK))
        _silu_mul_kernel[grid](out, gate_up, gate_up.stride(0), width, BLOCK=_BLOCK, num_warps=4)
    return out
