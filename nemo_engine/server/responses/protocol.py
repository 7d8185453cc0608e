"""What a request to ``/v1/responses`` may hold: OpenAI's fields for text and functions, and the extras of the chat
route.

Values are checked where the chat route checks them; here stands what only this API has. Nothing is stored, so ``store:
true`` and what refers to an earlier response are refused: the conversation is sent as ``input`` each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, WithJsonSchema

from nemo_engine.server.errors import ApiError
from nemo_engine.server.fields import INPUT_ITEM, INPUT_TOOL, TEXT_FORMAT
from nemo_engine.server.protocol import INSTEAD, UNSUPPORTED, ApiRequest, Items, Limits, SamplingRequest
from nemo_engine.text.messages import asks_nothing

INCLUDE_LOGPROBS = "message.output_text.logprobs"
# What answers of other models and of built-in tools have: there is nothing of the kind to include.
_NOTHING_TO_INCLUDE = {
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
}
_INCLUDED = [INCLUDE_LOGPROBS, *sorted(_NOTHING_TO_INCLUDE)]
MAX_TOP_LOGPROBS = 20
_MAX_METADATA = 16  # pairs
_MAX_METADATA_KEY = 64  # characters
_MAX_METADATA_VALUE = 512
_METADATA = WithJsonSchema(
    {
        "type": "object",
        "maxProperties": _MAX_METADATA,
        "propertyNames": {"maxLength": _MAX_METADATA_KEY},
        "additionalProperties": {"type": "string", "maxLength": _MAX_METADATA_VALUE},
    }
)

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    name: UNSUPPORTED[name] for name in UNSUPPORTED if name not in ("chat_template", "chat_template_kwargs")
} | {
    "access_programs": (),
    "background": (),
    "background_options": (),
    "context_management": (),
    "conversation": (),
    "enable_response_messages": (),
    "image": (),
    "logprob_token_ids": (),
    "logprobs": (),
    "max_completion_tokens": (),
    "max_tokens": (),
    "max_tool_calls": (),
    "messages": (),
    "moderation": (),
    "n": (1,),
    "previous_input_messages": (),
    "previous_response_id": (),
    "prompt": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "response_format": (),
    "return_token_ids": (),
}
_INSTEAD = INSTEAD | {
    "conversation": "input",
    "logprobs": f'include: ["{INCLUDE_LOGPROBS}"]',
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "previous_response_id": "input",
    "prompt": "input",
    "response_format": "text.format",
    "store": "input: responses are not stored, send the conversation with each request",
}


class TextOptions(ApiRequest):
    """The field ``text``: the form of the answer."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    inside: ClassVar[Mapping[str, Any]] = {"format": TEXT_FORMAT}

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponseStreamOptions(ApiRequest):
    """Options of a stream."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    include_obfuscation: Annotated[bool | None, Limits(enum=[False])] = False


class ResponsesRequest(SamplingRequest):
    """The body of ``/v1/responses``."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = _UNSUPPORTED
    instead: ClassVar[Mapping[str, str]] = _INSTEAD
    inside: ClassVar[Mapping[str, Any]] = {"input": [INPUT_ITEM], "tools": [INPUT_TOOL]}

    input: str | Annotated[Items[dict[str, Any]], Limits(minItems=1)] = Field(union_mode="left_to_right")
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: TextOptions | None = None
    tools: Items[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    top_logprobs: int | None = None
    include: Annotated[Items[Annotated[str, Limits(enum=_INCLUDED)]], Field(max_length=16)] | None = None
    truncation: str | None = None
    metadata: Annotated[dict[str, Any], _METADATA] | None = None
    reasoning: dict[str, Any] | None = None
    stream_options: ResponseStreamOptions | None = None
    system_placement: Literal["last", "first"] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def ignored_fields(self) -> list[str]:
        """Fields that had no effect, those of ``text`` and ``stream_options`` among them; ``ApiError`` for what is
        refused.
        """
        ignored = super().ignored_fields()
        for name in ("text", "stream_options"):
            inner: ApiRequest | None = getattr(self, name)
            if inner is not None:
                ignored += [f"{name}.{field}" for field in inner.ignored_fields()]
        self._refuse_unsupported()
        ignored += [
            f"reasoning.{field}" for field, value in (self.reasoning or {}).items() if field != "effort" and value
        ]
        return ignored + [
            f"include[{index}]" for index, field in enumerate(self.include or ()) if field in _NOTHING_TO_INCLUDE
        ]

    @property
    def has_logprobs(self) -> bool:
        """Whether the log-probabilities of the answer's text are asked for."""
        return INCLUDE_LOGPROBS in (self.include or ())

    def check(self) -> None:
        """Raise ``ApiError`` for values that are out of this API's limits."""
        if not self.input and not isinstance(self.input, str):
            raise ApiError(400, "input must not be an empty list", param="input")
        if self.top_logprobs is not None:
            if not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
                raise ApiError(
                    400,
                    f"top_logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {self.top_logprobs}",
                    param="top_logprobs",
                )
            if self.top_logprobs and not self.has_logprobs:
                raise ApiError(400, f'top_logprobs needs include: ["{INCLUDE_LOGPROBS}"]', param="top_logprobs")
        if self.truncation not in (None, "auto", "disabled"):
            raise ApiError(400, f'truncation must be "disabled", got {self.truncation!r}', param="truncation")
        check_metadata(self.metadata)

    def _refuse_unsupported(self) -> None:
        refused = ""
        for index, included in enumerate(self.include or ()):
            if included != INCLUDE_LOGPROBS and included not in _NOTHING_TO_INCLUDE:
                refused, detail = f"include[{index}]", f"{included!r}; it takes {INCLUDE_LOGPROBS!r}"
        if self.truncation == "auto":
            refused, detail = "truncation", '"auto"; send less, or use truncate_prompt_tokens'
        effort = (self.reasoning or {}).get("effort")
        if not asks_nothing(effort) and effort != "none":
            refused, detail = "reasoning.effort", f"{effort!r}: this model does not reason"
        if self.text is not None and self.text.verbosity not in (None, "", "medium"):
            refused, detail = "text.verbosity", f"{self.text.verbosity!r}"
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            refused, detail = "stream_options.include_obfuscation", "true"
        if refused:
            raise ApiError(400, f"{refused} is not supported as {detail}", param=refused, code="unsupported_parameter")


def check_metadata(metadata: Mapping[str, Any] | None) -> None:
    """Raise ``ApiError`` for what no request may keep with it."""
    pairs = metadata or {}
    if len(pairs) > _MAX_METADATA:
        raise ApiError(400, f"metadata must have at most {_MAX_METADATA} pairs, got {len(pairs)}", param="metadata")
    for key, value in pairs.items():
        if not isinstance(value, str):
            raise ApiError(400, f"metadata.{key[:200]} must be a string, got {value!r}", param=f"metadata.{key[:200]}")
        for what, text, limit in (("key", key, _MAX_METADATA_KEY), ("value", value, _MAX_METADATA_VALUE)):
            if len(text) > limit:
                raise ApiError(
                    400,
                    f"metadata must have {what}s of at most {limit} characters, got one of {len(text)}",
                    param="metadata",
                )
