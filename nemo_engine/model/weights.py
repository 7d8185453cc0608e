"""The weights of a model in memory: what they are, where a checkpoint's tensors go, and random ones.

Must not know how checkpoints are found or read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nemo_engine.checkpoint.inventory import DENSE, KindOf, LinearKind
from nemo_engine.checkpoint.layout import HF, PARTS, PROJECTION_OF, ExpectedTensor
from nemo_engine.config import ModelConfig
from nemo_engine.model.linear import DenseLinear, Fp8Linear, Linear
from nemo_engine.ops.blocks import quantize_weight_blocks
from nemo_engine.ops.linear import SCALE_BLOCK
from nemo_engine.ops.quantize import FP8, quantize_channels

DUMMY_PERIOD = 262_139  # random numbers drawn per dummy tensor, then repeated; prime, so that no two rows are alike
_DUMMY_INPUT_SCALE = 0.02  # the static scale of inputs, which dummy weights keep near 1
_CHUNK = 1 << 20  # numbers, or 128 rows, quantised at a time: their fp32 copies are small beside one tensor


def all_dense(layer: int | None, projection: str) -> LinearKind:
    """Every projection in the dtype of the activations."""
    return DENSE


@dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    """One decoder layer. H hidden, I intermediate, Q and K the widths of all query heads and of all key heads.

    ``qkv`` (Q + 2 K, H) has the rows [q; k; v], ``gate_up`` (2 I, H) has [gate; up]; ``o`` is (H, Q), ``down`` (H, I),
    the norms (H,). Query and key heads are in half-split rotary order. ``k_scale`` and ``v_scale``, (key heads,) fp32,
    multiply the entries of an FP8 cache; None for 1.
    """

    input_layernorm: torch.Tensor
    qkv: Linear
    o: Linear
    post_attention_layernorm: torch.Tensor
    gate_up: Linear
    down: Linear
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class NemoWeights:
    """A whole model: ``embed_tokens`` (V, H), ``norm`` (H,), ``lm_head`` (V, H).

    If they are tied and dense, ``lm_head`` holds the tensor of ``embed_tokens``.
    """

    embed_tokens: torch.Tensor
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: Linear

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, tied ones counted once."""
        layers = sum(
            layer.input_layernorm.nbytes + layer.post_attention_layernorm.nbytes
            + layer.qkv.num_bytes + layer.o.num_bytes + layer.gate_up.num_bytes + layer.down.num_bytes
            + sum(scale.nbytes for scale in (layer.k_scale, layer.v_scale) if scale is not None)
            for layer in self.layers
        )  # fmt: skip
        head = 0 if self.lm_head.weight is self.embed_tokens else self.lm_head.num_bytes
        return self.embed_tokens.nbytes + layers + self.norm.nbytes + head

    def pack(self, pack_weight: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Pack every dense projection (``DenseLinear.pack``), one after the other. A head that shares the tensor of the
        embeddings stays as it is.
        """
        projections = [p for layer in self.layers for p in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        for linear in (*projections, self.lm_head):
            if isinstance(linear, DenseLinear) and linear.weight is not self.embed_tokens:
                linear.pack(pack_weight)


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """The memory for one tensor of a checkpoint: ``values``, of its shape, and for FP8 also the ``scales`` of its rows,
    which are part of ``linear``.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    linear: Linear | None = None

    @property
    def is_by_block(self) -> bool:
        """Whether there is a scale for each block."""
        return self.scales is not None and self.scales.shape != (self.values.shape[0], 1)

    def store(self, name: str, x: torch.Tensor, start: int = 0) -> None:
        """Store ``x`` from row ``start`` on, where a block begins; quantise it if this is FP8.

        Raises ``ValueError`` naming the tensor if a number to be quantised is not finite.
        """
        end = start + x.shape[0]
        if self.scales is None:
            self.values[start:end].copy_(x)
            return
        quantize, unit = (quantize_weight_blocks, SCALE_BLOCK) if self.is_by_block else (quantize_channels, 1)
        rows = max(1, _CHUNK // x.shape[1] // SCALE_BLOCK) * SCALE_BLOCK
        for first in range(start, end, rows):
            values, scales = quantize(x[first - start : first - start + rows].to(self.values.device))
            if not scales.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity, and cannot be quantised to FP8")
            self.scales[first // unit : first // unit + scales.shape[0]] = scales
            self.values[first : first + values.shape[0]].view(torch.uint8).copy_(values.view(torch.uint8))


def dummy_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
    kind_of: KindOf = all_dense,
) -> NemoWeights:
    """Seeded random weights at which activations stay near 1. A tensor depends on seed, name, shape and kind only.

    Up to ``DUMMY_PERIOD`` numbers are drawn per tensor, on the CPU in fp32, and repeated, so that 12B parameters take
    seconds and every device and dtype has the same ones.
    """
    weights = empty_weights(config, dtype, torch.device(device), kind_of)
    residual_scale = (2 * config.num_layers) ** -0.5  # 2 additions per layer together add a variance near 1
    for tensor in HF.expected(config):
        place = place_of(weights, config, tensor)
        if len(tensor.shape) == 1:
            place.values.fill_(1.0)
            continue
        scale = tensor.shape[1] ** -0.5
        if tensor.part in ("o_proj", "down_proj"):
            scale *= residual_scale
        elif tensor.part == "embed_tokens" and not config.tie_word_embeddings:
            scale = 1.0
        digest = hashlib.sha256(f"{seed}/{tensor.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        noise = torch.randn(min(place.values.numel(), DUMMY_PERIOD), generator=generator).mul_(scale)
        values = place.values
        if place.scales is not None:
            values = torch.empty(tensor.shape, dtype=dtype, device=values.device)
        flat, block = values.view(-1), noise.to(values.device, dtype)
        for start in range(0, flat.numel(), DUMMY_PERIOD):
            part = flat[start : start + DUMMY_PERIOD]
            part.copy_(block[: part.numel()])
        if place.scales is not None:
            place.store(tensor.name, values)
            assert isinstance(place.linear, Fp8Linear)
            if place.linear.input_scale is not None:
                place.linear.input_scale.fill_(_DUMMY_INPUT_SCALE)
    return weights


def empty_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    kind_of: KindOf = all_dense,
    *,
    has_kv_scales: bool = False,
) -> NemoWeights:
    """Memory for the weights of ``config``, uninitialised; input scales and scales of keys and values are 0."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def linear(layer: int | None, projection: str, rows: int, width: int) -> Linear:
        kind = kind_of(layer, projection)
        if kind.scales == "none":
            return DenseLinear(empty(rows, width))
        shape = (rows, 1) if kind.scales == "channel" else (-(-rows // SCALE_BLOCK), -(-width // SCALE_BLOCK))
        return Fp8Linear(
            torch.empty(rows, width, dtype=FP8, device=device),
            torch.empty(shape, dtype=torch.float32, device=device),
            torch.zeros((), dtype=torch.float32, device=device) if kind.has_input_scale else None,
        )

    def kv_scale() -> torch.Tensor | None:
        return torch.zeros(config.num_kv_heads, dtype=torch.float32, device=device) if has_kv_scales else None

    hidden, inner = config.hidden_size, config.intermediate_size
    embed_tokens = empty(config.vocab_size, hidden)
    layers = tuple(
        LayerWeights(
            input_layernorm=empty(hidden),
            qkv=linear(layer, "qkv", config.q_size + 2 * config.kv_size, hidden),
            o=linear(layer, "o", hidden, config.q_size),
            post_attention_layernorm=empty(hidden),
            gate_up=linear(layer, "gate_up", 2 * inner, hidden),
            down=linear(layer, "down", hidden, inner),
            k_scale=kv_scale(),
            v_scale=kv_scale(),
        )
        for layer in range(config.num_layers)
    )
    is_shared = config.tie_word_embeddings and kind_of(None, "lm_head") == DENSE
    head = DenseLinear(embed_tokens) if is_shared else linear(None, "lm_head", config.vocab_size, hidden)
    return NemoWeights(embed_tokens, layers, empty(hidden), head)


def place_of(weights: NemoWeights, config: ModelConfig, tensor: ExpectedTensor) -> Place:
    """The place of a checkpoint's tensor in ``weights``; its values are contiguous."""
    if tensor.layer is None:
        if tensor.part == "lm_head":
            return _place_in(weights.lm_head, 0, config.vocab_size)
        return Place({"embed_tokens": weights.embed_tokens, "norm": weights.norm}[tensor.part])
    layer = weights.layers[tensor.layer]
    if tensor.part in ("input_layernorm", "post_attention_layernorm"):
        return Place(getattr(layer, tensor.part))
    q, kv, inner, hidden = config.q_size, config.kv_size, config.intermediate_size, config.hidden_size
    sizes = {"qkv": (q, kv, kv), "o": (hidden,), "gate_up": (inner, inner), "down": (hidden,)}
    projection = PROJECTION_OF[tensor.part]
    index = PARTS[projection].index(tensor.part)
    return _place_in(getattr(layer, projection), sum(sizes[projection][:index]), sizes[projection][index])


def _place_in(linear: Linear, first: int, rows: int) -> Place:
    values = linear.weight[first : first + rows]
    if not isinstance(linear, Fp8Linear):
        return Place(values)
    unit = 1 if linear.scales.shape == (linear.out_features, 1) else SCALE_BLOCK
    scales = linear.scales[first // unit : first // unit + -(-rows // unit)]
    return Place(values, scales, linear)
