"""Linear layers without bias: in the dtype of the activations, and of FP8 operands with scales."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_engine.ops.cpu import packed
from nemo_engine.ops.op import Case, Impl, Op, Site, cuda_runs, needs_fp8, triton_runs
from nemo_engine.ops.quantize import FP8

SCALE_BLOCK = 128  # outputs, and elements of K, that share a scale in DeepSeek's format


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``y = x w^T``. x: (T, K), weight: (N, K) -> (T, N), all of one dtype."""
    return F.linear(x, weight)


def linear_fp8(
    x8: Tensor, x_scales: Tensor, w8: Tensor, w_scales: Tensor, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """``y = (x w^T) * x_scales * w_scales``, the product in fp32. x8: (T, K), w8: (N, K) FP8 e4m3 -> (T, N) of
    ``out_dtype``.

    w_scales, fp32: one number of any shape for the weight, or (N, 1), one per output; x_scales is then (T, 1) fp32, one
    per token. Or (N / 128, K / 128), rounded up, one per block of the weight; x_scales is then (T, K / 128), one per
    token and 128 of K. Scales in fp64 give the product and the result in fp64.
    """
    wide = x_scales.dtype
    x, w = x8.to(wide), w8.to(wide)
    width, outputs = x.shape[1], w.shape[0]
    if w_scales.numel() == 1 or w_scales.shape == (outputs, 1):
        y = (x @ w.T) * x_scales * w_scales.reshape(1, -1)
    else:
        x = x * x_scales.repeat_interleave(SCALE_BLOCK, 1)[:, :width]
        per_row = w_scales.repeat_interleave(SCALE_BLOCK, 0)[:outputs]
        y = x @ (w * per_row.repeat_interleave(SCALE_BLOCK, 1)[:, :width]).T
    return y if wide == torch.float64 else y.to(out_dtype)


def _cublas_supports(site: Site) -> str | None:
    return None if site.device_type == "cuda" else f"runs on NVIDIA GPUs, this is {site.device_type}"


def _triton_supports(site: Site) -> str | None:
    widths = (site.hidden_size, site.intermediate_size, site.num_heads * site.head_dim)
    if any(width % 16 for width in widths):
        return f"rows of whole 16 elements, these have {', '.join(map(str, widths))}"
    return triton_runs(site)


def cuda_supports(site: Site) -> str | None:
    """What the CUDA kernels need: rows that the copy engine can fetch."""
    widths = (site.hidden_size, site.intermediate_size, site.num_heads * site.head_dim)
    if any(width % 16 for width in widths):
        return f"rows of whole 16 elements, these have {', '.join(map(str, widths))}"
    return cuda_runs(site)


def _make(dtype: torch.dtype, rows: int, outputs: int, width: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(rows + outputs * width)
    x, w = (torch.randn(n, width, generator=generator) for n in (rows, outputs))
    return x.to(dtype), (w * width**-0.5).to(dtype)


def _make_fp8(dtype: torch.dtype, rows: int, outputs: int, width: int, kind: str) -> tuple[Any, ...]:
    """Operands of one fixed precision, whatever the dtype: the result is bf16, as tensor cores add FP8 products in few
    bits.
    """
    x, w = _make(torch.float32, rows, outputs, width)
    generator = torch.Generator().manual_seed(rows + outputs + width)
    blocks = [-(-size // SCALE_BLOCK) for size in (outputs, width)]
    shapes = {"tensor": (), "tensor as a matrix": (1, 1), "channel": (outputs, 1), "block": blocks}
    x_scales, w_scales = (
        0.01 + torch.rand(shape, generator=generator)
        for shape in ((rows, blocks[1] if kind == "block" else 1), shapes[kind])
    )
    return (x * 100).to(FP8), x_scales, (w * 100).to(FP8), w_scales, torch.bfloat16


_SHAPES = ((0, 48, 64), (1, 5, 64), (3, 200, 272), (17, 130, 320), (65, 144, 48), (130, 33, 144), (257, 40, 80))
_FP8_SHAPES = (
    (0, 48, 64, "tensor"), (1, 5, 64, "tensor as a matrix"), (3, 200, 272, "channel"), (17, 130, 272, "block"),
    (65, 144, 48, "tensor"), (65, 150, 400, "block"), (130, 33, 144, "channel"), (257, 40, 80, "tensor"),
    (257, 136, 144, "block"), (257, 400, 144, "channel"), (2, 256, 5120, "channel"), (2, 256, 5120, "block"),
    (48, 40, 3072, "channel"), (130, 272, 1200, "channel"),
)  # fmt: skip


def _cases() -> Iterator[Case]:
    for rows, outputs, width in (*_SHAPES, (2, 256, 5120)):
        yield Case(f"{rows}x{width}x{outputs}", partial(_make, rows=rows, outputs=outputs, width=width))


def _fp8_cases() -> Iterator[Case]:
    for rows, outputs, width, kind in _FP8_SHAPES:
        make = partial(_make_fp8, rows=rows, outputs=outputs, width=width, kind=kind)
        yield Case(f"{rows}x{width}x{outputs} {kind}", make)


def _cost(x: Tensor, weight: Tensor) -> tuple[int, int]:
    rows, outputs = x.shape[0], weight.shape[0]
    return x.nbytes + weight.nbytes + rows * outputs * x.itemsize, 2 * x.numel() * outputs


def _fp8_cost(
    x8: Tensor, x_scales: Tensor, w8: Tensor, w_scales: Tensor, out_dtype: torch.dtype = torch.bfloat16
) -> tuple[int, int]:
    rows, outputs = x8.shape[0], w8.shape[0]
    num_bytes = x8.numel() + w8.numel() + 4 * (x_scales.numel() + w_scales.numel())
    return num_bytes + rows * outputs * out_dtype.itemsize, 2 * x8.numel() * outputs


LINEAR = Op(
    "linear",
    linear,
    (
        Impl("cublas", "torch.nn.functional:linear", _cublas_supports),
        Impl("triton", "nemo_engine.kernels.linear:linear", _triton_supports),
        Impl("cuda", "nemo_engine.ops.cuda.linear:linear", cuda_supports),
        Impl("cpu", "nemo_engine.ops.cpu.products:linear", packed.supports_compiled),
        Impl("onednn", "nemo_engine.ops.cpu.packed:linear", packed.supports),
        Impl("widened", "nemo_engine.ops.cpu.packed:linear_widened", packed.supports_widened),
    ),
    _cases,
    _cost,
)
LINEAR_FP8 = Op(
    "linear_fp8",
    linear_fp8,
    (
        Impl("triton", "nemo_engine.kernels.linear:linear_fp8", needs_fp8(_triton_supports)),
        Impl("cuda", "nemo_engine.ops.cuda.linear:linear_fp8", cuda_supports),
    ),
    _fp8_cases,
    _fp8_cost,
    is_fp8=True,
)
