"""Projections without bias: in the activations' dtype, and FP8 by FP8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_engine.ops.op import Case, Impl, Op, Site, needs_fp8, triton_runs
from nemo_engine.ops.quantize import quantize_channels, quantize_tokens

SCALE_BLOCK = 128  # of weights whose scales go by block: this many outputs by this many inputs


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight^T``. x: (T, K); weight: (N, K) -> (T, N)."""
    return F.linear(x, weight)


def linear_fp8(
    x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """``(x * x_scales) @ (weight * w_scales)^T``, products and sums in fp32 (fp64 for fp64 scales).

    x: (T, K) FP8 e4m3; weight: (N, K) FP8 e4m3; fp32 scales. w_scales of one number (per tensor) or (N, 1) (per output
    channel) go with x_scales (T, 1); by block, w_scales is (ceil(N / 128), ceil(K / 128)) and x_scales (T, ceil(K / 128)). Returns (T, N).
    """
    wide = torch.float64 if x_scales.dtype == torch.float64 else torch.float32
    out = torch.float64 if wide == torch.float64 else out_dtype
    a, b = x.to(wide), weight.to(wide)
    if w_scales.numel() > 1 and w_scales.shape != (weight.shape[0], 1):
        columns = torch.arange(x.shape[1], device=x.device) // SCALE_BLOCK
        rows = torch.arange(weight.shape[0], device=x.device) // SCALE_BLOCK
        a, b = a * x_scales[:, columns], b * w_scales[rows][:, columns]
        return (a @ b.T).to(out)
    return ((a @ b.T) * x_scales * w_scales.reshape(1, -1)).to(out)


def _supports_cublas(site: Site) -> str | None:
    return None if site.device_type == "cuda" else "needs a CUDA device"


def _cases() -> Iterator[Case]:
    for tokens, width, outputs in ((0, 64, 64), (1, 64, 1), (3, 272, 65), (17, 64, 200), (65, 96, 40), (130, 64, 130), (2, 5120, 128)):  # fmt: skip

        def make(dtype: torch.dtype, t: int = tokens, k: int = width, n: int = outputs) -> tuple[Any, ...]:
            generator = torch.Generator().manual_seed(t + k + n)
            x, weight = torch.randn(t, k, generator=generator), torch.randn(n, k, generator=generator) * k**-0.5
            return x.to(dtype), weight.to(dtype)

        yield Case(f"{tokens} x {width} -> {outputs}", make)


def _fp8_cases() -> Iterator[Case]:
    for tokens, width, outputs in ((0, 64, 64), (1, 64, 1), (3, 272, 65), (17, 64, 200), (65, 128, 40), (130, 64, 130), (2, 5120, 128)):  # fmt: skip
        for kind in ("tensor", "channel", "block"):

            def make(
                dtype: torch.dtype, t: int = tokens, k: int = width, n: int = outputs, kind: str = kind
            ) -> tuple[Any, ...]:
                return linear_fp8_inputs(t, k, n, kind)

            yield Case(f"{tokens} x {width} -> {outputs}, scale per {kind}", make)


def linear_fp8_inputs(tokens: int, width: int, outputs: int, kind: str) -> tuple[Any, ...]:
    """Random arguments of ``linear_fp8`` with weight scales per "tensor", "channel" or "block"."""
    generator = torch.Generator().manual_seed(tokens + width + outputs)
    x, w = torch.randn(tokens, width, generator=generator), torch.randn(outputs, width, generator=generator)
    if kind == "block":
        rows, columns = -(-outputs // SCALE_BLOCK), -(-width // SCALE_BLOCK)
        x_scales = 0.01 + 0.01 * torch.rand(tokens, columns, generator=generator)
        w_scales = 0.01 + 0.01 * torch.rand(rows, columns, generator=generator)
        fp8 = [(value * 64).clamp(-448, 448).to(torch.float8_e4m3fn) for value in (x, w)]
        return fp8[0], x_scales, fp8[1], w_scales
    q, x_scales = quantize_tokens(x)
    if kind == "tensor":
        weight, scales = quantize_tokens(w, torch.tensor(0.01))
        return q, x_scales, weight, scales[0]
    return q, x_scales, *quantize_channels(w)


def _cost(x: Tensor, weight: Tensor) -> tuple[int, int]:
    out = x.shape[0] * weight.shape[0] * x.element_size()
    return x.nbytes + weight.nbytes + out, 2 * x.shape[0] * weight.numel()


def _fp8_cost(x: Tensor, x_scales: Tensor, weight: Tensor, w_scales: Tensor) -> tuple[int, int]:
    scales = 4 * (x_scales.numel() + w_scales.numel())
    return x.nbytes + weight.nbytes + scales + 2 * x.shape[0] * weight.shape[0], 2 * x.shape[0] * weight.numel()


LINEAR = Op(
    "linear",
    linear,
    (
        Impl("cublas", "torch.nn.functional:linear", _supports_cublas),
        Impl("triton", "nemo_engine.kernels.linear:linear", triton_runs),
    ),
    _cases,
    _cost,
)
LINEAR_FP8 = Op(
    "linear_fp8",
    linear_fp8,
    (Impl("triton", "nemo_engine.kernels.linear:linear_fp8", needs_fp8(triton_runs)),),
    _fp8_cases,
    _fp8_cost,
)
