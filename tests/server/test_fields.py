"""What a request's fields may hold, at every level of every route: one rule (``server/fields.py``)."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.server.live import LiveServer

CHAT = "/v1/chat/completions"
NOTHING: list[Any] = [None, False, "", [], {}, {"a": None}, [{}], {"a": [], "b": {"c": ""}}]
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def post(live: LiveServer, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(live.url + path, json=body, timeout=600)


def history(**message: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", **message}]
    return {"messages": [*turns, {"role": "user", "content": "Hi"}], "max_tokens": 1}


def user(content: Any = "Hi", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 1, **more}


def input_of(*items: Any, **more: Any) -> dict[str, Any]:
    return {"input": [*items, {"role": "user", "content": "Hi"}], "max_output_tokens": 1, **more}


def part(**more: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": "Hi", **more}]


# Of each object in a body: the route, a body in which it has one more field, and the path by which that is told.
PLACES: list[tuple[str, Any, str]] = [
    ("/v1/completions", lambda more: {"prompt": "a", "max_tokens": 1, **more}, ""),
    (
        "/v1/completions",
        lambda more: {"prompt": "a", "max_tokens": 1, "stream": True, "stream_options": more},
        "stream_options.",
    ),
    (
        "/v1/completions",
        lambda more: {"prompt": "a", "max_tokens": 1, "response_format": {"type": "text", **more}},
        "response_format.",
    ),
    (CHAT, lambda more: user(**more), ""),
    (CHAT, lambda more: history(**more), "messages[]."),
    (CHAT, lambda more: user(part(**more)), "messages[].content[]."),
    (CHAT, lambda more: history(content=part(**more)), "messages[].content[]."),
    (
        CHAT,
        lambda more: {
            "messages": [{"role": "system", "content": part(**more)}, {"role": "user", "content": "a"}],
            "max_tokens": 1,
        },
        "messages[].content[].",
    ),
    (CHAT, lambda more: history(tool_calls=[CALL | more]), "messages[].tool_calls[]."),
    (
        CHAT,
        lambda more: history(tool_calls=[CALL | {"function": CALL["function"] | more}]),
        "messages[].tool_calls[].function.",
    ),
    (CHAT, lambda more: user(tools=[TOOL | more]), "tools[]."),
    (CHAT, lambda more: user(tools=[TOOL | {"function": FUNCTION | more}]), "tools[].function."),
    (
        CHAT,
        lambda more: user(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {}, **more}}),
        "response_format.json_schema.",
    ),
    (CHAT + "/render", lambda more: history(**more), "messages[]."),
    ("/tokenize", lambda more: {"prompt": "a", **more}, ""),
    ("/tokenize", lambda more: {"messages": [{"role": "user", "content": "a", **more}]}, "messages[]."),
    ("/detokenize", lambda more: {"tokens": [2000], **more}, ""),
    ("/abort", lambda more: {"request_id": "none", **more}, ""),
    ("/v1/responses", lambda more: input_of(**more), ""),
    ("/v1/responses", lambda more: input_of({"role": "assistant", "content": "a", **more}), "input[]."),
    (
        "/v1/responses",
        lambda more: input_of({"role": "user", "content": [{"type": "input_text", "text": "a", **more}]}),
        "input[].content[].",
    ),
    ("/v1/responses", lambda more: input_of(tools=[{"type": "function", **FUNCTION, **more}]), "tools[]."),
    ("/v1/responses", lambda more: input_of(text=more), "text."),
    ("/v1/responses", lambda more: input_of(text={"format": {"type": "text", **more}}), "text.format."),
    ("/v1/responses", lambda more: input_of(stream=True, stream_options=more), "stream_options."),
]


@pytest.mark.parametrize(("path", "body", "told"), PLACES)
def test_a_field_that_nobody_knows_is_told_unless_it_asks_for_nothing(
    live: LiveServer, path: str, body: Any, told: str
) -> None:
    answer = post(live, path, body({"cache_control": {"type": "ephemeral"}, "no_such": 7}))
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-ignored-fields"].split(", ") == [f"{told}cache_control", f"{told}no_such"]
    nothing = {f"no_such_{index}": value for index, value in enumerate(NOTHING)}
    answer = post(live, path, body(nothing))
    assert answer.status_code == 200 and "x-ignored-fields" not in answer.headers, (answer.text, answer.headers)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "audio", "function_call", "thinking"])
def test_what_would_change_the_prompt_is_refused_by_its_place_unless_it_asks_for_nothing(
    live: LiveServer, name: str
) -> None:
    for value in NOTHING:
        assert post(live, CHAT, history(**{name: value})).status_code == 200, value
    answer = post(live, CHAT, history(**{name: "I think"}))
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "unsupported_parameter"
    assert error["param"] == f"messages[1].{name}" and error["param"] in error["message"]


def test_known_fields_of_a_body_that_are_not_supported_ask_for_nothing_by_the_same_values(live: LiveServer) -> None:
    from nemo_engine.server.protocol import ChatRequest

    for value in NOTHING:
        answer = post(live, CHAT, user(**dict.fromkeys(ChatRequest.unsupported, value)))
        assert answer.status_code == 200 and "x-ignored-fields" not in answer.headers, (value, answer.text)
    for name in ChatRequest.unsupported:
        answer = post(live, CHAT, user(**{name: "something"}))
        assert answer.status_code == 400 and answer.json()["error"]["param"] == name
    assert post(live, CHAT, user(best_of=True)).status_code == 400


def test_names_that_are_told_are_bounded(live: LiveServer) -> None:
    many = {f"messages_{i}": 1 for i in range(500)}
    answer = post(live, CHAT, history(**many) | many)
    assert answer.status_code == 200 and len(answer.headers["x-ignored-fields"].split(", ")) == 32


# ---- prefix, as Mistral's clients send it


def test_prefix_false_is_nothing_and_prefix_true_continues_the_last_message(live: LiveServer) -> None:
    assert post(live, CHAT, history(prefix=False)).status_code == 200
    begun = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The heapq"}]}
    by_flag, by_prefix = (
        post(live, CHAT + "/render", body).json()
        for body in (
            begun | {"continue_final_message": True, "add_generation_prompt": False},
            {"messages": [begun["messages"][0], begun["messages"][1] | {"prefix": True}]},
        )
    )
    key = next(name for name in by_flag if name.endswith("token_ids") or name == "tokens")
    assert by_flag[key] == by_prefix[key]
    for body, place in (
        (history(prefix=True), "messages[1].prefix may be true in the last message only"),
        (history(prefix=1), "messages[1].prefix must be true or false"),
        (user() | {"messages": [{"role": "user", "content": "a", "prefix": True}]}, "messages[0] has fields"),
    ):
        answer = post(live, CHAT, body)
        assert answer.status_code == 400 and place in answer.json()["error"]["message"], answer.text


def test_echo_of_text_parts_is_that_of_text(live: LiveServer) -> None:
    begun = ["Hello, ", [{"type": "text", "text": "Hello, "}]]
    texts = []
    for content in begun:
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
        body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False, "echo": True}
        body |= {"max_tokens": 3, "temperature": 0}
        whole = post(live, CHAT, body).json()["choices"][0]["message"]["content"]
        lines = post(live, CHAT, body | {"stream": True}).text.split("\n")
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        texts += [whole, "".join(event["choices"][0]["delta"].get("content") or "" for event in events)]
    assert len(set(texts)) == 1 and texts[0].startswith("Hello, ")


# ---- tools and forms


def test_no_tools_are_no_tools(live: LiveServer) -> None:
    for path, body in (
        (CHAT, user(tools=[])),
        (CHAT, user(tools=[], tool_choice="auto")),
        ("/v1/responses", input_of(tools=[])),
    ):
        assert post(live, path, body).status_code == 200  # fmt: skip
    assert post(live, CHAT, user(tools=[], tool_choice="required")).status_code == 400


def test_a_forced_call_has_the_form_of_a_call_whatever_text_would_have(live: LiveServer) -> None:
    form = {"type": "json_schema", "name": "a", "schema": {"type": "object", "properties": {"b": {"type": "string"}}}}
    tool = {"type": "function", **FUNCTION}
    answer = post(
        live,
        "/v1/responses",
        input_of(tools=[tool], tool_choice="required", text={"format": form}) | {"max_output_tokens": 60},
    )
    assert answer.status_code == 200 and answer.json()["output"][0]["type"] == "function_call", answer.text
    chat = user(tools=[TOOL], tool_choice="required", response_format={"type": "json_object"}) | {"max_tokens": 60}
    message = post(live, CHAT, chat).json()["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "f"


def test_responses_takes_what_other_models_answers_would_include(live: LiveServer) -> None:
    body = input_of(
        include=["reasoning.encrypted_content", "message.output_text.logprobs"],
        reasoning={"summary": "auto", "effort": None},
    )
    answer = post(live, "/v1/responses", body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-ignored-fields"] == "reasoning.summary, include[0]"
    for field, value in (("reasoning", {"effort": "high"}), ("include", ["no.such"])):
        answer = post(live, "/v1/responses", input_of(**{field: value}))
        assert answer.status_code == 400 and answer.json()["error"]["param"].startswith(field)


# ---- ids


@pytest.mark.parametrize("wrong", [True, 1.0, "1", None, [1]])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/detokenize", lambda value: {"tokens": [2000, value]}),
        ("/v1/completions", lambda value: {"prompt": [2000, value], "max_tokens": 1}),
        ("/v1/completions", lambda value: {"prompt": [[2000], [2000, value]], "max_tokens": 1}),
        ("/v1/completions", lambda value: {"prompt": "a", "stop_token_ids": [2000, value], "max_tokens": 1}),
        (CHAT, lambda value: user(allowed_token_ids=[2000, value])),
        (CHAT, lambda value: user(logprobs=True, logprob_token_ids=[2000, value])),
    ],
)
def test_only_an_integer_is_the_id_of_a_token(live: LiveServer, path: str, body: Any, wrong: Any) -> None:
    answer = post(live, path, body(wrong))
    assert answer.status_code == 400 and answer.json()["error"]["param"], answer.text
