"""The two configurations: ``ModelConfig`` is read from a checkpoint, ``EngineConfig`` is what the user chose.

Both frozen.

Facts that follow from them (number of pages, context that fits) are results of start-up and live with their owners.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nemo_engine.checks import check_choice, check_int, check_positive
from nemo_engine.config_reader import (
    DEFAULT_CONTEXT_CAP,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    ConfigReader,
    read_rope_theta,
    refuse_other_architecture,
)
from nemo_engine.option_names import refuse_unknown_options

# Where both layouts are silent: transformers' MistralConfig and every tokenizer of Mistral's have these.
DEFAULT_BOS_TOKEN_ID, DEFAULT_EOS_TOKEN_ID = 1, 2

# Speculation: tokens that a decode row of a wide step computes, and tokens of all decode rows of one at most.
WIDTHS = (2, 4, 8)
WIDE_STEP_TOKENS = 256
MAX_GRAPH_TOKENS = 1024  # of a step with prompts that is a graph on a GPU

DEFAULT_STEP_TOKENS = 2048  # benchmarks/NOTES.md: the tail of a decode's waits, against throughput, on CPU and GPU

DTYPES = ("bfloat16", "float16", "float32", "float64")

_logger = logging.getLogger("nemo_engine")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The architecture of one checkpoint: a dense decoder with RMSNorm, half-split rotary embedding, grouped KV and
    SwiGLU.

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
        check_int("vocab_size", self.vocab_size, low=1, high=MAX_VOCAB)
        check_int("num_layers", self.num_layers, low=1, high=MAX_LAYERS)
        for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"):
            check_int(name, getattr(self, name), low=1, high=MAX_WIDTH)
        check_int("max_position_embeddings", self.max_position_embeddings, low=1)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads ({self.num_kv_heads}), got {self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, because rotary embedding turns pairs, got {self.head_dim}")
        check_positive("rope_theta", self.rope_theta)
        check_positive("rms_norm_eps", self.rms_norm_eps)
        check_choice("dtype", self.dtype, DTYPES)
        for name, ids in (("eos_token_ids", self.eos_token_ids), ("bos_token_id", (self.bos_token_id,))):
            for token_id in ids:
                check_int(name, 0 if token_id is None else token_id, low=0, high=self.vocab_size - 1)

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
        read = ConfigReader(data, "config.json")
        refuse_other_architecture(read)
        vocab_size = read.integer("vocab_size", high=MAX_VOCAB)
        eos_ids = read.token_ids("eos_token_id", DEFAULT_EOS_TOKEN_ID, vocab_size)
        if generation_config is not None:
            eos_ids += ConfigReader(generation_config, "generation_config.json").token_ids(
                "eos_token_id", None, vocab_size
            )
        bos_ids = read.token_ids("bos_token_id", DEFAULT_BOS_TOKEN_ID, vocab_size)
        num_heads = read.integer("num_attention_heads")
        if data.get("num_key_value_heads") is None and data.get("model_type") == "llama":
            num_kv_heads = num_heads  # LlamaConfig's default, which old files leave out
        else:
            num_kv_heads = read.integer("num_key_value_heads")
        return read.build(
            cls,
            vocab_size=vocab_size,
            hidden_size=read.integer("hidden_size"),
            num_layers=read.integer("num_hidden_layers", high=MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=read.integer("head_dim", 'it is never derived; add "head_dim" to the file'),
            intermediate_size=read.integer("intermediate_size"),
            rope_theta=read_rope_theta(read),
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
        read = ConfigReader(data, "params.json")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the user chose, with vLLM's names where it has one. Validated here; unknown names are a ``ValueError``.

    dtype: "auto" (the checkpoint's), "bfloat16", "float16", "float32" or "float64" (float64 on the CPU only).
    max_model_len: tokens of prompt and output together; "auto" takes the largest that the KV cache holds; None takes
        the checkpoint's claim, at most 131072. An explicit number may exceed 131072 but not the checkpoint's claim.
    max_num_seqs: requests that run at once.
    max_num_batched_tokens: tokens a step may compute, at least max_num_seqs; None takes 2048, since a step of more
        keeps the other requests waiting for long, and max_num_seqs if that is more.
    enable_prefix_caching: reuse the pages of equal prefixes.
    page_size: tokens per KV page: a power of two from 16 to 256. FlashAttention 2 reads pages of 256, the CUDA kernels
        of attention pages of up to 128.
    kv_cache_gib, num_kv_pages: the KV budget, absolute; at most one of them. With neither: on the CPU 1 GiB, at least
        one request of max_model_len if that is at most 4 GiB; on a GPU what the memory plan leaves.
    kv_cache_dtype: "auto" (FP8 where the checkpoint has a scheme for it, else the activations' dtype), "fp8" (e4m3;
        scales from the checkpoint, else 1), or the activations' dtype by name.
    quantization: "fp8" quantises a bf16 checkpoint while it loads (weights per output channel, activations per token),
        "fp8_block" by 128 x 128; one that is FP8 already must be of that kind and stays as it is. None takes any as it
        is.
    quantize_lm_head: the head becomes FP8 too.
    load_format: "auto" reads the checkpoint, "dummy" makes seeded random weights of its config.
    device: "auto" takes CUDA where there is one.
    enforce_eager: no CUDA graphs, no recorded steps on a CPU.
    prefer: {operation: implementation} to force one; {"*": implementation} takes it wherever it serves.
    pipeline_depth: steps in flight, 1 or 2; None takes 1 on the CPU, else 2.
    seed: of the noise of requests that bring none, and of dummy weights.
    max_logprobs: the most alternatives a request may ask for.
    tokenizer: path of the tokenizer if it is not in the checkpoint.
    skip_tokenizer_init: token ids only.
    chat_template: a Jinja template's file or text, or "mistral" for Mistral's own format; None takes what the
        checkpoint's template turns out to be.
    scheduling_policy: "fcfs", or "priority" (a lower number first).
    tensor_parallel_size: 1; more comes later and is refused.
    revision: of a Hub repository.
    speculative_config: {"method": "ngram", "num_speculative_tokens": 7} looks up drafts of 1 to 7 tokens in a request's
        own text, so that a step makes several tokens where they are right; the output is the same. None: no
        speculation.
    lora: a PEFT adapter, a directory or a Hub repository, that the model is merged with while it loads.
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
    lora: str | None = None
    speculative_config: dict[str, Any] | None = None

    def __new__(cls, *args: Any, **options: Any) -> EngineConfig:
        """Refuse unknown names by a ``ValueError`` that says what to use, before the constructor would by a
        ``TypeError``.
        """
        refuse_unknown_options("Engine", options, cls.__dataclass_fields__)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for name in ("enable_prefix_caching", "enforce_eager", "skip_tokenizer_init", "quantize_lm_head"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        check_choice("dtype", self.dtype, ("auto", *DTYPES))
        check_choice("load_format", self.load_format, ("auto", "dummy"))
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        check_choice("scheduling_policy", self.scheduling_policy, ("fcfs", "priority"))
        self._check_sizes()
        check_int("seed", self.seed, low=0, high=2**64 - 1)
        if self.max_logprobs != -1:
            check_int("max_logprobs", self.max_logprobs, low=0, low_text="at least 0, or -1 for the whole vocabulary")
        if self.pipeline_depth is not None:
            check_int("pipeline_depth", self.pipeline_depth, low=1, high=2)
        if self.prefer is not None:
            if not isinstance(self.prefer, Mapping) or not all(
                isinstance(text, str) and text for pair in self.prefer.items() for text in pair
            ):
                raise ValueError(f"prefer must map names of operations to implementations, got {self.prefer!r}")
            object.__setattr__(self, "prefer", dict(self.prefer))  # the caller's may change later
        if self.speculative_config is not None:
            object.__setattr__(self, "speculative_config", check_speculative_config(self.speculative_config))
        for name in ("tokenizer", "revision", "chat_template", "lora"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike) and name != "revision":
                value = os.fspath(value)
                object.__setattr__(self, name, value)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name} must be a non-empty string, got {value!r}")
        if self.lora is not None and self.load_format == "dummy":
            raise ValueError(
                "lora needs the checkpoint's weights, and load_format 'dummy' makes them up: give one of the two"
            )

    @property
    def num_speculative_tokens(self) -> int:
        """Drafts behind a token at most; 0 without speculation."""
        config = self.speculative_config
        return 0 if config is None else config["num_speculative_tokens"]

    @property
    def widths(self) -> tuple[int, ...]:
        """How many tokens a decode row of a wide step may compute; none without speculation."""
        return tuple(width for width in WIDTHS if width < 2 * self.num_speculative_tokens + 1)

    @property
    def tokens_per_step(self) -> int:
        """``max_num_batched_tokens``, or what it is by default."""
        return self.max_num_batched_tokens or max(DEFAULT_STEP_TOKENS, self.max_num_seqs)

    def steps_in_flight(self, device: str) -> int:
        """``pipeline_depth``, or what it is by default on ``device``: on the CPU a launch computes at once, so there is
        nothing to overlap.
        """
        return self.pipeline_depth or (1 if device == "cpu" else 2)

    def _check_sizes(self) -> None:
        if self.max_model_len is not None and self.max_model_len != "auto":
            check_int("max_model_len", self.max_model_len, low=1, low_text='at least 1, or "auto"')
        check_int("max_num_seqs", self.max_num_seqs, low=1)
        if self.max_num_batched_tokens is not None:
            check_int("max_num_batched_tokens", self.max_num_batched_tokens, low=1)
            if self.max_num_batched_tokens < self.max_num_seqs:
                least = f"at least max_num_seqs ({self.max_num_seqs}), so that a step can decode every running request"
                raise ValueError(f"max_num_batched_tokens must be {least}, got {self.max_num_batched_tokens}")
        if check_int("page_size", self.page_size, low=16, high=256).bit_count() != 1:
            raise ValueError(f"page_size must be a power of two from 16 to 256, got {self.page_size}")
        if self.kv_cache_gib is not None:
            check_positive("kv_cache_gib", self.kv_cache_gib)
            if self.num_kv_pages is not None:
                raise ValueError(
                    f"kv_cache_gib and num_kv_pages both set the KV budget: give at most one, got {self.kv_cache_gib} "
                    f"and {self.num_kv_pages}"
                )
        if self.num_kv_pages is not None:
            check_int("num_kv_pages", self.num_kv_pages, low=1)
        check_choice("kv_cache_dtype", self.kv_cache_dtype, ("auto", "fp8", "fp8_e4m3", *DTYPES))
        check_choice("quantization", self.quantization, (None, "fp8", "fp8_block"))
        check_int("tensor_parallel_size", self.tensor_parallel_size, low=1)
        if self.tensor_parallel_size > 1:
            raise ValueError(f"tensor_parallel_size above 1 is not supported yet, got {self.tensor_parallel_size}")


def check_speculative_config(config: object) -> dict[str, Any]:
    """``EngineConfig.speculative_config`` with its default filled in; ``ValueError`` for what it cannot be."""
    if not isinstance(config, Mapping):
        raise ValueError(
            f'speculative_config must be like {{"method": "ngram", "num_speculative_tokens": 7}}, got {config!r}'
        )
    for key in config:
        if key in ("prompt_lookup_max", "prompt_lookup_min"):
            raise ValueError(f"speculative_config: the last 4, 3 or 2 tokens are always looked up: leave {key} out")
        if key not in ("method", "num_speculative_tokens"):
            raise ValueError(f"speculative_config must have the keys method and num_speculative_tokens, got {key!r}")
    check_choice('speculative_config["method"]', config.get("method"), ("ngram",))
    count = config.get("num_speculative_tokens", WIDTHS[-1] - 1)
    check_int('speculative_config["num_speculative_tokens"]', count, low=1, high=WIDTHS[-1] - 1)
    return {"method": "ngram", "num_speculative_tokens": count}


def resolve_max_model_len(model: ModelConfig, config: EngineConfig) -> int:
    """The context to serve, in tokens, before the KV cache is sized.

    An explicit ``max_model_len`` may be anything up to the checkpoint's claim; otherwise it is that claim, at most
    131072, with a warning if the claim is larger. Raises ``ValueError`` above the claim.
    """
    claim = model.max_position_embeddings
    if isinstance(config.max_model_len, int):
        if config.max_model_len > claim:
            raise ValueError(
                f"max_model_len must be at most the checkpoint's max_position_embeddings ({claim}), got "
                f"{config.max_model_len}"
            )
        return config.max_model_len
    if claim > DEFAULT_CONTEXT_CAP:
        message = "the checkpoint claims a context of %d tokens; %d are served unless max_model_len asks for more"
        _logger.warning(message, claim, DEFAULT_CONTEXT_CAP)
    return min(claim, DEFAULT_CONTEXT_CAP)
