"""Linear layers with what comes before them in a layer: the norm, or the activation. In one launch where a kernel does so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemo_engine.ops.activation import silu_mul, silu_mul_fp8
from nemo_engine.ops.linear import linear, linear_fp8
from nemo_engine.ops.norm import rms_norm, rms_norm_fp8
from nemo_engine.ops.op import Case, Op
from nemo_engine.ops.quantize import quantize_channels


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
    return compose_norm_linear_fp8(rms_norm_fp8, linear_fp8)(x, residual, norm_weight, eps, w8, w_scales, x_scale)


def silu_mul_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """``linear`` of ``silu_mul``. gate_up: (T, 2 K), weight: (N, K) -> (T, N)."""
    return compose_silu_mul_linear(silu_mul, linear)(gate_up, weight)


def silu_mul_linear_fp8(gate_up: Tensor, w8: Tensor, w_scales: Tensor, x_scale: Tensor | None = None) -> Tensor:
    """``linear_fp8`` of ``silu_mul_fp8``, x_scale being its static scale. (T, 2 K), (N, K) FP8 -> (T, N) of gate_up's dtype."""
    return compose_silu_mul_linear_fp8(silu_mul_fp8, linear_fp8)(gate_up, w8, w_scales, x_scale)


def compose_norm_linear(norm: Callable[..., Any], linear: Callable[..., Any]) -> Callable[..., Any]:
    """``norm_linear`` of two implementations."""

    def composed(
        x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        normed, total = norm(x, norm_weight, eps, residual)
        return linear(normed, weight), total

    return composed


def compose_norm_linear_fp8(norm: Callable[..., Any], linear: Callable[..., Any]) -> Callable[..., Any]:
    """``norm_linear_fp8`` of two implementations."""

    def composed(
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        w8: Tensor,
        w_scales: Tensor,
        x_scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        x8, x_scales, total = norm(x, norm_weight, eps, residual, x_scale)
        return linear(x8, x_scales, w8, w_scales, x.dtype), total

    return composed


def compose_silu_mul_linear(silu_mul: Callable[..., Any], linear: Callable[..., Any]) -> Callable[..., Any]:
    """``silu_mul_linear`` of two implementations."""
    return lambda gate_up, weight: linear(silu_mul(gate_up), weight)


def compose_silu_mul_linear_fp8(silu_mul: Callable[..., Any], linear: Callable[..., Any]) -> Callable[..., Any]:
    """``silu_mul_linear_fp8`` of two implementations."""

    def composed(gate_up: Tensor, w8: Tensor, w_scales: Tensor, x_scale: Tensor | None = None) -> Tensor:
        x8, x_scales = silu_mul(gate_up, x_scale)
        result: Tensor = linear(x8, x_scales, w8, w_scales, gate_up.dtype)
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
        return (noise(rows, 2 * width) * 2).to(dtype), *weights
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


NORM_LINEAR = Op(
    "norm_linear",
    norm_linear,
    (),
    partial(_cases, "norm"),
    _norm_cost,
    composed=lambda ops: compose_norm_linear(ops.rms_norm, ops.linear),
)
NORM_LINEAR_FP8 = Op(
    "norm_linear_fp8",
    norm_linear_fp8,
    (),
    partial(_cases, "norm fp8"),
    _norm_cost,
    is_fp8=True,
    composed=lambda ops: compose_norm_linear_fp8(ops.rms_norm_fp8, ops.linear_fp8),
)
SILU_MUL_LINEAR = Op(
    "silu_mul_linear",
    silu_mul_linear,
    (),
    partial(_cases, "silu"),
    _silu_cost,
    composed=lambda ops: compose_silu_mul_linear(ops.silu_mul, ops.linear),
)
SILU_MUL_LINEAR_FP8 = Op(
    "silu_mul_linear_fp8",
    silu_mul_linear_fp8,
    (),
    partial(_cases, "silu fp8"),
    _silu_cost,
    is_fp8=True,
    composed=lambda ops: compose_silu_mul_linear_fp8(ops.silu_mul_fp8, ops.linear_fp8),
)
