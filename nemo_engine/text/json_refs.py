"""``SchemaIndex``: where each part of a JSON schema stands, what references lead to, and which keywords are what they
must be.

Draft 2020-12, with what earlier drafts wrote otherwise. Keywords that no draft knows, and those that only describe, are
ignored, as the standard has it. A keyword that cannot be kept is refused by its name and place.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

Schema = dict[str, Any] | bool

MAX_COUNT = 10**9  # of characters, items or properties in a bound
TYPES = ("null", "boolean", "number", "string", "array", "object")
_VALUES = ("enum", "const", "default", "examples")  # keywords with values, not schemas
# Keywords that restrict a value in a way that is not followed, and the values with which they do not.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "not": (False,),
    "if": (),
    "contains": (),
    "uniqueItems": (False,),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "$dynamicRef": (),
    "$recursiveRef": (),
    "x-guidance": (),
}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return _is_number(value) and value == int(value) and 0 <= value <= MAX_COUNT  # type: ignore[call-overload, operator]


def _is_schema(value: object) -> bool:
    return isinstance(value, (dict, bool))


def _are_schemas(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(_is_schema, value))


def _are_named_schemas(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_schema, value.values()))


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_types(value: object) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name in (*TYPES, "integer") for name in names)


_A_COUNT = (_is_count, f"an integer of 0 to {MAX_COUNT}")
_A_NUMBER = (_is_number, "a number")
_A_SCHEMA = (_is_schema, "a schema: an object, true or false")
_SCHEMAS = (_are_schemas, "a list of at least one schema")
_NAMED_SCHEMAS = (_are_named_schemas, "an object of schemas")
_A_STRING = (lambda value: isinstance(value, str), "a string")
_SHAPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_are_types, f"{', '.join(TYPES)} or integer, or a list of these"),
    "enum": (lambda value: isinstance(value, list), "a list"),
    "minLength": _A_COUNT, "maxLength": _A_COUNT, "minItems": _A_COUNT, "maxItems": _A_COUNT,
    "minProperties": _A_COUNT, "maxProperties": _A_COUNT, "minimum": _A_NUMBER, "maximum": _A_NUMBER,
    "exclusiveMinimum": (lambda value: _is_number(value) or isinstance(value, bool), "a number"),
    "exclusiveMaximum": (lambda value: _is_number(value) or isinstance(value, bool), "a number"),
    "multipleOf": (lambda value: _is_number(value) and value > 0, "a number greater than 0"),
    "pattern": _A_STRING, "format": _A_STRING, "$ref": _A_STRING,
    "properties": _NAMED_SCHEMAS, "patternProperties": _NAMED_SCHEMAS, "dependentSchemas": _NAMED_SCHEMAS,
    "additionalProperties": _A_SCHEMA, "propertyNames": _A_SCHEMA, "additionalItems": _A_SCHEMA,
    "items": (lambda value: _is_schema(value) or isinstance(value, list) and all(map(_is_schema, value)), _A_SCHEMA[1]),
    "prefixItems": _SCHEMAS, "allOf": _SCHEMAS, "anyOf": _SCHEMAS, "oneOf": _SCHEMAS,
    "required": (_are_names, "a list of names"),
    "dependentRequired": (
        lambda value: isinstance(value, dict) and all(map(_are_names, value.values())), "an object of lists of names"
    ),
    "dependencies": (
        lambda value: isinstance(value, dict) and all(_are_names(one) or _is_schema(one) for one in value.values()),
        "an object of schemas or lists of names",
    ),
}  # fmt: skip


def _step(name: object) -> str:
    return str(name).replace("~", "~0").replace("/", "~1")


class SchemaIndex:
    """Knows every part of one schema by identity; the schema must not change."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._places: dict[int, str] = {}
        self._resources: dict[int, dict[str, Any]] = {}  # what "#" means in each part
        self._named: dict[tuple[int, str], dict[str, Any]] = {}  # anchors, by resource
        self._ids: dict[str, dict[str, Any]] = {"": root}
        self._checked: set[int] = set()
        open_values: list[tuple[Any, str, dict[str, Any]]] = [(root, "#", root)]
        while open_values:
            value, place, resource = open_values.pop()
            if isinstance(value, list):
                open_values += [(child, f"{place}/{index}", resource) for index, child in enumerate(value)]
            elif isinstance(value, dict):
                name = value.get("$id")
                if isinstance(name, str):
                    resource = value
                    self._ids.setdefault(name.rstrip("#"), value)
                self._places[id(value)], self._resources[id(value)] = place, resource
                if isinstance(value.get("$anchor"), str):
                    self._named[id(resource), value["$anchor"]] = value
                open_values += [
                    (child, f"{place}/{_step(key)}", resource) for key, child in value.items() if key not in _VALUES
                ]

    def place(self, schema: dict[str, Any], keyword: str) -> str:
        """The keyword and where it stands, for an error."""
        return f"{keyword} at {self._places.get(id(schema), '#')}"

    def adopt(self, flat: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
        """``made``, which was made out of a part, stands where that does. Keep it alive."""
        self._places[id(flat)], self._resources[id(flat)] = self._places[id(schema)], self._resources[id(schema)]
        return flat

    def resolve(self, schema: dict[str, Any]) -> Schema:
        """What the ``$ref`` of ``schema`` leads to; ``ValueError`` if that is not in this schema."""
        ref: str = schema["$ref"]
        name, _, fragment = ref.partition("#")
        resource = self._ids.get(name) if name else self._resources[id(schema)]
        if resource is None:
            raise self._lost(schema, ref, "is not a part of this schema, and others are not fetched")
        if fragment and not fragment.startswith("/"):
            anchored = self._named.get((id(resource), unquote(fragment)))
            if anchored is None:
                raise self._lost(schema, ref, "does not exist: no $anchor has this name")
            return anchored
        target: Any = resource
        for step in unquote(fragment).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and step in target:
                target = target[step]
            elif isinstance(target, list) and step.isdecimal() and int(step[:9]) < len(target):
                target = target[int(step)]
            else:
                raise self._lost(schema, ref, "does not exist")
        if not _is_schema(target) or isinstance(target, dict) and id(target) not in self._places:
            raise self._lost(schema, ref, "is no schema")
        found_schema: Schema = target
        return found_schema

    def _lost(self, schema: dict[str, Any], ref: str, why: str) -> ValueError:
        return ValueError(f"{self.place(schema, '$ref')}: {ref[:200]!r} {why}")

    def check(self, schema: dict[str, Any]) -> None:
        """Refuse keywords of ``schema`` itself that have no proper value, or cannot be kept."""
        if id(schema) in self._checked:
            return
        for keyword, value in schema.items():
            if keyword in _SHAPES and not _SHAPES[keyword][0](value):
                shown = json.dumps(value, ensure_ascii=False)
                shown = shown if len(shown) <= 100 else shown[:100] + "..."
                raise ValueError(f"{self.place(schema, keyword)} must be {_SHAPES[keyword][1]}, got {shown}")
            if keyword in _UNSUPPORTED and not any(value is ok or value == ok == {} for ok in _UNSUPPORTED[keyword]):
                self._refuse(schema, keyword)
        self._checked.add(id(schema))

    def _refuse(self, schema: dict[str, Any], keyword: str) -> None:
        if keyword == "if" and not {"then", "else"} & set(schema):
            return
        if keyword == "uniqueItems" and schema.get("maxItems") in (0, 1):
            return
        if keyword == "x-guidance":
            raise ValueError("x-guidance is not supported: use whitespace_pattern or disable_any_whitespace")
        raise ValueError(f"{self.place(schema, keyword)} is not supported")
