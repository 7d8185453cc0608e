"""Structured outputs as grammars over real vocabularies: what they allow, what is refused by name, and what hostile
input costs.
"""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nemo_engine.sampling_params import SamplingParams
from nemo_engine.structured_outputs import MAX_GRAMMAR_CHARS, MAX_JSON_NESTING, StructuredOutputsParams
from nemo_engine.text import Tokenizer, grammar_trial, load_tokenizer
from nemo_engine.text import grammar as grammar_module
from nemo_engine.text.grammar import MAX_CACHED, Grammar, GrammarCompiler, tool_call_grammar
from nemo_engine.text.tools import check_tools, tool_call_schema
from tests.helpers.patience import yardstick
from tests.text.test_tokenizer import NEMO, SENTENCEPIECE, TINY

EOS = 2
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Kit:
    """A tokenizer and its compiler."""

    def __init__(self, path: Path) -> None:
        tokenizer = load_tokenizer(path)
        assert tokenizer is not None
        self.tokenizer: Tokenizer = tokenizer
        self.size = tokenizer.vocab_size
        self.compiler = GrammarCompiler(tokenizer, self.size, [EOS])

    def start(self, **form: Any) -> Grammar:
        return self.compiler.compile(StructuredOutputsParams(**form))

    def allowed(self, grammar: Grammar) -> list[int]:
        mask = grammar.mask()
        assert len(mask) == -(-self.size // 32) * 4
        bits = bin(int.from_bytes(mask, "little"))[:1:-1]
        return [token_id for token_id, bit in enumerate(bits) if bit == "1"]

    def matches(self, grammar: Grammar, text: str) -> bool:
        """Whether ``text``, written in single bytes' or the tokenizer's tokens, is a whole text of ``grammar``."""
        grammar = grammar.copy()
        data = text.encode()
        while data:
            fitting = [i for i in self.allowed(grammar) if i != EOS and data.startswith(self.bytes_of(i))]
            if not fitting:
                return False
            token_id = max(fitting, key=lambda i: len(self.bytes_of(i)))
            grammar.accept(token_id)
            data = data[len(self.bytes_of(token_id)) :]
        return EOS in self.allowed(grammar)

    def bytes_of(self, token_id: int) -> bytes:
        return self.tokenizer.token_bytes(token_id) or b"\xff"

    def sample(self, grammar: Grammar, seed: int, most: int = 400) -> str | None:
        """A random walk to an end; None if it is longer than ``most`` tokens."""
        grammar, rng, data = grammar.copy(), random.Random(seed), b""
        for count in range(most):
            allowed = self.allowed(grammar)
            token_id = EOS if EOS in allowed and rng.random() < count / 100 else rng.choice(allowed)
            if token_id == EOS:
                grammar.accept(EOS)
                assert grammar.is_finished
                return data.decode()
            grammar.accept(token_id)
            data += self.bytes_of(token_id)
        return None


@pytest.fixture(scope="module")
def tiny() -> Kit:
    return Kit(TINY)


@pytest.fixture(scope="module")
def nemo() -> Kit:
    return Kit(NEMO)


@pytest.fixture(scope="module", params=[TINY, NEMO, SENTENCEPIECE], ids=["nemo-tiny", "nemo", "sentencepiece"])
def kit(request: pytest.FixtureRequest) -> Kit:
    return Kit(request.param)


# ---- what is allowed


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ({"regex": r"\d{3}-[a-c]+"}, ["123-a", "000-cab"], ["12-a", "123-", "123-d", " 123-a"]),
        ({"regex": r"日本(語|人)?"}, ["日本", "日本語"], ["日", "本"]),
        ({"regex": ""}, [""], ["x", " "]),
        ({"choice": ["yes", "no", "yes!", 'a "b"\n\\/', "日本 😀"]}, ["yes", "no", "yes!", 'a "b"\n\\/', "日本 😀"], ["", "ye", "no!"]),
        ({"choice": ["", "x"]}, ["", "x"], ["xx"]),
        ({"choice": [""]}, [""], ["x"]),
        ({"choice": [f"option {i}" for i in range(5000)]}, ["option 0", "option 4999"], ["option", "option 5000", ""]),
        ({"grammar": 'start: "a" b+\nb: /[0-9]/ ","?'}, ["a1", "a1,2", "a12,"], ["a", "1"]),
        ({"grammar": 'root ::= "a" b+\nb ::= [0-9] ","?'}, ["a1", "a1,2", "a12,"], ["a", "1"]),
        ({"grammar": 'start: "%json {" j // %json {\nj: %json {"type": "integer", "minimum": 9007199254740993}'},
         ["%json {9007199254740993"], ["%json {9007199254740992"]),
        ({"json": {"type": "string", "pattern": '^[^"]*$'}}, ['"a"', '"\\\\"'], ['"\\""']),
        ({"json": {"type": "string", "pattern": r"^(?=.*\d)(?!.*x)[a-z\d]{2,4}$"}}, ['"a1"', '"12"'], ['"ab"', '"x1"', '"a1b2c"']),
        ({"json": {"patternProperties": {"^a": {"type": "null"}, "b$": {"const": None}}, "additionalProperties": False}},
         ["{}", '{"ab":null}'], ['{"ab":1}', '{"c":null}']),
        ({"json": {"uniqueItems": True, "maxItems": 1, "items": {"multipleOf": 12}, "type": "array"}}, ["[]", "[24]", "[-12]"], ["[25]", "[1,2]"]),
        ({"json_object": True}, ["{}", '{"a":1}', '{"a": [1, {"b": null}]}', '{\n  "a": 1\n}'], ["[]", "1", '{"a":}', " {}", "{} "]),
        ({"json": PERSON}, ['{"name":"x","age":3}', '{ "name" : "x", "age": 150, "tags": ["a", "b"] }'],
         ['{"name":"x"}', '{"age":3,"name":"x"}', '{"name":"x","age":151}', '{"name":"x","age":3,"z":1}', '{"name":"123456789","age":1}']),
        ({"json": json.dumps(PERSON)}, ['{"name":"x","age":3}'], ['{"name":"x"}']),
        ({"json": {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}}}}},
         ["{}", '{"c":{"c":{}}}'], ['{"c":1}']),
    ],
)  # fmt: skip
def test_what_a_grammar_matches(kit: Kit, form: dict[str, Any], good: list[str], bad: list[str]) -> None:
    grammar = kit.start(**form)
    assert [text for text in good if not kit.matches(grammar, text)] == []
    assert [text for text in bad if kit.matches(grammar, text)] == []


@pytest.mark.parametrize(
    ("options", "good", "bad"),
    [
        ({}, ['{"a":1}', '{"a": 1}', '{\n    "a": 1\n}', "{\n" + " " * 16 + '"a":1}'],
         ['{"a":  1}', '{"a":\n\n1}', "{\n" + " " * 17 + '"a":1}', '{"a":\t1}']),
        ({"disable_any_whitespace": True}, ['{"a":1}'], ['{"a": 1}', '{\n"a":1}']),
        ({"whitespace_pattern": r"[ \t]{0,2}"}, ['{"a":1}', '{"a":  1}', '{\t"a":1}'], ['{"a":   1}', '{\n"a":1}']),
    ],
)  # fmt: skip
def test_white_space_is_bounded(tiny: Kit, options: dict[str, Any], good: list[str], bad: list[str]) -> None:
    for form in ({"json": {"type": "object", "properties": {"a": {"type": "integer"}}}}, {"json_object": True}):
        grammar = tiny.start(**form, **options)
        assert [text for text in good if not tiny.matches(grammar, text)] == []
        assert [text for text in bad if tiny.matches(grammar, text)] == []


def test_objects_are_closed_if_asked_for(tiny: Kit) -> None:
    inner = {"properties": {"default": {"type": "object", "properties": {"b": {"type": "null"}}}}, "type": "object"}
    schema = {"type": "object", "properties": {"a": inner}, "required": ["a"], "additionalProperties": True}
    text = '{"a":{"default":{"z":1}}}'
    assert tiny.matches(tiny.start(json=schema), text)
    closed = tiny.start(json=schema, disable_additional_properties=True)
    assert not tiny.matches(closed, text)
    assert tiny.matches(closed, '{"a":{"default":{"b":null}},"said otherwise":1}')


def test_control_tokens_are_never_text(kit: Kit) -> None:
    grammar = kit.start(regex="(?s:.*)")
    special = [token_id for token_id in kit.allowed(grammar) if kit.tokenizer.is_special(token_id)]
    assert special == [EOS]
    # A text that spells one is written in ordinary tokens.
    spelled = kit.start(choice=["[TOOL_CALLS]", "</s>"])
    assert not any(kit.tokenizer.is_special(token_id) for token_id in kit.allowed(spelled))
    assert kit.matches(spelled, "[TOOL_CALLS]") and kit.matches(spelled, "</s>")


def test_ids_that_the_tokenizer_does_not_know_are_never_allowed(tiny: Kit) -> None:
    for size in (tiny.size + 70, tiny.size - 1000):
        compiler = GrammarCompiler(tiny.tokenizer, size, [EOS, size - 1])
        mask = compiler.compile(StructuredOutputsParams(regex="(?s:.*)")).mask()
        assert len(mask) == -(-size // 32) * 4
        bits = int.from_bytes(mask, "little")
        assert bits >> min(size, tiny.size) in (0, 1 << (size - 1 - tiny.size) if size > tiny.size else 0)
        assert bits >> EOS & 1 and bits >> (size - 1) & 1, "both end tokens end it"


def test_a_token_that_does_not_fit_is_an_error_for_good(tiny: Kit) -> None:
    grammar = tiny.start(regex="[0-9]+")
    other = grammar.copy()
    (letter,) = tiny.tokenizer.encode("a", bos=False)
    with pytest.raises(ValueError, match="doesn't satisfy the grammar"):
        grammar.accept(letter)
    with pytest.raises(ValueError):
        grammar.mask()
    assert tiny.matches(other, "12"), "a copy is not concerned"


def test_a_finished_grammar_allows_the_end_alone(tiny: Kit) -> None:
    grammar = tiny.start(regex="[0-9]")
    assert not grammar.is_finished
    grammar.accept(tiny.tokenizer.encode("7", bos=False)[0])
    assert grammar.is_finished and tiny.allowed(grammar) == [EOS]


@pytest.mark.parametrize("seed", range(8))
def test_random_walks_validate(kit: Kit, seed: int) -> None:
    compact = kit.sample(kit.start(json=PERSON), seed)
    assert compact is not None
    jsonschema.validate(json.loads(compact), PERSON)


# ---- tool calls


def test_a_tool_call_is_forced(kit: Kit) -> None:
    tools = check_tools(
        [
            {"type": "function", "function": {"name": name, "parameters": parameters}}
            for name, parameters in [("weather", PERSON), ("now", {"type": "object", "properties": {}})]
        ]
    )
    tool_calls_id = kit.tokenizer.tool_calls_id
    assert tool_calls_id is not None
    form = tool_call_grammar(tool_calls_id, tool_call_schema(tools))
    grammar = kit.compiler.compile(form)
    assert kit.allowed(grammar) == [tool_calls_id]
    grammar.accept(tool_calls_id)
    call = '[{"name": "weather", "arguments": {"name": "x", "age": 3}}]'
    assert kit.matches(grammar, call) and kit.matches(grammar, call.replace(" ", ""))
    assert not kit.matches(grammar, call.replace("weather", "whether"))
    assert not kit.matches(grammar, call.replace("3", '"3"'))
    assert not kit.matches(grammar, call.replace(": ", ":  "))


def test_a_plain_tool_call_is_compiled_without_a_trial(tiny: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(grammar_module, "try_compile", lambda spec: tried.append(spec["text"]))
    schema = {
        "type": "array",
        "items": {"type": "object", "properties": {"plain": {"type": "string", "format": "date"}}},
    }
    form = tool_call_grammar(9, schema)
    tiny.compiler.compile(form)
    tiny.compiler.compile(tool_call_grammar(9, schema, {"type": "integer"}))
    assert tried == [] and form.grammar is not None
    for grammar in (tool_call_grammar(9, {"type": "string", "pattern": "a{99}"}).grammar, form.grammar + 'x: "y"\n'):
        assert grammar is not None
        tiny.start(grammar=grammar)
    assert len(tried) == 2


# ---- refusals


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object, got none"),
        ({"json": {}, "regex": "a"}, r"exactly one of .* got \['json', 'regex'\]"),
        ({"structural_tag": "x"}, "structured_outputs.structural_tag is not supported"),
        ({"json_object": 1}, "json_object must be true or false, got 1"),
        ({"json_object": False}, "exactly one"),
        ({"zork": 1}, r"unknown keys \['zork'\]"),
        ({"json": "{"}, "structured_outputs.json is not JSON"),
        ({"json": "[" * 100_000}, "structured_outputs.json is not JSON"),
        ({"json": "true"}, "json must be a schema"),
        ({"json": {"enum": [float("nan")]}}, "structured_outputs.json is not JSON"),
        ({"json": {"enum": [{1, 2}]}}, "structured_outputs.json is not JSON"),
        ({"json": {"enum": ["\ud800"]}}, "structured_outputs.json must be valid Unicode"),
        ({"json": {"enum": ["x" * 300_000]}}, "structured_outputs.json must have at most 262144 characters"),
        ({"json": {"enum": list(range(60_000))}}, "structured_outputs.json must have at most 50000 values"),
        ({"regex": 5}, "structured_outputs.regex must be a string, got 5"),
        ({"regex": "a" * (MAX_GRAMMAR_CHARS + 1)}, "structured_outputs.regex must have at most 65536 characters, got "
                                                   "65537"),
        ({"choice": []}, "structured_outputs.choice must be a list of at least one string"),
        ({"choice": "abc"}, "structured_outputs.choice must be a list of at least one string"),
        ({"choice": ["a", 3]}, r"structured_outputs.choice\[1\] must be a string, got 3"),
        ({"choice": ["a", "\ud800"]}, r"structured_outputs.choice\[1\] must be valid Unicode"),
        ({"choice": ["x" * 200_000, "y" * 200_000]}, "structured_outputs.choice must have at most 262144 characters"),
        ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace needs json or json_object, got it "
                                                         "with regex"),
        ({"json": {}, "disable_any_whitespace": "no"}, "disable_any_whitespace must be true or false"),
        ({"json": {}, "disable_any_whitespace": True, "whitespace_pattern": " "}, "whitespace_pattern does not go with"),
    ],
)  # fmt: skip
def test_bad_parameters(form: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(structured_outputs=form)


def test_parameters_may_be_a_mapping_and_are_kept_as_text() -> None:
    params = SamplingParams(structured_outputs={"json": {"type": "null"}})
    assert params.structured_outputs == StructuredOutputsParams(json='{ "type": "null" }')
    for value in ("json", 3, [("json", {})]):
        with pytest.raises(ValueError, match="structured_outputs must be a StructuredOutputsParams or a mapping"):
            SamplingParams(structured_outputs=value)  # type: ignore[arg-type]


def test_nesting_is_limited_and_cycles_end() -> None:
    def nested(depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {}
        for _ in range(depth - 1):
            schema = {"items": schema}
        return schema

    StructuredOutputsParams(json=nested(MAX_JSON_NESTING))
    with pytest.raises(ValueError, match="nested at most 64 deep"):
        StructuredOutputsParams(json=nested(MAX_JSON_NESTING + 1))
    cycle: dict[str, Any] = {"items": {}}
    cycle["items"]["items"] = cycle
    with pytest.raises(ValueError, match="nested at most 64 deep"):
        StructuredOutputsParams(json=cycle)
    wide: dict[str, Any] = {}
    for _ in range(60):  # 2^60 values, in 60 objects
        wide = {"a": wide, "b": wide}
    with pytest.raises(ValueError, match="at most 50000 values"):
        StructuredOutputsParams(json=wide)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"regex": "a(?=b)"}, "structured_outputs.regex: .*look-around"),
        ({"regex": r"(a)\1"}, "structured_outputs.regex: .*backreferences are not supported"),
        ({"regex": "[a"}, "structured_outputs.regex: .*unclosed character class"),
        ({"json": {"type": "array", "uniqueItems": True}}, "structured_outputs.json: uniqueItems at # is not supported"),
        ({"json": {"not": {}}}, "not at # is not supported"),
        ({"json": {"properties": {"a/b": {"if": {}, "then": {}}}}}, "if at #/properties/a~1b is not supported"),
        ({"json": {"type": "string", "format": "zork"}}, "structured_outputs.json: format at #: 'zork' is not "
                                                         "supported. It may be date, "),
        ({"json": {"type": "string", "pattern": "a(?=a)"}}, "structured_outputs.json: pattern at #: 'a\\(\\?=a\\)': "
                                                            ".*look-ahead"),
        ({"json": {"items": {"pattern": r"(a)\1"}}}, r"pattern at #/items: .*: \\1 is not supported, at character 5"),
        ({"json": {"multipleOf": -1}}, "multipleOf at # must be a number greater than 0, got -1"),
        ({"json": {"type": "integer", "multipleOf": 17}}, "multipleOf at #: multiples of 17 cannot be followed"),
        ({"json": {"maxLength": "3"}}, 'maxLength at # must be an integer of 0 to 1000000000, got "3"'),
        ({"json": {"patternProperties": {c: {} for c in "abcde"}}}, "patternProperties at #: at most 4 patterns"),
        ({"grammar": 'start: j\nj: %json {"uniqueItems": true}'}, "structured_outputs.grammar: uniqueItems at # is not "
                                                                  "supported"),
        ({"grammar": "start: j\nj: %json {\"a\"}"}, "what follows %json is not JSON"),
        ({"json": {"type": "zork"}}, "structured_outputs.json: type at # must be null, boolean.*got \"zork\""),
        ({"json": {"minimum": 2, "maximum": 1, "type": "integer"}}, "no text satisfies it"),
        ({"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "oneOf at # is supported where its options "
                                                                         "exclude each other .*options 0 and 1 may "
                                                                         "both hold"),
        ({"json": {"minProperties": 2}}, "minProperties at #: 2 is more than the required properties"),
        ({"json": {"x-guidance": {"lenient": True}, "not": {}}}, "x-guidance is not supported"),
        ({"json": {"$ref": "https://example.com/a.json"}}, "https://example.com/a.json. is not a part of this schema"),
        ({"json": {"$ref": "file:///etc/passwd"}}, "file:///etc/passwd. is not a part of this schema"),
        ({"json": {"$ref": "#/$defs/a"}}, "#/\\$defs/a' does not exist"),
        ({"json": {"$ref": "#"}}, "structured_outputs.json: no text satisfies it"),
        ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}}, "no text satisfies it"),
        ({"json": {}, "whitespace_pattern": "[ x]"}, "whitespace_pattern: it must match nothing but white space"),
        ({"json": {}, "whitespace_pattern": "["}, "unclosed character class"),
        ({"grammar": "start: foo"}, 'structured_outputs.grammar: .*unknown name: "foo"'),
        ({"grammar": "zork"}, "structured_outputs.grammar: it has no rule `start:`, and is not GBNF either"),
        ({"grammar": "root ::= foo"}, "Rule 'foo' not found"),
        ({"grammar": "start: start"}, "structured_outputs.grammar: no text satisfies it"),
        ({"grammar": "start: <[9999999]>"}, "9999999"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(tiny: Kit, form: dict[str, Any], message: str) -> None:
    for _ in range(2):  # the second time, from what is remembered
        with pytest.raises(ValueError, match=message) as caught:
            tiny.start(**form)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def chain(count: int, link: str, end: str) -> str:
    return "".join(link % (i, i + 1) for i in range(count)) + end % count


@pytest.mark.parametrize(
    "form",
    [
        {"json": {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(1, 20)]}},
        {"json": {"type": "integer", "multipleOf": 999_983}},
        {"json": '{"$ref":"#/$defs/d0","$defs":{' + chain(3000, '"d%d":{"properties":{"a":{"$ref":"#/$defs/d%d"}}},', '"d%d":{}}}')},
        {"regex": "a?" * 30_000},
        {"regex": "(" * 20_000 + "a" + ")" * 20_000},
        {"regex": "((a{1000}){1000}){1000}"},
        {"grammar": "start: a0\n" + chain(4000, "a%d: a%d\n", 'a%d: "x"\n')},
        {"grammar": "start: A0\n" + chain(3000, 'A%d: A%d "y"\n', 'A%d: "x"\n')},
        {"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
        {"grammar": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000},
        {"grammar": "start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1} A{i + 1}\n" for i in range(60)) + 'A60: "x"\n'},
        {"json": {"allOf": [{"anyOf": [{"type": "string", "minLength": i}, {"minimum": i}]} for i in range(20)]}},
    ],
    ids=lambda form: str(form)[:40],
)  # fmt: skip
def test_hostile_input_is_refused_in_bounded_time(tiny: Kit, form: dict[str, Any]) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=f"structured_outputs.{next(iter(form))}: ") as caught:
        tiny.start(**form)
    assert len(str(caught.value)) < 500
    used = time.process_time() - start
    assert used < 1 or used < 20 * yardstick()


@pytest.mark.parametrize(
    "form",
    [
        {"json": {"type": "string", "minLength": 10**9}},
        {"json": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}},
        {"grammar": "start: a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(60)) + 'a60: "x"\n'},
        {"json": {"properties": {f"p{i}": {"type": "string"} for i in range(1000)}}},
        {"regex": "(.*a){25}b"},
        {"regex": "(a|b)*a(a|b){2000}"},
        {"regex": "(((((x*)*)*)*)*)*y"},
        {"choice": [f"value {i}" for i in range(20_000)]},
        {"grammar": 'start: e\ne: e e | "a" | '},
    ],
    ids=lambda form: str(form)[:40],
)  # fmt: skip
def test_a_mask_of_a_nasty_grammar_takes_bounded_time(nemo: Kit, form: dict[str, Any]) -> None:
    grammar = nemo.start(**form)
    rng = random.Random(1)
    for _ in range(30):
        start = time.process_time()
        try:
            token_id = rng.choice(nemo.allowed(grammar))
            if token_id == EOS:
                break
            grammar.accept(token_id)
        except ValueError:  # too complex: the request would end here
            break
        finally:
            used = time.process_time() - start
            assert used < 1 or used < 20 * yardstick()


# ---- the compiler


def test_the_extra_is_named_where_it_is_missing(tiny: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"structured_outputs needs llguidance: pip install 'nemo-engine\[structured\]'"
    ):
        GrammarCompiler(tiny.tokenizer, tiny.size, [EOS]).compile(StructuredOutputsParams(regex="a"))


def test_compiled_grammars_are_remembered_up_to_a_limit(tiny: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[StructuredOutputsParams] = []
    original = GrammarCompiler._compile

    def count(self: GrammarCompiler, vocabulary: Any, params: StructuredOutputsParams) -> Any:
        compiled.append(params)
        return original(self, vocabulary, params)

    monkeypatch.setattr(GrammarCompiler, "_compile", count)
    compiler = GrammarCompiler(tiny.tokenizer, tiny.size, [EOS])
    forms = [StructuredOutputsParams(regex=f"a{i}") for i in range(MAX_CACHED + 1)]
    for form in [*forms[:-1], forms[0], forms[-1], forms[0], forms[1]]:
        compiler.compile(form)
    assert compiled == [*forms, forms[1]]


def test_what_could_not_be_tried_is_tried_again(tiny: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    form = {"grammar": 'start: "tried again"'}
    with monkeypatch.context() as patch:
        patch.setattr(grammar_trial, "TRIAL_WALL_SECONDS", 0.0)
        with pytest.raises(ValueError, match="structured_outputs.grammar: it could not be tried: .*timed out"):
            tiny.start(**form)
        patch.setattr(grammar_trial.sys, "executable", "/no/such/python")
        with pytest.raises(ValueError, match="structured_outputs.grammar: it could not be tried: .*No such file"):
            tiny.start(**form)
    assert tiny.matches(tiny.start(**form), "tried again")


def test_threads_may_compile_at_once(tiny: Kit) -> None:
    compiler = GrammarCompiler(tiny.tokenizer, tiny.size, [EOS])
    results: list[bytes] = []

    def work(index: int) -> None:
        results.append(
            compiler.compile(StructuredOutputsParams(json=PERSON if index % 2 else {"type": "object"})).mask()
        )

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and len(set(results)) <= 2
