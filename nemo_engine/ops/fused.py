"""Linear layers with what comes before them in a layer: the norm, the activation, or their input's quantisation. In one launch where a kernel does so.

Of FP8 weights with scales per block, the input is quantised by blocks too, and has no static scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemo_engine.ops.activation import silu_mul, silu_mul_fp8
from nemo_engine.ops.blocks import quantize_token_blocks
from nemo_engine.ops.linear import cuda_supports, linear, linear_fp8
from nemo_engine.ops.norm import rms_norm, rms_norm_fp8
from nemo_engine.ops.op import Case, Impl, Op
from nemo_engine.ops.quantize import quantize_channels, quantize_tokens


def norm_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """``linear`` of ``rms_norm``. x, residual: (T, K); norm_weight: (K,); weight: (N, K). Returns ((T, N), (T, K) x + residual)."""
    return compose_norm_linear(rms_norm, linear)(x, residual, norm_weight, eps, weight)


def norm_linear_fp8(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    w8: Tensor,
    w_scales: Tensor,
    x_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``linear_fp8`` of ``rms_norm_fp8``, x_scale being its static scale. w8: (N, K) FP8 -> ((T, N) of x's dtype, (T, K))."""
    composed = compose_norm_linear_fp8(rms_norm, rms_norm_fp8, quantize_token_blocks, linear_fp8)
    return composed(x, residual, norm_weight, eps, w8, w_scales, x_scale)


def silu_mul_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """``linear`` of ``silu_mul``. gate_up: (T, 2 K), weight: (N, K) -> (T, N)."""
    return compose_silu_mul_linear(silu_mul, linear)(gate_up, weight)


def silu_mul_linear_fp8(gate_up: Tensor, w8: Tensor, w_scales: Tensor, x_scale: Tensor | None = None) -> Tensor:
    """``linear_fp8`` of ``silu_mul_fp8``, x_scale being its static scale. (T, 2 K), (N, K) FP8 -> (T, N) of gate_up's dtype."""
    composed = compose_silu_mul_linear_fp8(silu_mul, silu_mul_fp8, quantize_token_blocks, linear_fp8)
    return composed(gate_up, w8, w_scales, x_scale)


def quantize_linear_fp8(x: Tensor, w8: Tensor, w_scales: Tensor, x_scale: Tensor | None = None) -> Tensor:
    """``linear_fp8`` of ``quantize_tokens``, x_scale being its static scale. x: (T, K); w8: (N, K) FP8 -> (T, N) of x's dtype."""
    return compose_quantize_linear_fp8(quantize_tokens, quantize_token_blocks, linear_fp8)(x, w8, w_scales, x_scale)


def has_blocks(w8: Tensor, w_scales: Tensor) -> bool:
    """Whether a weight has scales of blocks, and more than one: with one, it is the same as a scale per tensor."""
    return w_scales.numel() > 1 and w_scales.shape != (w8.shape[0], 1)


def compose_norm_linear(norm: Callable[..., Any], linear: Callable[..., Any]) -> Callable[..., Any]:
    """``norm_linear`` of two implementations."""

    def composed(
        x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        normed, total = norm(x, norm_weight, eps, residual)
        return linear(normed, weight), total

    return composed


def compose_norm_linear_fp8(
    norm: Callable[..., Any], norm_fp8: Callable[..., Any], blocks: Callable[..., Any], linear: Callable[..., Any]
) -> Callable[..., Any]:
    """``norm_linear_fp8`` of implementations of the norm, the norm into FP8, the quantisation by blocks and the product."""

    def composed(
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        w8: Tensor,
        w_scales: Tensor,
        x_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if has_blocks(w8, w_scales):
            normed, total = norm(x, norm_weight, eps, residual)
            x8, x_scales = blocks(normed)
        else:
            x8, x_scales, total = norm_fp8(x, norm_weight, eps, residual, x_scale)
        return linear(x8, x_scales, w8, w_scales, x.dtype), total

    return composed


def compose_silu_mul_linear(silu_mul: Callable[..., Any], linear: Callable[..., Any]) -> Callable[..., Any]:
    """``silu_mul_linear`` of two implementations."""
    return lambda gate_up, weight: linear(silu_mul(gate_up), weight)


def compose_silu_mul_linear_fp8(
    silu_mul: Callable[..., Any],
    silu_mul_fp8: Callable[..., Any],
    blocks: Callable[..., Any],
    linear: Callable[..., Any],
) -> Callable[..., Any]:
    """``silu_mul_linear_fp8`` of implementations, as ``compose_norm_linear_fp8``."""

    def composed(gate_up: Tensor, w8: Tensor, w_scales: Tensor, x_scale: Tensor | None = None) -> Tensor:
        x8, x_scales = blocks(silu_mul(gate_up)) if has_blocks(w8, w_scales) else silu_mul_fp8(gate_up, x_scale)
        result: Tensor = linear(x8, x_scales, w8, w_scales, gate_up.dtype)
        return result

    return composed


def compose_quantize_linear_fp8(
    quantize: Callable[..., Any], blocks: Callable[..., Any], linear: Callable[..., Any]
) -> Callable[..., Any]:
    """``quantize_linear_fp8`` of implementations, as ``compose_norm_linear_fp8``."""

    def composed(x: Tensor, w8: Tensor, w_scales: Tensor, x_scale: Tensor | None = None) -> Tensor:
        x8, x_scales = blocks(x) if has_blocks(w8, w_scales) else quantize(x, x_scale)
        result: Tensor = linear(x8, x_scales, w8, w_scales, x.dtype)
        return result

    return composed


_SHAPES = (
    (0, 48, 64), (1, 5, 64), (2, 200, 272), (5, 40, 1024), (8, 48, 256), (9, 130, 320), (16, 33, 256), (17, 72, 144),
    (65, 40, 80), (1, 64, 5120), (3, 40, 5120),
)  # fmt: skip


def _make(dtype: torch.dtype, rows: int, outputs: int, width: int, kind: str) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(rows + outputs * width)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight = noise(outputs, width) * width**-0.5
    is_norm, is_fp8 = kind.startswith("norm"), kind.endswith("fp8")
    weights: tuple[Any, ...] = (weight.to(dtype),)
    if is_fp8:
        weights = (*quantize_channels(weight), torch.tensor(0.02) if width % 3 else None)
    if not is_norm:
        return (noise(rows, 2 * width if kind.startswith("silu") else width) * 2).to(dtype), *weights
    residual = noise(rows, width).to(dtype) if outputs % 2 == 0 else None
    return noise(rows, width).to(dtype), residual, (1 + 0.1 * noise(width)).to(dtype), 1e-5, *weights


def _cases(kind: str) -> Iterator[Case]:
    for rows, outputs, width in _SHAPES:
        yield Case(f"{rows}x{width}x{outputs}", partial(_make, rows=rows, outputs=outputs, width=width, kind=kind))


def _cost(rows: int, weight: Tensor, inputs: int) -> tuple[int, int]:
    outputs, width = weight.shape
    return weight.nbytes + 2 * rows * (inputs * width + outputs), 2 * rows * outputs * width


def _norm_cost(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, *rest: Any
) -> tuple[int, int]:
    return _cost(x.shape[0], weight, 1 if residual is None else 3)


def _silu_cost(gate_up: Tensor, weight: Tensor, *rest: Any) -> tuple[int, int]:
    return _cost(gate_up.shape[0], weight, 2)


def _plain_cost(x: Tensor, weight: Tensor, *rest: Any) -> tuple[int, int]:
    return _cost(x.shape[0], weight, 1)


NORM_LINEAR = Op(
    "norm_linear",
    norm_linear,
    (Impl("cuda", "nemo_engine.ops.cuda.linear:norm_linear", cuda_supports),),
    partial(_cases, "norm"),
    _norm_cost,
    composed=lambda ops: compose_norm_linear(ops.rms_norm, ops.linear),
)
NORM_LINEAR_FP8 = Op(
    "norm_linear_fp8",
    norm_linear_fp8,
    (Impl("cuda", "nemo_engine.ops.cuda.linear:norm_linear_fp8", cuda_supports),),
    partial(_cases, "norm fp8"),
    _norm_cost,
    is_fp8=True,
    composed=lambda ops: compose_norm_linear_fp8(
        ops.rms_norm, ops.rms_norm_fp8, ops.quantize_token_blocks, ops.linear_fp8
    ),
)
SILU_MUL_LINEAR = Op(
    "silu_mul_linear",
    silu_mul_linear,
    (Impl("cuda", "nemo_engine.ops.cuda.linear:silu_mul_linear", cuda_supports),),
    partial(_cases, "silu"),
    _silu_cost,
    composed=lambda ops: compose_silu_mul_linear(ops.silu_mul, ops.linear),
)
SILU_MUL_LINEAR_FP8 = Op(
    "silu_mul_linear_fp8",
    silu_mul_linear_fp8,
    (Impl("cuda", "nemo_engine.ops.cuda.linear:silu_mul_linear_fp8", cuda_supports),),
    partial(_cases, "silu fp8"),
    _silu_cost,
    is_fp8=True,
    composed=lambda ops: compose_silu_mul_linear_fp8(
        ops.silu_mul, ops.silu_mul_fp8, ops.quantize_token_blocks, ops.linear_fp8
    ),
)
QUANTIZE_LINEAR_FP8 = Op(
    "quantize_linear_fp8",
    quantize_linear_fp8,
    (Impl("cuda", "nemo_engine.ops.cuda.linear:quantize_linear_fp8", cuda_supports),),
    partial(_cases, "plain fp8"),
    _plain_cost,
    is_fp8=True,
    composed=lambda ops: compose_quantize_linear_fp8(ops.quantize_tokens, ops.quantize_token_blocks, ops.linear_fp8),
)
