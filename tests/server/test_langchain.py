"""langchain-openai against a live server, through chat completions and through responses."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

from nemo_engine import AsyncEngine
from tests.server.live import MODEL, LiveServer
from tests.server.planted import CALLS, planted

MESSAGES = [SystemMessage("Be brief."), HumanMessage("What is a list?")]


@tool
def get_weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather of a city."""
    return f"mild in {city}"


class Point(BaseModel):
    """A point."""

    x: int = Field(ge=0, le=99)
    kind: Literal["dot", "cross"]


def chat_model(live: LiveServer, api: str) -> ChatOpenAI:
    options: dict[str, Any] = {"api_key": "none", "max_retries": 0, "temperature": 0, "max_tokens": 80}
    return ChatOpenAI(
        model=MODEL, base_url=f"{live.url}/v1", stream_usage=True, use_responses_api=api == "responses", **options
    )


@pytest.fixture(params=["chat", "responses"])
def model(request: pytest.FixtureRequest, live: LiveServer) -> ChatOpenAI:
    return chat_model(live, request.param)


def test_invoke_stream_and_batch(model: ChatOpenAI) -> None:
    answer = model.invoke(MESSAGES)
    assert answer.text and answer.usage_metadata is not None
    chunks = list(model.stream(MESSAGES))
    assert len(chunks) > 4 and "".join(chunk.text for chunk in chunks) == answer.text
    usages = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [usage["output_tokens"] for usage in usages] == [answer.usage_metadata["output_tokens"]]
    assert [one.text for one in model.batch([MESSAGES, MESSAGES])] == [answer.text] * 2


def test_async(live: LiveServer) -> None:
    async def ask() -> list[str]:
        models = [chat_model(live, api) for api in ("chat", "responses")]
        whole = await asyncio.gather(*[model.ainvoke(MESSAGES) for model in models])
        return [answer.text for answer in whole] + [
            "".join([c.text async for c in m.astream(MESSAGES)]) for m in models
        ]

    texts = asyncio.run(ask())
    assert texts[0] and texts == texts[:1] * 4


def test_bound_tools_go_there_and_back(model: ChatOpenAI) -> None:
    bound = model.bind_tools([get_weather], tool_choice="any", parallel_tool_calls=False, strict=True)
    answer = bound.invoke(MESSAGES)
    (call,) = answer.tool_calls
    assert call["name"] == "get_weather" and call["args"]["city"] in ("Oslo", "Rome")
    result = get_weather.invoke(call)
    assert isinstance(result, ToolMessage)
    final = model.bind_tools([get_weather], tool_choice="none").invoke([*MESSAGES, answer, result], max_tokens=4)
    assert final.text


def test_streamed_calls_of_the_models_own_choice(model: ChatOpenAI, engine: AsyncEngine) -> None:
    pieces = ["Hm. ", CALLS, '[{"name": "get_weather", "argu', 'ments": {"city": "O', 'slo"}}]', ""]
    with planted(engine, pieces):
        whole: Any = None
        for chunk in model.bind_tools([get_weather]).stream(MESSAGES):
            whole = chunk if whole is None else whole + chunk
        at_once = model.bind_tools([get_weather]).invoke(MESSAGES)
    for answer in (whole, at_once):
        assert isinstance(answer, AIMessage) and answer.text == "Hm. "
        assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("get_weather", {"city": "Oslo"})]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model: ChatOpenAI, method: Any) -> None:
    found = model.with_structured_output(Point, method=method, strict=True).invoke(MESSAGES)
    assert isinstance(found, Point)


def test_completions(live: LiveServer) -> None:
    options: dict[str, Any] = {"api_key": "none", "max_retries": 0, "temperature": 0, "max_tokens": 8}
    model = OpenAI(model=MODEL, base_url=f"{live.url}/v1", **options)
    assert model.invoke("The heapq module") == "".join(model.stream("The heapq module")) != ""
