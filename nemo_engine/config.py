"""The two configurations: ``ModelConfig`` is read from a checkpoint, ``EngineConfig`` is what the user chose. Both frozen.

Facts that follow from them (number of pages, context that fits) are results of start-up and live with their owners.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DEFAULT_CONTEXT_CAP = 131072  # tokens; NeMo was trained for this, whatever its config claims

Device = Literal["auto", "cpu", "cuda"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What the user chose, with vLLM's names where it has one. Validated here; unknown names are a ``TypeError``.

    dtype: "auto" (the checkpoint's), "bfloat16", "float16", "float32" or "float64" (float64 on the CPU only).
    max_model_len: tokens of prompt and output together; "auto" takes the largest that the KV cache holds; None takes the
        checkpoint's claim, at most 131072. An explicit number may exceed 131072 but not the checkpoint's claim.
    max_num_seqs: requests that run at once. max_num_batched_tokens: tokens a step may compute, at least max_num_seqs.
    enable_prefix_caching: reuse the pages of equal prefixes.
    page_size: tokens per KV page: a power of two from 16 to 128.
    kv_cache_gib, num_kv_pages: the KV budget, absolute; at most one of them. With neither: on the CPU 1 GiB, at
        least one request of max_model_len if that is at most 4 GiB.
    kv_cache_dtype: "auto" (that of the activations); "fp8" comes later and is refused.
    load_format: "auto" reads the checkpoint, "dummy" makes seeded random weights of its config.
    device: "auto" takes CUDA where there is one. enforce_eager: no CUDA graphs.
    prefer: {operation: implementation} to force one. pipeline_depth: steps in flight, 1 or 2; None takes 1 on the CPU, else 2.
    seed: of the noise of requests that bring none, and of dummy weights. max_logprobs: the most alternatives a request may ask for.
    tokenizer: path of the tokenizer if it is not in the checkpoint. skip_tokenizer_init: token ids only.
    scheduling_policy: "fcfs", or "priority" (a lower number first).
    tensor_parallel_size: 1; more comes later and is refused. revision: of a Hub repository.
    """

    dtype: str = "auto"
    max_model_len: int | Literal["auto"] | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    enable_prefix_caching: bool = True
    page_size: int = 64
    kv_cache_gib: float | None = None
    num_kv_pages: int | None = None
    kv_cache_dtype: str = "auto"
    load_format: str = "auto"
    device: str = "auto"
    enforce_eager: bool = False
    prefer: dict[str, str] | None = None
    pipeline_depth: int | None = None
    seed: int = 0
    max_logprobs: int = 20
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    scheduling_policy: str = "fcfs"
    tensor_parallel_size: int = 1
    revision: str | None = None
