"""The forward pass: one architecture, written as a straight line of operations on plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_engine.config import ModelConfig
from nemo_engine.model.weights import NemoWeights
from nemo_engine.ops import Ops
from nemo_engine.ops.attention import AttentionMeta
from nemo_engine.ops.fused import Sum
from nemo_engine.ops.paged_kv import PagedKV
from nemo_engine.ops.rope import RopeMeta, rope_table


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """What a step's T tokens are and where they lie; made by the runner, not changed during the step."""

    input_ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64
    slot_mapping: Tensor  # (T,) int64: page * page_size + offset, where each token's key and value go
    attention: AttentionMeta


def make_kv_cache(
    config: ModelConfig,
    weights: NemoWeights,
    num_pages: int,
    page_size: int,
    dtype: torch.dtype,
    make: Callable[..., Tensor] = torch.zeros,
) -> list[PagedKV]:
    """A cache of ``num_pages`` pages and page 0, which is padding, for each layer of ``weights``, with its scales.

    ``make``: torch.zeros or torch.empty.
    """
    shape = (num_pages + 1, config.num_kv_heads, page_size, config.head_dim)
    device = weights.embed_tokens.device

    def cache() -> Tensor:
        return make(shape, dtype=dtype, device=device)

    return [PagedKV(cache(), cache(), layer.k_scale, layer.v_scale) for layer in weights.layers]


class Nemo:
    """The model: weights, rotary table, chosen operations. Holds no state of requests or steps.

    ``max_len`` is the served context in tokens: the rotary table has that many positions.
    """

    def __init__(self, config: ModelConfig, weights: NemoWeights, ops: Ops, max_len: int) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        self.rope = rope_table(config.head_dim, config.rope_theta, max_len, weights.embed_tokens.device)

    def forward(self, inputs: ModelInputs, kv_cache: Sequence[PagedKV]) -> Sum:
        """Run all layers over T tokens, writing their keys and values into ``kv_cache``, as ``make_kv_cache`` makes it.

        Returns (T, H) for ``logits``.
        """
        config, ops = self.config, self.ops
        q_size, kv_size, eps = config.q_size, config.kv_size, config.rms_norm_eps
        scale = config.head_dim**-0.5
        x = ops.embed(self.weights.embed_tokens, inputs.input_ids)  # (T, H)
        residual: Tensor | None = None
        rope = RopeMeta(self.rope, inputs.positions, inputs.slot_mapping)
        for layer, kv in zip(self.weights.layers, kv_cache, strict=True):
            qkv, residual = layer.qkv.after_norm(x, residual, layer.input_layernorm, eps, ops)  # (T, Q + 2 K), (T, H)
            q, k, v = (
                part.unflatten(1, (-1, config.head_dim)) for part in qkv.split([q_size, kv_size, kv_size], dim=1)
            )
            q = ops.rope_and_append_kv_(q, k, v, kv, rope)  # (T, Hq, D)
            x = ops.paged_attention(q, kv, inputs.attention, scale)  # (T, Hq, D)
            x, residual = layer.o.plus(residual, x.flatten(1), ops)  # (T, H)
            x, residual = layer.gate_up.mlp(layer.down, x, residual, layer.post_attention_layernorm, eps, ops)  # (T, H)
        return Sum(x, residual)

    def logits(self, hidden: Sum, rows: Tensor | slice | None = None) -> Tensor:
        """Logits of what ``forward`` returned, or of ``rows`` of it: (T, H) -> (R, V), of the activations' dtype."""
        weights, (x, residual) = self.weights, hidden
        if rows is not None:
            x, residual = x[rows], None if residual is None else residual[rows]
        logits, _ = weights.lm_head.after_norm(x, residual, weights.norm, self.config.rms_norm_eps, self.ops)
        return logits
