"""A fine-tune with a chat template behind the server: its prompts, its ends of turns, its calls, and templates that
clients send.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import nemo_engine
from nemo_engine import AsyncEngine, Engine, SamplingParams
from nemo_engine.text import template_meter
from tests.helpers import hf_tokenizers
from tests.server.live import ENGINE_OPTIONS, LiveServer
from tests.text.chat_templates import CHATML, HERMES, TINY, TOOLS

CHAT = "/v1/chat/completions"
START, END = 14, 15
USER = [{"role": "user", "content": "Hi <|im_end|>"}]


def write_model(folder: Path, template: str) -> Path:
    """nemo-tiny as a fine-tune in ChatML: two control tokens renamed, two that are shown, no tekken.json."""
    source = Path(nemo_engine.__file__).parent / "assets/nemo-tiny"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("tekken*"))
    names = {START: "<|im_start|>", END: "<|im_end|>", 16: "<tool_call>", 17: "</tool_call>"}
    data = hf_tokenizers.tekken_as_hf(TINY, renamed=names)
    for token in data["added_tokens"]:
        token["special"] = token["id"] not in (16, 17)
    hf_tokenizers.write(folder, data, hf_tokenizers.config_of(data, chat_template=template))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "hermes", HERMES)


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Iterator[AsyncEngine]:
    with AsyncEngine(folder, **ENGINE_OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(tuned: AsyncEngine) -> Iterator[LiveServer]:
    with LiveServer(tuned, trust_request_chat_template=True) as server:
        yield server


def post(server: LiveServer, path: str = CHAT, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=600)


def streamed(server: LiveServer, **body: Any) -> tuple[str, list[dict[str, Any]], str]:
    """The content, the calls and the finish reason of a streamed answer."""
    content, calls, reason = "", [], ""
    with httpx.stream("POST", server.url + CHAT, json={**body, "stream": True}, timeout=600) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line[6:])["choices"]:
                content += choice["delta"].get("content") or ""
                for call in choice["delta"].get("tool_calls", ()):
                    if call["index"] == len(calls):
                        calls.append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
                    calls[call["index"]]["arguments"] += call["function"]["arguments"]
                reason = choice["finish_reason"] or reason
    return content, calls, reason


def test_the_template_serves_and_says_so(server: LiveServer) -> None:
    answer = post(server, CHAT + "/render", messages=USER).json()
    assert answer["prompt"] == "<|im_start|>user\nHi <|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert [i for i in answer["token_ids"] if i in (START, END)] == [START, END, START]
    assert post(server, "/tokenize", messages=USER).json()["tokens"] == answer["token_ids"]
    said = httpx.get(server.url + "/version").json()["chat"]
    assert said["renderer"] == "template" and said["template"] == "tokenizer_config.json"
    assert said["ends"] == ["<|im_end|>"] and "lacks control tokens" not in said["why"]


@pytest.mark.parametrize("end", [END, 2])
def test_the_end_of_a_turn_ends_an_answer(server: LiveServer, tuned: AsyncEngine, end: int) -> None:
    bias = {str(end): 100}
    choice = post(server, messages=USER, logit_bias=bias).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"], choice["stop_reason"]) == ("stop", "", None)
    choice = post(server, messages=USER, logit_bias=bias, min_tokens=3, max_tokens=9).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"]
    choice = post(server, messages=USER, logit_bias=bias, ignore_eos=True, max_tokens=3).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", "b"]}}}
    answer = post(server, messages=USER, response_format=schema, logit_bias=bias).json()["choices"][0]
    assert answer["finish_reason"] == "stop" and json.loads(answer["message"]["content"]) in ("a", "b")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_forced_calls_have_the_form_that_the_template_writes(server: LiveServer, choice: Any) -> None:
    tools = [json.loads(json.dumps(tool)) for tool in TOOLS]
    for tool in tools:
        tool["function"]["parameters"] |= {"additionalProperties": False}
        for value in tool["function"]["parameters"]["properties"].values():
            value |= {"enum": ["x", "y"]} if value["type"] == "string" else {}
            value |= {"maximum": 9, "minimum": 0} if value["type"] == "integer" else {}
            value |= {"items": {"enum": [1, 2]}, "maxItems": 2} if value["type"] == "array" else {}
    body = {"messages": USER, "tools": tools, "tool_choice": choice, "max_tokens": 200, "seed": 3, "temperature": 1.0}
    body["parallel_tool_calls"] = False  # a model that is not tuned for calls goes on making them
    prompt = post(server, CHAT + "/render", **body).json()["prompt"]
    assert prompt.endswith("<|im_start|>assistant\n<tool_call>\n")
    whole = post(server, **body).json()["choices"][0]
    calls = whole["message"]["tool_calls"]
    assert whole["finish_reason"] == "tool_calls" and calls and whole["message"]["content"] is None
    for call in calls:
        assert len(call["id"]) == 9 and isinstance(json.loads(call["function"]["arguments"]), dict)
        assert call["function"]["name"] == "add" or choice == "required"
    content, pieces, reason = streamed(server, **body)
    assert (content, reason) == ("", "tool_calls")
    assert [(one["name"], one["arguments"]) for one in pieces] == [
        (call["function"]["name"], call["function"]["arguments"]) for call in calls
    ]


def test_calls_between_tags_are_found_in_free_answers(server: LiveServer) -> None:
    """A grammar makes the model write what a tuned one would."""
    text = 'grammar: "Sure.\\n" TAG "\\n{\\"name\\": \\"add\\", \\"arguments\\": {\\"a_b\\": 1}}\\n" END'
    lark = text.replace("grammar", "start").replace("TAG", "<[16]>").replace("END", "<[17]>")
    body = {"messages": USER, "tools": TOOLS, "structured_outputs": {"grammar": lark}, "max_tokens": 60}
    choice = post(server, **body).json()["choices"][0]
    assert choice["message"]["content"] == "Sure." and choice["finish_reason"] == "tool_calls"
    function = choice["message"]["tool_calls"][0]["function"]
    assert function == {"name": "add", "arguments": '{"a_b": 1}'}
    assert streamed(server, **body)[0] == "Sure."
    plain = post(server, **body, tool_choice="none").json()["choices"][0]
    assert "<tool_call>" in plain["message"]["content"] and plain["finish_reason"] == "stop"


def test_a_clients_template_is_taken_where_the_server_trusts_it(server: LiveServer, tuned: AsyncEngine) -> None:
    body = {
        "messages": USER,
        "chat_template": "{{ greeting }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
    }
    answer = post(server, CHAT + "/render", **body, chat_template_kwargs={"greeting": "<|im_start|>"}).json()
    assert answer["prompt"] == "<|im_start|>Hi <|im_end|><|im_end|>" and answer["token_ids"].count(START) == 0
    assert post(server, **body, max_tokens=2).status_code == 200
    for wrong, said in (
        ({"chat_template": "{{ 1 / 0 }}"}, "ZeroDivisionError"),
        ({"chat_template_kwargs": {"no_such": 1}}, "no_such has no effect"),
        ({"chat_template_kwargs": {"tools": 1}}, "must be given as tools itself"),
        ({"documents": [{"text": "x"}]}, "does not read them"),
        ({"system_placement": "first"}, "places system text"),
    ):
        refused = post(server, messages=USER, **wrong)
        assert refused.status_code == 400 and said in refused.json()["error"]["message"], refused.text
    with LiveServer(tuned) as closed:
        refused = post(closed, **body)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "chat_template"
        assert "--trust-request-chat-template" in refused.json()["error"]["message"]
        assert post(closed, messages=USER, max_tokens=1).status_code == 200


def test_the_responses_route_takes_a_template_by_the_same_rule(server: LiveServer, tuned: AsyncEngine) -> None:
    body = {"input": "Hi", "max_output_tokens": 3, "seed": 1, "chat_template_kwargs": {"greeting": "Well"}}
    template = "{{ greeting }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    answer = post(server, "/v1/responses", **body, chat_template=template).json()
    said = {"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {"greeting": "Well"}}
    prompt = post(server, CHAT + "/render", **said, chat_template=template).json()
    assert prompt["prompt"] == "WellHi<|im_end|>" and answer["usage"]["input_tokens"] == len(prompt["token_ids"])
    refused = post(server, "/v1/responses", **body)
    assert refused.status_code == 400 and "greeting has no effect" in refused.json()["error"]["message"]
    assert post(server, "/v1/responses", input="Hi", max_output_tokens=1, documents=[{"text": "x"}]).status_code == 400
    with LiveServer(tuned) as closed:
        refused = post(closed, "/v1/responses", **body, chat_template=template)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "chat_template"


def test_a_template_without_end_costs_its_own_request_alone(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_meter, "MAX_SECONDS", 0.5)
    bomb = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

    def others_meanwhile() -> int:
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(post(server, messages=USER, chat_template=bomb)))
        thread.start()
        others = 0
        while thread.is_alive():
            assert httpx.get(server.url + "/health", timeout=600).status_code == 200
            others += not answers
            time.sleep(0.02)
        thread.join()
        assert answers[0].status_code == 400 and "computing time" in answers[0].json()["error"]["message"]
        return others

    assert any(others_meanwhile() > 3 for _ in range(5))  # a busy machine may let none through, but not each time


def test_the_engine_takes_a_file_a_text_and_mistral(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(CHATML.replace("assistant", "bot"))
    for option, expected in ((tmp_path / "own.jinja", "bot"), (CHATML, "assistant"), ("mistral", "[/INST]")):
        with Engine(folder, chat_template=option, **ENGINE_OPTIONS) as engine:
            (output,) = engine.chat(USER, SamplingParams(max_tokens=1))
            assert engine.tokenizer is not None
            assert expected in engine.tokenizer.decode(output.prompt_token_ids[-9:], skip_special_tokens=False)
    for option, said in (
        (tmp_path / "no.jinja", "which is no file"),
        ("{% x %}", "chat_template cannot be used: line 1"),
    ):
        with pytest.raises(ValueError, match=said):
            Engine(folder, chat_template=option, **ENGINE_OPTIONS)
