"""Around the bodies: methods, encodings, ids of requests, aborts by id, and what is refused before it costs
anything.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from pydantic_core import to_json

from nemo_engine import AsyncEngine
from tests.server.live import LiveServer

BODY = {"prompt": [1, 2000, 2001], "max_tokens": 2}
LONG = {"prompt": [1, 2000, 2001], "max_tokens": 900, "ignore_eos": True}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def narrow() -> Iterator[LiveServer]:
    """One request runs, the others wait."""
    options: dict[str, Any] = {"device": "cpu", "max_num_seqs": 1, "num_kv_pages": 100, "page_size": 16}
    with AsyncEngine("nemo-tiny", **options) as engine, LiveServer(engine, max_queue=20, page=False) as server:
        yield server


def post(server: LiveServer, body: dict[str, Any], path: str = "/v1/completions", **options: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=600, **options)


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.mark.parametrize("path", ["/health", "/v1/health/live", "/v1/health/ready", "/metrics", "/v1/models"])
def test_head_is_get_without_the_body(live: LiveServer, path: str) -> None:
    with httpx.Client(base_url=live.url) as client:  # over one connection: a body would be taken for the next answer
        head, get = client.head(path), client.get(path)
    assert head.status_code == get.status_code == 200 and not head.content and get.content
    assert head.headers["content-type"] == get.headers["content-type"]
    refused = httpx.head(live.url + "/v1/completions")
    assert refused.status_code == 405 and refused.headers["allow"] == "POST"


def test_compressed_bodies_are_refused_and_a_byte_order_mark_is_not(live: LiveServer) -> None:
    plain = json.dumps(BODY).encode()
    for kind, content in (("gzip", gzip.compress(plain)), ("br", plain)):
        answer = httpx.post(live.url + "/v1/completions", content=content, headers=JSON | {"content-encoding": kind})
        assert (
            answer.status_code == 415
            and f"Content-Encoding must not be set: bodies are taken uncompressed, got '{kind}'" in answer.text
        )
    for content, headers in ((plain, JSON | {"content-encoding": "identity"}), (b"\xef\xbb\xbf" + plain, JSON)):
        assert httpx.post(live.url + "/v1/completions", content=content, headers=headers).status_code == 200


def test_an_error_quotes_little_of_what_was_sent(live: LiveServer) -> None:
    for body in ({"model": "m" * 10**6}, {"response_format": {"type": "t" * 10**6}}, {"logit_bias": {"b" * 10**6: 1}}):
        answer = post(live, BODY | body)
        assert answer.status_code in (400, 404) and len(answer.content) < 10_000
        assert answer.json()["error"]["message"].count("[...]") <= 1


def test_too_many_prompts_are_refused_before_they_are_read(live: LiveServer) -> None:
    with patch("nemo_engine.server.prompts._encode", side_effect=AssertionError("it is read")) as encode:
        answer = post(live, BODY | {"prompt": ["one"] * 100_000})
        assert answer.status_code == 400 and "must be at most 128, got 100000" in answer.text
        assert not encode.called
        assert post(live, BODY).status_code == 500 and encode.called


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", BODY | {"logprobs": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "logprobs": True}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 2, "include": ["message.output_text.logprobs"]}),
    ],
)
def test_an_answer_that_is_long_to_write_holds_up_nobody(live: LiveServer, path: str, body: dict[str, Any]) -> None:
    has_begun, may_go_on = threading.Event(), threading.Event()

    def long(data: Any) -> bytes:
        has_begun.set()
        assert may_go_on.wait(120)
        return to_json(data)

    with patch("nemo_engine.server.answer.to_json", long), ThreadPoolExecutor() as pool:
        task = pool.submit(post, live, body, path)
        assert has_begun.wait(120)
        try:
            assert httpx.get(live.url + "/health", timeout=600).status_code == 200
        finally:
            may_go_on.set()
        assert task.result().status_code == 200


def test_ids_of_proxies_may_repeat_and_clients_ids_may_not(narrow: LiveServer) -> None:
    headers = {"X-Request-Id": "of-the-proxy"}

    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=narrow.url, timeout=600) as client:
            body = BODY | {"max_tokens": 30, "ignore_eos": True}
            same = [client.post("/v1/completions", json=body, headers=headers) for _ in range(3)]
            asked = [client.post("/v1/completions", json=body | {"request_id": "mine"}) for _ in range(2)]
            several = [
                client.post("/v1/completions", json=body | {"request_id": "ours", "prompt": [[1, 5], [1, 6]]})
                for _ in range(2)
            ]
            return await asyncio.gather(*same, *asked, *several)

    *same, one, other, first, second = asyncio.run(run())
    ids = [answer.json()["id"] for answer in same]
    assert ids == [answer.headers["x-request-id"] for answer in same] == ["cmpl-of-the-proxy"] * 3
    for pair in ((one, other), (first, second)):
        assert sorted(answer.status_code for answer in pair) == [200, 400]
        assert any("is in use by an unfinished request" in answer.text for answer in pair)
    odd = post(narrow, BODY, headers={"X-Request-Id": "a b\té".encode("latin-1")})
    assert odd.json()["id"].removeprefix("cmpl-").isalnum()


def test_an_abort_by_id_ends_all_prompts_of_a_request(narrow: LiveServer) -> None:
    async def run() -> httpx.Response:
        async with httpx.AsyncClient(base_url=narrow.url, timeout=600) as client:
            body = LONG | {"request_id": "all", "prompt": [[1, 5], [1, 6], [1, 7]]}
            task = asyncio.create_task(client.post("/v1/completions", json=body))
            while narrow.service.engine.num_unfinished < 3:
                await asyncio.sleep(0.01)
            told = await client.post("/abort", json={"request_id": ["all", "nobody"]})
            assert told.json() == {"aborted": ["cmpl-all"]}
            return await task

    answer = asyncio.run(run()).json()
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["abort"] * 3
    assert not narrow.service.running


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", LONG),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 900}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 900}),
    ],
)
def test_streams_that_are_left_while_they_wait_are_ended(narrow: LiveServer, path: str, body: dict[str, Any]) -> None:
    engine = narrow.service.engine

    def send(path: str, body: dict[str, Any]) -> socket.socket:
        content = json.dumps(body | {"stream": True, "ignore_eos": True}).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
            f"{len(content)}\r\n\r\n"
        )
        connection = socket.create_connection(("127.0.0.1", int(narrow.url.rsplit(":", 1)[1])), timeout=30)
        connection.sendall(head.encode() + content)
        return connection

    running = send("/v1/completions", LONG | {"request_id": "first"})
    wait_for(lambda: engine.stats().num_running == 1, "the first runs")
    waiting = [send(path, body) for _ in range(4)]
    wait_for(lambda: engine.num_unfinished == 5, "the others wait")
    for connection in waiting:
        connection.close()
    wait_for(lambda: engine.num_unfinished <= 1, "those that were left are ended")
    assert "cmpl-first" in narrow.service.owners, "the first still runs"
    running.close()
    wait_for(lambda: engine.num_unfinished == 0, "all are ended")


def test_tokens_of_a_text_and_back(live: LiveServer) -> None:
    told = post(live, {"prompt": "naïve [INST]", "return_token_strs": True}, "/tokenize").json()
    ids = told["tokens"]
    assert ids[0] == 1 and told["count"] == len(ids) == len(told["token_strs"]) and told["token_strs"][0] == "<s>"
    assert post(live, {"tokens": ids}, "/detokenize").json() == {"prompt": "<s>naïve [INST]"}
    bare = post(live, {"prompt": "naïve [INST]", "add_special_tokens": False}, "/tokenize").json()
    assert bare["tokens"] == ids[1:] and bare["token_strs"] is None
    assert post(live, {"tokens": []}, "/detokenize").json() == {"prompt": ""}
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": []}),
        ("/tokenize", {"prompt": "a", "model": "other"}),
        ("/detokenize", {"tokens": [1, 10**6]}),
    ):
        assert post(live, body, path).status_code == (404 if "model" in body else 400), body


def test_a_rendered_chat_is_the_prompt_that_is_answered(live: LiveServer) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "[INST] hi"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    body = {"messages": messages, "tools": [tool], "max_tokens": 1}
    told = post(live, body, "/v1/chat/completions/render").json()
    assert told["count"] == len(told["token_ids"]) and told["prompt"].endswith("[INST]S\n\n[INST] hi[/INST]")
    answer = post(live, body | {"return_token_ids": True}, "/v1/chat/completions").json()
    assert answer["prompt_token_ids"] == told["token_ids"] and answer["usage"]["prompt_tokens"] == told["count"]
    assert post(live, {"messages": messages, "tools": [tool]}, "/tokenize").json()["tokens"] == told["token_ids"]
    forced = post(live, body | {"tool_choice": "required"}, "/v1/chat/completions/render").json()
    assert forced["prompt"] == told["prompt"] + "[TOOL_CALLS]"


def test_a_queue_is_never_longer_than_it_may_be(narrow: LiveServer) -> None:
    async def run() -> list[int]:
        async with httpx.AsyncClient(base_url=narrow.url, timeout=600) as client:
            body = BODY | {"max_tokens": 40, "ignore_eos": True}
            answers = await asyncio.gather(*[client.post("/v1/completions", json=body) for _ in range(60)])
            return [answer.status_code for answer in answers]

    statuses = asyncio.run(run())
    assert set(statuses) == {200, 429} and statuses.count(200) < 40
