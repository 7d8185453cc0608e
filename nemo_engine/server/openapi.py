"""The part of the OpenAPI document that goes beyond the types of fields: the content of conversations, tools and forms,
the fields that go together, and the limits of this server and its model.

Four kinds of rules cannot be said in JSON Schema, and stand in descriptions: that a number is written as an integer (1,
not 1.0), what compares two values (``min_tokens`` and ``max_tokens``, names that are used once), what depends on the
order of messages, and what a tokenizer or a compiler of grammars finds.
"""

from __future__ import annotations

from collections.abc import Mapping

from nemo_engine.sampling_params import MAX_BAD_WORD_LENGTH, MAX_LOGPROB_TOKEN_IDS, MAX_STOP, MAX_STOP_LENGTH
from nemo_engine.server.openapi_schemas import COMPONENTS, NOTHING, NULL, TEXT, Schema, list_of, or_null, ref
from nemo_engine.server.responses.protocol import INCLUDE_LOGPROBS, MAX_TOP_LOGPROBS
from nemo_engine.server.service import Service


def _given(name: str, value: Schema) -> Schema:
    """A schema for objects in which the field ``name`` is ``value``."""
    return {"required": [name], "properties": {name: value}}


def _if(condition: Schema, then: Schema) -> Schema:
    return {"if": condition, "then": then}


_TRUE: Schema = {"const": True}
_SOME: Schema = {"not": NULL}
_IS_TEXT_FORMAT: Schema = {
    "anyOf": [NULL, {"type": "object", "required": ["type"], "properties": {"type": {"const": "text"}}}]
}
# A generator of cases may multiply these out: five for a request are few enough, and four for one of chat, whose ``n``
# above 1 needs sampling too.
_TOGETHER: dict[str, list[Schema]] = {
    "GenerationRequest": [
        _if(_given("stream", _TRUE), {"properties": {"prompt_logprobs": NULL}})
        | {"else": {"properties": {"stream_options": NULL}}},
        _if(_given("structured_outputs", _SOME), {"properties": {"response_format": _IS_TEXT_FORMAT}}),
    ],
    "ChatRequest": [
        _if(_given("top_logprobs", _SOME), _given("logprobs", _TRUE)),
        _if(
            _given("tool_choice", {"anyOf": [{"enum": ["required", "any"]}, {"type": "object"}]}),
            _given("tools", {"type": "array", "minItems": 1}),
        ),
    ],
    "CompletionRequest": [
        _if(
            _given("n", {"type": "integer", "minimum": 2}),
            {"properties": {"temperature": {"not": {"type": "number", "exclusiveMaximum": 1e-5}}}},
        ),
        _if({"allOf": [_given("echo", _TRUE), _given("stream", _TRUE)]}, {"properties": {"logprobs": NULL}}),
        _if(_given("max_tokens", {"const": 0}), _given("echo", _TRUE)),
    ],
    "ResponsesRequest": [
        _if(
            _given("top_logprobs", {"type": "integer", "minimum": 1}),
            _given("include", {"type": "array", "contains": {"const": INCLUDE_LOGPROBS}}),
        ),
        _if(
            _given("tool_choice", {"anyOf": [{"enum": ["required", "any"]}, {"type": "object"}]}),
            _given("tools", {"type": "array", "minItems": 1}),
        ),
        _if(
            _given("structured_outputs", _SOME),
            {"properties": {"text": {"anyOf": [NULL, {"type": "object", "properties": {"format": _IS_TEXT_FORMAT}}]}}},
        ),
        _if(_given("stream_options", _SOME), _given("stream", _TRUE)),
    ],
    "TokenizeRequest": [
        {"oneOf": [_given("prompt", TEXT), _given("messages", {"type": "array"})]},
    ],
}
_KINDS = {
    "ChatRequest": ("GenerationRequest", "ChatRequest"),
    "CompletionRequest": ("GenerationRequest", "CompletionRequest"),
    "TokenizeRequest": ("TokenizeRequest",),
    "ResponsesRequest": ("ResponsesRequest",),
}


_STREAMED = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


def describe(document: Schema, service: Service) -> None:
    """Add to ``document``, which FastAPI made, the rules that FastAPI does not know."""
    schemas: dict[str, Schema] = document["components"]["schemas"]
    for name, schema in schemas.items():
        for field, form in _fields(service, name).items():
            if field in schema.get("properties", {}):
                known = schema["properties"][field]
                schema["properties"][field] = form | {key: known[key] for key in ("title", "default") if key in known}
        rules = [rule for kind in _KINDS.get(name, ()) for rule in _TOGETHER[kind]]
        if rules:
            schema["allOf"] = rules
        _say_vocabulary(schema, service.engine.model_config.vocab_size)
    schemas.update(COMPONENTS)
    for path in _STREAMED:
        answers = document["paths"][path]["post"]["responses"]
        answers["200"]["content"]["text/event-stream"] = {"schema": {}}


def _fields(service: Service, kind: str) -> Mapping[str, Schema]:
    """The schemas of fields of a request of ``kind``, with the limits of this server."""
    max_tokens = service.options.max_completion_tokens
    limit: Schema = {} if max_tokens is None else {"maximum": max_tokens}
    tokens = {"type": ["integer", "null"], "minimum": 1, **limit}
    most_logprobs = service.engine.config.max_logprobs
    count = {"type": ["integer", "null"], "minimum": -1}
    if most_logprobs != -1:
        count = {"type": ["integer", "null"], "minimum": 0, "maximum": most_logprobs}
    text = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
    fields: dict[str, Schema] = {
        "model": {"enum": [*service.model_names, None]},
        "n": {"type": ["integer", "null"], "minimum": 1, "maximum": service.options.max_completions},
        "stop": {"anyOf": [text, list_of(text, maxItems=MAX_STOP), NULL]},
        "bad_words": or_null(list_of({"type": "string", "minLength": 1, "maxLength": MAX_BAD_WORD_LENGTH})),
        "truncate_prompt_tokens": {"anyOf": [{"const": -1}, {"type": "integer", "minimum": 1}, NULL]},
        "max_tokens": tokens if kind == "ChatRequest" else tokens | {"minimum": 0},
        "max_completion_tokens": tokens,
        "max_output_tokens": tokens,
        "prompt_logprobs": count,
        "logprob_token_ids": or_null(list_of({"type": "integer", "minimum": 0}, maxItems=MAX_LOGPROB_TOKEN_IDS)),
        "allowed_token_ids": or_null(list_of({"type": "integer", "minimum": 0}, minItems=1)),
        "structured_outputs": or_null(ref("StructuredOutputs")),
        "seed": {"type": ["integer", "null"], "minimum": -(2**63), "maximum": 2**64 - 1},
        "logit_bias": or_null(
            {
                "type": "object",
                "description": "Numbers beyond 100 and -100 count as these.",
                "propertyNames": {
                    "pattern": f"^0*({ids_below(service.engine.model_config.vocab_size)})$",
                    "maxLength": 20,
                },
                "additionalProperties": {"type": "number"},
            }
        ),
    }
    if service.engine.config.scheduling_policy != "priority":
        fields["priority"] = {"enum": [0, None]}
    if kind == "CompletionRequest":
        fields["logprobs"] = count
    if kind in ("CompletionRequest", "ChatRequest"):
        fields["response_format"] = or_null(ref("ResponseFormat"))
    if kind in ("ChatRequest", "TokenizeRequest"):
        fields["messages"] = list_of(ref("Message"), minItems=1)
        fields["tools"] = or_null(list_of(ref("Tool")))
    if kind == "ChatRequest":
        fields |= {
            "tool_choice": or_null(ref("ToolChoice")),
            "top_logprobs": count,
            "add_special_tokens": {"enum": [False, None]},
        }
    if kind == "TokenizeRequest":
        fields["messages"] = or_null(fields["messages"])
    if kind == "TextOptions":
        fields |= {"verbosity": {"enum": ["medium", "", None]}, "format": or_null(ref("TextFormat"))}
    if kind == "ResponsesRequest":
        fields |= {
            "input": {"anyOf": [TEXT, list_of(ref("InputItem"), minItems=1)]},
            "tools": or_null(list_of(ref("InputTool"))),
            "tool_choice": or_null(ref("InputToolChoice")),
            "top_logprobs": {
                "type": ["integer", "null"],
                "minimum": 0,
                "maximum": min(MAX_TOP_LOGPROBS, most_logprobs) if most_logprobs != -1 else MAX_TOP_LOGPROBS,
            },
            "truncation": {"enum": ["disabled", None]},
            "reasoning": or_null({"type": "object", "properties": {"effort": {"anyOf": [{"const": "none"}, NOTHING]}}}),
        }
    if kind == "RepetitionDetectionFields":
        fields |= {
            name: {"type": "integer", "minimum": 0} for name in ("max_pattern_size", "min_pattern_size", "min_count")
        }
    return fields


def ids_below(number: int) -> str:
    """A regular expression for the integers from 0 to ``number`` - 1, without leading zeros but for 0."""
    digits = str(number - 1)
    parts = [f"[1-9][0-9]{{{length - 1}}}" for length in range(2, len(digits))] + ["[0-9]"] * (len(digits) > 1)
    for at, digit in enumerate(digits):
        least = 1 if at == 0 and len(digits) > 1 else 0
        if int(digit) > least:
            parts.append(
                f"{digits[:at]}[{least}-{int(digit) - 1}]" + f"[0-9]{{{len(digits) - at - 1}}}" * (at < len(digits) - 1)
            )
    return "|".join([*parts, digits])


def _say_vocabulary(schema: Schema, vocab_size: int) -> None:
    """Write the range of token ids into ``schema``."""
    for field in schema.get("properties", {}).values():
        for option in field.get("anyOf", [field]):
            items = option.get("items", {})
            items = items.get("items", items)  # several prompts: lists in a list
            if items.get("type") == "integer" and "minimum" in items:
                items["maximum"] = vocab_size - 1
