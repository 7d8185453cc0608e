"""No body stops the streams of others: the worst gap of a stream beside each of many hostile ones, as a ratio to its
worst gap alone.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.server.test_process import serving

MAX_RATIO = 20.0  # of worst gaps; seconds, and so hundreds, before these bodies were bounded
LEAST_ALONE = 0.010  # seconds; a gap alone that was luckily smaller counts as this
NUM_TRIES = 8  # the least ratio counts: a stop is there each time, what others do to the machine is not

M = 1_000_000
MESSAGE = {"role": "user", "content": "a"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}


def completion(**fields: Any) -> tuple[str, bytes]:
    return "/v1/completions", json.dumps({"prompt": "a", "max_tokens": 1} | fields).encode()


def chat(**fields: Any) -> tuple[str, bytes]:
    return "/v1/chat/completions", json.dumps({"messages": [MESSAGE], "max_tokens": 1} | fields).encode()


def answer(**fields: Any) -> tuple[str, bytes]:
    return "/v1/responses", json.dumps({"input": "a", "max_output_tokens": 1} | fields).encode()


def other(path: str, **fields: Any) -> tuple[str, bytes]:
    return path, json.dumps(fields).encode()


def tool(index: int) -> dict[str, Any]:
    return {"type": "function", "function": TOOL["function"] | {"name": f"f{index}"}}  # type: ignore[operator]


# Each is within the largest size of a body, and made when it is sent; what is answered, after "/".
BODIES: dict[str, Callable[[], tuple[str, bytes]]] = {
    "ids to abort/413": lambda: other("/abort", request_id=["x"] * M),
    "ids to abort, fewer/400": lambda: other("/abort", request_id=["x"] * 240_000),
    "ids to abort, few/200": lambda: other("/abort", request_id=["x"] * 4096),
    "unknown fields/413": lambda: completion(**{f"k{i}": i for i in range(700_000)}),
    "unknown fields, fewer/200": lambda: completion(**{f"k{i}": i for i in range(40_000)}),
    "names of unknown fields/200": lambda: completion(**{f"{i}" + "k" * 5000: i for i in range(2000)}),
    "text to encode/400": lambda: other("/tokenize", prompt="a" * 10 * M),
    "text to encode, less/200": lambda: other("/tokenize", prompt="a" * M),
    "text to encode, words/200": lambda: other("/tokenize", prompt="some words " * (M // 12), return_token_strs=True),
    "ids to decode/413": lambda: other("/detokenize", tokens=[2000] * (2 * M)),
    "ids to decode, fewer/200": lambda: other("/detokenize", tokens=[2000] * 200_000),
    "long prompt/400": lambda: completion(prompt="a" * 15 * M),
    "long prompt, words/400": lambda: completion(prompt="some words " * M),
    "long prompt without special tokens/400": lambda: completion(prompt="a" * 10 * M, add_special_tokens=False),
    "long prompt, cut/200": lambda: completion(prompt="some words " * (M // 12), truncate_prompt_tokens=5),
    "long prompt of ids/400": lambda: completion(prompt=[2000] * 240_000),
    "many prompts/400": lambda: completion(prompt=["a"] * 240_000),
    "many prompts of ids/400": lambda: completion(prompt=[[5]] * 49_000),
    "ids and a text/400": lambda: completion(prompt=[5] * 200_000 + ["a"]),
    "escapes/413": lambda: ("/v1/completions", b'{"prompt":"' + rb"\u00e9" * 2_600_000 + b'"}'),
    "escapes, fewer/400": lambda: ("/v1/completions", b'{"prompt":"' + rb"\u00e9" * 900_000 + b'"}'),
    "quotes/413": lambda: ("/v1/completions", b'{"prompt":"' + rb"\"" * (7 * M) + b'"}'),
    "lists/413": lambda: ("/v1/completions", b'{"prompt":' + b"[" + b"[]," * (4 * M) + b"[]]}"),
    "depth/413": lambda: ("/v1/completions", b'{"prompt":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "digits/400": lambda: ("/v1/completions", b'{"prompt":"a","seed":' + b"9" * (15 * M) + b"}"),
    "stop strings/400": lambda: completion(stop=[f"s{i}" for i in range(240_000)]),
    "a long stop string/400": lambda: completion(stop="s" * 10 * M),
    "bad words/200": lambda: completion(bad_words=[f"{i}" for i in range(10_000)]),
    "too many bad words/400": lambda: completion(bad_words=[f"{i}" for i in range(240_000)]),
    "a long bad word/400": lambda: completion(bad_words=["s" * 10 * M, "t"]),
    "bad words of many tokens/400": lambda: completion(bad_words=["s" * 1000] + [f"{i}" for i in range(9999)]),
    "biases/200": lambda: completion(logit_bias={str(i): 1 for i in range(6000)}),
    "wrong biases/400": lambda: completion(logit_bias={str(i): "x" for i in range(49_000)}),
    "too many biases/413": lambda: completion(logit_bias={str(i): 1 for i in range(100_000)}),
    "stop ids/400": lambda: completion(stop_token_ids=list(range(240_000))),
    "allowed ids, not numbers/400": lambda: completion(allowed_token_ids=["x"] * 240_000),
    "long model/400": lambda: completion(model="m" * 15 * M),
    "long salt/400": lambda: completion(cache_salt="m" * 15 * M),
    "many completions/200": lambda: completion(prompt=[2000] * 100, n=128),
    "many completions with stop strings/400": lambda: completion(n=128, stop=[f"s{i}" for i in range(1024)]),
    "messages/400": lambda: chat(messages=[MESSAGE] * 24_000),
    "too many messages/413": lambda: chat(messages=[MESSAGE] * 100_000),
    "long messages/400": lambda: chat(messages=[MESSAGE | {"content": "a" * 1000}] * 12_000),
    "parts/400": lambda: chat(messages=[{"role": "user", "content": [{"type": "text", "text": "word"}] * 24_000}]),
    "calls that are answered/400": lambda: chat(
        messages=[
            MESSAGE,
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                    for i in range(5000)
                ],
            },
            *({"role": "tool", "tool_call_id": f"c{i}", "content": "1"} for i in range(4999, -1, -1)),
        ]
    ),
    "JSON in a result/400": lambda: chat(
        messages=[
            MESSAGE,
            {
                "role": "assistant",
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "c", "content": "[" + "[]," * (4 * M) + "[]]"},
        ]
    ),
    "tools/400": lambda: chat(tools=[tool(i) for i in range(4000)]),
    "allowed tools/400": lambda: chat(
        tools=[tool(i) for i in range(2000)],
        tool_choice={
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "auto",
                "tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(2000)],
            },
        },
    ),
    "a large schema/": lambda: completion(
        structured_outputs={"json": {"type": "object", "properties": {f"k{i}": {} for i in range(24_000)}}}
    ),
    "a large enum/": lambda: completion(structured_outputs={"json": {"enum": [f"k{i}" for i in range(200_000)]}}),
    "a large choice/": lambda: completion(structured_outputs={"choice": [f"k{i}" for i in range(200_000)]}),
    "a long expression/": lambda: completion(structured_outputs={"regex": "(a|b)*" * 200_000}),
    "a costly expression/": lambda: completion(structured_outputs={"regex": "(a{1,1000}b{1,1000}){1,1000}"}),
    "an unknown format/400": lambda: completion(response_format={"type": "x" * 10 * M}),
    "input/400": lambda: answer(input=[MESSAGE] * 24_000),
    "long input/400": lambda: answer(input="some words " * M),
    "metadata/400": lambda: answer(metadata={f"k{i}": "v" for i in range(49_000)}),
    "include/400": lambda: answer(include=["x"] * 240_000),
}


class Stream:
    """A stream that goes on, and the worst gap between two of its events."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
        self._worst = 0.0
        self._is_over = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        body = json.dumps({"prompt": "a", "max_tokens": 8000, "ignore_eos": True, "stream": True})
        last = None
        while not self._is_over:
            self._connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            while response.readline():
                now = time.monotonic()
                if last is not None:
                    self._worst = max(self._worst, now - last)
                last = now
                if self._is_over:
                    return
            last = None  # a new request begins

    def worst(self) -> float:
        """The worst gap since the last call, that which is going on included."""
        worst, self._worst = self._worst, 0.0
        return worst

    def close(self) -> None:
        self._is_over = True
        self._thread.join(20)
        self._connection.close()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(
        "--num-kv-pages=2000",
        "--max-model-len=8192",
        "--max-num-batched-tokens=64",
        "--max-num-seqs=16",
        "--no-log-requests",
    ) as (_, url, _lines):
        yield url


def gap_beside(stream: Stream, url: str, path: str, body: bytes) -> tuple[float, int]:
    """The worst gap while ``body`` is sent and answered, and the status of the answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    stream.worst()
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.read()
    time.sleep(0.1)
    connection.close()
    return stream.worst(), response.status


@pytest.mark.parametrize("name", BODIES)
def test_no_body_stops_the_streams_of_others(server: str, name: str) -> None:
    path, body = BODIES[name]()
    assert len(body) < 16 * 2**20
    expected = name.partition("/")[2]
    stream = Stream(server)
    ratios = []
    try:
        time.sleep(0.05)
        for _ in range(NUM_TRIES):
            stream.worst()
            time.sleep(0.1)
            alone = max(stream.worst(), LEAST_ALONE)
            beside, status = gap_beside(stream, server, path, body)
            assert expected == str(status) or (not expected and status in (200, 400))
            ratios.append(beside / alone)
            if ratios[-1] < MAX_RATIO:
                return
        raise AssertionError(f"the gaps beside it were {[round(ratio) for ratio in ratios]} times those alone")
    finally:
        stream.close()
