"""The two configurations: ``ModelConfig`` is read from a checkpoint, ``EngineConfig`` is what the user chose. Both frozen.

Facts that follow from them (number of pages, context that fits) are results of start-up and live with their owners.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

DEFAULT_CONTEXT_CAP = 131072  # tokens; NeMo was trained for this, whatever its config claims

# Where both layouts are silent: transformers' MistralConfig and every tokenizer of Mistral's have these.
DEFAULT_BOS_TOKEN_ID, DEFAULT_EOS_TOKEN_ID = 1, 2

# No model comes near these. The sampler's sums have room for as many ids.
MAX_LAYERS, MAX_VOCAB, MAX_WIDTH = 4096, 1 << 22, 1 << 20

DTYPES = ("bfloat16", "float16", "float32", "float64")

_logger = logging.getLogger("nemo_engine")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture of one checkpoint: a dense decoder with RMSNorm, half-split rotary embedding, grouped KV and SwiGLU.

    Nothing here has a fallback formula: ``head_dim`` in particular is read, never derived.
    ``max_position_embeddings`` is what the checkpoint claims, before any cap. ``dtype`` is the checkpoint's, by torch's
    name ("bfloat16"). ``eos_token_ids`` may be empty; ``bos_token_id`` may be None.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_int("vocab_size", self.vocab_size, low=1, high=MAX_VOCAB)
        _check_int("num_layers", self.num_layers, low=1, high=MAX_LAYERS)
        for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"):
            _check_int(name, getattr(self, name), low=1, high=MAX_WIDTH)
        _check_int("max_position_embeddings", self.max_position_embeddings, low=1)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads ({self.num_kv_heads}), got {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, because rotary embedding turns pairs, got {self.head_dim}")
        _check_positive("rope_theta", self.rope_theta)
        _check_positive("rms_norm_eps", self.rms_norm_eps)
        _check_choice("dtype", self.dtype, DTYPES)
        for name, ids in (("eos_token_ids", self.eos_token_ids), ("bos_token_id", (self.bos_token_id,))):
            for token_id in ids:
                _check_int(name, 0 if token_id is None else token_id, low=0, high=self.vocab_size - 1)

    @property
    def q_size(self) -> int:
        """Width of all query heads: ``num_heads * head_dim``, which need not be ``hidden_size``."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads: ``num_kv_heads * head_dim``."""
        return self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """Bytes that one token takes in the KV cache: keys and values of all layers."""
        return 2 * self.num_layers * self.kv_size * bytes_per_element

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], *, generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
        """From a Hugging Face ``config.json``; end-of-sequence ids of ``generation_config.json`` are added to its own.

        Raises ``ValueError`` for a missing or wrong field, and for everything that would make it another architecture.
        """
        read = _Reader(data, "config.json")
        _refuse_other_architecture(read)
        vocab_size = read.integer("vocab_size", high=MAX_VOCAB)
        eos_ids = read.token_ids("eos_token_id", DEFAULT_EOS_TOKEN_ID, vocab_size)
        if generation_config is not None:
            eos_ids += _Reader(generation_config, "generation_config.json").token_ids("eos_token_id", None, vocab_size)
        bos_ids = read.token_ids("bos_token_id", DEFAULT_BOS_TOKEN_ID, vocab_size)
        return read.build(
            cls,
            vocab_size=vocab_size,
            hidden_size=read.integer("hidden_size"),
            num_layers=read.integer("num_hidden_layers", high=MAX_LAYERS),
            num_heads=read.integer("num_attention_heads"),
            num_kv_heads=read.integer("num_key_value_heads"),
            head_dim=read.integer("head_dim", 'it is never derived; add "head_dim" to the file'),
            intermediate_size=read.integer("intermediate_size"),
            rope_theta=_rope_theta(read),
            rms_norm_eps=read.number("rms_norm_eps"),
            tie_word_embeddings=read.boolean("tie_word_embeddings"),
            max_position_embeddings=read.context("max_position_embeddings"),
            dtype=read.dtype("dtype", "torch_dtype"),
            bos_token_id=bos_ids[0] if bos_ids else None,
            eos_token_ids=tuple(dict.fromkeys(eos_ids)),
        )

    @classmethod
    def from_mistral(cls, data: Mapping[str, Any]) -> ModelConfig:
        """From Mistral's ``params.json``, which may be silent about context, dtype and token ids.

        Then the context is 131072 and the dtype bfloat16; begin and end of sequence are 1 and 2, as in all of Mistral's
        tokenizers. Raises ``ValueError`` as ``from_hf`` does.
        """
        read = _Reader(data, "params.json")
        for key in ("sliding_window", "_sliding_window", "moe", "yarn", "vision_encoder", "multimodal",
                    "q_lora_rank", "kv_lora_rank", "use_biases", "llama_4_scaling", "attn_bias"):  # fmt: skip
            read.refuse(key)
        return read.build(
            cls,
            vocab_size=read.integer("vocab_size", high=MAX_VOCAB),
            hidden_size=read.integer("dim"),
            num_layers=read.integer("n_layers", high=MAX_LAYERS),
            num_heads=read.integer("n_heads"),
            num_kv_heads=read.integer("n_kv_heads"),
            head_dim=read.integer("head_dim", 'it is never derived; add "head_dim" to the file'),
            intermediate_size=read.integer("hidden_dim"),
            rope_theta=read.number("rope_theta"),
            rms_norm_eps=read.number("norm_eps"),
            tie_word_embeddings=read.boolean("tied_embeddings"),
            max_position_embeddings=read.context("max_position_embeddings", "max_seq_len"),
            dtype=read.dtype("dtype", "torch_dtype"),
            bos_token_id=DEFAULT_BOS_TOKEN_ID,
            eos_token_ids=(DEFAULT_EOS_TOKEN_ID,),
        )


class _Reader:
    """Typed reads from one JSON object; every error names the file and the key. A null is as good as absent."""

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        if not isinstance(data, Mapping):
            raise ValueError(f"{source} must hold a JSON object, got {type(data).__name__}")
        self.data, self.source = data, source

    def first(self, *keys: str, default: Any = None) -> Any:
        return next((self.data[key] for key in keys if self.data.get(key) is not None), default)

    def integer(self, key: str, hint: str = "", *, high: int = MAX_WIDTH) -> int:
        value = self.data.get(key)
        if value is None:
            raise ValueError(f"{self.source} has no {key}" + (f": {hint}" if hint else ""))
        _check_int(f"{self.source}: {key}", value, low=1)
        return _check_int(f"{self.source}: {key}", value, low=1, high=high)

    def number(self, key: str) -> float:
        value = self.data.get(key)
        if value is None:
            raise ValueError(f"{self.source} has no {key}")
        return _check_positive(f"{self.source}: {key}", value)

    def context(self, *keys: str) -> int:
        key = next((key for key in keys if self.data.get(key) is not None), None)
        return DEFAULT_CONTEXT_CAP if key is None else _check_int(f"{self.source}: {key}", self.data[key], low=1)

    def boolean(self, key: str) -> bool:
        value = self.first(key, default=False)
        if not isinstance(value, bool):
            raise ValueError(f"{self.source}: {key} must be true or false, got {value!r}")
        return value

    def dtype(self, *keys: str) -> str:
        value = self.first(*keys, default="bfloat16")
        return value.removeprefix("torch.") if isinstance(value, str) else value

    def token_ids(self, key: str, default: int | None, vocab_size: int) -> list[int]:
        """Zero, one or several ids of the vocabulary; only an absent key means ``default``, a null means none."""
        value = self.data.get(key, default)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            _check_int(f"{self.source}: {key}", token_id, low=0, high=vocab_size - 1)
        return list(ids)

    def refuse(self, key: str, *, unless: tuple[Any, ...] = (False,), because: str = "is not supported") -> None:
        """Raise if ``key`` is set to anything but null or one of ``unless``."""
        value = self.data.get(key)
        if value is not None and not any(value == allowed for allowed in unless):
            raise ValueError(f"{self.source}: {key} {because}, got {value!r}")

    def build(self, cls: type[ModelConfig], **fields: Any) -> ModelConfig:
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None


def _refuse_other_architecture(read: _Reader) -> None:
    """Raise unless ``config.json`` describes exactly what this engine computes."""
    architectures = read.first("architectures", default=["MistralForCausalLM"])
    known = {"MistralForCausalLM", "LlamaForCausalLM"}  # without biases and scaling, Llama is the same computation
    if not isinstance(architectures, list) or not known.intersection(map(str, architectures)):
        raise ValueError(f"config.json: architectures must hold MistralForCausalLM, got {architectures!r}")
    read.refuse("model_type", unless=("mistral", "llama"), because="must be mistral")
    read.refuse(
        "sliding_window", because="is not supported: attention is over the whole context, as in Mistral NeMo (null)"
    )
    read.refuse("hidden_act", unless=("silu",), because="must be silu")
    for key in ("attention_bias", "mlp_bias", "num_local_experts", "num_experts", "n_routed_experts", "q_lora_rank",
                "kv_lora_rank", "attn_logit_softcapping", "final_logit_softcapping", "use_qk_norm", "qk_norm"):  # fmt: skip
        read.refuse(key)
    for key in ("partial_rotary_factor", "embedding_multiplier", "residual_multiplier", "logits_scaling"):
        read.refuse(key, unless=(1,))
    layer_types = read.first("layer_types", default=[])
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ValueError(f"config.json: layer_types must all be full_attention, got {layer_types!r}")


def _rope_theta(read: _Reader) -> float:
    """The rotary base: at the top level, or in ``rope_parameters`` as newer transformers write it. Scaling is refused."""
    found = {} if read.first("rope_theta") is None else {"rope_theta": read.number("rope_theta")}
    for key in ("rope_parameters", "rope_scaling"):
        block = read.first(key, default={})
        if not isinstance(block, dict):
            raise ValueError(f"config.json: {key} must be an object, got {block!r}")
        inner = _Reader(block, f"config.json: {key}")
        kind = inner.first("rope_type", "type")
        if kind not in (None, "default"):
            raise ValueError(f"config.json: {key} of type {kind!r} is not supported: only 'default', without scaling")
        inner.refuse("partial_rotary_factor", unless=(1,))
        unknown = set(block) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if unknown:
            raise ValueError(f"config.json: {key} has what is not supported: {', '.join(sorted(unknown))}")
        if inner.first("rope_theta") is not None:
            found[f"{key}.rope_theta"] = inner.number("rope_theta")
    if not found:
        raise ValueError("config.json has no rope_theta, neither at the top level nor in rope_parameters")
    if len(set(found.values())) > 1:
        raise ValueError(f"config.json: rope_theta is given twice and differs: {found!r}")
    return next(iter(found.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the user chose, with vLLM's names where it has one. Validated here; unknown names are a ``TypeError``.

    dtype: "auto" (the checkpoint's), "bfloat16", "float16", "float32" or "float64" (float64 on the CPU only).
    max_model_len: tokens of prompt and output together; "auto" takes the largest that the KV cache holds; None takes the
        checkpoint's claim, at most 131072. An explicit number may exceed 131072 but not the checkpoint's claim.
    max_num_seqs: requests that run at once. max_num_batched_tokens: tokens a step may compute, at least max_num_seqs; None takes 2048 on
        the CPU, where a step of more keeps the other requests waiting for long, else 8192, and max_num_seqs if that is more.
    enable_prefix_caching: reuse the pages of equal prefixes. page_size: tokens per KV page: a power of two from 16 to 128.
    kv_cache_gib, num_kv_pages: the KV budget, absolute; at most one of them. With neither: on the CPU 1 GiB, at least one request of
        max_model_len if that is at most 4 GiB; on a GPU what the memory plan leaves.
    kv_cache_dtype: "auto" (FP8 where the checkpoint has a scheme for it, else the activations' dtype), "fp8" (e4m3; scales from the
        checkpoint, else 1), or the activations' dtype by name.
    quantization: "fp8" quantises a bf16 checkpoint while it loads (weights per output channel, activations per token), "fp8_block" by 128 x
        128; one that is FP8 already must be of that kind and stays as it is. None takes any as it is. quantize_lm_head: the head becomes FP8 too.
    load_format: "auto" reads the checkpoint, "dummy" makes seeded random weights of its config.
    device: "auto" takes CUDA where there is one. enforce_eager: no CUDA graphs.
    prefer: {operation: implementation} to force one; {"*": implementation} takes it wherever it serves. pipeline_depth: steps in flight, 1 or 2; None takes 1 on the CPU, else 2.
    seed: of the noise of requests that bring none, and of dummy weights. max_logprobs: the most alternatives a request may ask for.
    tokenizer: path of the tokenizer if it is not in the checkpoint. skip_tokenizer_init: token ids only.
    chat_template: a Jinja template's file or text, or "mistral" for Mistral's own format; None takes what the checkpoint's template turns out to be.
    scheduling_policy: "fcfs", or "priority" (a lower number first). tensor_parallel_size: 1; more comes later and is refused. revision: of a Hub repository.
    """

    dtype: str = "auto"
    max_model_len: int | Literal["auto"] | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    page_size: int = 64
    kv_cache_gib: float | None = None
    num_kv_pages: int | None = None
    kv_cache_dtype: str = "auto"
    quantization: str | None = None
    quantize_lm_head: bool = False
    load_format: str = "auto"
    device: str = "auto"
    enforce_eager: bool = False
    prefer: dict[str, str] | None = None
    pipeline_depth: int | None = None
    seed: int = 0
    max_logprobs: int = 20
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    chat_template: str | None = None
    scheduling_policy: str = "fcfs"
    tensor_parallel_size: int = 1
    revision: str | None = None

    def __post_init__(self) -> None:
        for name in ("enable_prefix_caching", "enforce_eager", "skip_tokenizer_init", "quantize_lm_head"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        _check_choice("dtype", self.dtype, ("auto", *DTYPES))
        _check_choice("load_format", self.load_format, ("auto", "dummy"))
        _check_choice("device", self.device, ("auto", "cpu", "cuda"))
        _check_choice("scheduling_policy", self.scheduling_policy, ("fcfs", "priority"))
        self._check_sizes()
        _check_int("seed", self.seed, low=0, high=2**64 - 1)
        if self.max_logprobs != -1:
            _check_int("max_logprobs", self.max_logprobs, low=0, low_text="at least 0, or -1 for the whole vocabulary")
        if self.pipeline_depth is not None:
            _check_int("pipeline_depth", self.pipeline_depth, low=1, high=2)
        if self.prefer is not None:
            if not isinstance(self.prefer, Mapping) or not all(
                isinstance(text, str) and text for pair in self.prefer.items() for text in pair
            ):
                raise ValueError(f"prefer must map names of operations to implementations, got {self.prefer!r}")
            object.__setattr__(self, "prefer", dict(self.prefer))  # the caller's may change later
        for name in ("tokenizer", "revision", "chat_template"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, value := os.fspath(value))
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name} must be a non-empty string, got {value!r}")

    def tokens_per_step(self, device: str) -> int:
        """``max_num_batched_tokens``, or what it is by default on ``device``: "cpu" or "cuda"."""
        return self.max_num_batched_tokens or max(2048 if device == "cpu" else 8192, self.max_num_seqs)

    def steps_in_flight(self, device: str) -> int:
        """``pipeline_depth``, or what it is by default on ``device``: on the CPU a launch computes at once, so there is nothing to overlap."""
        return self.pipeline_depth or (1 if device == "cpu" else 2)

    def _check_sizes(self) -> None:
        if self.max_model_len is not None and self.max_model_len != "auto":
            _check_int("max_model_len", self.max_model_len, low=1, low_text='at least 1, or "auto"')
        _check_int("max_num_seqs", self.max_num_seqs, low=1)
        if self.max_num_batched_tokens is not None:
            _check_int("max_num_batched_tokens", self.max_num_batched_tokens, low=1)
            if self.max_num_batched_tokens < self.max_num_seqs:
                least = f"at least max_num_seqs ({self.max_num_seqs}), so that a step can decode every running request"
                raise ValueError(f"max_num_batched_tokens must be {least}, got {self.max_num_batched_tokens}")
        if _check_int("page_size", self.page_size, low=16, high=128) not in (16, 32, 64, 128):
            raise ValueError(f"page_size must be a power of two from 16 to 128, got {self.page_size}")
        if self.kv_cache_gib is not None:
            _check_positive("kv_cache_gib", self.kv_cache_gib)
            if self.num_kv_pages is not None:
                raise ValueError(
                    f"kv_cache_gib and num_kv_pages both set the KV budget: give at most one, got {self.kv_cache_gib} "
                    f"and {self.num_kv_pages}"
                )
        if self.num_kv_pages is not None:
            _check_int("num_kv_pages", self.num_kv_pages, low=1)
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, ("auto", "fp8", "fp8_e4m3", *DTYPES))
        _check_choice("quantization", self.quantization, (None, "fp8", "fp8_block"))
        _check_int("tensor_parallel_size", self.tensor_parallel_size, low=1)
        if self.tensor_parallel_size > 1:
            raise ValueError(f"tensor_parallel_size above 1 is not supported yet, got {self.tensor_parallel_size}")


def resolve_max_model_len(model: ModelConfig, config: EngineConfig) -> int:
    """The context to serve, in tokens, before the KV cache is sized.

    An explicit ``max_model_len`` may be anything up to the checkpoint's claim; otherwise it is that claim, at most
    131072, with a warning if the claim is larger. Raises ``ValueError`` above the claim.
    """
    claim = model.max_position_embeddings
    if isinstance(config.max_model_len, int):
        if config.max_model_len > claim:
            raise ValueError(
                f"max_model_len must be at most the checkpoint's max_position_embeddings ({claim}), got {config.max_model_len}"
            )
        return config.max_model_len
    if claim > DEFAULT_CONTEXT_CAP:
        message = "the checkpoint claims a context of %d tokens; %d are served unless max_model_len asks for more"
        _logger.warning(message, claim, DEFAULT_CONTEXT_CAP)
    return min(claim, DEFAULT_CONTEXT_CAP)


def _check_int(name: str, value: object, *, low: int, high: int | None = None, low_text: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        limit = low_text or f"at least {low}"
        raise ValueError(f"{name} must be {limit if high is None else f'from {low} to {high}'}, got {value}")
    return value


def _check_positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")
    return float(value)


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
