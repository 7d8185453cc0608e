"""What each tensor of a checkpoint is called, and what shape it must have.

Hugging Face's layout and Mistral's differ in names and in the order of rows in a query or key head: Mistral's is
interleaved (the pairs that rotary embedding turns are rows 2i and 2i + 1), Hugging Face's and ours is half-split (rows
i and i + head_dim / 2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from nemo_engine.config import ModelConfig

Layout = Literal["hf", "mistral"]

# Part: name in (Hugging Face's layout, Mistral's).
_LAYER_NAMES = {
    "input_layernorm": ("layers.{}.input_layernorm", "layers.{}.attention_norm"),
    "q_proj": ("layers.{}.self_attn.q_proj", "layers.{}.attention.wq"),
    "k_proj": ("layers.{}.self_attn.k_proj", "layers.{}.attention.wk"),
    "v_proj": ("layers.{}.self_attn.v_proj", "layers.{}.attention.wv"),
    "o_proj": ("layers.{}.self_attn.o_proj", "layers.{}.attention.wo"),
    "post_attention_layernorm": ("layers.{}.post_attention_layernorm", "layers.{}.ffn_norm"),
    "gate_proj": ("layers.{}.mlp.gate_proj", "layers.{}.feed_forward.w1"),
    "up_proj": ("layers.{}.mlp.up_proj", "layers.{}.feed_forward.w3"),
    "down_proj": ("layers.{}.mlp.down_proj", "layers.{}.feed_forward.w2"),
}
_OUTER_NAMES = {
    "embed_tokens": ("embed_tokens", "tok_embeddings"),
    "norm": ("norm", "norm"),
    "lm_head": ("lm_head", "output"),
}
# The parts whose rows each projection holds, in this order from the top.
PARTS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
PROJECTION_OF = {part: projection for projection, parts in PARTS.items() for part in parts} | {"lm_head": "lm_head"}
WITH_VOCABULARY = ("embed_tokens", "lm_head")  # these parts have a row for each token of the vocabulary

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
    """A tensor that a checkpoint must hold. ``layer`` is None outside the layers; ``part`` is the key of a table above.

    ``name`` is what the checkpoint calls it, ``module`` what transformers calls the module that it belongs to.
    """

    name: str
    shape: tuple[int, ...]
    part: str
    layer: int | None
    module: str


@dataclass(frozen=True, slots=True)
class TensorNames:
    """The names in one checkpoint: those of its layout after ``prefix``, the head's after ``head_prefix``."""

    layout: Layout = "hf"
    prefix: str = "model."
    head_prefix: str = ""

    def module(self, part: str, layer: int | None = None) -> str:
        """The name of the module of ``part``."""
        names = _OUTER_NAMES[part] if layer is None else _LAYER_NAMES[part]
        prefix = self.head_prefix if part == "lm_head" else self.prefix
        return prefix + names[0 if self.layout == "hf" else 1].format(layer)

    def tensor(self, part: str, layer: int | None = None) -> str:
        """The name of the weight of ``part``."""
        return self.module(part, layer) + ".weight"

    def attention(self, layer: int) -> str:
        """The name of a layer's attention module, with which the names of the scales of keys and values begin."""
        return f"{self.prefix}layers.{layer}.{'self_attn' if self.layout == 'hf' else 'attention'}"

    def expected(self, config: ModelConfig, *, has_head: bool | None = None) -> list[ExpectedTensor]:
        """All tensors of a checkpoint of ``config``. ``has_head`` says whether ``lm_head`` is among them; None: unless
        the embeddings are tied.
        """
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
        if not (not config.tie_word_embeddings if has_head is None else has_head):
            del outer_shapes["lm_head"]
        places: list[tuple[int | None, str, tuple[int, ...]]] = [(None, *item) for item in outer_shapes.items()]
        places += [(layer, *item) for layer in range(config.num_layers) for item in layer_shapes.items()]
        return [
            ExpectedTensor(self.tensor(part, layer), shape, part, layer, HF.module(part, layer))
            for layer, part, shape in places
        ]


HF = TensorNames()
MISTRAL = TensorNames("mistral", "")


def names_in(layout: Layout, tensors: Iterable[str]) -> TensorNames:
    """The names of a checkpoint with ``tensors``, whose prefix ("model.", "language_model.", none or another) is found
    in them.

    Raises ``ValueError`` if there are several embeddings or several heads, so that one would have to be guessed.
    """
    usual = HF if layout == "hf" else MISTRAL
    prefixes: list[str] = []
    for part, default in (("embed_tokens", usual.prefix), ("lm_head", usual.head_prefix)):
        ending = _OUTER_NAMES[part][0 if layout == "hf" else 1] + ".weight"
        names = [name for name in tensors if name == ending or name.endswith("." + ending)]
        if layout == "mistral" and part == "lm_head":  # encoders beside the model call their last layer "output" too
            names = [name for name in names if name == prefixes[0] + ending]
        if len(names) > 1:
            raise ValueError(f"there are several {part}, and only one can be this model's: {', '.join(sorted(names))}")
        prefixes.append(names[0].removesuffix(ending) if names else default)
    return TensorNames(layout, *prefixes)


def size_fields(layout: Layout, part: str) -> str:
    """The fields of config.json, or params.json, that give ``part`` its shape."""
    fields = _SIZE_FIELDS.get(part, ("hidden_size", "dim"))[0 if layout == "hf" else 1]
    return f"[{fields}] of {'config.json' if layout == 'hf' else 'params.json'}"


def is_ignored(name: str) -> bool:
    """Whether a tensor may be in a checkpoint without being read: a rotary buffer, which follows from the config."""
    return _IGNORED.fullmatch(name) is not None
