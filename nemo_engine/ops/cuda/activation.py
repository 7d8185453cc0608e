"""SiLU of the gate times the up projection, and quantisation to FP8, by csrc/activation."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_engine.ops.cuda import address, library, row_stride, stream_of
from nemo_engine.ops.linear import SCALE_BLOCK


def silu_mul(gate_up: Tensor) -> Tensor:
    """As ``nemo_engine.ops.activation.silu_mul``; bf16, rows dense, I a multiple of 8."""
    rows, width = _gated_shape(gate_up)
    y = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    library().silu_mul(y.data_ptr(), gate_up.data_ptr(), rows, width, row_stride(gate_up), stream_of(gate_up))
    return y


def silu_mul_fp8(gate_up: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As ``nemo_engine.ops.activation.silu_mul_fp8``; I a multiple of 8 up to 16,384; ``scale``: () fp32."""
    rows, width = _gated_shape(gate_up)
    y, scales = _outputs(gate_up, width, columns=1)
    library().silu_mul_fp8(
        y.data_ptr(), scales.data_ptr(), gate_up.data_ptr(), _address(scale), rows, width, row_stride(gate_up),
        stream_of(gate_up),
    )  # fmt: skip
    return y, scales


def quantize_tokens(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As ``nemo_engine.ops.quantize.quantize_tokens``; bf16, rows dense, K a multiple of 8 up to 16,384; ``scale``: ()
    fp32.
    """
    rows, width = _shape(x)
    y, scales = _outputs(x, width, columns=1)
    library().quantize_tokens(
        y.data_ptr(), scales.data_ptr(), x.data_ptr(), _address(scale), rows, width, row_stride(x), stream_of(x)
    )
    return y, scales


def quantize_token_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """As ``nemo_engine.ops.blocks.quantize_token_blocks``; bf16, rows dense, K a multiple of 8."""
    rows, width = _shape(x)
    y, scales = _outputs(x, width, columns=-(-width // SCALE_BLOCK))
    library().quantize_token_blocks(
        y.data_ptr(), scales.data_ptr(), x.data_ptr(), rows, width, row_stride(x), stream_of(x)
    )
    return y, scales


def _shape(x: Tensor) -> tuple[int, int]:
    assert x.dtype == torch.bfloat16 and x.dim() == 2 and x.stride(1) == 1, (x.dtype, x.shape, x.stride())
    return x.shape[0], x.shape[1]


def _gated_shape(gate_up: Tensor) -> tuple[int, int]:
    """Rows and columns of the output."""
    rows, width = _shape(gate_up)
    assert width % 2 == 0, gate_up.shape
    return rows, width // 2


def _outputs(x: Tensor, width: int, columns: int) -> tuple[Tensor, Tensor]:
    """FP8 values and scales for the rows of ``x``."""
    values = torch.empty(x.shape[0], width, dtype=torch.float8_e4m3fn, device=x.device)
    return values, torch.empty(x.shape[0], columns, dtype=torch.float32, device=x.device)


def _address(scale: Tensor | None) -> int:
    assert scale is None or (scale.numel() == 1 and scale.dtype == torch.float32), scale
    return address(scale)
