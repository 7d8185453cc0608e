"""What the OpenAPI document says of requests beyond their fields' types: what conversations, tools and forms hold, which fields go
together, and the limits of this server and its model.

Four kinds of rules cannot be said in JSON Schema, and stand in descriptions: that a number is written as an integer (1, not 1.0), what
compares two values (``min_tokens`` and ``max_tokens``, names that are used once), what depends on the order of messages, and what
a tokenizer or a compiler of grammars finds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nemo_engine.sampling_params import MAX_BAD_WORD_LENGTH, MAX_LOGPROB_TOKEN_IDS, MAX_STOP, MAX_STOP_LENGTH
from nemo_engine.server.fields import MESSAGE, REFUSED
from nemo_engine.server.responses.protocol import INCLUDE_LOGPROBS, MAX_TOP_LOGPROBS
from nemo_engine.server.service import Service

Schema = dict[str, Any]

_NULL: Schema = {"type": "null"}
_TEXT: Schema = {"type": "string"}
_ANY: Schema = {}
_NOTHING: Schema = {"$ref": "#/components/schemas/Nothing"}
_NAME: Schema = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}
_BOOLEAN: Schema = {"type": ["boolean", "null"]}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, _NULL]}


def _object(required: Iterable[str], refused: Iterable[str] = (), **properties: Schema) -> Schema:
    """An object whose fields ``refused`` must ask for nothing."""
    made: Schema = {"type": "object", "required": list(required), "properties": properties}
    if refused:
        made["patternProperties"] = {f"^({'|'.join(sorted(refused))})$": _NOTHING}
    return made


def _list(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def _part(kind: str, field: str) -> Schema:
    others = {"text", "refusal", "image_url", "input_audio", "file"} - {field}
    return _object(["type", field], others, **{"type": {"const": kind}, field: _TEXT})


_REFUSED_OF_MESSAGES = {name for name, known in MESSAGE.items() if known is REFUSED}
_OF_ASSISTANTS = {"tool_calls", "refusal", "annotations", "parsed", "prefix"}
_TEXTS = {"anyOf": [_TEXT, _list(_part("text", "text"))]}


def _message(role: Schema, required: Iterable[str], refused: set[str], **properties: Schema) -> Schema:
    return _object(
        ["role", *required],
        _REFUSED_OF_MESSAGES | refused,
        role=role,
        name={"type": ["string", "null"]},
        **properties,
    )


_OF_CALLS = {"call_id", "name", "arguments", "parsed_arguments"}


def _input_part(field: str) -> Schema:
    kinds = ["refusal"] if field == "refusal" else ["input_text", "output_text", "text"]
    return _object(["type", field], ["image_url", "file_id", "detail"], **{"type": {"enum": kinds}, field: _TEXT})


_CALL = _object(
    ["id", "function"],
    id={"type": "string", "minLength": 1},
    type={"enum": ["function", None]},
    function=_object(
        ["name"], name=_NAME, arguments={"anyOf": [_TEXT, {"type": "object"}, _NULL], "description": "JSON text, or an object"}
    ),
)  # fmt: skip
_COMPONENTS: dict[str, Schema] = {
    "Nothing": {
        "description": "A value that asks for nothing, as if the field were left out.",
        "anyOf": [
            {"enum": [None, False, ""]},
            _list(_NOTHING, maxItems=64),
            {"type": "object", "additionalProperties": _NOTHING, "maxProperties": 64},
        ],
    },
    "Message": {
        "description": "A tool's message answers a call of the assistant's turn before it. The last message that is not the system's is "
        "the user's or a tool's, or an assistant's that is continued.",
        "anyOf": [
            _message(
                {"enum": ["system", "developer", "user"]}, ["content"], _OF_ASSISTANTS | {"tool_call_id"}, content=_TEXTS
            ),
            _message(
                {"const": "assistant"}, [], {"tool_call_id"},
                content={"anyOf": [_TEXT, _NULL, _list({"anyOf": [_part("text", "text"), _part("refusal", "refusal")]})]},
                refusal={"type": ["string", "null"]},
                tool_calls=_or_null(_list(_CALL)),
                prefix=_BOOLEAN,
            ),
            _message(
                {"const": "tool"}, ["content", "tool_call_id"], _OF_ASSISTANTS,
                content=_TEXTS, tool_call_id={"type": "string", "minLength": 1},
            ),
        ],
    },
    "Parameters": {
        "description": "The JSON schema of an object, of draft 7.",
        "type": "object",
        "properties": {"type": {"const": "object"}},
    },
    "Tool": _object(
        ["type", "function"],
        type={"const": "function"},
        function=_object(
            ["name"], name=_NAME, description={"type": ["string", "null"]}, strict=_BOOLEAN, parameters=_or_null(_ref("Parameters"))
        ),
    ),
    "ResponseFormat": {
        "anyOf": [
            _object(
                ["type"], ["json_schema", "schema", "grammar", "regex", "structures", "triggers"],
                type={"enum": ["text", "json_object"]},
            ),
            _object(
                ["type", "json_schema"], ["schema", "grammar", "regex", "structures", "triggers"],
                type={"const": "json_schema"},
                json_schema=_object(["schema"], schema={"type": ["object", "boolean"]}),
            ),
        ]
    },
    "StructuredOutputs": {
        "description": "Exactly one of json, regex, choice, grammar and json_object.",
        "anyOf": [
            {"type": "object", "additionalProperties": False, "required": [name], "properties": {name: schema, **more}}
            for name, schema, more in (
                ("json", {"type": "object"}, {"disable_any_whitespace": {"type": "boolean"}}),
                ("json_object", {"const": True}, {"disable_any_whitespace": {"type": "boolean"}}),
                ("regex", {"type": "string", "format": "rust-regex", "maxLength": 65536}, {}),
                ("grammar", {"type": "string", "format": "lark", "maxLength": 65536}, {}),
                ("choice", _list(_TEXT, minItems=1), {}),
            )
        ],
    },
    "ToolChoice": {
        "anyOf": [
            {"enum": ["auto", "none", "required", "any"]},
            _object(["type", "function"], type={"const": "function"}, function=_object(["name"], name=_NAME)),
            _object(
                ["type", "allowed_tools"], type={"const": "allowed_tools"},
                allowed_tools=_object(
                    ["mode", "tools"], mode={"enum": ["auto", "required"]},
                    tools=_list(_object(["type", "function"], type={"const": "function"}, function=_object(["name"], name=_NAME)), minItems=1),
                ),
            ),
        ]
    },
    # Of /v1/responses
    "InputItem": {
        "description": "An output answers a call of the assistant's turn before it. The last item that is not the system's is the user's or "
        "an output.",
        "anyOf": [
            _object(
                ["role", "content"], _OF_CALLS | {"output"}, type={"anyOf": [{"const": "message"}, _NOTHING]},
                role={"enum": ["user", "assistant", "system", "developer"]},
                content={"anyOf": [_TEXT, _list({"anyOf": [_input_part("text"), _input_part("refusal")]})]},
            ),
            _object(
                ["type", "call_id", "name"], {"role", "content", "output", "phase"}, type={"const": "function_call"},
                call_id={"type": "string", "minLength": 1}, name=_NAME, arguments={"type": ["string", "object", "null"]},
            ),
            _object(
                ["type", "call_id", "output"], {"role", "content", "phase", "arguments", "parsed_arguments"},
                type={"const": "function_call_output"}, call_id={"type": "string", "minLength": 1},
                output={"anyOf": [_TEXT, _list(_input_part("text"))]},
            ),
        ],
    },
    "InputTool": _object(
        ["type", "name"], ["function", "output_schema"],
        type={"const": "function"}, name=_NAME, description={"type": ["string", "null"]}, strict=_BOOLEAN,
        parameters=_or_null(_ref("Parameters")), defer_loading=_NOTHING, **{"async": _NOTHING},
        allowed_callers={"anyOf": [{"const": ["direct"]}, _NOTHING]},
    ),
    "InputToolChoice": {
        "anyOf": [
            {"enum": ["auto", "none", "required", "any"]},
            _object(["type", "name"], type={"const": "function"}, name=_NAME),
            _object(
                ["type", "mode", "tools"], type={"const": "allowed_tools"}, mode={"enum": ["auto", "required"]},
                tools=_list(_object(["type", "name"], type={"const": "function"}, name=_NAME), minItems=1),
            ),
        ]
    },
    "TextFormat": {
        "anyOf": [
            _object(["type"], ["name", "schema", "strict", "description"], type={"enum": ["text", "json_object"]}),
            _object(["type", "name", "schema"], type={"const": "json_schema"}, name=_NAME, schema={"type": ["object", "boolean"]}),
        ]
    },
}  # fmt: skip


def _given(name: str, value: Schema) -> Schema:
    """That a field is there, and is ``value``."""
    return {"required": [name], "properties": {name: value}}


def _if(condition: Schema, then: Schema) -> Schema:
    return {"if": condition, "then": then}


_TRUE: Schema = {"const": True}
_SOME: Schema = {"not": _NULL}
_IS_TEXT_FORMAT: Schema = {
    "anyOf": [_NULL, {"type": "object", "required": ["type"], "properties": {"type": {"const": "text"}}}]
}
# A generator of cases may multiply these out: five for a request are few enough, and four for one of chat, whose ``n`` above 1 needs sampling too.
_TOGETHER: dict[str, list[Schema]] = {
    "GenerationRequest": [
        _if(_given("stream", _TRUE), {"properties": {"prompt_logprobs": _NULL}}) | {"else": {"properties": {"stream_options": _NULL}}},
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
        _if(_given("n", {"type": "integer", "minimum": 2}), {"properties": {"temperature": {"not": {"type": "number", "exclusiveMaximum": 1e-5}}}}),
        _if({"allOf": [_given("echo", _TRUE), _given("stream", _TRUE)]}, {"properties": {"logprobs": _NULL}}),
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
            {"properties": {"text": {"anyOf": [_NULL, {"type": "object", "properties": {"format": _IS_TEXT_FORMAT}}]}}},
        ),
        _if(_given("stream_options", _SOME), _given("stream", _TRUE)),
    ],
    "TokenizeRequest": [
        {"oneOf": [_given("prompt", _TEXT), _given("messages", {"type": "array"})]},
    ],
}  # fmt: skip
_KINDS = {"ChatRequest": ("GenerationRequest", "ChatRequest"), "CompletionRequest": ("GenerationRequest", "CompletionRequest"),
          "TokenizeRequest": ("TokenizeRequest",), "ResponsesRequest": ("ResponsesRequest",)}  # fmt: skip


_STREAMED = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


def describe(document: Schema, service: Service) -> None:
    """Add to ``document``, of FastAPI, what it does not know."""
    schemas: dict[str, Schema] = document["components"]["schemas"]
    for name, schema in schemas.items():
        for field, said in _fields(service, name).items():
            if field in schema.get("properties", {}):
                known = schema["properties"][field]
                schema["properties"][field] = said | {key: known[key] for key in ("title", "default") if key in known}
        rules = [rule for kind in _KINDS.get(name, ()) for rule in _TOGETHER[kind]]
        if rules:
            schema["allOf"] = rules
        _say_vocabulary(schema, service.engine.model_config.vocab_size)
    schemas.update(_COMPONENTS)
    for path in _STREAMED:
        answers = document["paths"][path]["post"]["responses"]
        answers["200"]["content"]["text/event-stream"] = {"schema": {}}


def _fields(service: Service, kind: str) -> Mapping[str, Schema]:
    """Of the fields of a request of ``kind``, what they hold on this server."""
    most = service.options.max_completion_tokens
    limit: Schema = {} if most is None else {"maximum": most}
    tokens = {"type": ["integer", "null"], "minimum": 1, **limit}
    most_logprobs = service.engine.config.max_logprobs
    count = {"type": ["integer", "null"], "minimum": -1}
    if most_logprobs != -1:
        count = {"type": ["integer", "null"], "minimum": 0, "maximum": most_logprobs}
    text = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
    fields: dict[str, Schema] = {
        "model": {"enum": [*service.model_names, None]},
        "n": {"type": ["integer", "null"], "minimum": 1, "maximum": service.options.max_completions},
        "stop": {"anyOf": [text, _list(text, maxItems=MAX_STOP), _NULL]},
        "bad_words": _or_null(_list({"type": "string", "minLength": 1, "maxLength": MAX_BAD_WORD_LENGTH})),
        "truncate_prompt_tokens": {"anyOf": [{"const": -1}, {"type": "integer", "minimum": 1}, _NULL]},
        "max_tokens": tokens if kind == "ChatRequest" else tokens | {"minimum": 0},
        "max_completion_tokens": tokens,
        "max_output_tokens": tokens,
        "prompt_logprobs": count,
        "logprob_token_ids": _or_null(_list({"type": "integer", "minimum": 0}, maxItems=MAX_LOGPROB_TOKEN_IDS)),
        "allowed_token_ids": _or_null(_list({"type": "integer", "minimum": 0}, minItems=1)),
        "structured_outputs": _or_null(_ref("StructuredOutputs")),
        "seed": {"type": ["integer", "null"], "minimum": -(2**63), "maximum": 2**64 - 1},
        "logit_bias": _or_null(
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
        fields["response_format"] = _or_null(_ref("ResponseFormat"))
    if kind in ("ChatRequest", "TokenizeRequest"):
        fields["messages"] = _list(_ref("Message"), minItems=1)
        fields["tools"] = _or_null(_list(_ref("Tool")))
    if kind == "ChatRequest":
        fields |= {
            "tool_choice": _or_null(_ref("ToolChoice")),
            "top_logprobs": count,
            "add_special_tokens": {"enum": [False, None]},
        }
    if kind == "TokenizeRequest":
        fields["messages"] = _or_null(fields["messages"])
    if kind == "TextOptions":
        fields |= {"verbosity": {"enum": ["medium", "", None]}, "format": _or_null(_ref("TextFormat"))}
    if kind == "ResponsesRequest":
        fields |= {
            "input": {"anyOf": [_TEXT, _list(_ref("InputItem"), minItems=1)]},
            "tools": _or_null(_list(_ref("InputTool"))),
            "tool_choice": _or_null(_ref("InputToolChoice")),
            "top_logprobs": {
                "type": ["integer", "null"],
                "minimum": 0,
                "maximum": min(MAX_TOP_LOGPROBS, most_logprobs) if most_logprobs != -1 else MAX_TOP_LOGPROBS,
            },
            "truncation": {"enum": ["disabled", None]},
            "reasoning": _or_null(
                {"type": "object", "properties": {"effort": {"anyOf": [{"const": "none"}, _NOTHING]}}}
            ),
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
    """Say which token ids there are."""
    for field in schema.get("properties", {}).values():
        for one in field.get("anyOf", [field]):
            items = one.get("items", {})
            if items.get("type") == "integer" and "minimum" in items:
                items["maximum"] = vocab_size - 1
