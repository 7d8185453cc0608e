"""RMSNorm, with the addition of the residual in the same pass, and its FP8 quantisation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemo_engine.ops.op import Case, Impl, Op, Site, cpu_runs, cuda_runs, needs_fp8, triton_runs
from nemo_engine.ops.quantize import quantize_tokens

_MAX_WIDTH = 16384  # one program, or one block, holds a row in its registers
_VECTOR = 8  # elements of an access of the CUDA kernels, 16 bytes


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``y = x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, after ``x += residual`` if there is one.

    x, residual: (T, H); weight: (H,). Returns (y, x), x being the sum that the next residual is. Statistics are in fp32
    (fp64 for fp64); the normalised value is rounded to x's dtype before the product, as in transformers.
    """
    if residual is not None:
        x = x + residual
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype), x


def rms_norm_fp8(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``rms_norm``, and its y by ``quantize_tokens``. Returns (y (T, H) FP8 e4m3, scales (T, 1) fp32, x (T, H))."""
    y, x = rms_norm(x, weight, eps, residual)
    return *quantize_tokens(y, scale), x


def _triton_supports(site: Site) -> str | None:
    if site.hidden_size > _MAX_WIDTH:
        return f"rows of at most {_MAX_WIDTH} elements, these have {site.hidden_size}"
    return triton_runs(site)


def _cuda_supports(site: Site) -> str | None:
    if site.hidden_size > _MAX_WIDTH or site.hidden_size % _VECTOR:
        return f"rows of a multiple of {_VECTOR} elements up to {_MAX_WIDTH}, these have {site.hidden_size}"
    return cuda_runs(site)


def _make(
    dtype: torch.dtype, rows: int, width: int, has_residual: bool, not_finite: bool = False,
    is_static: bool | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    generator = torch.Generator().manual_seed(rows * width)
    x, r = (torch.randn(rows, width, generator=generator) * 3 for _ in range(2))
    if not_finite:
        x[0, -1], x[1, 0] = torch.nan, -torch.inf
    weight = 1 + 0.1 * torch.randn(width, generator=generator)
    scale = () if is_static is None else (torch.tensor(0.01) if is_static else None,)
    return x.to(dtype), weight.to(dtype), 1e-5, r.to(dtype) if has_residual else None, *scale


def _cases() -> Iterator[Case]:
    for rows, width in ((0, 64), (1, 64), (3, 24), (17, 256), (2, 5120), (1, 16384)):
        for has_residual in (False, True):
            name = f"{rows}x{width}{' residual' if has_residual else ''}"
            make = partial(_make, rows=rows, width=width, has_residual=has_residual)
            yield Case(name, make, {"hidden_size": width})
    make = partial(_make, rows=3, width=264, has_residual=True, not_finite=True)
    yield Case("NaN and infinity", make, {"hidden_size": 264})


def _fp8_cases() -> Iterator[Case]:
    for rows, width, is_static in (
        (0, 64, False), (1, 64, True), (3, 24, False), (17, 256, False), (2, 5120, True), (3, 5120, False),
    ):  # fmt: skip
        for has_residual in (False, True):
            make = partial(_make, rows=rows, width=width, has_residual=has_residual, is_static=is_static)
            name = f"{rows}x{width}{' residual' if has_residual else ''}{' static' if is_static else ''}"
            yield Case(name, make, {"hidden_size": width})
    for is_static in (False, True):
        make = partial(_make, rows=3, width=264, has_residual=True, not_finite=True, is_static=is_static)
        yield Case(f"NaN and infinity{' static' if is_static else ''}", make, {"hidden_size": 264})


def _cost(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[int, int]:
    passes = 2 if residual is None else 4
    return passes * x.nbytes + weight.nbytes, 4 * x.numel()


def _fp8_cost(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, scale: Tensor | None) -> tuple[int, int]:
    num_bytes, flops = _cost(x, weight, eps, residual)
    return num_bytes - x.nbytes + x.numel() + 4 * x.shape[0], flops + 2 * x.numel()


RMS_NORM = Op(
    "rms_norm",
    rms_norm,
    (
        Impl("triton", "nemo_engine.kernels.norm:rms_norm", _triton_supports),
        Impl("cuda", "nemo_engine.ops.cuda.norm:rms_norm", _cuda_supports),
        Impl("cpu", "nemo_engine.ops.cpu.compiled:rms_norm", cpu_runs),
    ),
    _cases,
    _cost,
)
RMS_NORM_FP8 = Op(
    "rms_norm_fp8",
    rms_norm_fp8,
    (
        Impl("triton", "nemo_engine.kernels.norm:rms_norm_fp8", needs_fp8(_triton_supports)),
        Impl("cuda", "nemo_engine.ops.cuda.norm:rms_norm_fp8", _cuda_supports),
    ),
    _fp8_cases,
    _fp8_cost,
    is_fp8=True,
)
