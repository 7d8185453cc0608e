"""Random JSON schemas, of everything that the compiler keeps and some that it refuses, and random regular
expressions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

_BIG = [2**53, 2**53 + 1, 2**63 - 1, -(2**63), 2**64, 10**25, 1234567890123456789, -(2**53) - 1]
_NAMES = [
    "a",
    "b",
    "name",
    'q"\\',
    "é",
    "",
    "x-1",
    "x-2",
    "a/b",
    "~",
    "日本",
    "😀",
    "score",
    "n\nl",
    "$ref",
    "\x7f",
    "\u2028",
]
_PATTERNS = [
    "^[^\"]*$", r"^[^\\]{1,5}$", "^[a-z]+$", r"^\d{3}-\d{4}$", "abc", "^x-", "-[0-9]$", r"^\w+@\w+\.[a-z]{2,3}$",
    r"^[^/\\:*?\"<>|]+$", "^(yes|no)?$", r"^\S+$", r"\s", "^.$", "^.{2,4}$", r"^[\w.]*$", r"^[^\w]$", r"^\D*$", "^a|b$",
    "(^a$)|(^b+$)", "^[é日]+$", "^[^a-z😀]{0,3}$", r"^\u0041\x42$", "^$", "", r"^(?=.*\d)(?=.*[a-z])[a-z\d]{4,8}$",
    r"^(?!foo)[a-z]{3}$", r"^[\t\n]+$", "(?i)^ab?k$", r"^(a|b)*a(a|b){3}$", "[\\x00-\\x1f]", r"^[^\x00-\x1f]{2}$",
]  # fmt: skip
_FORMATS = [
    "date",
    "time",
    "date-time",
    "duration",
    "email",
    "hostname",
    "ipv4",
    "ipv6",
    "uuid",
    "uri",
    "password",
    "zork",
]


class Schemas:
    """Makes random schemas, of everything that the compiler keeps and some that it refuses."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._definitions: dict[str, Any] = {}

    def make(self) -> Any:
        """One schema."""
        self._definitions = {}
        names = ["node", "leaf"][: self._rng.choice([0, 0, 1, 2])]
        self._refs = [f"#/$defs/{name}" for name in names]
        schema = self._schema(self._rng.choice([1, 2, 2, 3]))
        for name in names:
            self._definitions[name] = self._schema(1)
        if isinstance(schema, dict) and names:
            schema["$defs"] = self._definitions
        return schema

    def _one_in(self, count: int) -> bool:
        return self._rng.randrange(count) == 0

    def _schema(self, depth: int) -> Any:
        rng = self._rng
        if self._one_in(40):
            return rng.choice([True, {}, False])
        kinds: list[Callable[[int], Any]] = [
            self._number,
            self._number,
            self._string,
            self._string,
            self._values,
            self._bare,
        ]
        if depth > 0:
            kinds += [
                self._object,
                self._object,
                self._object,
                self._array,
                self._array,
                self._union,
                self._all,
                self._types,
            ]
        schema = rng.choice(kinds)(depth - 1)
        if isinstance(schema, dict):
            if self._refs and depth > 0 and self._one_in(6):
                schema = rng.choice([{"$ref": rng.choice(self._refs)}, {**schema, "$ref": rng.choice(self._refs)}])
            if self._one_in(5):
                schema |= {"title": "T", "description": "d", "default": None, "deprecated": True, "x-order": 1}
            if self._one_in(60):
                schema[rng.choice(["not", "contains", "if", "unevaluatedProperties"])] = rng.choice(
                    [{"type": "string"}, False]
                )
                schema["then"] = {"type": "null"}
        return schema

    def _bare(self, depth: int) -> Any:
        return {"type": self._rng.choice(["null", "boolean", "string", "integer", "number", "object", "array"])}

    def _a_number(self, is_integer: bool) -> int | float:
        rng = self._rng
        small = rng.choice([0, 1, -1, rng.randint(-9, 9), rng.randint(-2000, 2000), 10 ** rng.randint(1, 9)])
        if is_integer:
            return rng.choice([small, small, rng.choice(_BIG) + rng.randint(-2, 2)])
        return rng.choice(
            [small, 0.5, 0.1, -0.25, 1e-7, 3.14, 1.0, 1e20, -1e15, rng.uniform(-1, 1), round(rng.uniform(-99, 99), 2)]
        )

    def _number(self, depth: int) -> Any:
        rng, is_integer = self._rng, self._rng.random() < 0.6
        schema: dict[str, Any] = {"type": "integer" if is_integer else "number"}
        bounds = sorted([self._a_number(is_integer and not self._one_in(8)) for _ in range(2)])
        if rng.random() < 0.6:
            schema[rng.choice(["minimum", "exclusiveMinimum"])] = bounds[0]
        if rng.random() < 0.6:
            schema[rng.choice(["maximum", "exclusiveMaximum"])] = bounds[1]
        if self._one_in(4):
            schema["multipleOf"] = rng.choice(
                [1, 2, 3, 4, 5, 7, 10, 12, 25, 60, 0.5, 0.25, 0.1, 0.01, 1.5, 2.5, 0.3, 97, -1]
            )
        if self._one_in(6):
            schema["minimum"] = schema["maximum"] = rng.choice(_BIG)
        return schema

    def _string(self, depth: int) -> Any:
        rng = self._rng
        schema: dict[str, Any] = {"type": "string"}
        if rng.random() < 0.5:
            schema["pattern"] = (
                rng.choice(_PATTERNS) if rng.random() < 0.5 else regex(rng, 3, is_whole=rng.random() < 0.7)
            )
        if self._one_in(4):
            schema["format"] = rng.choice(_FORMATS)
        if self._one_in(3):
            schema["minLength"] = rng.choice([0, 1, 2, 5, 20])
        if self._one_in(3):
            schema["maxLength"] = rng.choice([0, 1, 3, 6, 30])
        return schema

    def _value(self, depth: int = 1) -> Any:
        rng = self._rng
        scalars = [
            None,
            True,
            False,
            "",
            "x",
            'a"b\\',
            "日本 😀\n\u0001",
            1.0,
            0.1,
            -3,
            1e300,
            1e-9,
            rng.choice(_BIG),
            rng.randint(-99, 99),
            "\u2028\x7f",
        ]
        if depth and self._one_in(4):
            return rng.choice([[self._value(0), self._value(0)], {rng.choice(_NAMES): self._value(0)}, [], {}])
        return rng.choice(scalars)

    def _values(self, depth: int) -> Any:
        if self._one_in(3):
            return {"const": self._value()}
        values = {json.dumps(value): value for value in (self._value() for _ in range(self._rng.randint(1, 5)))}
        schema = {"enum": list(values.values())}
        return (
            {**schema, "type": self._rng.choice(["string", "integer", ["number", "null", "object"]])}
            if self._one_in(4)
            else schema
        )

    def _types(self, depth: int) -> Any:
        parts = [self._number(depth), self._string(depth), self._array(depth), self._object(depth)]
        merged = {key: value for part in parts for key, value in part.items()}
        types = self._rng.sample(
            ["null", "boolean", "integer", "number", "string", "array", "object"], self._rng.randint(2, 4)
        )
        if self._one_in(5):
            del merged["type"]
            return merged
        return {**merged, "type": types}

    def _array(self, depth: int) -> Any:
        rng = self._rng
        schema: dict[str, Any] = {"type": "array"}
        if rng.random() < 0.8:
            schema["items"] = self._schema(depth)
        if self._one_in(3):
            schema["prefixItems"] = [self._schema(depth) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.5:
            schema["minItems"] = rng.randint(0, 3)
        if rng.random() < 0.7:
            schema["maxItems"] = rng.randint(0, 4)
        if self._one_in(25):
            schema["uniqueItems"] = True
        return schema

    def _object(self, depth: int) -> Any:
        rng = self._rng
        names = rng.sample(_NAMES, rng.randint(0, 4))
        schema: dict[str, Any] = {"type": "object", "properties": {name: self._schema(depth) for name in names}}
        if rng.random() < 0.7:
            schema["required"] = [name for name in names if rng.random() < 0.6]
            if self._one_in(6):
                schema["required"].append(rng.choice(_NAMES))
        if rng.random() < 0.7:
            schema["additionalProperties"] = rng.choice([False, False, False, True, self._schema(0)])
        if self._one_in(4):
            texts = rng.sample(["^x-", "[0-9]$", "^score$", "^[^a]*$", ".", "^s", "\\w", "é"], rng.randint(1, 3))
            schema["patternProperties"] = {text: self._schema(depth) for text in texts}
        if self._one_in(8):
            schema["minProperties"] = rng.randint(0, 3)
        if self._one_in(8):
            schema["maxProperties"] = rng.randint(0, 4)
        if self._one_in(8):
            schema["propertyNames"] = rng.choice(
                [{"pattern": "^[a-z]"}, {"maxLength": 2}, {"enum": ["a", "b", "zz"]}, {"minLength": 1}]
            )
        if names and self._one_in(8):
            schema["dependentRequired"] = {rng.choice(names): [rng.choice(_NAMES)]}
        if names and self._one_in(15):
            schema["dependentSchemas"] = {rng.choice(names): {"required": [rng.choice(names)], "maxProperties": 2}}
        return schema

    def _union(self, depth: int) -> Any:
        rng = self._rng
        schema: dict[str, Any] = {
            rng.choice(["anyOf", "anyOf", "anyOf", "oneOf"]): [self._schema(depth) for _ in range(rng.randint(1, 3))]
        }
        if self._one_in(3):
            schema |= rng.choice([self._object, self._string, self._number])(depth)
        return schema

    def _all(self, depth: int) -> Any:
        kind = self._rng.choice([self._object, self._object, self._string, self._number, self._array, self._schema])
        parts = [kind(depth), kind(depth)]
        if self._one_in(3):
            return {"allOf": parts[:1], **(parts[1] if isinstance(parts[1], dict) else {})}
        return {"allOf": parts}


def regex(rng: random.Random, depth: int, *, is_whole: bool) -> str:
    """A random expression that Python and Rust read the same way."""
    atoms = [
        "a",
        "b",
        "7",
        "é",
        "日",
        "😀",
        r"\d",
        r"\.",
        '"',
        "/",
        r"\\",
        " ",
        "-",
        "[a-f]",
        "[^a-z]",
        '[^"]',
        r"[^\\]",
        "[0-9]",
        r"\n",
        "[é-ü]",
        "_",
        "'",
    ]

    def sequence(level: int) -> str:
        text = ""
        for _ in range(rng.randint(1, 3)):
            atom = rng.choice(atoms) if level == 0 or rng.random() < 0.6 else f"(?:{options(level - 1)})"
            text += atom + rng.choice(["", "", "", "?", "*", "+", "{2}", "{1,3}", "{2,}"])
        return text

    def options(level: int) -> str:
        return "|".join([sequence(level) for _ in range(rng.choice([1, 1, 2, 3]))])

    body = options(depth - 1)
    return f"^(?:{body})$" if is_whole else body
