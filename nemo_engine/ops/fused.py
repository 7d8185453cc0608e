"""Linear layers with what comes before them in a layer: the norm, the activation, or their input's quantisation; and
the MLP, of whose two layers the first may store what the second's input is made of.

In one launch where a kernel does so.

Each is written once, over the operations that it consists of: the definition is that over their definitions, and where
no kernel of the whole is asked for, it runs over those that were chosen. Of FP8 weights with scales per block, the
input is quantised by blocks too, and has no static scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_engine.ops.activation import silu_mul, silu_mul_fp8
from nemo_engine.ops.blocks import quantize_token_blocks
from nemo_engine.ops.cpu import packed
from nemo_engine.ops.linear import cuda_supports, linear, linear_fp8
from nemo_engine.ops.norm import rms_norm, rms_norm_fp8
from nemo_engine.ops.op import Case, Impl, Op
from nemo_engine.ops.quantize import quantize_channels, quantize_tokens

_DEFINITIONS = SimpleNamespace(
    rms_norm=rms_norm, rms_norm_fp8=rms_norm_fp8, silu_mul=silu_mul, silu_mul_fp8=silu_mul_fp8, linear=linear,
    linear_fp8=linear_fp8, quantize_tokens=quantize_tokens, quantize_token_blocks=quantize_token_blocks,
)  # fmt: skip


class Sum(NamedTuple):
    """Two tensors of one shape that stand for their sum, which whoever reads it makes; or the sum alone."""

    x: Tensor
    residual: Tensor | None


Fp8Weights = tuple[Tensor, Tensor, Tensor | None]  # FP8 numbers, their scales, the static scale of the input


def has_blocks(w8: Tensor, w_scales: Tensor) -> bool:
    """Whether a weight has scales of blocks, and more than one: with one, it is the same as a scale per tensor."""
    return w_scales.numel() > 1 and w_scales.shape != (w8.shape[0], 1)


def norm_linear(
    ops: Any, x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """``linear`` of ``rms_norm``. x, residual: (T, K); norm_weight: (K,); weight: (N, K).

    Returns ((T, N), (T, K) x + residual).
    """
    normed, total = ops.rms_norm(x, norm_weight, eps, residual)
    return ops.linear(normed, weight), total


def norm_linear_fp8(
    ops: Any,
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    w8: Tensor,
    w_scales: Tensor,
    x_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``linear_fp8`` of ``rms_norm_fp8``, x_scale being its static scale. w8: (N, K) FP8 -> ((T, N) of x's dtype, (T,
    K)).
    """
    if has_blocks(w8, w_scales):
        normed, total = ops.rms_norm(x, norm_weight, eps, residual)
        return quantize_linear_fp8(ops, normed, w8, w_scales).x, total
    x8, x_scales, total = ops.rms_norm_fp8(x, norm_weight, eps, residual, x_scale)
    return ops.linear_fp8(x8, x_scales, w8, w_scales, x.dtype), total


def silu_mul_linear(ops: Any, gate_up: Tensor, weight: Tensor) -> Tensor:
    """``linear`` of ``silu_mul``. gate_up: (T, 2 K), weight: (N, K) -> (T, N)."""
    product: Tensor = ops.linear(ops.silu_mul(gate_up), weight)
    return product


def silu_mul_linear_fp8(
    ops: Any, gate_up: Tensor, w8: Tensor, w_scales: Tensor, x_scale: Tensor | None = None
) -> Tensor:
    """``linear_fp8`` of ``silu_mul_fp8``, x_scale being its static scale. (T, 2 K), (N, K) FP8 -> (T, N) of gate_up's
    dtype.
    """
    if has_blocks(w8, w_scales):
        return quantize_linear_fp8(ops, ops.silu_mul(gate_up), w8, w_scales).x
    product: Tensor = ops.linear_fp8(*ops.silu_mul_fp8(gate_up, x_scale), w8, w_scales, gate_up.dtype)
    return product


def quantize_linear_fp8(
    ops: Any, x: Tensor, w8: Tensor, w_scales: Tensor, x_scale: Tensor | None = None, residual: Tensor | None = None
) -> Sum:
    """``linear_fp8`` of ``quantize_tokens``, x_scale being its static scale, plus ``residual``. x: (T, K); w8: (N, K)
    FP8; residual: (T, N) -> (T, N), all of x's dtype, to which the product is rounded before it is added.
    """
    quantized = ops.quantize_token_blocks(x) if has_blocks(w8, w_scales) else ops.quantize_tokens(x, x_scale)
    return Sum(ops.linear_fp8(*quantized, w8, w_scales, x.dtype), residual)


def mlp_fp8(
    ops: Any, x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, gate_up_weights: Fp8Weights,
    down_weights: Fp8Weights,
) -> Sum:  # fmt: skip
    """``silu_mul_linear_fp8`` of ``norm_linear_fp8``, plus x + residual. x, residual: (T, H); weights: (2 I, H) and (H,
    I). Returns (T, H).
    """
    gate_up, total = ops.norm_linear_fp8(x, residual, norm_weight, eps, *gate_up_weights)
    return Sum(ops.silu_mul_linear_fp8(gate_up, *down_weights), total)


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


def _plain_cases() -> Iterator[Case]:
    yield from _cases("plain fp8")
    for rows, outputs, width in ((3, 48, 80), (257, 144, 400)):
        make = partial(_make_added, rows=rows, outputs=outputs, width=width)
        yield Case(f"{rows}x{width}x{outputs} and a residual", make)


def _make_added(dtype: torch.dtype, rows: int, outputs: int, width: int) -> tuple[Any, ...]:
    return *_make(dtype, rows, outputs, width, "plain fp8"), _make(dtype, rows, 1, outputs, "plain")[0]


def _mlp_cases() -> Iterator[Case]:
    for rows, hidden, inner in ((0, 48, 64), (3, 64, 32), (65, 144, 208), (130, 272, 400), (257, 80, 112)):
        yield Case(f"{rows}x{hidden}x{inner}", partial(_make_mlp, rows=rows, hidden=hidden, inner=inner))


def _make_mlp(dtype: torch.dtype, rows: int, hidden: int, inner: int) -> tuple[Any, ...]:
    *inputs, w8, w_scales, x_scale = _make(dtype, rows, 2 * inner, hidden, "norm fp8")
    return *inputs, (w8, w_scales, x_scale), _make(dtype, 1, hidden, inner, "silu fp8")[1:]


def _cost(rows: int, weight: Tensor, inputs: int) -> tuple[int, int]:
    outputs, width = weight.shape
    return weight.nbytes + 2 * rows * (inputs * width + outputs), 2 * rows * outputs * width


def _norm_cost(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, *rest: Any
) -> tuple[int, int]:
    return _cost(x.shape[0], weight, 1 if residual is None else 3)


def _silu_cost(gate_up: Tensor, weight: Tensor, *rest: Any) -> tuple[int, int]:
    return _cost(gate_up.shape[0], weight, 2)


def _mlp_cost(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[int, int]:
    first, second = _norm_cost(x, residual, *rest[:2], rest[2][0]), _cost(x.shape[0], rest[3][0], 1)
    return first[0] + second[0], first[1] + second[1]


def _plain_cost(
    x: Tensor, weight: Tensor, w_scales: Tensor, x_scale: Tensor | None = None, residual: Tensor | None = None
) -> tuple[int, int]:
    num_bytes, flops = _cost(x.shape[0], weight, 1)
    return num_bytes + (0 if residual is None else residual.nbytes), flops


def _op(
    composed: Callable[..., Any],
    cases: Callable[[], Iterator[Case]],
    cost: Callable[..., tuple[int, int]],
    replaces: tuple[str, ...] = (),
) -> Op:
    """replaces: what the product of csrc/cpu does before, and itself; none if there is no such."""
    name = composed.__name__
    compiled = Impl("cpu", f"nemo_engine.ops.cpu.products:{name}", packed.supports_compiled, replaces=replaces)
    return Op(
        name,
        partial(composed, _DEFINITIONS),
        (Impl("cuda", f"nemo_engine.ops.cuda.linear:{name}", cuda_supports), *([compiled] if replaces else [])),
        cases,
        cost,
        is_fp8=name.endswith("_fp8"),
        composed=composed,
    )


NORM_LINEAR = _op(norm_linear, partial(_cases, "norm"), _norm_cost, ("rms_norm", "linear"))
NORM_LINEAR_FP8 = _op(norm_linear_fp8, partial(_cases, "norm fp8"), _norm_cost)
SILU_MUL_LINEAR = _op(silu_mul_linear, partial(_cases, "silu"), _silu_cost, ("silu_mul", "linear"))
SILU_MUL_LINEAR_FP8 = _op(silu_mul_linear_fp8, partial(_cases, "silu fp8"), _silu_cost)
QUANTIZE_LINEAR_FP8 = _op(quantize_linear_fp8, _plain_cases, _plain_cost)
MLP_FP8 = Op(
    "mlp_fp8",
    partial(
        mlp_fp8,
        SimpleNamespace(norm_linear_fp8=NORM_LINEAR_FP8.semantics, silu_mul_linear_fp8=SILU_MUL_LINEAR_FP8.semantics),
    ),
    (Impl("cuda", "nemo_engine.ops.cuda.linear:mlp_fp8", cuda_supports),),
    _mlp_cases,
    _mlp_cost,
    is_fp8=True,
    composed=mlp_fp8,
)
