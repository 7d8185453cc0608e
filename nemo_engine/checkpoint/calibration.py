"""Static scales from text: the largest input that each projection sees, and the largest key and value of each head."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_engine.checkpoint.layout import PARTS
from nemo_engine.config import ModelConfig
from nemo_engine.model.linear import DenseLinear, Linear
from nemo_engine.model.nemo import Nemo
from nemo_engine.model.sequence import Sequence
from nemo_engine.model.weights import NemoWeights
from nemo_engine.ops import Ops
from nemo_engine.ops.quantize import FP8_MAX

PAGE_SIZE = 64
_TINIEST = 2.0**-20  # the smallest scale: an input that was always 0 here may be larger elsewhere


@dataclass(frozen=True, slots=True)
class Calibration:
    """Scales in fp32. Inputs have one, of shape (), by (layer, projection) and for (None, "lm_head"). Keys and values
    have one a head, of shape (key heads,), by layer.
    """

    inputs: dict[tuple[int | None, str], Tensor]
    keys: list[Tensor]
    values: list[Tensor]
    num_tokens: int


class ObservedLinear(Linear):
    """A dense projection that remembers the largest magnitude of its inputs."""

    def __init__(self, linear: Linear) -> None:
        assert isinstance(linear, DenseLinear)
        self._linear = linear
        self.weight = linear.weight
        self.largest = torch.zeros((), device=linear.weight.device)

    def __call__(self, x: Tensor, ops: Ops) -> Tensor:
        """See ``Linear``."""
        torch.maximum(self.largest, x.abs().max().float(), out=self.largest)
        return self._linear(x, ops)

    def after_norm(
        self, x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, ops: Ops
    ) -> tuple[Tensor, Tensor]:
        """See ``Linear``."""
        normed, total = ops.rms_norm(x, norm_weight, eps, residual)
        return self(normed, ops), total

    def after_silu_mul(self, gate_up: Tensor, ops: Ops) -> Tensor:
        """See ``Linear``."""
        return self(ops.silu_mul(gate_up), ops)


def calibrate(
    config: ModelConfig,
    weights: NemoWeights,
    ops: Ops,
    texts: SequenceOf[list[int]],
    advance: Callable[[int], object] = lambda tokens: None,
) -> Calibration:
    """Run ``texts``, token ids, through unquantised ``weights``. A scale is the largest magnitude divided by 448.

    advance is called with the number of tokens just done. Raises ``ValueError`` if there is no token, or if an
    activation is not finite.
    """
    longest = max(map(len, texts), default=0)
    if longest == 0:
        raise ValueError("calibration needs text, and there is none")
    layers = tuple(
        replace(
            layer,
            qkv=ObservedLinear(layer.qkv),
            o=ObservedLinear(layer.o),
            gate_up=ObservedLinear(layer.gate_up),
            down=ObservedLinear(layer.down),
        )
        for layer in weights.layers
    )
    model = Nemo(config, replace(weights, layers=layers), ops, longest)
    largest = [[torch.zeros(config.num_kv_heads) for _ in "kv"] for _ in layers]
    num_tokens, last = 0, torch.zeros(())
    for ids in filter(None, texts):
        sequence = Sequence(model, len(ids), PAGE_SIZE, weights.embed_tokens.dtype)
        hidden = sequence.feed(ids)
        normed, _ = ops.rms_norm(hidden[0], weights.norm, config.rms_norm_eps, hidden[1])
        last = torch.maximum(last, normed.abs().max().float().cpu())
        for kv, maxima in zip(sequence.kv_cache, largest, strict=True):
            for index, cache in enumerate(kv.caches):  # entries that were never written are 0, and change no maximum
                maxima[index] = torch.maximum(maxima[index], cache.abs().amax((0, 2, 3)).float().cpu())
        num_tokens += len(ids)
        advance(len(ids))
    inputs: dict[tuple[int | None, str], Tensor] = {
        (index, name): getattr(layer, name).largest.cpu() for index, layer in enumerate(layers) for name in PARTS
    }
    inputs[None, "lm_head"] = last
    every: list[tuple[object, Tensor]] = [*inputs.items()]
    every += [(f"{index}, keys or values", pair) for index, pairs in enumerate(largest) for pair in pairs]
    for name, magnitude in every:
        if not magnitude.isfinite().all():
            raise ValueError(f"calibration met NaN or infinity in layer {name}: dtype bfloat16 or float32 may hold it")

    def scale(magnitude: Tensor) -> Tensor:
        return (magnitude / FP8_MAX).clamp(min=_TINIEST)

    return Calibration(
        {name: scale(magnitude) for name, magnitude in inputs.items()},
        [scale(keys) for keys, _ in largest],
        [scale(values) for _, values in largest],
        num_tokens,
    )
