"""What requests may hold: OpenAI's fields and vLLM's extras, by the same names. Values are checked by the engine's own rules.

A field that is known and cannot be honoured is refused by name, unless its value asks for nothing; a field that nobody knows is
listed in the response's header ``X-Ignored-Fields``.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from nemo_engine.server.errors import ApiError

IGNORED_FIELDS_HEADER = "X-Ignored-Fields"
MAX_IGNORED = 32  # names that it lists

_NOTHING: tuple[Any, ...] = (None,)
# Known fields that are not supported, each with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": _NOTHING,
    "best_of": (None, 1),
    "chat_template": _NOTHING,
    "chat_template_kwargs": (None, {}),
    "documents": (None, []),
    "early_stopping": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": _NOTHING,
    "guided_decoding_backend": _NOTHING,
    "guided_grammar": _NOTHING,
    "guided_json": _NOTHING,
    "guided_regex": _NOTHING,
    "guided_whitespace_pattern": _NOTHING,
    "kv_transfer_params": _NOTHING,
    "length_penalty": (None, 1.0),
    "logits_processors": (None, []),
    "lora_request": _NOTHING,
    "media_io_kwargs": _NOTHING,
    "mm_processor_kwargs": _NOTHING,
    "modalities": (None, ["text"]),
    "prediction": _NOTHING,
    "prompt_embeds": _NOTHING,
    "reasoning": _NOTHING,
    "reasoning_effort": (None, "none"),
    "return_token_offsets": (None, False),
    "return_weight_versions": (None, False),
    "session_id": _NOTHING,
    "store": (None, False),
    "suffix": (None, ""),
    "thinking_token_budget": _NOTHING,
    "use_beam_search": (None, False),
    "verbosity": (None, "medium"),
    "vllm_xargs": (None, {}),
    "web_search_options": _NOTHING,
}
INSTEAD = {
    "guided_json": "structured_outputs",
    "guided_regex": "structured_outputs",
    "guided_choice": "structured_outputs",
    "guided_grammar": "structured_outputs",
    "functions": "tools",
    "function_call": "tool_choice",
}
# Taken by OpenAI for its own bookkeeping; here they have no effect, and the header says so.
_WITHOUT_EFFECT = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "user",
}


class ApiRequest(BaseModel):
    """What all requests share: the treatment of fields that are not declared."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED
    instead: ClassVar[Mapping[str, str]] = INSTEAD

    def ignored_fields(self) -> list[str]:
        """Fields that had no effect. Raises ``ApiError`` for a known one that is not supported."""
        extra = self.__pydantic_extra__ or {}
        for name in self.unsupported.keys() & extra.keys():
            value, harmless = extra[name], self.unsupported[name]
            if not any(value == nothing and type(value) is type(nothing) for nothing in harmless) and not (
                isinstance(value, (int, float)) and value in harmless and value is not True
            ):
                hint = f"; use {self.instead[name]}" if name in self.instead else ""
                raise ApiError(400, f"{name} is not supported{hint}", param=name, code="unsupported_parameter")
        told = (
            name
            for name, value in extra.items()
            if name not in self.unsupported and (value is not None or name not in _WITHOUT_EFFECT)
        )
        return list(islice(told, MAX_IGNORED))  # a hostile body may hold any number


class StreamOptions(ApiRequest):
    """Options of a stream: a last event with the usage, or the usage in every event."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class RepetitionDetectionFields(BaseModel):
    """``SamplingParams.repetition_detection``."""

    model_config = ConfigDict(extra="forbid")

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0


class SamplingRequest(ApiRequest):
    """What all requests that generate share."""

    model: str | None = None
    stream: bool | None = False
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**64 - 1)
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # vLLM's extras
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    truncation_side: Literal["left", "right"] | None = None
    repetition_detection: RepetitionDetectionFields | None = None
    structured_outputs: dict[str, Any] | None = None
    stream_interval: int | None = None
    priority: int | None = None
    request_id: str | None = Field(default=None, min_length=1, max_length=256)
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)
    return_tokens_as_token_ids: bool | None = False
    # ours
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    explain: bool | None = False


class GenerationRequest(SamplingRequest):
    """What requests for completions and for chat share."""

    stream_options: StreamOptions | None = None
    n: int | None = None
    response_format: dict[str, Any] | None = None
    logprob_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = False

    def ignored_fields(self) -> list[str]:
        """Those of ``stream_options`` too."""
        inner = {} if self.stream_options is None else self.stream_options.__pydantic_extra__ or {}
        return super().ignored_fields() + [f"stream_options.{name}" for name in inner]


class CompletionRequest(GenerationRequest):
    """The body of ``/v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(union_mode="left_to_right")
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = False
    add_special_tokens: bool | None = True


class ChatRequest(GenerationRequest):
    """The body of ``/v1/chat/completions`` and its ``render``."""

    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    add_special_tokens: bool | None = False
    echo: bool | None = False
    system_placement: Literal["last", "first"] | None = None
    strict: bool | None = False

    def ignored_fields(self) -> list[str]:
        """``name`` of messages too: the prompt's format has no place for it."""
        has_names = any(message.get("name") and message.get("role") != "tool" for message in self.messages)
        return super().ignored_fields() + ["messages[].name"] * has_names


class TokenizeRequest(ApiRequest):
    """The body of ``/tokenize``: a prompt, or messages as in chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    return_token_strs: bool | None = False
    system_placement: Literal["last", "first"] | None = None


class DetokenizeRequest(ApiRequest):
    """The body of ``/detokenize``."""

    model: str | None = None
    tokens: list[int]


class AbortRequest(ApiRequest):
    """The body of ``/abort``: the ids of responses, or ``request_id`` as it was sent."""

    request_id: str | list[str]
