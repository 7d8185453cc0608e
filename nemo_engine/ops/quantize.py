"""Quantisation to FP8 (e4m3): activations per token, weights per output channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_engine.ops.op import Case, Impl, Op, Site, cuda_runs, needs_fp8, triton_runs

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max  # 448
_MAX_WIDTH = 16384  # one program, or one block, holds a row in its registers
_VECTOR = 8  # elements of an access of the CUDA kernels, 16 bytes


def quantize_tokens(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``q = x / scale`` rounded to FP8, saturated, with a scale per row: ``max |x| / 448``, or ``scale`` (() fp32) for
    all rows.

    x: (T, K). Returns (q (T, K) FP8, scales (T, 1) fp32; both fp64 for fp64, unrounded). A row with NaN or infinity
    gets the scale NaN, so that its product is NaN.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    if scale is None:
        scales = (wide.abs().amax(dim=1, keepdim=True) / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    else:
        scales = scale.to(wide.dtype).expand(x.shape[0], 1)
    scales = torch.where(wide.isfinite().all(dim=1, keepdim=True), scales, torch.nan)
    scaled = (wide / scales).clamp(-FP8_MAX, FP8_MAX)
    return scaled if x.dtype == torch.float64 else scaled.to(FP8), scales


def quantize_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``quantize_tokens`` of a weight's output channels: (N, K) -> (N, K) FP8 and (N, 1) fp32."""
    return quantize_tokens(weight)


def _triton_supports(site: Site) -> str | None:
    widest = max(site.hidden_size, site.intermediate_size)
    if widest > _MAX_WIDTH:
        return f"rows of at most {_MAX_WIDTH} elements, these have {widest}"
    return triton_runs(site)


def _cuda_supports(site: Site) -> str | None:
    widths = (site.hidden_size, site.intermediate_size, site.num_heads * site.head_dim)
    if max(widths) > _MAX_WIDTH or any(width % _VECTOR for width in widths):
        return f"rows of multiples of {_VECTOR} elements up to {_MAX_WIDTH}, these have {', '.join(map(str, widths))}"
    return cuda_runs(site)


def _make(dtype: torch.dtype, rows: int, width: int, not_finite: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(rows * width)
    x = torch.randn(rows, width, generator=generator) * 5
    if not_finite:  # and a row of zeros
        x[0, -1], x[1, 0], x[2] = torch.nan, torch.inf, 0.0
    return x.to(dtype)


def _token_cases() -> Iterator[Case]:
    for rows, width, is_static in ((0, 16, False), (1, 16, True), (3, 40, False), (17, 272, True), (2, 14336, False)):

        def make(
            dtype: torch.dtype, rows: int = rows, width: int = width, is_static: bool = is_static
        ) -> tuple[Any, ...]:
            return _make(dtype, rows, width), torch.tensor(0.02) if is_static else None

        yield Case(f"{rows}x{width}{' static' if is_static else ''}", make, {"hidden_size": width})

    for is_static in (False, True):

        def make_not_finite(dtype: torch.dtype, is_static: bool = is_static) -> tuple[Any, ...]:
            return _make(dtype, 4, 264, not_finite=True), torch.tensor(0.02) if is_static else None

        yield Case(f"NaN, infinity and zeros{' static' if is_static else ''}", make_not_finite, {"hidden_size": 264})


def _cost(x: Tensor, scale: Tensor | None = None) -> tuple[int, int]:
    return x.nbytes + x.numel() + 4 * x.shape[0], 3 * x.numel()


QUANTIZE_TOKENS = Op(
    "quantize_tokens",
    quantize_tokens,
    (
        Impl("triton", "nemo_engine.kernels.quantize:quantize_tokens", needs_fp8(_triton_supports)),
        Impl("cuda", "nemo_engine.ops.cuda.activation:quantize_tokens", _cuda_supports),
    ),
    _token_cases,
    _cost,
    is_fp8=True,
)
