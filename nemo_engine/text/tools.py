"""Tool definitions, OpenAI's: checks, the choice among them, and the JSON schema of the calls that the model may
write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nemo_engine.checks import check_unicode
from nemo_engine.text.messages import FUNCTION_NAME, refuse_unknown

MAX_SCHEMA_DEPTH = 64
_NO_PARAMETERS = {"type": "object", "properties": {}}
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # from names to schemas
_DATA = ("const", "enum", "default", "examples")  # values, not schemas


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may write text or calls ("auto"), no calls ("none"), or calls only ("required"); and the
    ``names`` that it may call.
    """

    mode: Literal["auto", "none", "required"]
    names: tuple[str, ...]


def check_tools(tools: object) -> list[dict[str, Any]]:
    """Check tool definitions; returns each as ``{"type": "function", "function": {"name", "description", "parameters",
    ...}}``.

    A name is 1 to 64 letters, digits, "_" and "-", and used once. ``parameters`` is the JSON schema of an object;
    without it, a function takes no arguments. ``strict`` may be set. Raises ``ValueError`` naming tool and field.
    """
    from mistral_common.utils.json_utils import validate_json_schema_by_draft7

    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise ValueError(f"tools must be a list of tool definitions, got {tools!r}")
    checked: list[dict[str, Any]] = []
    places: dict[str, int] = {}
    for index, tool in enumerate(tools):
        name = f"tools[{index}]"
        function = _check_function(tool, name)
        if function["name"] in places:
            raise ValueError(
                f"{name}.function.name must be used once, got {function['name']!r}, also that of "
                f"tools[{places[function['name']]}]"
            )
        places[function["name"]] = index
        try:
            _walk(function["parameters"], lambda ref: ref, 0)
            validate_json_schema_by_draft7(function["parameters"])
        except ValueError as error:
            raise ValueError(f"{name}.function.parameters is not a valid JSON schema: {error}") from None
        for field in ("description", "parameters"):
            check_unicode(f"{name}.function.{field}", json.dumps(function[field], ensure_ascii=False, default=str))
        checked.append({"type": "function", "function": function})
    return checked


def check_tool_choice(choice: object, tools: Sequence[Mapping[str, Any]] | None) -> ToolChoice:
    """OpenAI's ``tool_choice`` for checked ``tools``: a word, one function, or allowed tools with a mode.

    Without a choice, the mode is "auto" if there are tools. "any" means "required". Raises ``ValueError``.
    """
    known = dict.fromkeys(tool["function"]["name"] for tool in tools or ())
    if choice is None or choice == "auto":
        return ToolChoice("auto" if known else "none", tuple(known))
    if choice == "none":
        return ToolChoice("none", ())
    if not known:
        raise ValueError(f"tool_choice {choice!r} needs tools")
    if choice in ("required", "any"):
        return ToolChoice("required", tuple(known))
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if isinstance(choice, Mapping) and kind == "function":
        return ToolChoice("required", (_chosen_name(choice, "tool_choice", known),))
    if isinstance(choice, Mapping) and kind == "allowed_tools":
        allowed = choice.get("allowed_tools")
        chosen = allowed.get("tools") if isinstance(allowed, Mapping) else None
        if (
            not isinstance(allowed, Mapping)
            or not isinstance(chosen, Sequence)
            or isinstance(chosen, str)
            or not chosen
        ):
            raise ValueError(f"tool_choice.allowed_tools must have a mode and a list of tools, got {allowed!r}")
        if allowed.get("mode") not in ("auto", "required"):
            raise ValueError(f"tool_choice.allowed_tools.mode must be auto or required, got {allowed.get('mode')!r}")
        names = [_chosen_name(tool, f"tool_choice.allowed_tools.tools[{i}]", known) for i, tool in enumerate(chosen)]
        return ToolChoice(allowed["mode"], tuple(dict.fromkeys(names)))
    raise ValueError(
        'tool_choice must be "auto", "none", "required", {"type": "function", "function": {"name": ...}} or '
        f'{{"type": "allowed_tools", ...}}, got {choice!r}'
    )


def tool_call_schema(
    tools: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None, parallel: bool = True
) -> dict[str, Any]:
    """The JSON schema of the text that may follow [TOOL_CALLS]: a list of calls of ``tools``, or of ``names`` alone.

    The list has exactly one call unless ``parallel``. Definitions to which the schema of parameters refers are moved
    under ``$defs`` of the whole, as "function.definition". Raises ``ValueError`` for a name that no tool has, and for
    references that lead out of their schema or nowhere.
    """
    functions = {tool["function"]["name"]: tool["function"] for tool in check_tools(tools)}
    if names is not None and (isinstance(names, str) or not names):
        raise ValueError(f"names must be a non-empty list of function names, got {names!r}")
    for name in names or ():
        if name not in functions:
            raise ValueError(f"names must be among the tools' ({', '.join(functions)}), got {name!r}")
    definitions: dict[str, Any] = {}
    calls = []
    called = None if names is None else frozenset(names)
    for index, (name, function) in enumerate(functions.items()):
        if called is None or name in called:
            arguments = _reroot(function["parameters"], name, definitions, f"tools[{index}].function.parameters")
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": name}, "arguments": arguments},
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
            )
    schema: dict[str, Any] = {
        "type": "array",
        "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
        "minItems": 1,
    }
    if not parallel:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return schema


def _check_function(tool: object, name: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or not isinstance(tool.get("function"), Mapping):
        raise ValueError(f'{name} must be {{"type": "function", "function": {{"name": ...}}}}, got {tool!r}')
    refuse_unknown(tool, {"type", "function"}, name, "a tool")
    function = tool["function"]
    refuse_unknown(function, {"name", "description", "parameters", "strict"}, f"{name}.function", "a function")
    called, description, strict = (function.get(key) for key in ("name", "description", "strict"))
    if not isinstance(called, str) or not FUNCTION_NAME.fullmatch(called):
        raise ValueError(f"{name}.function.name must be 1 to 64 letters, digits, _ and -, got {called!r}")
    if description is not None and not isinstance(description, str):
        raise ValueError(f"{name}.function.description must be a string, got {description!r}")
    if strict is not None and not isinstance(strict, bool):
        raise ValueError(f"{name}.function.strict must be true or false, got {strict!r}")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ValueError(f"{name}.function.parameters must be the JSON schema of an object, got {parameters!r}")
    if not parameters:
        parameters = _NO_PARAMETERS
    if parameters.get("type", "object") != "object":
        raise ValueError(f'{name}.function.parameters.type must be "object", got {parameters["type"]!r}')
    checked = {"name": called, "description": description or "", "parameters": dict(parameters)}
    return checked if strict is None else {**checked, "strict": strict}


def _chosen_name(choice: object, name: str, known: Collection[str]) -> str:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    chosen = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(chosen, str) or chosen not in known:
        raise ValueError(f"{name}.function.name must be that of a tool ({', '.join(known)}), got {chosen!r}")
    return chosen


def _reroot(schema: Mapping[str, Any], function: str, definitions: dict[str, Any], where: str) -> dict[str, Any]:
    """``schema`` for a place within another one. The parts that its references name go to ``definitions``."""
    tables = {kind: schema.get(kind) for kind in ("$defs", "definitions") if isinstance(schema.get(kind), Mapping)}
    uses_root = False

    def move(ref: str) -> str:
        nonlocal uses_root
        if not _leads_somewhere(schema, ref):
            raise ValueError(f"{where}: $ref must lead to a part of this schema, got {ref!r}")
        kind, _, path = ref[2:].partition("/")
        if kind in tables and path:
            return f"#/$defs/{function}.{'' if kind == '$defs' else 'definitions.'}{path}"
        uses_root = True
        return f"#/$defs/{function}{ref[1:]}"

    body = _walk({key: value for key, value in schema.items() if key not in (*tables, "$schema", "$id")}, move, 0)
    for kind, table in tables.items():
        for key, value in (table or {}).items():
            definitions[f"{function}.{'' if kind == '$defs' else 'definitions.'}{key}"] = _walk(value, move, 0)
    if uses_root:
        definitions[function] = body
        return {"$ref": f"#/$defs/{function}"}
    moved: dict[str, Any] = body
    return moved


def _leads_somewhere(schema: Any, ref: str) -> bool:
    """Whether ``ref`` is "#" or "#/..." and names a part of ``schema``."""
    if ref != "#" and not ref.startswith("#/"):
        return False
    for step in ref[2:].split("/") if ref != "#" else ():
        step = step.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, Mapping) and step in schema:
            schema = schema[step]
        elif (
            isinstance(schema, Sequence)
            and not isinstance(schema, str)
            and step.isdecimal()
            and int(step) < len(schema)
        ):
            schema = schema[int(step)]
        else:
            return False
    return True


def _walk(schema: Any, move: Callable[[str], str], depth: int) -> Any:
    """A copy of ``schema`` in which every reference is replaced by the result of ``move``."""
    if depth > MAX_SCHEMA_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_SCHEMA_DEPTH}")
    if isinstance(schema, (list, tuple)):
        return [_walk(part, move, depth + 1) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    copy: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str):
            copy[key] = move(value)
        elif key in _MAPS and isinstance(value, Mapping):
            copy[key] = {name: _walk(part, move, depth + 1) for name, part in value.items()}
        else:
            copy[key] = value if key in _DATA else _walk(value, move, depth + 1)
    return copy
