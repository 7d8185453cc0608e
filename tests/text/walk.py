"""Random walks through compiled grammars: what comes out is checked by other means than the grammar.

``run(minutes, seed)`` makes schemas, expressions, choices and grammars, walks through each by random allowed tokens and
checks every text: JSON strictly parsed and by ``jsonschema``, expressions by ``re``. What is refused must be refused by
a keyword that is there. As a script: ``python -m tests.text.walk --minutes 10 --seed 3``.
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
from tests.text.random_schemas import Schemas, regex

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


# ---- checks

_FORMAT_CHECKS: dict[str, Callable[[str], object]] = {
    "date": datetime.date.fromisoformat, "time": lambda text: datetime.time.fromisoformat(text if len(text) > 8 else
    "no"), "date-time": lambda text: datetime.datetime.fromisoformat(text.replace("Z", "+00:00")), "ipv4":
    ipaddress.IPv4Address, "ipv6": ipaddress.IPv6Address, "uuid": uuid.UUID, "email": lambda text:
    re.fullmatch(r"[^@\s]{1,64}@[^@\s]{1,253}", text) or int("no"), "hostname": lambda text: len(text) <= 253 and
    re.fullmatch(r"(?!-)[\w-]{1,63}(?<!-)(\.(?!-)[\w-]{1,63}(?<!-))*", text) or int("no"), "duration": lambda text:
    re.fullmatch(r"P(?=.)(\d+W|(\d+Y)?(\d+M)?(\d+D)?(T(?=.)(\d+H)?(\d+M)?(\d+S)?)?)", text) or int("no"), "uri": lambda
    text: re.fullmatch(r"[a-zA-Z][\w+.-]*:[!-~]+", text) or int("no"),
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
    """Walk for ``minutes``, or ``steps`` forms if given; returns counts.

    Compiles here: what is made is small, and processes are slow.
    """
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
