"""The real openai client against a live server: what people's programs send, and what they get back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

from nemo_engine import AsyncEngine, SamplingParams
from tests.server.live import ENGINE_OPTIONS, MODEL, LiveServer
from tests.server.planted import CALLS, WEATHER_PARAMETERS, planted

PROMPT = "The heapq module"
USER: list[Any] = [{"role": "user", "content": "What does os.path.join do?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": WEATHER_PARAMETERS,
    },
}
TIME: Any = {"type": "function", "function": {"name": "get_time"}}


@pytest.fixture(scope="module")
def client(live: LiveServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def greedy(engine: AsyncEngine, prompt: Any, max_tokens: int) -> str:
    """What the engine itself says."""

    async def last() -> str:
        async for output in engine.generate(prompt, SamplingParams(temperature=0, max_tokens=max_tokens)):
            final = output
        return final.outputs[0].text

    return asyncio.run(last())


def ids(engine: AsyncEngine, text: str) -> list[int]:
    assert engine.tokenizer is not None
    return engine.tokenizer.encode(text)


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL == client.models.retrieve(MODEL).id


# ---- completions


def test_completions_say_what_the_engine_says(client: OpenAI, engine: AsyncEngine) -> None:
    completion = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0)
    (choice,) = completion.choices
    assert choice.text == greedy(engine, PROMPT, 16)
    assert choice.finish_reason == "length"
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(ids(engine, PROMPT))
    assert completion.usage.completion_tokens == 16
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 16


def test_several_prompts_as_text_and_as_ids(client: OpenAI, engine: AsyncEngine) -> None:
    texts = [PROMPT, "A list is", "class Queue:"]
    encoded = [ids(engine, text) for text in texts]
    expected = [greedy(engine, text, 8) for text in texts]
    for prompt in (texts, encoded):
        choices = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=8).choices
        assert [choice.index for choice in choices] == [0, 1, 2]
        assert [choice.text for choice in choices] == expected
    (one,) = client.completions.create(model=MODEL, prompt=encoded[1], temperature=0, max_tokens=8).choices
    assert one.text == expected[1]


def test_completions_stream(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": [PROMPT, "A list is"], "n": 2, "seed": 4, "max_tokens": 8}
    whole = client.completions.create(**asked)
    texts = [""] * 4
    reasons: list[Any] = [None] * 4
    usage = None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        assert usage is None, "something came behind the usage"
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_echo_and_logprobs(client: OpenAI, engine: AsyncEngine) -> None:
    (plain,) = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=4).choices
    (choice,) = client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=4, echo=True, logprobs=2
    ).choices
    assert choice.text == PROMPT + plain.text
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.token_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(ids(engine, PROMPT)) + 4
    assert logprobs.token_logprobs[0] is None and all(value is not None for value in logprobs.token_logprobs[1:])
    assert "".join(logprobs.tokens[-4:]) == plain.text
    assert logprobs.top_logprobs is not None and len(logprobs.top_logprobs[-1]) >= 2
    assert logprobs.text_offset is not None and logprobs.text_offset == sorted(logprobs.text_offset)
    (only,) = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0, echo=True, logprobs=1).choices
    assert only.text == PROMPT


def test_stop_and_seed(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[10:14]
    (stopped,) = client.completions.create(**asked, stop=[stop, "never"]).choices
    assert stopped.text == text[: text.index(stop)] and stopped.finish_reason == "stop"
    seeded = [
        client.completions.create(**asked | {"temperature": 1, "seed": seed}).choices[0].text for seed in (7, 7, 8)
    ]
    assert seeded[0] == seeded[1] != seeded[2]
    many = client.completions.create(**asked | {"temperature": 1, "seed": 7, "n": 3}).choices
    assert many[0].text == seeded[0] and len({choice.text for choice in many}) == 3


def test_logit_bias_and_extras(client: OpenAI, engine: AsyncEngine) -> None:
    queue = ids(engine, "queue")[-1]
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 3, "temperature": 0}
    biased = client.completions.create(**asked, logit_bias={str(queue): 100}).choices[0].text
    allowed = client.completions.create(**asked, extra_body={"allowed_token_ids": [queue], "ignore_eos": True}).choices[
        0
    ]
    assert engine.tokenizer is not None
    assert biased == allowed.text == engine.tokenizer.decode([queue] * 3)


# ---- chat


def test_chat_and_its_stream(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    (choice,) = whole.choices
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason == "length"
    text, roles, usage = "", [], None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for part in chunk.choices:
            text += part.delta.content or ""
            roles += [part.delta.role] if part.delta.role else []
    assert text == choice.message.content and roles == ["assistant"]
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens == 16
    with client.chat.completions.stream(**asked) as stream:
        stream.until_done()
        assert stream.current_completion_snapshot.choices[0].message.content == text


def test_chat_n_and_logprobs(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL, messages=USER, n=3, seed=2, max_completion_tokens=6, logprobs=True, top_logprobs=2, temperature=1
    )
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) == 3
    for choice in whole.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert len(choice.logprobs.content) <= 6
        text = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content).decode()
        assert text.removesuffix("</s>") == choice.message.content
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_bytes_of_tokens_make_the_answer(client: OpenAI) -> None:
    form = {"structured_outputs": {"choice": ["naïve 日本 🎉"]}}  # of tokens that are no whole characters
    answer = client.chat.completions.create(model=MODEL, messages=USER, logprobs=True, top_logprobs=2, extra_body=form)
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content or []
    assert any("\ufffd" in entry.token for entry in entries)
    data = b"".join(bytes(entry.bytes or ()) for entry in entries).removesuffix(b"</s>")
    assert data.decode() == answer.choices[0].message.content == "naïve 日本 🎉"


def test_usage_in_every_event(client: OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chat = list(
        client.chat.completions.create(model=MODEL, messages=USER, max_tokens=4, stream=True, stream_options=options)
    )
    text = list(
        client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=0, echo=True, stream=True, stream_options=options
        )
    )
    for chunks, count in ((chat, 4), (text, 0)):
        counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
        assert len(counts) == len(chunks) and counts == sorted(counts) and counts[-1] == count
    assert "".join(chunk.choices[0].text for chunk in text[:-1]) == PROMPT
    assert text[-2].choices[0].finish_reason == "length"


def test_a_multi_turn_chat_is_cached(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Tell me of queues, at length. " * 10}]
    first = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=24, temperature=0)
    messages += [first.choices[0].message, {"role": "user", "content": "And of stacks?"}]
    second = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=2)
    assert first.usage is not None and second.usage is not None and second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens or 0
    assert first.usage.prompt_tokens - 16 <= cached < second.usage.prompt_tokens


def test_async_clients_at_once(live: LiveServer, engine: AsyncEngine) -> None:
    prompts = [f"def function_{index}" for index in range(24)]

    async def ask(client: AsyncOpenAI, prompt: str, is_streamed: bool) -> str:
        asked: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "seed": 5, "temperature": 0.8}
        if not is_streamed:
            return str((await client.completions.create(**asked)).choices[0].text)
        stream = await client.completions.create(**asked, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everything() -> tuple[list[str], list[str]]:
        async with AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*[ask(client, p, bool(i % 2)) for i, p in enumerate(prompts)])
            return list(together), [await ask(client, prompt, False) for prompt in prompts[::6]]

    together, alone = asyncio.run(everything())
    assert together[::6] == alone


# ---- tools


ARGUMENTS = '{"city": "Oslo", "days": 2}'


def own_choice(engine: AsyncEngine, text: str, *calls: str) -> dict[str, Any]:
    """A grammar that makes the model say ``text`` and then, behind the token [TOOL_CALLS], ``calls``."""
    assert engine.tokenizer is not None
    parts = [json.dumps(text)] if text else []
    parts += [f"<[{engine.tokenizer.tool_calls_id}]>", json.dumps(f"[{', '.join(calls)}]")]
    return {"structured_outputs": {"grammar": f"start: {' '.join(parts)}"}}


def test_calls_of_the_models_own_choice_go_there_and_back(client: OpenAI, engine: AsyncEngine) -> None:
    calls = (f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}', '{"name": "get_time", "arguments": {}}')
    asked: dict[str, Any] = {"model": MODEL, "tools": [WEATHER, TIME], "max_tokens": 90}
    asked["extra_body"] = own_choice(engine, "Let me see.", *calls)
    (choice,) = client.chat.completions.create(messages=USER, **asked).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    made = choice.message.tool_calls
    assert made is not None and [call.type for call in made] == ["function", "function"]
    assert [(call.function.name, call.function.arguments) for call in made if call.type == "function"] == [
        ("get_weather", ARGUMENTS),
        ("get_time", "{}"),
    ]
    assert all(len(call.id) == 9 and call.id.isalnum() for call in made) and made[0].id != made[1].id

    with client.chat.completions.stream(messages=USER, **asked) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion().choices[0]
    assert [(event.name, event.arguments) for event in done] == [("get_weather", ARGUMENTS), ("get_time", "{}")]
    assert final.finish_reason == "tool_calls" and final.message.content == "Let me see."

    history = [*USER, choice.message]
    history += [{"role": "tool", "tool_call_id": call.id, "content": "mild"} for call in made]
    answer = client.chat.completions.create(model=MODEL, messages=history, tools=[WEATHER], max_tokens=4)
    assert answer.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match=r"messages\[4\]\.tool_call_id"):
        client.chat.completions.create(model=MODEL, messages=[*history, history[-1]])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_forced_calls(client: OpenAI, choice: Any, is_streamed: bool) -> None:
    asked: dict[str, Any] = {
        "model": MODEL, "messages": USER, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 90, "temperature": 1,
        "parallel_tool_calls": False, "n": 3, "seed": 1,
    }  # fmt: skip
    if is_streamed:
        with client.chat.completions.stream(**asked) as stream:
            choices: Any = stream.get_final_completion().choices
    else:
        choices = client.chat.completions.create(**asked).choices
    assert len(choices) == 3
    for one in choices:
        assert one.finish_reason == "tool_calls" and not one.message.content
        (call,) = one.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "get_weather"
        assert arguments["city"] in ("Oslo", "Rome") and 1 <= arguments["days"] <= 9 and len(arguments) == 2


def test_a_function_by_name_is_called_once(client: OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    asked: dict[str, Any] = {"model": MODEL, "messages": USER, "tools": [WEATHER], "max_tokens": 90, "temperature": 1}
    for choice, is_one in ((named, True), ("required", False)):
        answer = client.chat.completions.create(**asked, tool_choice=choice, n=8, seed=1)
        counts = [len(one.message.tool_calls or ()) for one in answer.choices]
        assert (max(counts) == 1) is is_one and min(counts) >= 1


def test_a_broken_list_of_calls_is_content(client: OpenAI, engine: AsyncEngine) -> None:
    with planted(engine, ["Hm.", CALLS, '[{"name": "get_time", "arguments": {', "oops"]):
        (choice,) = client.chat.completions.create(model=MODEL, messages=USER, tools=[TIME]).choices
    assert choice.message.tool_calls is None and choice.finish_reason == "stop"
    assert choice.message.content == 'Hm.[{"name": "get_time", "arguments": {oops'


# ---- structured output


class Point(BaseModel):
    x: int = Field(ge=0, le=99)
    kind: Literal["dot", "cross"]


def test_parse(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": 60, "seed": 3}
    (choice,) = client.chat.completions.parse(**asked, response_format=Point).choices
    assert isinstance(choice.message.parsed, Point)
    with client.chat.completions.stream(**asked, response_format=Point) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Point)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**asked | {"max_tokens": 2}, response_format=Point)
    forced: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    forced["tools"] = [openai.pydantic_function_tool(Point)]
    calls: Any = client.chat.completions.parse(**asked, **forced).choices[0].message.tool_calls
    (call,) = calls
    assert isinstance(call.function.parsed_arguments, Point)


@pytest.mark.parametrize("is_strict", [False, True])
def test_a_form_of_answers_leaves_calls_possible(client: OpenAI, engine: AsyncEngine, is_strict: bool) -> None:
    assert engine.tokenizer is not None and engine.tokenizer.tool_calls_id is not None
    asked: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": 90, "seed": 3, "tools": [WEATHER]}
    form = {"type": "json_schema", "json_schema": {"name": "point", "schema": Point.model_json_schema()}}
    asked["response_format"] = form if is_strict else {"type": "json_object"}
    trigger = str(engine.tokenizer.tool_calls_id)
    (called,) = client.chat.completions.create(**asked, logit_bias={trigger: 100}).choices
    calls: Any = called.message.tool_calls
    assert calls[0].function.name == "get_weather" and not called.message.content
    (answered,) = client.chat.completions.create(**asked, logit_bias={trigger: -100}).choices
    assert answered.message.tool_calls is None and answered.message.content is not None
    assert answered.message.content.startswith("{")
    if is_strict:
        Point.model_validate_json(answered.message.content)


def test_choices_and_logprobs_go_together(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL, messages=USER, n=4, temperature=1, seed=1, logprobs=True, top_logprobs=1,
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
    )  # fmt: skip
    for choice in whole.choices:
        assert choice.message.content in ("yes", "no") and choice.finish_reason == "stop"
        assert choice.logprobs is not None and choice.logprobs.content


def test_a_schema_that_cannot_be_honoured_is_refused(client: OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "strange"}}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="strange"):
        client.chat.completions.create(model=MODEL, messages=USER, response_format=form)
    form["json_schema"]["schema"] = {"type": "object", "x-guidance": {"whitespace_flexible": False}}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    for more in ({}, {"tools": [tool]}):  # beside tools it becomes a part of a grammar
        with pytest.raises(openai.BadRequestError, match="x-guidance is not supported"):
            client.chat.completions.create(model=MODEL, messages=USER, response_format=form, **more)


def test_the_whole_vocabulary_can_be_reported() -> None:
    with (
        AsyncEngine("nemo-tiny", **ENGINE_OPTIONS, max_logprobs=-1) as engine,
        LiveServer(engine, page=False) as server,
    ):
        client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        (choice,) = client.chat.completions.create(
            model=MODEL, messages=USER, max_tokens=1, logprobs=True, top_logprobs=-1
        ).choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content[0].top_logprobs) == 6144


# ---- errors


def test_bad_requests(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature must be in") as caught:
        client.chat.completions.create(model=MODEL, messages=USER, temperature=9)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="max_model_len") as caught:
        client.completions.create(model=MODEL, prompt="x " * 3000, stream=True)
    assert caught.value.code == "context_length_exceeded"
    assert "this model's maximum context length is" in str(caught.value)  # litellm and others look for these words
    for field, value in (("top_logprobs", 21), ("max_completion_tokens", 0)):
        fields: Any = {field: value, "logprobs": True}
        with pytest.raises(openai.BadRequestError, match=f"{field} must be") as caught:
            client.chat.completions.create(model=MODEL, messages=USER, **fields)
        assert caught.value.param == field
    with pytest.raises(openai.BadRequestError, match="suffix is not supported"):
        client.completions.create(model=MODEL, prompt="x", suffix="y")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[[1, 5], [10**6]])
    assert caught.value.param == "prompt[1][0]"
    for extra in ({"structured_outputs": {"regex": "[a-z]+"}, "allowed_token_ids": [1]}, {"truncate_prompt_tokens": 0}):
        with pytest.raises(openai.BadRequestError, match="|".join(extra)):
            client.completions.create(model=MODEL, prompt="x", extra_body=extra)
    with pytest.raises(openai.NotFoundError, match="gpt-9") as missing:
        client.chat.completions.create(model="gpt-9", messages=USER)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="x")


def test_api_keys(engine: AsyncEngine) -> None:
    with LiveServer(engine, api_key=["first", "second"]) as live:
        for key in ("first", "second"):
            assert OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0).models.list().data
        with pytest.raises(openai.AuthenticationError) as caught:
            OpenAI(base_url=f"{live.url}/v1", api_key="third", max_retries=0).models.list()
        assert caught.value.code == "invalid_api_key"


def test_a_full_queue_is_a_rate_limit(engine: AsyncEngine) -> None:
    with LiveServer(engine, max_queue=1) as live:
        client = OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)
        asked: dict[str, Any] = {
            "model": MODEL,
            "prompt": PROMPT,
            "max_tokens": 300,
            "extra_body": {"ignore_eos": True},
        }
        with client.completions.create(**asked, n=48, stream=True) as stream:  # more than run at once
            next(iter(stream))
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(**asked)
        assert caught.value.response.headers["retry-after"] == "1"


def test_a_time_out(client: OpenAI, engine: AsyncEngine) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 900}
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**asked, extra_body={"timeout": 0.05, "ignore_eos": True})
    assert caught.value.status_code == 408


def test_failures_inside_the_engine(client: OpenAI, engine: AsyncEngine) -> None:
    with planted(engine, ["some", " text", ""], "error"):
        with pytest.raises(openai.InternalServerError, match="planted"):
            client.chat.completions.create(model=MODEL, messages=USER)
        text = ""
        with pytest.raises(openai.APIError, match="planted"):
            for chunk in client.chat.completions.create(model=MODEL, messages=USER, stream=True):
                text += chunk.choices[0].delta.content or ""
        assert text == "some text"
