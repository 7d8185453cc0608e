"""The two layouts of a checkpoint, Hugging Face's and Mistral's: what each tensor is called and what shape it must have.

They differ in names and in the order of rows in a query or key head: Mistral's is interleaved (the pairs that rotary
embedding turns are rows 2i and 2i + 1), Hugging Face's and ours is half-split (rows i and i + head_dim / 2).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from nemo_engine.config import ModelConfig

Layout = Literal["hf", "mistral"]

# Part: name in (Hugging Face's layout, Mistral's).
_LAYER_NAMES = {
    "input_layernorm": ("model.layers.{}.input_layernorm", "layers.{}.attention_norm"),
    "q_proj": ("model.layers.{}.self_attn.q_proj", "layers.{}.attention.wq"),
    "k_proj": ("model.layers.{}.self_attn.k_proj", "layers.{}.attention.wk"),
    "v_proj": ("model.layers.{}.self_attn.v_proj", "layers.{}.attention.wv"),
    "o_proj": ("model.layers.{}.self_attn.o_proj", "layers.{}.attention.wo"),
    "post_attention_layernorm": ("model.layers.{}.post_attention_layernorm", "layers.{}.ffn_norm"),
    "gate_proj": ("model.layers.{}.mlp.gate_proj", "layers.{}.feed_forward.w1"),
    "up_proj": ("model.layers.{}.mlp.up_proj", "layers.{}.feed_forward.w3"),
    "down_proj": ("model.layers.{}.mlp.down_proj", "layers.{}.feed_forward.w2"),
}
# The parts whose rows each projection holds, in this order from the top.
PARTS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
_OUTER_NAMES = {
    "embed_tokens": ("model.embed_tokens", "tok_embeddings"),
    "norm": ("model.norm", "norm"),
    "lm_head": ("lm_head", "output"),
}

# Buffers that old checkpoints carry and that follow from rope_theta.
_IGNORED = re.compile(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq|rope\.freqs")


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A tensor that a checkpoint must hold. ``layer`` is None outside the layers; ``part`` is the key of a table above."""

    name: str
    shape: tuple[int, ...]
    part: str
    layer: int | None


def attention_module(layout: Layout, layer: int) -> str:
    """What a layer's attention is called: the scales of keys and values are named after it."""
    return f"model.layers.{layer}.self_attn" if layout == "hf" else f"layers.{layer}.attention"


def tensor_name(layout: Layout, part: str, layer: int | None = None) -> str:
    """What ``part`` is called in a checkpoint."""
    names = _OUTER_NAMES[part] if layer is None else _LAYER_NAMES[part]
    return names[0 if layout == "hf" else 1].format(layer) + ".weight"


def expected_tensors(config: ModelConfig, layout: Layout) -> list[ExpectedTensor]:
    """All tensors of a checkpoint of ``config``, ``lm_head`` among them unless it is tied."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    layer_shapes = {
        "input_layernorm": (hidden,),
        "q_proj": (config.q_size, hidden),
        "k_proj": (config.kv_size, hidden),
        "v_proj": (config.kv_size, hidden),
        "o_proj": (hidden, config.q_size),
        "post_attention_layernorm": (hidden,),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    outer_shapes = {"embed_tokens": (vocab, hidden), "norm": (hidden,), "lm_head": (vocab, hidden)}
    if config.tie_word_embeddings:
        del outer_shapes["lm_head"]
    places: list[tuple[int | None, str, tuple[int, ...]]] = [(None, *item) for item in outer_shapes.items()]
    places += [(layer, *item) for layer in range(config.num_layers) for item in layer_shapes.items()]
    return [ExpectedTensor(tensor_name(layout, part, layer), shape, part, layer) for layer, part, shape in places]


def is_ignored(name: str) -> bool:
    """Whether a tensor may be in a checkpoint without being read: a rotary buffer of old exports."""
    return _IGNORED.fullmatch(name) is not None
