"""The kinds of linear layer. What a projection's weight looks like is chosen once, by whoever makes the weights.

A kind holds tensors and computes ``x @ weight.T``; the model calls it and does not ask which kind it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_engine.ops import Ops


@dataclass(frozen=True, slots=True, eq=False)
class DenseLinear:
    """A projection in the dtype of the activations, without bias: ``weight`` is (out, in), one row per output."""

    weight: torch.Tensor

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight."""
        return self.weight.nbytes

    def __call__(self, x: torch.Tensor, ops: Ops) -> torch.Tensor:
        """(T, in) -> (T, out)."""
        product: torch.Tensor = ops.linear(x, self.weight)
        return product

    def after_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, eps: float, ops: Ops
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The projection of ``x + residual``, normalised; and that sum. (T, in) twice -> (T, out), (T, in)."""
        product, total = ops.norm_linear(x, residual, norm_weight, eps, self.weight)
        return product, total

    def after_silu_mul(self, gate_up: torch.Tensor, ops: Ops) -> torch.Tensor:
        """The projection of ``silu(gate) * up``. (T, 2 in) -> (T, out)."""
        product: torch.Tensor = ops.silu_mul_linear(gate_up, self.weight)
        return product
