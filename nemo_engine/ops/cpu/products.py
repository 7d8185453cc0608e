"""bf16 products by csrc/cpu, on CPUs for which oneDNN has no faster ones: with the norm or the activation before them
in the same call.

Sums are in fp32 and in one order, so a row has the same bits alone, in any batch and with any number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_engine.ops.cpu import compiled, packed
from nemo_engine.ops.op import compiled_for_cpu

_BLOCK = 16  # outputs that lie together, as csrc/cpu/kernels.h has it
# Rows that every thread norms or activates for itself, which costs less than a wait of all; more are shared out first.
# At least those of a recorded step, whose calls are the same for fewer rows.
_PREPARED_BY_EACH = 64

_cpu: Any = compiled_for_cpu()


def pack_weight(weight: Tensor) -> Tensor:
    """(N, K) bf16, K even, copied into the order that csrc/cpu reads: (N, K, 1), so that nothing takes it for what it
    is not.
    """
    outputs, width = weight.shape
    whole = outputs - outputs % _BLOCK
    blocks = weight[:whole].reshape(-1, _BLOCK, width // 2, 2).transpose(1, 2)
    rest = weight[whole:].reshape(outputs - whole, width // 2, 2).transpose(0, 1)
    return torch.cat([blocks.flatten(), rest.flatten()]).view(outputs, width, 1)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See ``linear.linear``; ``weight`` may be packed."""
    if weight.dim() == 2:
        return packed.linear_widened(x, weight)
    return _product(x.contiguous(), weight)


def norm_linear(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``fused.norm_linear``; ``weight`` may be packed."""
    if weight.dim() == 2 or len(x) > _PREPARED_BY_EACH:
        normed, total = compiled.rms_norm(x, norm_weight, eps, residual)
        return linear(normed, weight), total
    x = total = x.contiguous()
    if residual is not None:
        residual, total = residual.contiguous(), torch.empty_like(x)
        compiled.check(torch.bfloat16, residual)
    compiled.check(torch.bfloat16, norm_weight)
    return _product(x, weight, residual, norm_weight, total, eps), total


def silu_mul_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """See ``fused.silu_mul_linear``; ``weight`` may be packed."""
    if weight.dim() == 2 or len(gate_up) > _PREPARED_BY_EACH:
        return linear(compiled.silu_mul(gate_up), weight)
    return _product(gate_up.contiguous(), weight, is_activated=True)


def _product(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    total: Tensor | None = None,
    eps: float = 0.0,
    is_activated: bool = False,
) -> Tensor:
    compiled.check(torch.bfloat16, x, weight)
    (rows, width), (outputs, expected, _) = x.shape, weight.shape
    if width != (1 + is_activated) * expected:
        raise ValueError(f"x has rows of {width}, the weight is of {(1 + is_activated) * expected}")
    y = x.new_empty(rows, outputs)
    before = [0 if tensor is None else tensor.data_ptr() for tensor in (residual, norm_weight, total)]
    _cpu.product(
        x.data_ptr(), before[0], before[1], weight.data_ptr(), y.data_ptr(), before[2], rows, expected, outputs,
        is_activated, eps,
    )  # fmt: skip
    return y
