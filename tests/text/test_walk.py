"""Random walks through grammars of random schemas, expressions, choices and grammars, with a fixed seed.

More: ``python -m tests.text.walk``.
"""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from nemo_engine.text import grammar as grammar_module
from nemo_engine.text.json_numbers import Numbers
from tests.text import walk


def test_texts_of_random_forms_are_what_was_asked_for() -> None:
    counts = walk.run(0.0, seed=20, steps=800)
    assert counts["texts"] > 1800, counts
    assert counts["refused"] + counts["nothing"] < 0.3 * counts["forms"], counts
    assert counts["unfinished"] + counts["outgrown"] < 0.2 * counts["texts"], counts


@pytest.mark.parametrize("fault", ["a bound", "an escape", "a name", "a dead end"])
def test_a_fault_in_the_compiler_is_seen(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The walk itself: with one thing planted it must fail."""
    original: Any
    if fault == "a bound":
        original = Numbers.terminal
        monkeypatch.setattr(Numbers, "terminal", lambda self: original(Numbers(self.is_integer, self.low)))
    elif fault == "an escape":
        monkeypatch.setattr("nemo_engine.text.json_strings._RAW", ((0xD800, 0xDFFF),))
        monkeypatch.setattr("nemo_engine.text.json_strings._quoted_chars", _loose_chars)
    elif fault == "a name":
        original = grammar_module.SchemaGrammar._other_names
        monkeypatch.setattr(
            grammar_module.SchemaGrammar,
            "_other_names",
            lambda self, m, p, names, allowed: original(self, m, p, [], allowed),
        )
    else:
        monkeypatch.setattr(grammar_module.SchemaGrammar, "doubtful", {})
    with pytest.raises(AssertionError):
        walk.run(0.0, seed=20, steps=800)


def _loose_chars(ranges: Any) -> str:
    from nemo_engine.text.json_strings import _CHAR

    return f"(?:{_CHAR})"


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"maximum": 3}, "4"),
        ({"multipleOf": 0.1}, "0.25"),
        ({"format": "date"}, '"2023-02-29"'),
        ({"type": "number"}, "1e999"),
        ({}, "NaN"),
        ({}, "{} "[:2] + "x"),
        ({"const": 2**53 + 1}, str(2**53)),
    ],
)
def test_the_check_is_strict(schema: Any, text: str) -> None:
    with pytest.raises((AssertionError, ValueError, jsonschema.ValidationError)):
        walk.check_json(schema, text)
    walk.check_json({"const": json.loads("0.3"), "multipleOf": 0.1}, "0.3")
