"""Random walks through compiled grammars: what comes out is checked by other means than the grammar.

``run(minutes, seed)`` makes schemas, expressions, choices and grammars, walks through each by random allowed tokens and checks every
text: JSON strictly parsed and by ``jsonschema``, expressions by ``re``. What is refused must be refused by a keyword that is there.
As a script: ``python -m tests.text.walk --minutes 10 --seed 3``.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import json
import random
import re
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any
from unittest import mock

import jsonschema
import numpy as np

from nemo_engine.outputs import GRAMMAR_TOO_COMPLEX
from nemo_engine.structured_outputs import StructuredOutputsParams
from nemo_engine.text import grammar as grammar_module
from nemo_engine.text.grammar import Grammar, GrammarCompiler
from nemo_engine.text.grammar_trial import NOTHING, matches_nothing

EOS = 0
_MERGED = [
    '"a"',
    '"b"',
    '"name"',
    '"x-1"',
    '"score"',
    '"é"',
    '":',
    '",',
    '"}',
    "{}",
    "[]",
    ' "',
    '{"',
    "12",
    "00",
    "99",
    ".5",
    '\\"',
    "\\\\",
    "\\u00",
    "\n  ",
    "é",
    "日",
    "😀",
    "true",
    "-1",
    "abc",
    "T0",
    "--",
]
WALKS = 4  # of one grammar
_LONGEST = 600  # tokens


class Bytes:
    """A tokenizer of single bytes and a few longer tokens, which is what a compiler needs of one."""

    bos_id = eos_id = EOS

    def __init__(self) -> None:
        self._tokens = [b"</s>", *(bytes([byte]) for byte in range(256)), *(text.encode() for text in _MERGED)]
        self.vocab_size = len(self._tokens)
        self.ends = np.array(
            [token_id == EOS or data[:1] in b'"]}' for token_id, data in enumerate(self._tokens)], np.uint8
        )

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        """The bytes of a token."""
        return self._tokens[token_id]

    def is_special(self, token_id: int) -> bool:
        """Whether it is the end token."""
        return token_id == EOS

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Single bytes."""
        return [byte + 1 for byte in text.encode()]


class DeadEnd(AssertionError):
    """A grammar that leads to where nothing is allowed."""


def walk(tokenizer: Bytes, grammar: Grammar, rng: random.Random) -> str | None:
    """A text of ``grammar`` by random tokens, biased to come to an end; None if it does not."""
    grammar, data, haste = grammar.copy(), b"", rng.choice([0.05, 0.3, 0.6])
    for _ in range(_LONGEST):
        mask = grammar.mask()
        allowed = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[: tokenizer.vocab_size]
        ends = (allowed & tokenizer.ends).nonzero()[0]
        fitting = ends if len(ends) and rng.random() < haste else allowed.nonzero()[0]
        if not len(fitting):
            raise DeadEnd(f"after {data!r} nothing is allowed")
        token_id = int(fitting[rng.randrange(len(fitting))])
        if token_id == EOS:
            return data.decode()
        grammar.accept(token_id)
        data += tokenizer.token_bytes(token_id)
    return None


# ---- schemas

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
    "^[^\"]*$", r"^[^\\]{1,5}$", "^[a-z]+$", r"^\d{3}-\d{4}$", "abc", "^x-", "-[0-9]$", r"^\w+@\w+\.[a-z]{2,3}$", r"^[^/\\:*?\"<>|]+$", "^(yes|no)?$",
    r"^\S+$", r"\s", "^.$", "^.{2,4}$", r"^[\w.]*$", r"^[^\w]$", r"^\D*$", "^a|b$", "(^a$)|(^b+$)", "^[é日]+$", "^[^a-z😀]{0,3}$", r"^\u0041\x42$", "^$", "",
    r"^(?=.*\d)(?=.*[a-z])[a-z\d]{4,8}$", r"^(?!foo)[a-z]{3}$", r"^[\t\n]+$", "(?i)^ab?k$", r"^(a|b)*a(a|b){3}$", "[\\x00-\\x1f]", r"^[^\x00-\x1f]{2}$",
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


# ---- checks

_FORMAT_CHECKS: dict[str, Callable[[str], object]] = {
    "date": datetime.date.fromisoformat,
    "time": lambda text: datetime.time.fromisoformat(text if len(text) > 8 else "no"),
    "date-time": lambda text: datetime.datetime.fromisoformat(text.replace("Z", "+00:00")),
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
    "uuid": uuid.UUID,
    "email": lambda text: re.fullmatch(r"[^@\s]{1,64}@[^@\s]{1,253}", text) or int("no"),
    "hostname": lambda text: len(text) <= 253 and re.fullmatch(r"(?!-)[\w-]{1,63}(?<!-)(\.(?!-)[\w-]{1,63}(?<!-))*", text) or int("no"),
    "duration": lambda text: re.fullmatch(r"P(?=.)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=.)(\d+H)?(\d+M)?(\d+S)?)?)", text) or int("no"),
    "uri": lambda text: re.fullmatch(r"[a-zA-Z][\w+.-]*:[!-~]+", text) or int("no"),
}  # fmt: skip


def _format(validator: Any, name: str, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    if isinstance(value, str) and name in _FORMAT_CHECKS:
        try:
            _FORMAT_CHECKS[name](value)
        except ValueError:
            yield jsonschema.ValidationError(f"{value!r} is no {name}")


def _multiple(validator: Any, step: Any, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if (Fraction(str(value)) / Fraction(str(step))).denominator != 1:
            yield jsonschema.ValidationError(f"{value} is no multiple of {step}")


# The library's multipleOf divides doubles.
Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"format": _format, "multipleOf": _multiple})


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def check_json(schema: Any, text: str) -> None:
    """``text`` is one JSON value without infinities for which ``schema`` holds."""
    value = json.loads(text, parse_constant=_no_constant)
    assert "Infinity" not in json.dumps(value)
    Validator(schema).validate(value)


def _keywords(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return set().union(*map(_keywords, schema))
    return set(schema) | set().union(*map(_keywords, schema.values())) if isinstance(schema, dict) else set()


def _parts(schema: Any) -> list[dict[str, Any]]:
    children = list(schema.values()) if isinstance(schema, dict) else schema if isinstance(schema, list) else []
    found = [part for child in children for part in _parts(child)]
    return [schema, *found] if isinstance(schema, dict) and isinstance(schema.get("enum", []), list) else found


class Walker:
    """Walks, and counts what it did."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._schemas = Schemas(self._rng)
        self._tokenizer = Bytes()
        self._compiler = GrammarCompiler(self._tokenizer, self._tokenizer.vocab_size, [EOS])  # type: ignore[arg-type]
        self.counts: Counter[str] = Counter()

    def step(self) -> None:
        """One form, of any kind; ``AssertionError`` with all that is needed to see the fault again."""
        rng = self._rng
        kind = rng.choice(["json"] * 14 + ["regex", "regex", "choice", "grammar", "nested"])
        form: dict[str, Any]
        if kind == "json" or kind == "nested":
            schema = self._schemas.make()
            if not isinstance(schema, dict):
                schema = {"allOf": [schema]}
            form = {"json": schema, **rng.choice([{}, {}, {"disable_any_whitespace": True}])}
            if kind == "nested":
                form = {"grammar": f'start: "<%json {{" j ">" // %json {{\nj: %json {json.dumps(schema)}\n'}
            self._walk(
                form,
                lambda text: check_json(
                    schema, text.removeprefix("<%json {").removesuffix(">") if kind == "nested" else text
                ),
                schema,
            )
        elif kind == "choice":
            texts = [
                rng.choice(["", "a", 'q"', "日本", "a\nb", "😀", ".*", "[x", str(rng.randint(0, 99))])
                for _ in range(rng.randint(1, 6))
            ]
            self._walk({"choice": texts}, lambda text: _hold(text in texts))
        else:
            pattern = regex(rng, 3, is_whole=False).replace(r"\d", "[0-9]")  # Unicode has more digits every year
            form = (
                {"regex": pattern}
                if kind == "regex"
                else {"grammar": f'start: x\nx: /{pattern.replace("/", chr(92) + "/")}/ | y y\ny: "(" x ")"\n'}
            )
            if kind == "regex":
                self._walk(form, lambda text: _hold(re.fullmatch(pattern, text)))
            else:
                self._walk(form, lambda text: _hold("(" in text or re.fullmatch(pattern, text)))

    def _walk(self, form: dict[str, Any], check: Callable[[str], object], schema: Any = None) -> None:
        self.counts["forms"] += 1
        try:
            grammar = self._compiler.compile(StructuredOutputsParams(**form))
        except ValueError as error:
            message = str(error).partition(": ")[2]
            self.counts["nothing" if message == NOTHING else "refused"] += 1
            is_named = (
                message == NOTHING or "too complex" in message or any(word in message for word in _keywords(schema))
            )
            assert is_named, f"{form} is refused without a keyword: {error}"
            if message == NOTHING and schema is not None:
                self._check_nothing(form, schema)
            if message != NOTHING:
                self.counts[re.sub(r"[0-9]+|at #\S*|'.*'", "", message)[:60]] += 1
            return
        for _ in range(WALKS):
            text = None
            try:
                text = walk(self._tokenizer, grammar, self._rng)
                if text is None:
                    self.counts["unfinished"] += 1
                    continue
                self.counts["texts"] += 1
                check(text)
            except ValueError as error:
                if not str(error).startswith(GRAMMAR_TOO_COMPLEX):
                    raise self._fault(form, text, error) from error
                self.counts["outgrown"] += 1
            except RecursionError:  # the checker follows references that lead to themselves
                self.counts["not checked"] += 1
            except (AssertionError, jsonschema.ValidationError) as error:
                raise self._fault(form, text, error) from error

    def _check_nothing(self, form: dict[str, Any], schema: Any) -> None:
        """A schema that is said to hold for nothing holds for no simple value."""
        listed = [value for part in _parts(schema) for value in [part.get("const"), *part.get("enum", [])]]
        for value in [
            None,
            True,
            0,
            1,
            -1,
            7,
            0.5,
            "",
            "a",
            "b",
            "ab",
            "12",
            [],
            [0],
            [None, None],
            {},
            {"a": 1},
            *listed,
        ]:
            try:
                Validator(schema).validate(value)
            except (jsonschema.ValidationError, RecursionError):
                continue
            raise self._fault(form, json.dumps(value), AssertionError("is refused though this is valid"))

    @staticmethod
    def _fault(form: dict[str, Any], text: str | None, error: Exception) -> AssertionError:
        shown = json.dumps(form, ensure_ascii=False)
        return AssertionError(f"{shown}\ngave {text!r}\n{type(error).__name__}: {str(error)[:400]}")


def _hold(value: object) -> None:
    assert value


def _find_empty(grammars: dict[str, str]) -> list[str]:
    from llguidance import LLTokenizer

    tokenizer = LLTokenizer("byte")
    return [name for name, text in grammars.items() if matches_nothing(tokenizer, text)]


def run(minutes: float, seed: int = 0, steps: int | None = None) -> Counter[str]:
    """Walk for ``minutes``, or ``steps`` forms if given; returns counts. Compiles here: what is made is small, and processes are slow."""
    walker, end = Walker(seed), time.monotonic() + minutes * 60
    with (
        mock.patch.object(grammar_module, "try_compile", lambda spec: None),
        mock.patch.object(grammar_module, "find_empty", _find_empty),
    ):
        while walker.counts["forms"] < steps if steps is not None else time.monotonic() < end:
            walker.step()
    return walker.counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name, count in run(arguments.minutes, arguments.seed).most_common():
        print(f"{count:8} {name}")
    sys.exit(0)
