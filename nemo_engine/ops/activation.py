"""SiLU of the gate times the up projection."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_engine.ops.op import Case, Impl, Op, triton_runs


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``. gate_up: (T, 2 I), gate in the first half -> (T, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _cases() -> Iterator[Case]:
    for rows, width in ((0, 8), (1, 8), (5, 40), (33, 640), (2, 14336)):

        def make(dtype: torch.dtype, rows: int = rows, width: int = width) -> tuple[object, ...]:
            generator = torch.Generator().manual_seed(rows * width)
            return ((torch.randn(rows, 2 * width, generator=generator) * 4).to(dtype),)

        yield Case(f"{rows}x{width}", make)


def _cost(gate_up: Tensor) -> tuple[int, int]:
    return gate_up.nbytes * 3 // 2, 3 * gate_up.numel()


SILU_MUL = Op(
    "silu_mul", silu_mul, (Impl("triton", "nemo_engine.kernels.activation:silu_mul", triton_runs),), _cases, _cost
)
