"""From the fields of a request to prompts as token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastapi import Request

from nemo_engine.engine.input_processor import EncodedPrompt
from nemo_engine.server.errors import ApiError
from nemo_engine.server.protocol import ChatRequest, CompletionRequest, GenerationRequest
from nemo_engine.server.service import Service
from nemo_engine.server.tools import ToolUse
from nemo_engine.text.messages import asks_nothing, refuse_unknown

_READ_BY_TEMPLATES = frozenset(("reasoning", "reasoning_content", "thinking"))  # by some
_SCHEMA_KEYS = {"name", "schema", "strict", "description"}


def encode_prompts(service: Service, http: Request, request: CompletionRequest) -> list[EncodedPrompt]:
    """The prompts of a completion request, one or several."""
    prompt = request.prompt
    many: list[Any] = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
    if not many or many == [[]]:
        raise ApiError(400, "prompt must not be empty", param="prompt")
    service.check_admission(len(many) * (request.n or 1), service.turn_of(http))
    return [
        _finish(service, request, _encode(service, request, item, index, len(many))) for index, item in enumerate(many)
    ]


def _encode(
    service: Service, request: CompletionRequest, prompt: str | list[int], index: int, count: int
) -> EncodedPrompt:
    name = f"prompt[{index}]" if count > 1 else "prompt"
    inputs = service.engine.inputs
    if not isinstance(prompt, str):
        return EncodedPrompt(None, inputs.check_ids(prompt, name))
    is_cut = request.truncate_prompt_tokens is not None
    if not prompt or not (is_cut or request.add_special_tokens is False):
        return inputs.encode(prompt, name)
    tokenizer = service.tokenizer
    if is_cut:
        inputs.check_size(prompt, name)
    else:
        inputs.check_length(prompt, name)
    ids = tokenizer.encode(prompt, bos=request.add_special_tokens is not False)
    return EncodedPrompt(prompt, inputs.check_ids(ids, name))


def encode_conversation(service: Service, request: ChatRequest, tools: ToolUse | None = None) -> EncodedPrompt:
    """The conversation of a chat request; ``tools`` None reads them from it."""
    renderer = service.renderer(request.chat_template)
    tools = tools or ToolUse.of(request, renderer)
    for name in _READ_BY_TEMPLATES - renderer.fields:
        for index, message in enumerate(request.messages):
            if not asks_nothing(message.get(name)):
                place = f"messages[{index}].{name}"
                raise ApiError(400, f"{place} is not supported", param=place, code="unsupported_parameter")
    (prompt,) = service.engine.inputs.encode_conversations(
        [request.messages],
        tools=tools.shown(),
        documents=request.documents,
        chat_template=request.chat_template or None,
        chat_template_kwargs=request.chat_template_kwargs,
        add_generation_prompt=request.add_generation_prompt is not False and not request.continue_final_message,
        continue_final_message=bool(request.continue_final_message),
        strict=bool(request.strict),
        system_placement=request.system_placement or service.options.system_placement,
        start_tool_calls=tools.is_forced,
    )
    return _finish(service, request, prompt)


def _finish(service: Service, request: GenerationRequest, prompt: EncodedPrompt) -> EncodedPrompt:
    """Truncate the prompt, check the server's limit, and add the salt."""
    max_tokens = request.truncate_prompt_tokens
    if max_tokens is not None:
        if max_tokens == 0:
            raise ApiError(
                400,
                "truncate_prompt_tokens must be at least 1, or -1 for the context's length, got 0",
                param="truncate_prompt_tokens",
            )
        max_tokens = service.engine.max_model_len - 1 if max_tokens == -1 else max_tokens
        if len(prompt.token_ids) > max_tokens:
            ids = prompt.token_ids
            truncated = ids[:max_tokens] if request.truncation_side == "right" else ids[-max_tokens:]
            prompt = replace(prompt, text=None, token_ids=truncated)
    limit = service.options.max_prompt_tokens
    if limit is not None and len(prompt.token_ids) > limit:
        raise ApiError(
            400,
            f"the prompt has {len(prompt.token_ids)} tokens, and this server takes at most {limit}",
            param="prompt" if isinstance(request, CompletionRequest) else "messages",
            code="context_length_exceeded",
        )
    return replace(prompt, cache_salt=request.cache_salt) if request.cache_salt else prompt


def structured_outputs(request: GenerationRequest) -> object | None:
    """The form of the answer that the request asks for, as ``SamplingParams.structured_outputs`` takes it."""
    form = request.response_format
    if form is None:
        return request.structured_outputs
    kind = form.get("type")
    known = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    if kind in ("text", "json_object", "json_schema"):
        refuse_unknown(form, known, "response_format", f"a format of type {kind}")
    options: dict[str, Any] | None
    if kind == "text":
        options = None
    elif kind == "json_object":
        options = {"json_object": True}
    elif kind == "json_schema":
        json_schema = form.get("json_schema")
        schema = json_schema.get("schema") if isinstance(json_schema, Mapping) else None
        if isinstance(json_schema, Mapping):
            refuse_unknown(json_schema, _SCHEMA_KEYS, "response_format.json_schema", "a schema")
        if schema is None:
            raise ApiError(
                400, "response_format.json_schema.schema is missing", param="response_format.json_schema.schema"
            )
        if not isinstance(schema, (Mapping, bool)):
            raise ApiError(
                400, "response_format.json_schema.schema must be an object", param="response_format.json_schema.schema"
            )
        options = {"json": schema if isinstance(schema, Mapping) else ({} if schema else {"not": {}})}
    else:
        raise ApiError(
            400,
            f"response_format.type must be text, json_object or json_schema, got {kind!r}",
            param="response_format.type",
            code="unsupported_parameter" if kind == "structural_tag" else "invalid_value",
        )
    if options is not None and request.structured_outputs is not None:
        raise ApiError(400, "response_format and structured_outputs exclude each other", param="response_format")
    return options if options is not None else request.structured_outputs
