"""Tool definitions are checked by name, and the schema of the calls accepts exactly the calls of those tools."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_engine.text import ToolChoice, check_tool_choice, check_tools, tool_call_schema


def tool(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    function = {"name": name, **more} if parameters is None else {"name": name, "parameters": parameters, **more}
    return {"type": "function", "function": function}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
NODE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/Node"}},
    "required": ["value"],
}
LIST = {
    "type": "object",
    "properties": {"head": {"$ref": "#/$defs/Node"}},
    "required": ["head"],
    "$defs": {"Node": NODE},
}
OTHER = {  # another Node, by the older word, a reference to the root and one into a property
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {
        "node": {"$ref": "#/definitions/Node"},
        "again": {"$ref": "#"},
        "same": {"$ref": "#/properties/flag"},
        "flag": {"type": "boolean"},
        "$ref": {"const": {"$ref": "#/nowhere"}},
    },
    "definitions": {"Node": {"type": "string"}},
    "additionalProperties": False,
}
TOOLS = [tool("city", CITY), tool("list", LIST), tool("other", OTHER), tool("none")]


def accepts(schema: dict[str, Any], value: Any) -> bool:
    jsonschema.Draft202012Validator.check_schema(schema)
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


@pytest.mark.parametrize(
    ("calls", "is_accepted"),
    [
        ([call("city", city="Paris")], True),
        ([call("city", city="Paris"), call("none"), call("city", city="Rome")], True),
        ([], False),
        ({}, False),
        ([call("city")], False),
        ([call("city", city="Paris", more=1)], False),
        ([call("town", city="Paris")], False),
        ([{"name": "city"}], False),
        ([call("city", city="Paris") | {"id": "x"}], False),
        ([call("list", head={"value": 1, "next": {"value": 2}})], True),
        ([call("list", head={"value": 1, "next": {"value": "2"}})], False),
        ([call("list", head="x")], False),
        ([call("other", node="x", again={"again": {"node": "y"}}, same=True)], True),
        ([call("other", node={"value": 1})], False),
        ([call("other", again={"again": {"node": 5}})], False),
        ([call("other", same="x")], False),
        ([{"name": "other", "arguments": {"$ref": {"$ref": "#/nowhere"}}}], True),
    ],
)
def test_the_schema_of_calls(calls: Any, is_accepted: bool) -> None:
    assert accepts(tool_call_schema(TOOLS), calls) is is_accepted


def test_one_call_and_some_names() -> None:
    two = [call("city", city="a"), call("none")]
    assert accepts(tool_call_schema(TOOLS), two) and not accepts(tool_call_schema(TOOLS, parallel=False), two)
    schema = tool_call_schema(TOOLS, ["none", "list"])
    assert accepts(schema, [call("none")]) and not accepts(schema, [call("city", city="a")])
    assert tool_call_schema(TOOLS, ["city"]) == {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"name": {"const": "city"}, "arguments": CITY},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        },
        "minItems": 1,
    }
    assert set(tool_call_schema(TOOLS)["$defs"]) == {"list.Node", "other", "other.definitions.Node"}


def test_the_tools_are_left_as_they_were() -> None:
    before = json.dumps(TOOLS)
    tool_call_schema(TOOLS)
    check_tools(TOOLS)[1]["function"]["parameters"]["type"] = "changed"
    assert json.dumps(TOOLS) == before


def test_what_is_taken() -> None:
    (plain, strict) = check_tools([tool("f", description=None), tool("g", {}, strict=True, description="d")])
    empty = {"type": "object", "properties": {}}
    assert plain == {"type": "function", "function": {"name": "f", "description": "", "parameters": empty}}
    assert strict["function"] == {"name": "g", "description": "d", "parameters": empty, "strict": True}


DEEP: dict[str, Any] = {"type": "object"}
for _ in range(100):
    DEEP = {"type": "object", "properties": {"x": DEEP}}


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("f", "tools must be a list"),
        ([5], r"tools\[0\] must be .* got 5"),
        ([{"type": "retrieval"}], r"tools\[0\] must be"),
        ([tool("f"), {"type": "function"}], r"tools\[1\] must be"),
        ([tool("f") | {"extra": 1}], r"tools\[0\] has fields .* extra"),
        ([tool("f", colour=1)], r"tools\[0\].function has fields .* colour"),
        ([tool("")], r"tools\[0\].function.name must be .* got ''"),
        ([tool("a.b")], r"tools\[0\].function.name must be .* got 'a.b'"),
        ([tool("a\n")], r"tools\[0\].function.name must be"),
        ([tool("a" * 65)], r"tools\[0\].function.name must be"),
        ([tool("f"), tool("g"), tool("f")], r"tools\[2\].function.name must be used once, got 'f', also that of tools\[0\]"),
        ([tool("f", description=5)], r"tools\[0\].function.description must be a string, got 5"),
        ([tool("f", strict="yes")], r"tools\[0\].function.strict must be true or false, got 'yes'"),
        ([tool("f", [1])], r"tools\[0\].function.parameters must be the JSON schema of an object, got \[1\]"),
        ([tool("f", {"type": "string"})], r"tools\[0\].function.parameters.type must be \"object\", got 'string'"),
        ([tool("f", {"type": "object", "properties": 5})], r"tools\[0\].function.parameters is not a valid JSON schema: 5"),
        ([tool("f", DEEP)], r"tools\[0\].function.parameters .* nested deeper than 64"),
    ],
)  # fmt: skip
def test_definitions_that_are_refused(tools: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tools(tools)


@pytest.mark.parametrize("ref", ["#/$defs/Missing", "http://example.com/x", "#anchor", "#/required/5", "other.json"])
def test_references_that_lead_nowhere(ref: str) -> None:
    tools = [tool("f", {"type": "object", "properties": {"x": {"$ref": ref}}, "required": ["x"]})]
    with pytest.raises(ValueError, match=r"tools\[0\].function.parameters: \$ref must lead to a part"):
        tool_call_schema(tools)


@pytest.mark.parametrize("names", [[], "city", ["town"]])
def test_names_that_are_refused(names: Any) -> None:
    with pytest.raises(ValueError, match="names must be"):
        tool_call_schema(TOOLS, names)


NAMES = ("city", "list", "other", "none")


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ToolChoice("auto", NAMES)),
        ("auto", ToolChoice("auto", NAMES)),
        ("none", ToolChoice("none", ())),
        ("required", ToolChoice("required", NAMES)),
        ("any", ToolChoice("required", NAMES)),
        ({"type": "function", "function": {"name": "list"}}, ToolChoice("required", ("list",))),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("none"), tool("city"), tool("none")]}}, ToolChoice("auto", ("none", "city"))),
    ],
)  # fmt: skip
def test_choices(choice: Any, expected: ToolChoice) -> None:
    assert check_tool_choice(choice, check_tools(TOOLS)) == expected


def test_choices_without_tools() -> None:
    for choice in (None, "auto", "none"):
        assert check_tool_choice(choice, None) == ToolChoice("none", ())
    with pytest.raises(ValueError, match="tool_choice 'required' needs tools"):
        check_tool_choice("required", None)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("often", "tool_choice must be .* got 'often'"),
        (5, "tool_choice must be .* got 5"),
        ({"type": "custom"}, "tool_choice must be"),
        ({"type": "function"}, "tool_choice.function.name must be .* got None"),
        ({"type": "function", "function": {"name": "town"}}, r"must be that of a tool \(city, list, other, none\), got 'town'"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}, "must have a mode and a list of "
                                                                                    "tools"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "x", "tools": [tool("city")]}}, "mode must be auto or "
                                                                                             "required, got 'x'"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [5]}}, r"tools\[0\].function.name must be"),
    ],
)  # fmt: skip
def test_choices_that_are_refused(choice: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tool_choice(choice, check_tools(TOOLS))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["function", "f", "object", "#",
    "auto"]), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "function", "name",
    "parameters", "properties", "$ref", "$defs", "x", "items"]), inner, max_size=4), max_leaves=15,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(tools=st.lists(ANYTHING, max_size=2), parameters=ANYTHING, choice=ANYTHING)
def test_nothing_but_value_errors(tools: Any, parameters: Any, choice: Any) -> None:
    for given_tools in (tools, [tool("f", parameters)]):
        try:
            checked = check_tools(given_tools)
            check_tool_choice(choice, checked)
            tool_call_schema(checked)
        except ValueError:
            pass
