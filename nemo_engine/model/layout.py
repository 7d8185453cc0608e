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

# What a part's shape follows from, by the names of (Hugging Face's configuration, Mistral's).
_SIZE_FIELDS = {
    "embed_tokens": ("vocab_size, hidden_size", "vocab_size, dim"),
    "lm_head": ("vocab_size, hidden_size", "vocab_size, dim"),
    "q_proj": ("num_attention_heads * head_dim, hidden_size", "n_heads * head_dim, dim"),
    "k_proj": ("num_key_value_heads * head_dim, hidden_size", "n_kv_heads * head_dim, dim"),
    "v_proj": ("num_key_value_heads * head_dim, hidden_size", "n_kv_heads * head_dim, dim"),
    "o_proj": ("hidden_size, num_attention_heads * head_dim", "dim, n_heads * head_dim"),
    "gate_proj": ("intermediate_size, hidden_size", "hidden_dim, dim"),
    "up_proj": ("intermediate_size, hidden_size", "hidden_dim, dim"),
    "down_proj": ("hidden_size, intermediate_size", "dim, hidden_dim"),
}

# Buffers that old checkpoints carry and that follow from rope_theta.
_IGNORED = re.compile(
    r"([\w.]+\.)?(rotary_emb|rotary_pos_emb|rope)\.((original_)?inv_freq|freqs(_cis)?|(cos|sin)(_cached)?)|([\w.]+\.)?freqs_cis"
)


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


def size_fields(layout: Layout, part: str) -> str:
    """The fields of config.json, or params.json, that give ``part`` its shape."""
    fields = _SIZE_FIELDS.get(part, ("hidden_size", "dim"))[0 if layout == "hf" else 1]
    return f"[{fields}] of {'config.json' if layout == 'hf' else 'params.json'}"


def check_num_layers(config: ModelConfig, layout: Layout, num_tensors: int) -> None:
    """Raise ``ValueError`` if a checkpoint of so many tensors cannot have the layers of ``config``, before they are listed one by one."""
    if config.num_layers > num_tensors:
        name = "config.json: num_hidden_layers" if layout == "hf" else "params.json: n_layers"
        raise ValueError(f"{name} is {config.num_layers}, and all weight files together hold {num_tensors} tensors")


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
    """Whether a tensor may be in a checkpoint without being read: a rotary buffer, which follows from the config."""
    return _IGNORED.fullmatch(name) is not None
