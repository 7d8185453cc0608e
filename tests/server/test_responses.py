"""/v1/responses with the real openai client: every event is validated by the client's own types and put together by
it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, Field, TypeAdapter

from nemo_engine import AsyncEngine
from tests.server.live import MODEL, LiveServer
from tests.server.planted import CALLS, WEATHER_PARAMETERS, planted

ANY_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": WEATHER_PARAMETERS,
    "strict": True,
}
TIME: Any = {"type": "function", "name": "get_time", "parameters": {"type": "object", "properties": {}}}
ARGUMENTS = '{"city": "Oslo", "days": 2}'
CALL = f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}'


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(live: LiveServer, **fields: Any) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/responses", json={"model": MODEL, "input": "hi", "max_output_tokens": 4} | fields)


def checked(body: dict[str, Any]) -> Response:
    """The response object, which must fit the client's type as it stands: the client itself does not look."""
    response: Response = Response.model_validate(body, strict=True)
    return response


def events_of(live: LiveServer, **fields: Any) -> list[dict[str, Any]]:
    """The events of a streamed response, each validated, with numbers without a gap."""
    text = post(live, stream=True, **fields).text
    events: list[dict[str, Any]] = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n", 1)
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        ANY_EVENT.validate_python(event)
        assert event["sequence_number"] == len(events)
        events.append(event)
    assert [one["type"] for one in events[:2]] == ["response.created", "response.in_progress"]
    return events


def assert_whole(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The last response of a stream, after a look at whether the events add up to it."""
    last = events[-1]["response"]
    checked(last)
    for index, item in enumerate(last["output"]):
        own = [one for one in events if one.get("output_index") == index]
        assert own[0]["type"] == "response.output_item.added" and own[0]["item"]["status"] == "in_progress"
        assert own[-1]["type"] == "response.output_item.done" and own[-1]["item"] == item
        assert all(one.get("item_id", item["id"]) == item["id"] for one in own)
        deltas = "".join(one["delta"] for one in own if one["type"].endswith(".delta"))
        logprobs = [token for one in own if one["type"].endswith(".delta") for token in one.get("logprobs", ())]
        done = next(one for one in own if one["type"].endswith(("_text.done", "_arguments.done")))
        if item["type"] == "message":
            (part,) = item["content"]
            assert deltas == done["text"] == part["text"]
            assert done["logprobs"] == part["logprobs"]
            assert logprobs == part["logprobs"][: len(logprobs)]
            assert [one["type"].split(".", 1)[1] for one in own if "delta" not in one["type"]] == [
                "output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done",
            ]  # fmt: skip
        else:
            assert deltas == done["arguments"] == item["arguments"]
            assert done["name"] == item["name"]
    return dict(last)


# ---- text


def test_text(client: OpenAI, live: LiveServer) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "What is a list?"}], max_tokens=12, temperature=0
    )
    response = client.responses.create(
        model=MODEL, input="What is a list?", max_output_tokens=12, temperature=0, metadata={"run": "7"}
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.status == "incomplete"
    assert response.incomplete_details is not None and response.incomplete_details.reason == "max_output_tokens"
    assert response.metadata == {"run": "7"}
    assert response.temperature == 0.0 and response.max_output_tokens == 12
    assert response.usage is not None and chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == 12
    assert response.usage.total_tokens == chat.usage.total_tokens
    body = post(live, metadata={"a": "b"}).json()
    checked(body)
    assert body["store"] is False and body["id"].startswith("resp_")


def test_an_answer_that_ends_by_itself_is_completed(live: LiveServer) -> None:
    body = post(live, structured_outputs={"choice": ["yes"]}, max_output_tokens=20).json()
    response = checked(body)
    assert response.output_text == "yes" and response.status == "completed"
    assert response.incomplete_details is None and response.completed_at is not None
    events = events_of(live, structured_outputs={"choice": ["yes"]}, max_output_tokens=20)
    assert events[-1]["type"] == "response.completed"
    assert assert_whole(events)["output"][0]["content"][0]["text"] == "yes"


def test_instructions_and_items_are_the_chat_they_stand_for(client: OpenAI, engine: AsyncEngine) -> None:
    with planted(engine, ["ok"]) as prompts:
        client.responses.create(
            model=MODEL,
            instructions="Be brief.",
            input=[
                {"role": "developer", "content": "In English."},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "One?"}]},
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "One.", "annotations": []}],
                },
                {"role": "user", "content": "Two?"},
            ],
        )
        client.chat.completions.create(
            model=MODEL,
            messages=[
                {"role": "system", "content": "Be brief."},
                {"role": "developer", "content": "In English."},
                {"role": "user", "content": "One?"},
                {"role": "assistant", "content": "One."},
                {"role": "user", "content": "Two?"},
            ],
        )
    assert prompts[0].token_ids == prompts[1].token_ids


def test_stream_equals_whole(client: OpenAI, live: LiveServer) -> None:
    asked: dict[str, Any] = {"input": "Queues?", "max_output_tokens": 16, "seed": 5, "ignore_eos": True}
    whole = checked(post(live, **asked).json())
    events = events_of(live, **asked)
    last = assert_whole(events)
    assert events[-1]["type"] == "response.incomplete" and last["status"] == "incomplete"
    assert last["output"][0]["content"][0]["text"] == whole.output_text
    assert whole.usage is not None
    assert last["usage"]["output_tokens"] == whole.usage.output_tokens == 16
    assert events[0]["response"]["usage"] is None and events[0]["response"]["output"] == []


def test_the_clients_own_accumulator(client: OpenAI) -> None:
    with client.responses.stream(
        model=MODEL, input="hi", max_output_tokens=20, extra_body={"structured_outputs": {"choice": ["a queue"]}}
    ) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == "a queue"
    assert final.status == "completed"


def test_async_client(live: LiveServer) -> None:
    async def ask() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            asked: dict[str, Any] = {"model": MODEL, "input": "hi", "max_output_tokens": 8, "temperature": 0}
            whole = await client.responses.create(**asked)
            text = ""
            async for event in await client.responses.create(**asked, stream=True):
                text += event.delta if event.type == "response.output_text.delta" else ""
            return whole.output_text, text

    whole, streamed = asyncio.run(ask())
    assert whole == streamed != ""


def test_logprobs(client: OpenAI, live: LiveServer) -> None:
    asked: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 3, "temperature": 0}
    body = post(live, **asked).json()
    checked(body)
    (part,) = body["output"][0]["content"]
    assert [one["token"] for one in part["logprobs"]] and len(part["logprobs"]) == 4
    assert all(len(one["top_logprobs"]) == 3 for one in part["logprobs"])
    assert "".join(one["token"] for one in part["logprobs"]) == part["text"]
    streamed = assert_whole(events_of(live, **asked))
    # The last bits of a number depend on what else is in the batch.
    for ours, theirs in zip(streamed["output"][0]["content"][0]["logprobs"], part["logprobs"], strict=True):
        assert ours["token"] == theirs["token"]
        assert ours["logprob"] == pytest.approx(theirs["logprob"], abs=0.05)
    assert post(live).json()["output"][0]["content"][0]["logprobs"] == []


def test_usage_counts_cached_tokens(live: LiveServer) -> None:
    long = "A sentence that fills the pages of a cache. " * 12
    first, second = (post(live, input=long).json()["usage"] for _ in range(2))
    assert first["input_tokens"] == second["input_tokens"] > 64
    assert second["input_tokens_details"]["cached_tokens"] >= 64


def test_extras_of_the_chat_route(live: LiveServer) -> None:
    answer = post(
        live, top_k=1, min_p=0.1, stop=["zzz"], seed=3, logit_bias={"1500": 100}, explain=True, request_id="x7"
    )
    body = answer.json()
    assert body["id"] == "resp_x7" and answer.headers["x-request-id"] == "resp_x7"
    assert body["explain"]["parameters"]["top_k"] == {"value": 1, "origin": "request"}
    answer = post(live, user="me", frobnicate=1, text={"shade": 3}, prompt_cache_key="k")
    assert answer.status_code == 200
    ignored = set(answer.headers["x-ignored-fields"].split(", "))
    assert ignored == {"user", "frobnicate", "text.shade", "prompt_cache_key"}


# ---- tools


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_forced_call_goes_there_and_back(client: OpenAI, choice: Any) -> None:
    history: list[Any] = [{"role": "user", "content": "How is Oslo?"}]
    response = client.responses.create(
        model=MODEL, input=history, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False, max_output_tokens=80
    )
    (call,) = response.output
    assert response.status == "completed" and response.output_text == ""
    assert call.type == "function_call" and call.name == "get_weather" and call.status == "completed"
    arguments = json.loads(call.arguments)
    assert arguments["city"] in ("Oslo", "Rome") and 1 <= arguments["days"] <= 9
    assert len(call.call_id) == 9
    history += response.output
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": '{"degrees": 3}'})
    answer = client.responses.create(model=MODEL, input=history, tools=[WEATHER], max_output_tokens=4)
    assert answer.output_text


def test_the_history_of_calls_is_the_chat_it_stands_for(client: OpenAI, engine: AsyncEngine) -> None:
    flat: list[Any] = [WEATHER, TIME]
    nested: list[Any] = [
        {"type": "function", "function": {k: v for k, v in one.items() if k != "type"}} for one in flat
    ]
    with planted(engine, ["ok"]) as prompts:
        client.responses.create(
            model=MODEL,
            tools=flat,
            input=[
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": "Let me see."},
                {"type": "function_call", "call_id": "call_1", "name": "get_weather", "arguments": ARGUMENTS},
                {"type": "function_call", "call_id": "call_2", "name": "get_time", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "call_2", "output": "noon"},
                {
                    "type": "function_call_output",
                    "call_id": "call_1",
                    "output": [{"type": "input_text", "text": "mild"}],
                },
            ],
        )
        calls = [("call_1", "get_weather", ARGUMENTS), ("call_2", "get_time", "{}")]
        messages: list[Any] = [
            {"role": "user", "content": "?"},
            {
                "role": "assistant",
                "content": "Let me see.",
                "tool_calls": [
                    {"type": "function", "id": call_id, "function": {"name": name, "arguments": arguments}}
                    for call_id, name, arguments in calls
                ],
            },
            {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
            {"role": "tool", "tool_call_id": "call_1", "content": "mild"},
        ]
        client.chat.completions.create(model=MODEL, tools=nested, messages=messages)
    assert prompts[0].token_ids == prompts[1].token_ids


PIECES = [
    "Let ",
    "me see.",
    CALLS,
    '[{"name": "get_',
    'weather", "argu',
    f'ments": {ARGUMENTS}}}',
    ", ",
    '{"name": ',
    '"get_time"}]',
    "",
]


def test_text_and_calls_of_the_models_own_choice(live: LiveServer, engine: AsyncEngine) -> None:
    asked: dict[str, Any] = {"tools": [WEATHER, TIME], "include": ["message.output_text.logprobs"]}
    with planted(engine, PIECES):
        whole = checked(post(live, **asked).json())
        events = events_of(live, **asked)
    streamed = checked(assert_whole(events))
    assert events[-1]["type"] == "response.completed"
    for response in (whole, streamed):
        text, weather, time = response.output
        assert text.type == "message" and response.output_text == "Let me see."
        assert text.content[0].type == "output_text"
        assert [one.token for one in text.content[0].logprobs or ()] == ["Let ", "me see."]
        assert weather.type == time.type == "function_call"
        assert (weather.name, weather.arguments) == ("get_weather", ARGUMENTS)
        assert (time.name, time.arguments) == ("get_time", "{}")


def test_one_call_without_parallel_tool_calls(live: LiveServer, engine: AsyncEngine) -> None:
    asked: dict[str, Any] = {"tools": [WEATHER, TIME], "parallel_tool_calls": False}
    with planted(engine, PIECES):
        outputs = [post(live, **asked).json(), assert_whole(events_of(live, **asked))]
    for body in outputs:
        assert [item["type"] for item in body["output"]] == ["message", "function_call"]
        assert body["parallel_tool_calls"] is False


def test_the_clients_own_accumulator_takes_calls(client: OpenAI, engine: AsyncEngine) -> None:
    with (
        planted(engine, PIECES),
        client.responses.stream(model=MODEL, input="?", tools=[WEATHER, TIME]) as stream,
    ):
        snapshots = [one.snapshot for one in stream if one.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert ARGUMENTS in snapshots
    assert final.output[1].type == "function_call" and final.output[1].parsed_arguments == json.loads(ARGUMENTS)


def test_a_call_that_is_cut_is_incomplete(live: LiveServer, engine: AsyncEngine) -> None:
    pieces = [CALLS, f'[{CALL}, {{"name": "get_weather", ', '"arguments": {"ci']
    with planted(engine, pieces, "length"):
        bodies = [
            post(live, tools=[WEATHER]).json(),
            assert_whole(events_of(live, tools=[WEATHER])),
        ]
    for body in bodies:
        assert body["status"] == "incomplete"
        assert [item["status"] for item in body["output"]] == ["completed", "incomplete"]
        assert body["output"][1]["arguments"] == '{"ci'


def test_what_is_no_call_is_text(live: LiveServer, engine: AsyncEngine) -> None:
    with planted(engine, ["Hm.", CALLS, "no calls at all"]):
        bodies = [post(live, tools=[WEATHER]).json(), assert_whole(events_of(live, tools=[WEATHER]))]
    for body in bodies:
        assert checked(body).output_text == "Hm.no calls at all" and len(body["output"]) == 1
    # A stream has told of a call before it turns out to be none.
    with planted(engine, [CALLS, '[{"name": "get_time", "arguments": {"a": 1', "} oops"]):
        body = assert_whole(events_of(live, tools=[TIME]))
    assert [item["type"] for item in body["output"]] == ["function_call", "message"]
    assert body["output"][1]["content"][0]["text"].endswith("oops")


def test_no_tools_with_tool_choice_none(client: OpenAI, engine: AsyncEngine) -> None:
    with planted(engine, ["ok"]) as prompts:
        client.responses.create(model=MODEL, input="?", tools=[WEATHER], tool_choice="none")
        client.responses.create(model=MODEL, input="?")
    assert prompts[0].token_ids == prompts[1].token_ids


def test_allowed_tools(client: OpenAI, engine: AsyncEngine) -> None:
    choice: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]}
    tools: Any = [WEATHER, TIME]
    response = client.responses.create(
        model=MODEL, input="?", tools=tools, tool_choice=choice, parallel_tool_calls=False, max_output_tokens=60
    )
    assert [item.name for item in response.output if item.type == "function_call"] == ["get_time"]
    with planted(engine, ["ok"]) as prompts:
        client.responses.create(model=MODEL, input="?", tools=tools, tool_choice=choice | {"mode": "auto"})
        client.responses.create(model=MODEL, input="?", tools=[TIME])
    assert prompts[0].token_ids == prompts[1].token_ids


# ---- structured output


class Point(BaseModel):
    x: int = Field(ge=0, le=99)
    name: str = Field(pattern="^[a-z]{1,6}$")


def test_parse_gives_the_clients_own_class(client: OpenAI) -> None:
    response = client.responses.parse(model=MODEL, input="A point", text_format=Point, max_output_tokens=80)
    assert isinstance(response.output_parsed, Point)
    assert response.text is not None and response.text.format is not None
    assert response.text.format.type == "json_schema" and response.text.format.name == "Point"
    with client.responses.stream(model=MODEL, input="A point", text_format=Point, max_output_tokens=80) as stream:
        stream.until_done()
        assert isinstance(stream.get_final_response().output_parsed, Point)


def test_json_object(client: OpenAI) -> None:
    response = client.responses.create(
        model=MODEL,
        input="JSON, please",
        text={"format": {"type": "json_object"}},
        max_output_tokens=60,
        extra_body={"structured_outputs": None},
        temperature=0,
    )
    assert response.output_text.lstrip().startswith("{")


# ---- errors


def test_failure_in_mid_stream_is_an_event(live: LiveServer, engine: AsyncEngine) -> None:
    with planted(engine, ["Some ", "text", ""], "error"):
        events = events_of(live)
        whole = post(live)
    assert events[-1]["type"] == "response.failed"
    body = events[-1]["response"]
    checked(body)
    assert (
        body["status"] == "failed" and body["error"]["code"] == "server_error" and "planted" in body["error"]["message"]
    )
    assert body["output"][0]["status"] == "incomplete"
    assert whole.status_code == 500 and whole.json()["error"]["code"] == "generation_failed"


def test_a_time_out_in_mid_stream_is_an_event(live: LiveServer, engine: AsyncEngine) -> None:
    with planted(engine, ["Some ", "text"], raises=TimeoutError()):
        events = events_of(live)
    assert events[-1]["type"] == "response.failed"
    body = events[-1]["response"]
    assert checked(body).error is not None and "time-out" in body["error"]["message"]
    assert body["usage"]["output_tokens"] == 2


def test_an_aborted_response_is_cancelled(live: LiveServer, engine: AsyncEngine) -> None:
    with planted(engine, ["Some ", "text"], "abort"):
        bodies = [post(live).json(), events_of(live)[-1]["response"]]
    for body in bodies:
        assert checked(body).status == "cancelled" and body["incomplete_details"] is None
        assert body["output"][0]["status"] == "incomplete"


MESSAGE = {"role": "user", "content": "?"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": 5}, "input"),
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": ["x"]}, "input[0]"),
    ({"input": [MESSAGE, {"type": "reasoning", "summary": []}]}, "input[1].type"),
    ({"input": [{"type": ["x"]}]}, "input[0].type"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
    ({"input": [MESSAGE, {"role": "assistant", "content": "x"}]}, "input[1]"),
    ({"input": [{"type": "function_call_output", "call_id": "x", "output": "1"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "output": "1"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "x"}]}, "input[0].output"),
    ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
    ({"instructions": "x", "input": [{"type": "function_call", "call_id": "1", "name": "f g"}]}, "input[0].name"),
    ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": 3}]}, "input[0].arguments"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0]"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"tools": [TIME, WEATHER | {"parameters": {"type": "string"}}]}, "tools[1].parameters.type"),
    ({"tools": [TIME, TIME]}, "tools[1].name"),
    ({"tools": [TIME | {"output_schema": {"type": "string"}}]}, "tools[0]"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice.name"),
    ({"tools": [TIME], "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
    ({"tools": [TIME], "tool_choice": {"type": "allowed_tools", "mode": "x", "tools": [TIME]}}, "tool_choice.mode"),
    (
        {"tools": [TIME], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [WEATHER]}},
        "tool_choice.tools[0].name",
    ),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
    ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
    ({"text": {"verbosity": "high"}}, "text.verbosity"),
    ({"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}}, "text.format"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"temperature": 9}, "temperature"),
    ({"top_p": "x"}, "top_p"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"top_logprobs": 21, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
    ({"include": ["message.output_text.logprobs", "no.such"]}, "include[1]"),
    ({"truncation": "auto"}, "truncation"),
    ({"truncation": "some"}, "truncation"),
    ({"metadata": {"a": 5}}, "metadata.a"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    ({"metadata": {"a" * 65: "x"}}, "metadata"),
    ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
    ({"max_tool_calls": 3}, "max_tool_calls"),
    ({"messages": [MESSAGE]}, "messages"),
    ({"n": 2}, "n"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[f"{i}-{param}" for i, (_, param) in enumerate(REFUSED)])
def test_bad_input_is_named(live: LiveServer, fields: dict[str, Any], param: str) -> None:
    answer = post(live, **fields)
    error = answer.json()["error"]
    assert answer.status_code == 400, error
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert "messages[" not in error["message"] and param.rsplit(".", 1)[-1] in error["message"]


def test_no_tools_may_be_an_empty_list(client: OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="hi", max_output_tokens=2, tools=[])  # the Agents SDK's way
    assert answer.tools == [] and answer.output_text


def test_values_that_ask_for_nothing_are_taken(live: LiveServer) -> None:
    nothing: dict[str, Any] = {
        "store": False, "background": False, "previous_response_id": None, "conversation": None, "reasoning": {"effort":
        None}, "include": [], "truncation": "disabled", "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "metadata": None, "tools": None, "tool_choice": "auto", "n": 1, "max_tool_calls": None, "top_logprobs": 0,
        "stream_options": {"include_obfuscation": False},
    }  # fmt: skip
    answer = post(live, **nothing)
    assert answer.status_code == 200, answer.text
    assert "x-ignored-fields" not in answer.headers
    assert post(live, reasoning={"effort": "none"}, store=None).status_code == 200


def test_errors_are_the_clients_exceptions(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.responses.create(model="gpt-9", input="hi")
    with pytest.raises(openai.BadRequestError, match="max_model_len") as caught:
        client.responses.create(model=MODEL, input="x " * 3000, stream=True)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_1")
    with pytest.raises(openai.NotFoundError):
        client.responses.delete("resp_1")
