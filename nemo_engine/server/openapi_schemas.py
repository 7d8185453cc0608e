"""The OpenAPI document's schemas of conversations, tools and forms, which FastAPI does not know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nemo_engine.server.fields import MESSAGE, REFUSED

Schema = dict[str, Any]

NULL: Schema = {"type": "null"}
TEXT: Schema = {"type": "string"}
_ANY: Schema = {}
NOTHING: Schema = {"$ref": "#/components/schemas/Nothing"}
_NAME: Schema = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}
_BOOLEAN: Schema = {"type": ["boolean", "null"]}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}


def _object(required: Iterable[str], refused: Iterable[str] = (), **properties: Schema) -> Schema:
    """An object whose fields ``refused`` must ask for nothing."""
    schema: Schema = {"type": "object", "required": list(required), "properties": properties}
    if refused:
        schema["patternProperties"] = {f"^({'|'.join(sorted(refused))})$": NOTHING}
    return schema


def list_of(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def _part(kind: str, field: str) -> Schema:
    others = {"text", "refusal", "image_url", "input_audio", "file"} - {field}
    return _object(["type", field], others, **{"type": {"const": kind}, field: TEXT})


_REFUSED_OF_MESSAGES = {name for name, known in MESSAGE.items() if known is REFUSED}
_OF_ASSISTANTS = {"tool_calls", "refusal", "annotations", "parsed", "prefix"}
_TEXTS = {"anyOf": [TEXT, list_of(_part("text", "text"))]}


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
    return _object(["type", field], ["image_url", "file_id", "detail"], **{"type": {"enum": kinds}, field: TEXT})


_CALL = _object(
    ["id", "function"],
    id={"type": "string", "minLength": 1},
    type={"enum": ["function", None]},
    function=_object(
        ["name"],
        name=_NAME,
        arguments={"anyOf": [TEXT, {"type": "object"}, NULL], "description": "JSON text, or an object"},
    ),
)
COMPONENTS: dict[str, Schema] = {
    "Nothing": {
        "description": "A value that asks for nothing, as if the field were left out.",
        "anyOf": [
            {"enum": [None, False, ""]},
            list_of(NOTHING, maxItems=64),
            {"type": "object", "additionalProperties": NOTHING, "maxProperties": 64},
        ],
    },
    "Message": {
        "description": "A tool's message answers a call of the assistant's turn before it. The last message that is "
        "not the system's is "
        "the user's or a tool's, or an assistant's that is continued.",
        "anyOf": [
            _message(
                {"enum": ["system", "developer", "user"]},
                ["content"],
                _OF_ASSISTANTS | {"tool_call_id"},
                content=_TEXTS,
            ),
            _message(
                {"const": "assistant"},
                [],
                {"tool_call_id"},
                content={
                    "anyOf": [TEXT, NULL, list_of({"anyOf": [_part("text", "text"), _part("refusal", "refusal")]})]
                },
                refusal={"type": ["string", "null"]},
                tool_calls=or_null(list_of(_CALL)),
                prefix=_BOOLEAN,
            ),
            _message(
                {"const": "tool"},
                ["content", "tool_call_id"],
                _OF_ASSISTANTS,
                content=_TEXTS,
                tool_call_id={"type": "string", "minLength": 1},
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
            ["name"],
            name=_NAME,
            description={"type": ["string", "null"]},
            strict=_BOOLEAN,
            parameters=or_null(ref("Parameters")),
        ),
    ),
    "ResponseFormat": {
        "anyOf": [
            _object(
                ["type"],
                ["json_schema", "schema", "grammar", "regex", "structures", "triggers"],
                type={"enum": ["text", "json_object"]},
            ),
            _object(
                ["type", "json_schema"],
                ["schema", "grammar", "regex", "structures", "triggers"],
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
                ("choice", list_of(TEXT, minItems=1), {}),
            )
        ],
    },
    "ToolChoice": {
        "anyOf": [
            {"enum": ["auto", "none", "required", "any"]},
            _object(["type", "function"], type={"const": "function"}, function=_object(["name"], name=_NAME)),
            _object(
                ["type", "allowed_tools"],
                type={"const": "allowed_tools"},
                allowed_tools=_object(
                    ["mode", "tools"],
                    mode={"enum": ["auto", "required"]},
                    tools=list_of(
                        _object(
                            ["type", "function"], type={"const": "function"}, function=_object(["name"], name=_NAME)
                        ),
                        minItems=1,
                    ),
                ),
            ),
        ]
    },
    # Of /v1/responses
    "InputItem": {
        "description": "An output answers a call of the assistant's turn before it. The last item that is not the "
        "system's is the user's or "
        "an output.",
        "anyOf": [
            _object(
                ["role", "content"],
                _OF_CALLS | {"output"},
                type={"anyOf": [{"const": "message"}, NOTHING]},
                role={"enum": ["user", "assistant", "system", "developer"]},
                content={"anyOf": [TEXT, list_of({"anyOf": [_input_part("text"), _input_part("refusal")]})]},
            ),
            _object(
                ["type", "call_id", "name"],
                {"role", "content", "output", "phase"},
                type={"const": "function_call"},
                call_id={"type": "string", "minLength": 1},
                name=_NAME,
                arguments={"type": ["string", "object", "null"]},
            ),
            _object(
                ["type", "call_id", "output"],
                {"role", "content", "phase", "arguments", "parsed_arguments"},
                type={"const": "function_call_output"},
                call_id={"type": "string", "minLength": 1},
                output={"anyOf": [TEXT, list_of(_input_part("text"))]},
            ),
        ],
    },
    "InputTool": _object(
        ["type", "name"],
        ["function", "output_schema"],
        type={"const": "function"},
        name=_NAME,
        description={"type": ["string", "null"]},
        strict=_BOOLEAN,
        parameters=or_null(ref("Parameters")),
        defer_loading=NOTHING,
        **{"async": NOTHING},
        allowed_callers={"anyOf": [{"const": ["direct"]}, NOTHING]},
    ),
    "InputToolChoice": {
        "anyOf": [
            {"enum": ["auto", "none", "required", "any"]},
            _object(["type", "name"], type={"const": "function"}, name=_NAME),
            _object(
                ["type", "mode", "tools"],
                type={"const": "allowed_tools"},
                mode={"enum": ["auto", "required"]},
                tools=list_of(_object(["type", "name"], type={"const": "function"}, name=_NAME), minItems=1),
            ),
        ]
    },
    "TextFormat": {
        "anyOf": [
            _object(["type"], ["name", "schema", "strict", "description"], type={"enum": ["text", "json_object"]}),
            _object(
                ["type", "name", "schema"],
                type={"const": "json_schema"},
                name=_NAME,
                schema={"type": ["object", "boolean"]},
            ),
        ]
    },
}
