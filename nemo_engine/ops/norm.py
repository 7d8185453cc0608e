"""RMSNorm, with the addition of the residual in the same pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nemo_engine.ops.op import Case, Impl, Op, Site, triton_runs

_TRITON_MAX_WIDTH = 16384  # one program holds a row in its registers


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


def _triton_supports(site: Site) -> str | None:
    if site.hidden_size > _TRITON_MAX_WIDTH:
        return f"rows of at most {_TRITON_MAX_WIDTH} elements, these have {site.hidden_size}"
    return triton_runs(site)


def _cases() -> Iterator[Case]:
    for rows, width in ((0, 64), (1, 64), (3, 24), (17, 256), (2, 5120)):
        for has_residual in (False, True):

            def make(
                dtype: torch.dtype, rows: int = rows, width: int = width, has: bool = has_residual
            ) -> tuple[object, ...]:
                generator = torch.Generator().manual_seed(rows * width)
                x, r = (torch.randn(rows, width, generator=generator) * 3 for _ in range(2))
                weight = 1 + 0.1 * torch.randn(width, generator=generator)
                return x.to(dtype), weight.to(dtype), 1e-5, r.to(dtype) if has else None

            yield Case(f"{rows}x{width}{' residual' if has_residual else ''}", make)


def _cost(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[int, int]:
    passes = 2 if residual is None else 4
    return passes * x.nbytes + weight.nbytes, 4 * x.numel()


RMS_NORM = Op(
    "rms_norm", rms_norm, (Impl("triton", "nemo_engine.kernels.norm:rms_norm", _triton_supports),), _cases, _cost
)
