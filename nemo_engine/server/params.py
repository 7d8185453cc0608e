"""From a request's fields to ``SamplingParams``, and where each effective value came from.

Precedence: the request, the server's defaults, the model's generation_config.json, the defaults of the API.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nemo_engine.engine.input_processor import CHAT_TEMPERATURE
from nemo_engine.sampling_params import RepetitionDetection, RequestOutputKind, SamplingParams
from nemo_engine.server.errors import ApiError
from nemo_engine.server.prompts import structured_outputs
from nemo_engine.server.protocol import ChatRequest, CompletionRequest, GenerationRequest
from nemo_engine.server.service import Service
from nemo_engine.server.tools import ToolUse

_LIMITS = frozenset(("max_completion_tokens", "max_tokens"))
_DEFAULT_MAX_TOKENS = 16  # of /v1/completions; chat has the rest of the context
_PLAIN = frozenset((  # whose default is None, "not given"
    "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p",
    "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "prompt_logprobs", "logprob_token_ids",
    "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output", "stream_interval",
    "logit_bias", "allowed_token_ids", "bad_words", "speculation",
))  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Effective:
    """The parameters of a request, and who set each of those that are not the API's defaults."""

    params: SamplingParams
    origins: dict[str, str]

    def explain(self) -> dict[str, Any]:
        """``{name: {"value", "origin"}}`` of all parameters."""
        explained = {}
        for field in dataclasses.fields(self.params):
            if field.name not in ("output_kind", "extra_args"):
                value = getattr(self.params, field.name)
                if dataclasses.is_dataclass(value) and not isinstance(value, type):
                    value = dataclasses.asdict(value)
                explained[field.name] = {"value": value, "origin": self.origins.get(field.name, "default")}
        return explained


def effective(
    service: Service,
    request: GenerationRequest,
    num_prompt_tokens: int,
    *,
    asked_tokens: int | None,
    logprobs: int | None,
    tools: ToolUse | None = None,
) -> Effective:
    """The parameters of ``request`` for a prompt of that length. Raises ``ValueError`` or ``ApiError`` for bad ones.

    ``asked_tokens`` is the request's own limit of output tokens. It and every default are cut to what the context and
    the cache hold beside the prompt. The form of the answer is what the request asks for, or with ``tools`` that of
    their calls.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, defaults in (("model", service.model_defaults), ("server", service.server_defaults)):
        for name, value in defaults.items():
            values[name], origins[name] = value, origin
    for name in request.model_fields_set & _PLAIN:
        value = getattr(request, name)
        if value is not None:
            values[name], origins[name] = value, "request"
    if request.seed is not None and request.seed < -1:
        values["seed"] = request.seed % 2**64
    if logprobs is not None:
        values["logprobs"], origins["logprobs"] = logprobs, "request"
    if request.repetition_detection is not None:
        values["repetition_detection"] = RepetitionDetection(**request.repetition_detection.model_dump())
        origins["repetition_detection"] = "request"
    asked_form = structured_outputs(request)
    is_chat = isinstance(request, ChatRequest)
    if is_chat and "temperature" not in values:
        values["temperature"] = CHAT_TEMPERATURE
        origins["temperature"] = "model"
    _set_max_tokens(service, request, num_prompt_tokens, asked_tokens, values, origins)
    values["output_kind"] = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
    try:
        structured = asked_form if tools is None else tools.structured_outputs(asked_form)
        if structured is not None:
            values["structured_outputs"], origins["structured_outputs"] = structured, "request"
        params = service.engine.inputs.effective_params(SamplingParams(**values))
    except ValueError as error:
        message = str(error)
        if tools is not None and tools.has_grammar(asked_form) and message.startswith("structured_outputs"):
            message = tools.blamed(message, asked_form)
        raise ValueError(_in_words_of(request, message)) from None
    return Effective(params, origins)


def _in_words_of(request: GenerationRequest, message: str) -> str:
    """``message`` with the name of the field that the client sent: the engine knows ``response_format`` as
    ``structured_outputs``.
    """
    if request.response_format is None or request.response_format.get("type") == "text":
        return message
    form, kind = "response_format", request.response_format.get("type")
    schema = "response_format.json_schema.schema" if kind == "json_schema" else form
    for ours, theirs in (
        ("structured_outputs.json_object", form),
        ("structured_outputs.json", schema),
        ("structured_outputs", form),
    ):
        if message.startswith(ours):
            return theirs + message.removeprefix(ours)
    return message


def _set_max_tokens(
    service: Service,
    request: GenerationRequest,
    num_prompt_tokens: int,
    max_tokens: int | None,
    values: dict[str, Any],
    origins: dict[str, str],
) -> None:
    limit = service.options.max_completion_tokens
    if max_tokens is not None:
        values["max_tokens"], origins["max_tokens"] = max_tokens, "request"
        is_echo = isinstance(request, CompletionRequest) and bool(request.echo)
        for name in _LIMITS & type(request).model_fields.keys():  # if both are there, the first counts; check both
            value = getattr(request, name)
            if value is not None and value < 1 and not (value == 0 and is_echo):
                raise ApiError(400, f"{name} must be at least 1, got {value}", param=name)
            if value is not None and limit is not None and value > limit:
                raise ApiError(400, f"{name} must be at most {limit} on this server, got {value}", param=name)
    elif "max_tokens" not in values and isinstance(request, CompletionRequest):
        values["max_tokens"] = _DEFAULT_MAX_TOKENS
    room = service.engine.room_for(num_prompt_tokens)
    for upper, origin in ((limit, "server limit"), (room, "context")):
        if upper is not None and (values.get("max_tokens") is None or values["max_tokens"] > upper):
            values["max_tokens"], origins["max_tokens"] = upper, origin
