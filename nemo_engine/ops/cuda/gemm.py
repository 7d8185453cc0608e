"""FP8 matrix products of many tokens by csrc/gemm, with what follows them in a layer."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from nemo_engine.ops.cuda import library, row_stride, stream_of
from nemo_engine.ops.fused import has_blocks

_FP8 = torch.float8_e4m3fn


class _Epilogue(IntEnum):
    """As in csrc/gemm/gemm.h."""

    NONE = 0
    ADD_RESIDUAL = 1
    SILU_MUL = 2
    SILU_MUL_QUANTIZE = 3


def linear_fp8_large(x8: Tensor, x_scales: Tensor, w8: Tensor, w_scales: Tensor) -> Tensor:
    """As ``nemo_engine.ops.linear.linear_fp8``, result bf16; K a multiple of 16 and N of 8."""
    y = torch.empty(x8.shape[0], w8.shape[0], dtype=torch.bfloat16, device=x8.device)
    _gemm(_Epilogue.NONE, y, x8, x_scales, w8, w_scales)
    return y


def linear_add_fp8(x8: Tensor, x_scales: Tensor, w8: Tensor, w_scales: Tensor, residual: Tensor) -> Tensor:
    """As ``nemo_engine.ops.epilogues.linear_add_fp8``; residual bf16, N a multiple of 8."""
    assert residual.dtype == torch.bfloat16 and residual.shape == (x8.shape[0], w8.shape[0]), residual.shape
    assert residual.stride(1) == 1, residual.stride()
    y = torch.empty(residual.shape, dtype=residual.dtype, device=x8.device)
    _gemm(_Epilogue.ADD_RESIDUAL, y, x8, x_scales, w8, w_scales, residual=residual)
    return y


def linear_silu_mul_fp8(
    x8: Tensor, x_scales: Tensor, w8: Tensor, w_scales: Tensor, scale: Tensor | None = None
) -> Tensor:
    """As ``nemo_engine.ops.epilogues.linear_silu_mul_fp8``; ``scale``: () fp32, N a multiple of 16."""
    assert scale is None or (scale.numel() == 1 and scale.dtype == torch.float32), scale
    dtype = torch.bfloat16 if scale is None else _FP8
    y = torch.empty(x8.shape[0], w8.shape[0] // 2, dtype=dtype, device=x8.device)
    epilogue = _Epilogue.SILU_MUL if scale is None else _Epilogue.SILU_MUL_QUANTIZE
    _gemm(epilogue, y, x8, x_scales, w8, w_scales, out_scale=scale)
    return y


def _gemm(
    epilogue: _Epilogue,
    y: Tensor,
    x8: Tensor,
    x_scales: Tensor,
    w8: Tensor,
    w_scales: Tensor,
    *,
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> None:
    (rows, width), outputs = x8.shape, w8.shape[0]
    assert x8.dtype == w8.dtype == _FP8 and w8.shape[1] == width, (x8.dtype, w8.dtype, x8.shape, w8.shape)
    assert x8.stride(1) == w8.stride(1) == 1, (x8.stride(), w8.stride())
    is_block = has_blocks(w8, w_scales)
    assert x_scales.dtype == w_scales.dtype == torch.float32, (x_scales.dtype, w_scales.dtype)
    assert x_scales.shape == (rows, -(-width // 128) if is_block else 1), x_scales.shape
    assert not is_block or row_stride(x_scales, 1) == row_stride(w_scales, 1) == 1, (
        x_scales.stride(),
        w_scales.stride(),
    )
    library().gemm_fp8(
        int(epilogue), y.data_ptr(), x8.data_ptr(), row_stride(x8), x_scales.data_ptr(), row_stride(x_scales), w8.data_ptr(),
        row_stride(w8), w_scales.data_ptr(), w_scales.stride(0) if w_scales.numel() > 1 else 0, is_block,
        0 if residual is None else residual.data_ptr(), 0 if residual is None else row_stride(residual),
        0 if out_scale is None else out_scale.data_ptr(), rows, outputs, width, stream_of(x8),
    )  # fmt: skip
