"""Linear layers by csrc/linear (at most 64 rows, with the norm, activation or quantisation before them in the same
launch) and csrc/gemm.
"""

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_engine.ops import fused
from nemo_engine.ops.cuda import address, counters_of, library, row_stride, stream_of
from nemo_engine.ops.cuda.activation import quantize_token_blocks, quantize_tokens, silu_mul, silu_mul_fp8
from nemo_engine.ops.cuda.norm import rms_norm, rms_norm_fp8
from nemo_engine.ops.fused import has_blocks

SMALL_ROWS = 64  # that the kernels of csrc/linear take at once


class _Input(IntEnum):
    """As in csrc/linear/linear.h."""

    READY = 0
    NORM = 1
    SILU_MUL = 2
    QUANTIZE = 3


# Up to how many rows each block makes the input of a launch for itself; more rows the blocks share, which costs a round
# trip through L2. Making all of it costs nothing while the ring of weights (88 KiB a block, 132 blocks: 2.7 us at
# 4.3 TB/s) fills for the first time, and holds memory up after that. Instructions of a warp for 32 x 8 elements, all
# passes, from the machine code (FP8 and bf16), at 4 a cycle of 1.755 GHz:
#   SiLU      272 and 107, 14,336 elements: 2.2 and 0.9 us a row (two MUFU an element and pass, 16 a cycle: 2.0, 1.0)
#   norm      387 and 250,  5,120 elements: 1.1 and 0.7 us a row
#   quantise  103,          4,096 elements: 0.23 us a row
_FUSED_ROWS = {_Input.SILU_MUL: 1, _Input.NORM: 2, _Input.QUANTIZE: 8}


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """As ``nemo_engine.ops.linear.linear``; bf16, K a multiple of 8. More rows than 64 go to cuBLAS."""
    rows = x.shape[0]
    if rows > SMALL_ROWS:
        return F.linear(x, weight)
    y = torch.empty(rows, weight.shape[0], dtype=x.dtype, device=x.device)
    if rows:
        _check(x, weight, torch.bfloat16)
        _small(y, _Input.READY, x, weight)
    return y


def linear_fp8(
    x8: Tensor, x_scales: Tensor, w8: Tensor, w_scales: Tensor, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """As ``nemo_engine.ops.linear.linear_fp8``; K a multiple of 16, result bf16."""
    assert out_dtype == torch.bfloat16, out_dtype
    rows, outputs = x8.shape[0], w8.shape[0]
    if _is_large(x8, w8):
        return _large(x8, x_scales, w8, w_scales)
    y = torch.empty(rows, outputs, dtype=out_dtype, device=x8.device)
    _check(x8, w8, torch.float8_e4m3fn)
    for first in range(0, rows, SMALL_ROWS):
        part = slice(first, first + SMALL_ROWS)
        _small(y[part], _Input.READY, x8[part], w8, w_scales, x_scales[part])
    return y


_ALONE = SimpleNamespace(
    rms_norm=rms_norm, rms_norm_fp8=rms_norm_fp8, silu_mul=silu_mul, silu_mul_fp8=silu_mul_fp8, linear=linear,
    linear_fp8=linear_fp8, quantize_tokens=quantize_tokens, quantize_token_blocks=quantize_token_blocks,
)  # fmt: skip


def norm_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``nemo_engine.ops.fused.norm_linear``: one launch for up to 64 rows."""
    if not _is_small(x):
        return fused.norm_linear(_ALONE, x, residual, norm_weight, eps, weight)
    return _norm(x, residual, norm_weight, eps, weight)


def norm_linear_fp8(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    w8: Tensor,
    w_scales: Tensor,
    x_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``nemo_engine.ops.fused.norm_linear_fp8``: one launch for up to 64 rows, of weights without blocks."""
    if has_blocks(w8, w_scales) or not _is_small(x):
        return fused.norm_linear_fp8(_ALONE, x, residual, norm_weight, eps, w8, w_scales, x_scale)
    return _norm(x, residual, norm_weight, eps, w8, w_scales, x_scale)


def silu_mul_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """As ``nemo_engine.ops.fused.silu_mul_linear``: one launch for up to 64 rows."""
    if not _is_small(gate_up):
        return fused.silu_mul_linear(_ALONE, gate_up, weight)
    return _made(_Input.SILU_MUL, gate_up, weight)


def silu_mul_linear_fp8(gate_up: Tensor, w8: Tensor, w_scales: Tensor, x_scale: Tensor | None = None) -> Tensor:
    """As ``nemo_engine.ops.fused.silu_mul_linear_fp8``: one launch for up to 64 rows, of weights without blocks."""
    if has_blocks(w8, w_scales) or not _is_small(gate_up):
        return fused.silu_mul_linear_fp8(_ALONE, gate_up, w8, w_scales, x_scale)
    return _made(_Input.SILU_MUL, gate_up, w8, w_scales, x_scale)


def quantize_linear_fp8(
    x: Tensor, w8: Tensor, w_scales: Tensor, x_scale: Tensor | None = None, residual: Tensor | None = None
) -> fused.Sum:
    """As ``nemo_engine.ops.fused.quantize_linear_fp8``: one launch for up to 64 rows, of weights without blocks; of
    more rows the product adds the residual.
    """
    if _is_small(x) and not has_blocks(w8, w_scales):
        return fused.Sum(_made(_Input.QUANTIZE, x, w8, w_scales, x_scale), residual)
    if residual is None or not _is_large(x, w8):
        return fused.quantize_linear_fp8(_ALONE, x, w8, w_scales, x_scale, residual)
    x8, x_scales = quantize_token_blocks(x) if has_blocks(w8, w_scales) else quantize_tokens(x, x_scale)
    return fused.Sum(_large(x8, x_scales, w8, w_scales, residual), None)


def mlp_fp8(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, gate_up_weights: fused.Fp8Weights,
    down_weights: fused.Fp8Weights,
) -> fused.Sum:  # fmt: skip
    """As ``nemo_engine.ops.fused.mlp_fp8``: of more than 64 rows the first product stores the activation, where weights
    have no blocks, and the second adds x + residual.
    """
    w8, w_scales, x_scale = gate_up_weights
    if x.shape[0] <= SMALL_ROWS:
        gate_up, total = norm_linear_fp8(x, residual, norm_weight, eps, *gate_up_weights)
        return fused.Sum(silu_mul_linear_fp8(gate_up, *down_weights), total)
    if has_blocks(w8, w_scales):
        gate_up, total = norm_linear_fp8(x, residual, norm_weight, eps, *gate_up_weights)
        return quantize_linear_fp8(silu_mul(gate_up), *down_weights, total)
    x8, x_scales, total = rms_norm_fp8(x, norm_weight, eps, residual, x_scale)
    return quantize_linear_fp8(_large(x8, x_scales, w8, w_scales, is_gated=True), *down_weights, total)


def _is_small(x: Tensor) -> bool:
    return 0 < x.shape[0] <= SMALL_ROWS


def _is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether csrc/gemm takes it."""
    return x.shape[0] > SMALL_ROWS and weight.shape[0] % 8 == 0


def _is_made_by_each(kind: _Input, rows: int, weight: Tensor) -> bool:
    """Whether each block makes the input for itself."""
    if rows > _FUSED_ROWS[kind]:
        return False
    fits: bool = library().small_linear_fits(int(kind), weight.itemsize == 1, rows, *weight.shape)
    return fits


def _norm(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    w_scales: Tensor | None = None,
    x_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    assert norm_weight.dtype == x.dtype and norm_weight.is_contiguous(), (norm_weight.dtype, norm_weight.stride())
    total = x
    if residual is not None:
        assert residual.dtype == x.dtype and residual.shape == x.shape and residual.stride(1) == 1, residual.shape
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    norm = (residual, norm_weight, None if residual is None else total, eps)
    _small(y, _Input.NORM, x, weight, w_scales, None, x_scale, norm)
    return y, total


def _made(
    kind: _Input, x: Tensor, weight: Tensor, w_scales: Tensor | None = None, x_scale: Tensor | None = None
) -> Tensor:
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    _small(y, kind, x, weight, w_scales, None, x_scale)
    return y


def _small(
    y: Tensor,
    kind: _Input,
    x: Tensor,
    weight: Tensor,
    w_scales: Tensor | None = None,
    x_scales: Tensor | None = None,
    x_scale: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, Tensor | None, float] = (None, None, None, 0.0),
) -> None:
    """One launch. norm: residual, weight of the norm, where the sum goes, eps."""
    residual, norm_weight, total, eps = norm
    rows, (outputs, width) = x.shape[0], weight.shape
    assert x.stride(1) == 1 and weight.stride(1) == 1 and y.is_contiguous(), (x.stride(), weight.stride())
    assert x.dtype == (weight.dtype if kind == _Input.READY else torch.bfloat16), (x.dtype, weight.dtype)
    assert x.shape[1] == (2 * width if kind == _Input.SILU_MUL else width), (x.shape, weight.shape)
    made, made_scales, counts = None, None, None
    if kind != _Input.READY and not _is_made_by_each(kind, rows, weight):
        made = torch.empty(rows, width, dtype=weight.dtype, device=x.device)
        made_scales = torch.empty(rows, dtype=torch.float32, device=x.device) if w_scales is not None else None
        counts = counters_of(weight, 2)
    arguments = (
        y.data_ptr(), int(kind), x.data_ptr(), address(residual), address(norm_weight), address(total),
        address(x_scale), eps, rows, width, row_stride(x), 0 if residual is None else row_stride(residual),
        address(made), address(made_scales), address(counts), weight.data_ptr(), outputs, row_stride(weight),
    )  # fmt: skip
    if w_scales is None:
        library().small_linear(*arguments, stream_of(x))
        return
    is_block = _check_scales(rows, weight, w_scales, x_scales)
    library().small_linear_fp8(
        *arguments, address(x_scales), 0 if x_scales is None else row_stride(x_scales), w_scales.data_ptr(),
        _scale_stride(w_scales), is_block, stream_of(x),
    )  # fmt: skip


def _large(
    x8: Tensor,
    x_scales: Tensor,
    w8: Tensor,
    w_scales: Tensor,
    residual: Tensor | None = None,
    is_gated: bool = False,
) -> Tensor:
    (rows, width), outputs = x8.shape, w8.shape[0]
    _check(x8, w8, torch.float8_e4m3fn)
    assert x8.stride(1) == w8.stride(1) == 1, (x8.stride(), w8.stride())
    is_block = _check_scales(rows, w8, w_scales, x_scales)
    assert residual is None or (residual.dtype, residual.shape) == (torch.bfloat16, (rows, outputs)), residual.shape
    assert residual is None or residual.stride(1) == 1, residual.stride()
    y = torch.empty(rows, outputs // 2 if is_gated else outputs, dtype=torch.bfloat16, device=x8.device)
    library().gemm_fp8(
        y.data_ptr(), x8.data_ptr(), row_stride(x8), x_scales.data_ptr(), row_stride(x_scales), w8.data_ptr(),
        row_stride(w8), w_scales.data_ptr(), _scale_stride(w_scales), address(residual),
        0 if residual is None else row_stride(residual), is_block, is_gated, rows, outputs, width, stream_of(x8),
    )  # fmt: skip
    return y


def _scale_stride(w_scales: Tensor) -> int:
    return w_scales.stride(0) if w_scales.numel() > 1 else 0


def _check_scales(rows: int, weight: Tensor, w_scales: Tensor, x_scales: Tensor | None) -> bool:
    """Returns whether the scales are those of blocks."""
    is_block = has_blocks(weight, w_scales)
    assert w_scales.dtype == torch.float32 and (not is_block or row_stride(w_scales, 1) == 1), w_scales.stride()
    if x_scales is not None:
        expected = (rows, -(-weight.shape[1] // 128) if is_block else 1)
        assert x_scales.dtype == torch.float32 and x_scales.shape == expected and row_stride(x_scales, 1) == 1, (
            x_scales.shape
        )
    return is_block


def _check(x: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    assert x.dtype == weight.dtype == dtype and x.shape[1] == weight.shape[1], (
        x.dtype,
        weight.dtype,
        x.shape,
        weight.shape,
    )
