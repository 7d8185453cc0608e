"""The kinds of linear layer. The code that makes the weights chooses the kind of each projection, once.

A kind holds tensors and computes ``x @ weight.T``; the model calls it and does not ask which kind it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nemo_engine.ops import Ops
from nemo_engine.ops.fused import Sum


class Linear(ABC):
    """What the model needs of a projection."""

    __slots__ = ()
    weight: torch.Tensor  # (out, in)

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
        """Bytes of all its tensors."""
        return self.weight.nbytes

    @abstractmethod
    def __call__(self, x: torch.Tensor, ops: Ops) -> torch.Tensor:
        """(T, in) -> (T, out)."""

    @abstractmethod
    def after_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, eps: float, ops: Ops
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The projection of ``x + residual``, normalised; and that sum. (T, in) twice -> (T, out), (T, in)."""

    @abstractmethod
    def after_silu_mul(self, gate_up: torch.Tensor, ops: Ops) -> torch.Tensor:
        """The projection of ``silu(gate) * up``. (T, 2 in) -> (T, out)."""

    def plus(self, residual: torch.Tensor, x: torch.Tensor, ops: Ops) -> Sum:
        """``residual`` plus the projection of ``x``. (T, out), (T, in) -> (T, out)."""
        return Sum(self(x, ops), residual)

    def mlp(
        self, down: Linear, x: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, eps: float,
        ops: Ops,
    ) -> Sum:  # fmt: skip
        """``x + residual`` plus ``down`` of the activation of this, which is gate and up, ``after_norm``: (T, H) twice
        -> (T, H).
        """
        gate_up, total = self.after_norm(x, residual, norm_weight, eps, ops)
        return Sum(down.after_silu_mul(gate_up, ops), total)


@dataclass(slots=True, eq=False)
class DenseLinear(Linear):
    """A projection in the dtype of the activations, without bias. ``weight`` is (out, in), one row per output, unless
    ``pack`` has changed its order.
    """

    weight: torch.Tensor

    def pack(self, pack_weight: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put the weight into the order of ``pack_weight``, in which the product it belongs to multiplies fastest.
        Nothing else can read that order.
        """
        self.weight = pack_weight(self.weight)

    def __call__(self, x: torch.Tensor, ops: Ops) -> torch.Tensor:
        """See ``Linear``."""
        product: torch.Tensor = ops.linear(x, self.weight)
        return product

    def after_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, eps: float, ops: Ops
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Linear``."""
        product, total = ops.norm_linear(x, residual, norm_weight, eps, self.weight)
        return product, total

    def after_silu_mul(self, gate_up: torch.Tensor, ops: Ops) -> torch.Tensor:
        """See ``Linear``."""
        product: torch.Tensor = ops.silu_mul_linear(gate_up, self.weight)
        return product


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Linear(Linear):
    """A projection of FP8 (e4m3) weights, whose input is quantised too: per token, or by ``input_scale`` if there is
    one.

    ``weight`` (out, in) holds FP8 numbers: as FP8, or widened to fp32 once where the definition computes (``widen``).
    ``scales``, fp32: (out, 1), one per output; or (out / 128, in / 128), rounded up, one per block, the input then
    having one per token and 128 of it. ``input_scale`` is () fp32.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    input_scale: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """See ``Linear``."""
        return self.weight.nbytes + self.scales.nbytes + (0 if self.input_scale is None else self.input_scale.nbytes)

    def widen(self) -> Fp8Linear:
        """The same numbers with ``weight`` in fp32: four times the bytes, and no conversion at every step."""
        return Fp8Linear(self.weight.float(), self.scales, self.input_scale)

    def __call__(self, x: torch.Tensor, ops: Ops) -> torch.Tensor:
        """See ``Linear``."""
        product: torch.Tensor = ops.quantize_linear_fp8(x, self.weight, self.scales, self.input_scale).x
        return product

    def plus(self, residual: torch.Tensor, x: torch.Tensor, ops: Ops) -> Sum:
        """See ``Linear``."""
        total: Sum = ops.quantize_linear_fp8(x, self.weight, self.scales, self.input_scale, residual)
        return total

    def after_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, eps: float, ops: Ops
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Linear``."""
        product, total = ops.norm_linear_fp8(x, residual, norm_weight, eps, self.weight, self.scales, self.input_scale)
        return product, total

    def after_silu_mul(self, gate_up: torch.Tensor, ops: Ops) -> torch.Tensor:
        """See ``Linear``."""
        product: torch.Tensor = ops.silu_mul_linear_fp8(gate_up, self.weight, self.scales, self.input_scale)
        return product

    def mlp(
        self, down: Linear, x: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, eps: float,
        ops: Ops,
    ) -> Sum:  # fmt: skip
        """See ``Linear``."""
        if not isinstance(down, Fp8Linear):
            return Linear.mlp(self, down, x, residual, norm_weight, eps, ops)
        weights = ((one.weight, one.scales, one.input_scale) for one in (self, down))
        total: Sum = ops.mlp_fp8(x, residual, norm_weight, eps, *weights)
        return total
