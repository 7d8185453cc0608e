"""RMSNorm by csrc/norm."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_engine.ops.cuda import library, row_stride, stream_of


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As ``nemo_engine.ops.norm.rms_norm``; all bf16, rows dense, H a multiple of 8 up to 16,384."""
    total = _check_and_allocate(x, weight, residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    library().rms_norm(y.data_ptr(), *_arguments(total, x, weight, residual), *_sizes(x, residual), eps, stream_of(x))
    return y, total


def rms_norm_fp8(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``nemo_engine.ops.norm.rms_norm_fp8``; ``scale``: () fp32."""
    assert scale is None or (scale.numel() == 1 and scale.dtype == torch.float32), scale
    total = _check_and_allocate(x, weight, residual)
    y = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    library().rms_norm_fp8(
        y.data_ptr(), scales.data_ptr(), *_arguments(total, x, weight, residual), 0 if scale is None else
        scale.data_ptr(), *_sizes(x, residual), eps, stream_of(x),
    )  # fmt: skip
    return y, scales, total


def _check_and_allocate(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    """What holds x + residual: x itself if there is none."""
    width = x.shape[1]
    assert x.dtype == weight.dtype == torch.bfloat16, (x.dtype, weight.dtype)
    assert x.stride(1) == 1 and weight.shape == (width,) and weight.is_contiguous(), (x.shape, x.stride(), weight.shape)
    if residual is None:
        return x
    assert residual.dtype == x.dtype and residual.shape == x.shape and residual.stride(1) == 1, residual.shape
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _arguments(total: Tensor, x: Tensor, weight: Tensor, residual: Tensor | None) -> tuple[int, ...]:
    if residual is None:
        return 0, x.data_ptr(), 0, weight.data_ptr()
    return total.data_ptr(), x.data_ptr(), residual.data_ptr(), weight.data_ptr()


def _sizes(x: Tensor, residual: Tensor | None) -> tuple[int, ...]:
    """Rows, width, strides between rows."""
    return *x.shape, row_stride(x), 0 if residual is None else row_stride(residual)
