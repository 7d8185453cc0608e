"""The bodies of requests: OpenAI's fields and vLLM's extras, by the same names.

The engine checks the values by its own rules.

``fields`` has the rules for values that ask for nothing and for undeclared fields, also of objects inside a body.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, GetJsonSchemaHandler

from nemo_engine.option_names import advice
from nemo_engine.sampling_params import MAX_BAD_WORDS, MAX_N, MAX_STOP
from nemo_engine.server.errors import ApiError
from nemo_engine.server.fields import MESSAGE, RESPONSE_FORMAT, TOOL, Ignored
from nemo_engine.text.messages import asks_nothing

IGNORED_FIELDS_HEADER = "X-Ignored-Fields"

# Known fields that are not supported, each with values that ask for nothing beside those that always do.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": (),
    "documents": (),
    "early_stopping": (),
    "function_call": ("none",),
    "functions": (),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": (),
    "lora_request": (),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "reasoning": (),
    "reasoning_effort": ("none",),
    "return_token_offsets": (),
    "return_weight_versions": (),
    "session_id": (),
    "store": (),
    "suffix": (),
    "thinking_token_budget": (),
    "use_beam_search": (),
    "verbosity": ("medium",),
    "vllm_xargs": (),
    "web_search_options": (),
}
_OF_TEMPLATES = ("chat_template", "chat_template_kwargs", "documents")  # for chat; the first two for responses too
INSTEAD = {
    "functions": "tools",
    "function_call": "tool_choice",
}


class Limits:
    """Schema for the OpenAPI document of a field whose value the engine checks."""

    def __init__(self, **limits: Any) -> None:
        self._limits = limits

    def __get_pydantic_json_schema__(self, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema: dict[str, Any] = handler(core)
        for option in schema.get("anyOf", [schema]):
            if option.get("type") != "null":
                option.update(self._limits)
        return schema


class _First(FailFast):
    __hash__ = object.__hash__  # so that it can be part of a union


_T = TypeVar("_T")
Items = Annotated[list[_T], _First()]  # only the first wrong element is reported: there may be very many
_Some = Annotated[Items[_T], Limits(minItems=1)]
_Text = Annotated[str, Limits(minLength=1)]
_TokenId = Annotated[int, Limits(minimum=0)]
_SEED_SHOWN = Limits(
    minimum=-(2**62), maximum=2**63
)  # the document's numbers are floats: what lies within is taken in any case


class ApiRequest(BaseModel):
    """The base of all requests: it deals with fields that are not declared."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), strict=True)
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED
    instead: ClassVar[Mapping[str, str]] = INSTEAD

    inside: ClassVar[Mapping[str, Any]] = {}  # the names in objects of declared fields that are not models themselves

    @cached_property
    def _ignored(self) -> Ignored:  # a private attribute of pydantic's costs as much as all checks of a short request
        return Ignored()

    def model_post_init(self, _: Any) -> None:
        """Drop unknown fields of objects inside the body. Raises ``ApiError`` for a field that is refused there."""
        for name, names in self.inside.items():
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, self._ignored.known_part(value, names, name))

    def ignored_fields(self) -> list[str]:
        """Fields that had no effect. Raises ``ApiError`` for a known one that is not supported."""
        extra = self.__pydantic_extra__ or {}
        for name in self.unsupported.keys() & extra.keys():
            value = extra[name]
            if not asks_nothing(value) and not any(
                value == harmless and not isinstance(value, bool) for harmless in self.unsupported[name]
            ):
                hint = f"use {self.instead[name]}" if name in self.instead else advice(name, ())
                raise ApiError(
                    400,
                    f"{name} is not supported" + (f"; {hint}" if hint else ""),
                    param=name,
                    code="unsupported_parameter",
                )
        for name, value in extra.items():
            if self._ignored.is_full:  # a hostile body may have any number of fields
                break
            if name not in self.unsupported and not asks_nothing(value):
                self._ignored.add(name)
        return list(self._ignored.paths)


class StreamOptions(ApiRequest):
    """Options of a stream: a last event with the usage, or the usage in every event."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class RepetitionDetectionFields(BaseModel):
    """``SamplingParams.repetition_detection``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0


class SamplingRequest(ApiRequest):
    """The sampling fields of all requests that generate."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    stream: bool | None = False
    stop: _Text | Annotated[Items[_Text], Limits(maxItems=MAX_STOP)] | None = None
    seed: Annotated[int | None, _SEED_SHOWN] = Field(default=None, ge=-(2**63), le=2**64 - 1)
    temperature: Annotated[float | None, Limits(minimum=0, maximum=2)] = None
    top_p: Annotated[float | None, Limits(exclusiveMinimum=0, maximum=1)] = None
    frequency_penalty: Annotated[float | None, Limits(minimum=-2, maximum=2)] = None
    presence_penalty: Annotated[float | None, Limits(minimum=-2, maximum=2)] = None
    logit_bias: dict[str, Any] | None = None
    # vLLM's extras
    top_k: Annotated[int | None, Limits(minimum=-1)] = None
    min_p: Annotated[float | None, Limits(minimum=0, maximum=1)] = None
    repetition_penalty: Annotated[float | None, Limits(exclusiveMinimum=0)] = None
    stop_token_ids: Items[_TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int | None, Limits(minimum=0)] = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    bad_words: Annotated[Items[_Text] | None, Limits(maxItems=MAX_BAD_WORDS)] = None
    allowed_token_ids: Items[_TokenId] | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)
    truncation_side: Literal["left", "right"] | None = None
    repetition_detection: RepetitionDetectionFields | None = None
    structured_outputs: dict[str, Any] | None = None
    stream_interval: Annotated[int | None, Limits(minimum=1)] = None
    priority: int | None = None
    request_id: str | None = Field(default=None, min_length=1, max_length=256)
    cache_salt: str | None = Field(default=None, min_length=1, max_length=1024)
    return_tokens_as_token_ids: bool | None = False
    # ours
    speculation: bool | None = None
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    explain: bool | None = False


class GenerationRequest(SamplingRequest):
    """The fields that requests for completions and for chat share."""

    inside: ClassVar[Mapping[str, Any]] = {"response_format": RESPONSE_FORMAT}

    stream_options: StreamOptions | None = None
    n: Annotated[int | None, Limits(minimum=1, maximum=MAX_N)] = None
    response_format: dict[str, Any] | None = None
    logprob_token_ids: Items[_TokenId] | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = False

    def ignored_fields(self) -> list[str]:
        """The unknown fields, with those of ``stream_options``."""
        inner = [] if self.stream_options is None else self.stream_options.ignored_fields()
        return super().ignored_fields() + [f"stream_options.{name}" for name in inner]


class CompletionRequest(GenerationRequest):
    """The body of ``/v1/completions``."""

    prompt: _Text | _Some[_Text] | _Some[_TokenId] | _Some[_Some[_TokenId]] = Field(union_mode="left_to_right")
    max_tokens: Annotated[int | None, Limits(minimum=1)] = None
    logprobs: int | None = None
    echo: bool | None = False
    add_special_tokens: bool | None = True


class ChatRequest(GenerationRequest):
    """The body of ``/v1/chat/completions`` and its ``render``."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        name: values for name, values in UNSUPPORTED.items() if name not in _OF_TEMPLATES
    }
    inside: ClassVar[Mapping[str, Any]] = {"response_format": RESPONSE_FORMAT, "messages": [MESSAGE], "tools": [TOOL]}

    messages: _Some[dict[str, Any]]
    max_tokens: Annotated[int | None, Limits(minimum=1)] = None
    max_completion_tokens: Annotated[int | None, Limits(minimum=1)] = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: Items[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    add_special_tokens: bool | None = False
    echo: bool | None = False
    documents: Items[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    system_placement: Literal["last", "first"] | None = None
    strict: bool | None = False

    def ignored_fields(self) -> list[str]:
        """``name`` of messages too: the prompt's format has no place for it."""
        has_names = any(message.get("name") and message.get("role") != "tool" for message in self.messages)
        return super().ignored_fields() + ["messages[].name"] * has_names


class TokenizeRequest(ApiRequest):
    """The body of ``/tokenize``: a prompt, or messages as in chat."""

    inside: ClassVar[Mapping[str, Any]] = {"messages": [MESSAGE], "tools": [TOOL]}

    model: Annotated[str, Field(max_length=1024)] | None = None
    prompt: str | None = None
    messages: _Some[dict[str, Any]] | None = None
    tools: Items[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = True
    continue_final_message: bool | None = False
    return_token_strs: bool | None = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    system_placement: Literal["last", "first"] | None = None


class DetokenizeRequest(ApiRequest):
    """The body of ``/detokenize``."""

    model: Annotated[str, Field(max_length=1024)] | None = None
    tokens: Items[_TokenId]


class AbortRequest(ApiRequest):
    """The body of ``/abort``: the ids of responses, or ``request_id`` as it was sent."""

    request_id: Annotated[str, Field(max_length=1024)] | Annotated[Items[str], Field(max_length=4096)]
