"""A schema that cannot be kept is refused by the name of the field that the client sent it in, on every road into the
grammar.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from nemo_engine import AsyncEngine, SamplingParams
from nemo_engine.server.protocol import ChatRequest
from nemo_engine.server.tools import ToolUse
from tests.server.live import LiveServer

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
GOOD: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
BAD: dict[str, Any] = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
WRONG = "not at #/properties/a is not supported"
OURS, THEIRS, OTHER = "structured_outputs.json", "response_format.json_schema.schema", "text.format.schema"


def tools(*parameters: Any) -> dict[str, Any]:
    named = [{"name": f"f{index}", "parameters": one} for index, one in enumerate(parameters)]
    return {"tools": [{"type": "function", "function": function} for function in named]}


def flat(*parameters: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function"} | one["function"] for one in tools(*parameters)["tools"]]}


def answer(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}


def text(schema: Any) -> dict[str, Any]:
    return {"text": {"format": {"type": "json_schema", "name": "a", "schema": schema}}}


FORCED = {"tool_choice": "required"}
BODIES: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, tools(GOOD, BAD) | FORCED, "tools[1].function.parameters"),
    (CHAT, tools(GOOD, BAD) | FORCED | answer(GOOD), "tools[1].function.parameters"),
    (CHAT, tools(GOOD, BAD) | answer(GOOD), "tools[1].function.parameters"),
    (CHAT, tools(BAD, GOOD) | {"structured_outputs": {"json": GOOD}}, "tools[0].function.parameters"),
    (CHAT, tools(BAD) | {"response_format": {"type": "json_object"}}, "tools[0].function.parameters"),
    (CHAT, tools(GOOD) | answer(BAD), THEIRS),
    (CHAT, answer(BAD), THEIRS),
    (CHAT, tools(GOOD) | {"structured_outputs": {"json": BAD}}, OURS),
    (CHAT, {"structured_outputs": {"json": BAD}, "response_format": {"type": "text"}}, OURS),
    (COMPLETIONS, answer(BAD), THEIRS),
    (COMPLETIONS, {"structured_outputs": {"json": BAD}}, OURS),
    (RESPONSES, flat(GOOD, BAD) | FORCED, "tools[1].parameters"),
    (RESPONSES, flat(GOOD, BAD) | text(GOOD), "tools[1].parameters"),
    (RESPONSES, flat(GOOD) | text(BAD), OTHER),
    (RESPONSES, text(BAD), OTHER),
]


@pytest.mark.parametrize(("path", "body", "param"), BODIES)
def test_a_schema_is_refused_by_its_field(live: LiveServer, path: str, body: dict[str, Any], param: str) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    rest: dict[str, Any] = {CHAT: chat, COMPLETIONS: {"prompt": "a"}, RESPONSES: {"input": "a"}}[path]
    error = httpx.post(live.url + path, json=body | rest, timeout=600).json()["error"]
    assert error["param"] == param and error["message"] == f"{param}: {WRONG}"


def test_what_no_schema_alone_is_to_blame_for(engine: AsyncEngine) -> None:
    """Each is small, and the grammar of all calls is too large."""
    many = [GOOD | {"properties": {"a": {"enum": [f"{index}" + "x" * 20_000]}}} for index in range(16)]
    request = ChatRequest(messages=[{"role": "user", "content": "Hi"}], **tools(*many), tool_choice="required")
    assert engine.renderers is not None
    use = ToolUse.of(request, engine.renderers.default)
    with pytest.raises(ValueError) as error:
        SamplingParams(structured_outputs=use.structured_outputs(None))  # type: ignore[arg-type]
    message = use.blamed(str(error.value), None)
    assert message.startswith("tools: the schema of all calls must have at most "), message
