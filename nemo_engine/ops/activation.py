"""SiLU of the gate times the up projection, and its FP8 quantisation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_engine.ops.op import Case, Impl, Op, Site, cpu_runs, cuda_runs, needs_fp8, triton_runs
from nemo_engine.ops.quantize import quantize_tokens

_MAX_WIDTH = 16384  # to quantise a row, one program, or one block, holds it in its registers
_VECTOR = 8  # elements of an access of the CUDA kernels, 16 bytes


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``. gate_up: (T, 2 I), gate in the first half -> (T, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_mul_fp8(gate_up: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``silu_mul``, and the result by ``quantize_tokens``: (T, 2 I) -> (T, I) FP8 e4m3 and (T, 1) fp32."""
    return quantize_tokens(silu_mul(gate_up), scale)


def _triton_fp8_supports(site: Site) -> str | None:
    if site.intermediate_size > _MAX_WIDTH:
        return f"rows of at most {_MAX_WIDTH} elements, these have {site.intermediate_size}"
    return triton_runs(site)


def _cuda_supports(site: Site) -> str | None:
    if site.intermediate_size % _VECTOR:
        return f"an intermediate_size that is a multiple of {_VECTOR}, this is {site.intermediate_size}"
    return cuda_runs(site)


def _cuda_fp8_supports(site: Site) -> str | None:
    if site.intermediate_size > _MAX_WIDTH:
        return f"rows of at most {_MAX_WIDTH} elements, these have {site.intermediate_size}"
    return _cuda_supports(site)


def _make(
    dtype: torch.dtype, rows: int, width: int, not_finite: bool = False, is_static: bool | None = None
) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(rows * width)
    gate_up = torch.randn(rows, 2 * width, generator=generator) * 4
    if not_finite:  # and gates whose exponential is beyond fp32
        gate_up[0, -1], gate_up[1, 0] = torch.nan, torch.inf
        gate_up[2, 0], gate_up[2, 1] = -300.0, 300.0
    scale = () if is_static is None else (torch.tensor(0.05) if is_static else None,)
    return gate_up.to(dtype), *scale


def _cases() -> Iterator[Case]:
    for rows, width in ((0, 8), (1, 8), (5, 40), (33, 640), (2, 14336)):
        yield Case(f"{rows}x{width}", partial(_make, rows=rows, width=width), {"intermediate_size": width})
    make = partial(_make, rows=3, width=264, not_finite=True)
    yield Case("NaN, infinity and large gates", make, {"intermediate_size": 264})


def _fp8_cases() -> Iterator[Case]:
    for rows, width, is_static in ((0, 8, False), (1, 8, True), (5, 40, False), (33, 640, True), (2, 14336, False)):
        make = partial(_make, rows=rows, width=width, is_static=is_static)
        yield Case(f"{rows}x{width}{' static' if is_static else ''}", make, {"intermediate_size": width})
    for is_static in (False, True):
        make = partial(_make, rows=3, width=264, not_finite=True, is_static=is_static)
        name = f"NaN, infinity and large gates{' static' if is_static else ''}"
        yield Case(name, make, {"intermediate_size": 264})


def _cost(gate_up: Tensor) -> tuple[int, int]:
    return gate_up.nbytes * 3 // 2, 3 * gate_up.numel()


def _fp8_cost(gate_up: Tensor, scale: Tensor | None) -> tuple[int, int]:
    return gate_up.nbytes + gate_up.numel() // 2 + 4 * gate_up.shape[0], 4 * gate_up.numel()


SILU_MUL = Op(
    "silu_mul",
    silu_mul,
    (
        Impl("triton", "nemo_engine.kernels.activation:silu_mul", triton_runs),
        Impl("cuda", "nemo_engine.ops.cuda.activation:silu_mul", _cuda_supports),
        Impl("cpu", "nemo_engine.ops.cpu.compiled:silu_mul", cpu_runs),
    ),
    _cases,
    _cost,
)
SILU_MUL_FP8 = Op(
    "silu_mul_fp8",
    silu_mul_fp8,
    (
        Impl("triton", "nemo_engine.kernels.activation:silu_mul_fp8", needs_fp8(_triton_fp8_supports)),
        Impl("cuda", "nemo_engine.ops.cuda.activation:silu_mul_fp8", _cuda_fp8_supports),
    ),
    _fp8_cases,
    _fp8_cost,
    is_fp8=True,
)
