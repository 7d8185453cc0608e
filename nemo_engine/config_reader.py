"""Reading the values of ``config.json`` and ``params.json``, and refusing what would make them another architecture.

Each refusal is one line that says what the checkpoint is and what to do instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from nemo_engine.checks import check_int, check_positive

T = TypeVar("T")

DEFAULT_CONTEXT_CAP = 131072  # tokens; NeMo was trained for this, whatever its config claims

# No model comes near these. The sampler's sums have room for as many ids.
MAX_LAYERS, MAX_VOCAB, MAX_WIDTH = 4096, 1 << 22, 1 << 20

# Without biases and scaling, Llama is the same computation. The last two are saved without a head, which tied
# embeddings do not need.
_ARCHITECTURES = ("MistralForCausalLM", "LlamaForCausalLM", "MistralModel", "LlamaModel")
_INSTEAD = "this engine computes Mistral NeMo's architecture alone: serve it with vLLM, SGLang or transformers"
_OTHERS = {
    "mixtral": "Mixtral is a mixture of experts",
    "qwen": "Qwen has biases or norms in its attention",
    "gemma": "Gemma has norms, scales and an activation that differ",
    "phi": "Phi has fused projections and scaled rotary frequencies",
    "nemotron": "Nemotron has another activation and other norms",
    "deepseek": "DeepSeek has latent attention and experts",
    "gptoss": "gpt-oss is a mixture of experts",
    "mistral3": "Mistral 3 reads images beside text",
    "pixtral": "Pixtral reads images beside text",
    "llava": "LLaVA models read images beside text",
    "mamba": "Mamba has no attention",
}


class ConfigReader:
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
        check_int(f"{self.source}: {key}", value, low=1)
        return check_int(f"{self.source}: {key}", value, low=1, high=high)

    def number(self, key: str) -> float:
        value = self.data.get(key)
        if value is None:
            raise ValueError(f"{self.source} has no {key}")
        return check_positive(f"{self.source}: {key}", value)

    def context(self, *keys: str) -> int:
        key = next((key for key in keys if self.data.get(key) is not None), None)
        return DEFAULT_CONTEXT_CAP if key is None else check_int(f"{self.source}: {key}", self.data[key], low=1)

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
            check_int(f"{self.source}: {key}", token_id, low=0, high=vocab_size - 1)
        return list(ids)

    def refuse(
        self, key: str, *, unless: tuple[Any, ...] = (False,), because: str = "is not supported", hint: str = ""
    ) -> None:
        """Raise if ``key`` is set to anything but null or one of ``unless``; ``hint`` says what to do instead."""
        value = self.data.get(key)
        if value is not None and not any(value == allowed for allowed in unless):
            raise ValueError(f"{self.source}: {key} {because}, got {value!r}" + (f": {hint}" if hint else ""))

    def build(self, cls: type[T], **fields: Any) -> T:
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None


def refuse_other_architecture(read: ConfigReader) -> None:
    """Raise unless ``config.json`` describes exactly what this engine computes."""
    architectures = read.first("architectures", default=_ARCHITECTURES[:1])
    if not isinstance(architectures, (list, tuple)) or not set(_ARCHITECTURES).intersection(map(str, architectures)):
        raise ValueError(
            "config.json: architectures must hold MistralForCausalLM, got "
            f"{architectures!r}{_what_it_is(architectures)}"
        )
    kind = read.first("model_type", default="mistral")
    if kind not in ("mistral", "llama"):
        raise ValueError(f"config.json: model_type must be mistral, got {kind!r}{_what_it_is([kind])}")
    read.refuse(
        "sliding_window",
        because="is not supported: attention is over the whole context, as in Mistral NeMo (null)",
        hint="serve a model with a window with vLLM or transformers, or take one without (Mistral 7B v0.3 rather than "
        "v0.1)",
    )
    read.refuse("hidden_act", unless=("silu",), because="must be silu")
    for key in ("attention_bias", "mlp_bias", "num_local_experts", "num_experts", "n_routed_experts", "q_lora_rank",
                "kv_lora_rank", "attn_logit_softcapping", "final_logit_softcapping", "use_qk_norm",
                "qk_norm"):  # fmt: skip
        read.refuse(key, hint=_INSTEAD)
    for key in ("partial_rotary_factor", "embedding_multiplier", "residual_multiplier", "logits_scaling"):
        read.refuse(key, unless=(1,), hint=_INSTEAD)
    layer_types = read.first("layer_types", default=[])
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ValueError(f"config.json: layer_types must all be full_attention, got {layer_types!r}: {_INSTEAD}")


def _what_it_is(architectures: Any) -> str:
    """What is known of another architecture, and what to do with it."""
    named = str(architectures[0] if isinstance(architectures, (list, tuple)) and architectures else "")
    plain = named.lower().replace("_", "").replace("-", "")
    known = next((f": {text}, and" for prefix, text in _OTHERS.items() if plain.startswith(prefix)), ":")
    return f"{known} {_INSTEAD}"


def read_rope_theta(read: ConfigReader) -> float:
    """The rotary base: at the top level, or in ``rope_parameters`` as newer transformers write it.

    Scaling is refused.
    """
    thetas = {} if read.first("rope_theta") is None else {"rope_theta": read.number("rope_theta")}
    for key in ("rope_parameters", "rope_scaling"):
        block = read.first(key, default={})
        if not isinstance(block, dict):
            raise ValueError(f"config.json: {key} must be an object, got {block!r}")
        inner = ConfigReader(block, f"config.json: {key}")
        kind = inner.first("rope_type", "type")
        if kind not in (None, "default"):
            raise ValueError(
                f"config.json: {key} of type {kind!r} is not supported: its rotary frequencies are scaled for longer "
                "texts, and only "
                "'default', without scaling, is computed here: serve it with vLLM or transformers"
            )
        inner.refuse("partial_rotary_factor", unless=(1,))
        unknown = set(block) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if unknown:
            raise ValueError(f"config.json: {key} has what is not supported: {', '.join(sorted(unknown))}")
        if inner.first("rope_theta") is not None:
            thetas[f"{key}.rope_theta"] = inner.number("rope_theta")
    if not thetas and read.first("model_type") == "llama":
        return 10000.0  # LlamaConfig's default, which old files leave out
    if not thetas:
        raise ValueError("config.json has no rope_theta, neither at the top level nor in rope_parameters")
    if len(set(thetas.values())) > 1:
        raise ValueError(f"config.json: rope_theta is given twice and differs: {thetas!r}")
    return next(iter(thetas.values()))
