"""Who may ask and how much: keys, sizes, queues, time-outs, origins; and what errors look like."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from nemo_engine import AsyncEngine
from nemo_engine.server.app import create_app
from nemo_engine.server.options import ServerOptions
from tests.server.live import LiveServer

BODY = {"prompt": [1, 2000, 2001], "max_tokens": 2}
KEYS = ("first-key", "second key with spaces ünd ä")


def post(server: LiveServer, path: str = "/v1/completions", body: Any = None, **options: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=BODY if body is None else body, timeout=600, **options)


def check_error(response: httpx.Response, status: int, *, param: str | None = None, text: str = "") -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)
    assert text in error["message"], error
    assert param is None or error["param"] == param, error
    return dict(error)


@pytest.fixture(scope="module")
def guarded(engine: AsyncEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(f"# keys of the clients\n\n{KEYS[1]}\n", "utf-8")
    with LiveServer(engine, api_key=[KEYS[0]], api_key_file=str(path), page=False) as server:
        yield server


# ---- keys


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("form", ["bearer", "x-api-key", "basic"])
def test_any_of_the_keys_opens(guarded: LiveServer, key: str, form: str) -> None:
    if form == "basic":
        assert post(guarded, auth=httpx.BasicAuth("anyone", key)).status_code == 200
        return
    raw = key.encode()
    headers = [(b"authorization", b"Bearer " + raw)] if form == "bearer" else [(b"x-api-key", raw)]
    assert post(guarded, headers=httpx.Headers(headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "first-key"},
        {"Authorization": "Basic Zmlyc3Q6d3Jvbmc="},
        {"Authorization": "Basic !!!"},
        {"Authorization": "Bearer first-key2"},
        {"Authorization": "Bearer first-ke"},
        {"X-API-Key": ""},
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/version", "/load", "/openapi.json", "/nowhere"])
def test_without_a_key_nothing_is_told(guarded: LiveServer, headers: dict[str, str], path: str) -> None:
    response = httpx.get(guarded.url + path, headers=headers)
    check_error(response, 401)
    assert "www-authenticate" in response.headers


def test_a_browser_on_another_site_cannot_lend_its_login(guarded: LiveServer) -> None:
    auth = httpx.BasicAuth("anyone", KEYS[0])
    assert post(guarded, auth=auth, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    check_error(post(guarded, auth=auth, headers={"Sec-Fetch-Site": "cross-site"}), 401)


@pytest.mark.parametrize("path", ["/health", "/v1/health/live", "/v1/health/ready", "/metrics"])
def test_probes_need_no_key(guarded: LiveServer, path: str) -> None:
    assert httpx.get(guarded.url + path).status_code == 200


def test_probes_need_no_key_where_the_server_is_mounted(engine: AsyncEngine) -> None:
    app = FastAPI()
    app.mount("/openai", create_app(engine, ServerOptions(api_key=["k"], log_requests=False)))
    client = TestClient(app)
    assert [client.request(method, "/openai/health").status_code for method in ("GET", "HEAD")] == [200, 200]
    refused = [client.get(f"/openai{path}") for path in ("/", "/v1/models", "/health/")]
    assert [answer.status_code for answer in refused] == [401, 401, 401]
    assert [answer.headers["www-authenticate"][:6] for answer in refused] == ["Basic ", "Bearer", "Bearer"]


def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ServerOptions().keys() == ()
    monkeypatch.setenv("NEMO_ENGINE_API_KEY", "a, b,,a")
    assert ServerOptions(api_key=["c"]).keys() == (b"c", b"a", b"b")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 70000}, "port must be an integer in [0, 65535], got 70000"),
        ({"max_queue": 0}, "max_queue must be an integer at least 1, got 0"),
        ({"request_timeout": -1.0}, "request_timeout must be a positive number, got -1.0"),
        ({"request_timeout": float("nan")}, "request_timeout must be a positive number"),
        ({"api_key_file": "/nowhere"}, "api_key_file must be a file that exists, got '/nowhere'"),
        ({"ssl_certfile": __file__}, "ssl_certfile and ssl_keyfile go together"),
        ({"api_key": [" "]}, "must not be empty"),
        ({"metrics_prefix": "a:b"}, "metrics_prefix must be letters"),
        ({"system_placement": "middle"}, 'system_placement must be "last" or "first"'),
        ({"default_sampling_params": {"seed": "1"}}, "default_sampling_params takes temperature"),
        ({"default_sampling_params": {"top_p": "x"}}, "default_sampling_params top_p must be a number, got 'x'"),
        ({"default_sampling_params": {"temperature": "9"}}, "temperature must be in [0.0, 2.0], got 9.0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ServerOptions(**options)
    assert message in str(error.value)


def test_a_key_file_without_keys(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no key"):
        ServerOptions(api_key_file=str(tmp_path / "keys")).keys()


# ---- sizes


def test_large_bodies(engine: AsyncEngine) -> None:
    with LiveServer(engine, max_request_mib=0.01, page=False) as server:
        check_error(post(server, body={"prompt": "x" * 20000}), 413, text="larger than 10485 bytes")

        def chunks() -> Iterator[bytes]:
            for _ in range(40):
                yield b"[" * 1000

        check_error(
            httpx.post(server.url + "/v1/completions", content=chunks(), headers={"content-type": "application/json"}),
            413,
        )
        assert post(server).status_code == 200


def test_limits_of_the_server(engine: AsyncEngine) -> None:
    options = {"max_prompt_tokens": 10, "max_completion_tokens": 5, "max_completions": 3, "page": False}
    with LiveServer(engine, **options) as server:
        error = check_error(post(server, body={"prompt": [1] * 11}), 400, param="prompt", text="11 tokens")
        assert error["code"] == "context_length_exceeded"
        check_error(post(server, body=BODY | {"max_tokens": 6}), 400, param="max_tokens", text="at most 5")
        check_error(post(server, body=BODY | {"n": 4}), 400, param="n", text="at most 3, got 4")
        check_error(post(server, body={"prompt": [[1]] * 2, "n": 2}), 400, param="n", text="at most 3, got 4")
        answer = post(server, body={"prompt": [1, 2000], "ignore_eos": True, "explain": True}).json()
        assert answer["usage"]["completion_tokens"] == 5
        assert answer["explain"]["parameters"]["max_tokens"] == {"value": 5, "origin": "server limit"}


def test_a_full_queue_is_said_at_once() -> None:
    options: dict[str, Any] = {
        "device": "cpu",
        "max_num_seqs": 1,
        "max_model_len": 512,
        "num_kv_pages": 40,
        "page_size": 16,
    }
    with AsyncEngine("nemo-tiny", **options) as engine, LiveServer(engine, max_queue=2, page=False) as server:

        async def run() -> list[httpx.Response]:
            resume = threading.Event()
            pause = asyncio.create_task(
                engine.call(lambda _: resume.wait(90))
            )  # so that none ends before all have come
            async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
                body = BODY | {"max_tokens": 100, "ignore_eos": True}
                posts = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(12)]
                deadline = time.monotonic() + 60
                while sum(post.done() for post in posts) < 9 and time.monotonic() < deadline:
                    await asyncio.sleep(0.01)
                resume.set()
                await pause
                return await asyncio.gather(*posts)

        responses = asyncio.run(run())
        refused = [response for response in responses if response.status_code != 200]
        assert len(refused) == 9  # one runs and two wait, however many were prepared at the same time
        for response in refused:
            assert check_error(response, 429)["code"] == "queue_full"
            assert int(response.headers["retry-after"]) >= 1
        assert post(server).status_code == 200


# ---- time-outs


def test_a_request_that_takes_too_long_is_ended(
    engine: AsyncEngine, live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = asyncio.run(engine.call(lambda loop: loop._core))
    step = core.step
    monkeypatch.setattr(core, "step", lambda: [time.sleep(0.005), step()][1])  # 900 tokens take 4.5 s or more
    body = BODY | {"max_tokens": 900, "ignore_eos": True, "timeout": 0.2}
    error = check_error(post(live, body=body), 408, param="timeout")
    assert error["type"] == "timeout_error"
    for seconds in (0.2, 1.0, 4.0):  # until it has begun in time
        streamed = body | {"stream": True, "timeout": seconds}
        with httpx.stream("POST", live.url + "/v1/completions", json=streamed, timeout=600) as response:
            events = [line for line in response.iter_lines() if line]
        assert events[-1] == "data: [DONE]" and json.loads(events[-2][6:])["error"]["type"] == "timeout_error"
        if len(events) > 3:
            break
    assert len(events) > 3
    check_error(post(live, body=BODY | {"timeout": 0}), 400, param="timeout")

    async def rest() -> None:
        for _ in range(5000):
            stats = await engine.call(lambda loop: loop.stats())
            if stats.num_running == 0:
                return
            await asyncio.sleep(0.02)
        raise AssertionError("it still runs")

    asyncio.run(rest())
    with LiveServer(engine, request_timeout=0.2, page=False) as server:
        check_error(post(server, body=body | {"timeout": 60}), 408)


# ---- origins


def test_cross_origin_requests_are_off_unless_asked_for(engine: AsyncEngine, live: LiveServer) -> None:
    headers = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in httpx.options(live.url + "/v1/completions", headers=headers).headers
    with LiveServer(engine, cors_origin=["https://app.example"], api_key=["k"], page=False) as server:
        response = httpx.options(server.url + "/v1/completions", headers=headers)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://app.example"
        refused = httpx.get(server.url + "/v1/models", headers={"Origin": "https://app.example"})
        check_error(refused, 401)
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        other = headers | {"Origin": "https://evil.example"}
        assert "access-control-allow-origin" not in httpx.options(server.url + "/v1/models", headers=other).headers


# ---- bodies


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"nonsense", "not valid JSON"),
        (b'{"prompt": "\xff\xfe"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "not valid JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        (b"[" * 100000, "not valid JSON"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "not valid JSON"),
        (b"[]", "JSON object"),
        (b"null", ""),
        (b"1", "JSON object"),
        (b"{}", "prompt is missing"),
        (b'{"prompt": null}', "prompt"),
        (b'{"prompt": []}', "prompt must not be empty"),
        (b'{"prompt": ""}', "prompt must not be empty"),
        (b'{"prompt": [[]]}', "prompt"),
        (b'{"prompt": [[1], []]}', "prompt[1] must not be empty"),
        (b'{"prompt": [1, "a"]}', "prompt"),
        (b'{"prompt": [1, -1]}', "prompt[1] must be in [0, 6143], got -1"),
        (b'{"prompt": [99999999999999999999999]}', "prompt"),
        (b'{"prompt": {"a": 1}}', "prompt"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens must be at least 1, got 0"),
        (b'{"prompt": "a", "max_tokens": 1.5}', "max_tokens"),
        (b'{"prompt": "a", "n": 0}', "n must be"),
        (b'{"prompt": "a", "n": 1000}', "n times the number of prompts must be at most 128, got 1000"),
        (b'{"prompt": "a", "stop": ""}', "stop must hold non-empty strings"),
        (json.dumps({"prompt": "a", "stop": ["x"] * 1025}).encode(), "stop must hold at most 1024 strings, got 1025"),
        (json.dumps({"prompt": "a", "bad_words": ["x"] * 10001}).encode(), "bad_words must hold at most 10000 words, "
                                                                           "got 10001"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
        (b'{"prompt": "a", "logit_bias": {"7000": 1}}', "logit_bias must hold ids in [0, 6143], got 7000"),
        (b'{"prompt": "a", "seed": 18446744073709551616}', "seed"),
        (b'{"prompt": "a", "stream_options": {"include_usage": true}}', "stream_options needs stream"),
        (b'{"prompt": "a", "best_of": 3}', "best_of is not supported"),
        (b'{"prompt": "a", "use_beam_search": true}', "use_beam_search is not supported"),
        (b'{"prompt": "a", "guided_json": {"type": "object"}}', "guided_json is not supported; use structured_outputs"),
        (b'{"prompt": "a", "logprobs": 21}', "logprobs must be at most max_logprobs (20), got 21"),
        (b'{"prompt": "a", "temperature": "hot"}', "temperature"),
        (b'{"prompt": "a", "priority": 1}', 'priority needs scheduling_policy="priority"'),
        (b'{"prompt": "a", "truncate_prompt_tokens": 0}', "truncate_prompt_tokens"),
        (b'{"prompt": "a", "response_format": {"type": "xml"}}', "response_format.type must be"),
        (b'{"prompt": "a", "response_format": {"type": "json_schema"}}', "response_format.json_schema.schema is missing"),
        (b'{"prompt": "a", "response_format": {"type": "json_object", "schema": {"type": "object"}}}', "response_format has fields that a format"),
        (b'{"prompt": "a", "cache_salt": ""}', "cache_salt"),
    ],
)  # fmt: skip
def test_hostile_bodies_are_refused_by_name(live: LiveServer, content: bytes, text: str) -> None:
    response = httpx.post(live.url + "/v1/completions", content=content, headers={"content-type": "application/json"})
    check_error(response, 400, text=text)


def test_other_media_types_and_methods(live: LiveServer) -> None:
    url = live.url + "/v1/completions"
    assert httpx.post(url, content=b"a=b", headers={"content-type": "text/plain"}).status_code in (400, 415)
    check_error(httpx.get(url), 405)
    check_error(httpx.get(live.url + "/nowhere"), 404)
    check_error(httpx.get(live.url + "/v1/models/other"), 404, param="model")
    check_error(post(live, body=BODY | {"model": "gpt-4"}), 404, param="model")


def test_what_is_no_http_is_dropped(live: LiveServer) -> None:
    port = int(live.url.rsplit(":", 1)[1])
    for data in (
        b"\x00\x01\x02\xff" * 50,
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(data)
            answer = connection.recv(4096)
            assert b" 400 " in answer.splitlines()[0]
    assert post(live).status_code == 200


def test_unknown_fields_are_told_and_nothing_else_changes(live: LiveServer) -> None:
    plain = post(live, body=BODY | {"temperature": 0})
    assert "x-ignored-fields" not in plain.headers
    odd = {"topp": 0.5, "user": "me", "metadata": {"a": 1}, "x\r\ny: z": 1, "ünknown": 2}
    response = post(live, body=BODY | {"temperature": 0} | odd)
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == plain.json()["choices"][0]["text"]
    told = response.headers["x-ignored-fields"]
    assert all(name in told for name in ("topp", "user", "metadata", "nknown")) and "\n" not in told
    named = {"messages": [{"role": "user", "content": "hi", "name": "me"}], "max_tokens": 1}
    inner = {"stream": True, "stream_options": {"include_obfuscation": True}}
    nested = post(live, "/v1/chat/completions", named | inner)
    assert nested.headers["x-ignored-fields"] == "stream_options.include_obfuscation, messages[].name"
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answered = [named["messages"][0] | {"name": None}, {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "abcdefghi", "name": "f", "content": "1"}]  # fmt: skip
    tool = post(live, "/v1/chat/completions", {"messages": answered, "max_tokens": 1})
    assert tool.status_code == 200 and "x-ignored-fields" not in tool.headers
    trivial = {"best_of": 1, "use_beam_search": False, "suffix": None, "store": False, "audio": None}
    quiet = post(live, body=BODY | trivial)
    assert quiet.status_code == 200 and "x-ignored-fields" not in quiet.headers
