"""FP8 projections of many tokens with what follows them in a layer: the residual, or the activation and its quantisation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemo_engine.ops.activation import silu_mul
from nemo_engine.ops.linear import cuda_supports, linear_fp8
from nemo_engine.ops.op import Case, Impl, Op
from nemo_engine.ops.quantize import FP8, FP8_MAX, quantize_channels, quantize_tokens

_INTERLEAVED = 8  # rows of the gate, then as many of the other half


def interleave_gate_up(gate_up: Tensor) -> Tensor:
    """(2 I, ...) rows [gate; up] in groups of 8, of the gate and of the other half in turn, so that one tile has both. I a multiple of 8."""
    gate, up = (half.unflatten(0, (-1, _INTERLEAVED)) for half in gate_up.chunk(2))
    return torch.stack([gate, up], 1).flatten(0, 2)


def linear_add_fp8(x8: Tensor, x_scales: Tensor, w8: Tensor, w_scales: Tensor, residual: Tensor) -> Tensor:
    """``residual + linear_fp8``, scales per tensor or channel. x8: (T, K), w8: (N, K), residual: (T, N) -> (T, N) of its dtype."""
    return residual + linear_fp8(x8, x_scales, w8, w_scales, residual.dtype)


def linear_silu_mul_fp8(
    x8: Tensor, x_scales: Tensor, w8: Tensor, w_scales: Tensor, scale: Tensor | None = None
) -> Tensor:
    """``silu_mul`` of ``linear_fp8`` with rows as ``interleave_gate_up`` lays them: (T, K), (2 I, K) -> (T, I) bf16.

    With ``scale``, () fp32: the quotients in FP8, saturated; fp64 unrounded, of fp64 scales.
    """
    outputs = w8.shape[0]
    order = interleave_gate_up(torch.arange(outputs, device=w8.device)).argsort()
    w_scales = w_scales[order] if w_scales.numel() > 1 else w_scales
    product = silu_mul(linear_fp8(x8, x_scales, w8[order], w_scales))
    if scale is None:
        return product
    wide = product if product.dtype == torch.float64 else product.float()
    quotient = (wide / scale.to(wide.dtype)).clamp(-FP8_MAX, FP8_MAX)
    return quotient if wide.dtype == torch.float64 else quotient.to(FP8)


def _operands(dtype: torch.dtype, rows: int, outputs: int, width: int, is_per_tensor: bool) -> tuple[Any, ...]:
    """FP8 operands whatever the dtype: they are what is given."""
    generator = torch.Generator().manual_seed(rows + outputs * width)
    x, w = (torch.randn(n, width, generator=generator) for n in (rows, outputs))
    x8, x_scales = quantize_tokens(x)
    w8, w_scales = quantize_channels(w * width**-0.5 * 2)
    return x8, x_scales, w8, (torch.tensor(0.003) if is_per_tensor else w_scales)


def _make(dtype: torch.dtype, rows: int, outputs: int, width: int, kind: str) -> tuple[Any, ...]:
    operands = _operands(dtype, rows, outputs, width, kind.endswith("tensor"))
    if kind.startswith("add"):
        generator = torch.Generator().manual_seed(rows)
        return *operands, torch.randn(rows, outputs, generator=generator).bfloat16()
    return *operands, torch.tensor(0.02) if kind.startswith("quantised") else None


def _cases(kind: str) -> Iterator[Case]:
    for rows, outputs, width in ((0, 48, 64), (1, 16, 16), (65, 144, 272), (130, 32, 144), (257, 400, 144)):
        yield Case(
            f"{rows}x{width}x{outputs} {kind}", partial(_make, rows=rows, outputs=outputs, width=width, kind=kind)
        )


def _add_cases() -> Iterator[Case]:
    yield from _cases("add")
    yield from _cases("add, scale of a tensor")


def _silu_cases() -> Iterator[Case]:
    yield from _cases("silu")
    yield from _cases("quantised, scale of a tensor")


def _cost(x8: Tensor, x_scales: Tensor, w8: Tensor, w_scales: Tensor, other: Tensor | None) -> tuple[int, int]:
    rows, outputs = x8.shape[0], w8.shape[0]
    return x8.numel() + w8.numel() + 4 * rows * outputs, 2 * x8.numel() * outputs


LINEAR_ADD_FP8 = Op(
    "linear_add_fp8",
    linear_add_fp8,
    (Impl("cuda", "nemo_engine.ops.cuda.gemm:linear_add_fp8", cuda_supports),),
    _add_cases,
    _cost,
    is_fp8=True,
)
LINEAR_SILU_MUL_FP8 = Op(
    "linear_silu_mul_fp8",
    linear_silu_mul_fp8,
    (Impl("cuda", "nemo_engine.ops.cuda.gemm:linear_silu_mul_fp8", cuda_supports),),
    _silu_cases,
    _cost,
    is_fp8=True,
)
