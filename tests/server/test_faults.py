"""What goes wrong around a server: clients that vanish or crawl, requests that fail inside, an engine that dies."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from nemo_engine import AsyncEngine
from nemo_engine.step import TOKEN_NOT_FINITE, StepResult
from nemo_engine.text import grammar_trial
from tests.scheduler.invariants import check
from tests.server.live import ENGINE_OPTIONS, LiveServer

LONG = {"prompt": [1, 2000, 2001], "max_tokens": 900, "ignore_eos": True, "seed": 1}
SHORT = {"prompt": [1, 2000, 2001], "max_tokens": 3, "ignore_eos": True, "seed": 1}


@pytest.fixture(scope="module")
def server(engine: AsyncEngine) -> Iterator[LiveServer]:
    with LiveServer(engine, page=False) as server:
        yield server


def raw_request(server: LiveServer, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    """A connection over which the request has been sent, and nothing read."""
    port = int(server.url.rsplit(":", 1)[1])
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


def wait_until_idle(server: LiveServer, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    engine = server.service.engine
    while engine.num_unfinished or engine.stats().num_running:
        assert time.monotonic() < deadline, "requests are left"
        time.sleep(0.02)
    stats = asyncio.run(engine.call(lambda loop: loop.stats()))
    assert stats.num_free_pages == stats.num_pages
    asyncio.run(engine.call(lambda loop: check(loop._core.scheduler)))


def num_aborted(server: LiveServer) -> float:
    (line,) = [
        line
        for line in httpx.get(server.url + "/metrics").text.splitlines()
        if line.startswith("nemo_engine:request_success_total") and 'finished_reason="abort"' in line
    ]
    return float(line.rsplit(" ", 1)[1])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_vanishes_ends_its_request(server: LiveServer, stream: bool, path: str) -> None:
    body: dict[str, Any] = LONG | {"stream": stream}
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": "count"}]
        del body["prompt"]
    before = num_aborted(server)
    connections = [raw_request(server, body, path) for _ in range(5)]
    deadline = time.monotonic() + 120
    while server.service.engine.stats().num_running < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    steps = server.service.engine.last_step_id
    for connection in connections:
        connection.close()
    wait_until_idle(server)
    assert server.service.engine.last_step_id - steps < 800  # they did not run to their ends
    deadline = time.monotonic() + 120
    while num_aborted(server) < before + 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert num_aborted(server) == before + 5


def test_a_slow_reader_holds_up_nobody_and_is_told_everything(server: LiveServer) -> None:
    body = LONG | {"max_tokens": 300}
    wanted = httpx.post(server.url + "/v1/completions", json=body, timeout=600).json()["choices"][0]["text"]
    connection = raw_request(server, body | {"stream": True, "logprobs": 20})
    assert httpx.post(server.url + "/v1/completions", json=SHORT, timeout=600).status_code == 200
    wait_until_idle(server)  # the engine is done with it, though nothing was read
    data = b""
    connection.settimeout(60)
    while b"[DONE]" not in data:
        piece = connection.recv(1 << 16)
        assert piece, "the stream broke off"
        data += piece
    connection.close()
    answer = data.partition(b"\r\n\r\n")[2]
    answer = re.sub(rb"\r\n[0-9a-f]+\r\n|^[0-9a-f]+\r\n", b"", answer)  # the lengths of chunks
    events = [json.loads(line[6:]) for line in answer.split(b"\n\n") if line.startswith(b"data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == wanted


def plant(engine: AsyncEngine, change: Any) -> None:
    """Replace ``launch`` of the engine's runner by what ``change`` makes of it, for one step."""

    def install(loop: Any) -> None:
        runner = loop._core.runner
        launch = runner.launch

        def once(plan: Any) -> Any:
            runner.launch = launch
            return change(launch, plan)

        runner.launch = once

    asyncio.run(engine.call(install))


class _Poisoned:
    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def result(self) -> StepResult:
        result = self._handle.result()
        tokens = [TOKEN_NOT_FINITE, *result.token_ids[1:]]
        return StepResult(
            result.step_id, tokens, {k: v for k, v in result.logprobs.items() if k}, result.prompt_logprobs
        )


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_inside_is_told_and_the_others_go_on(server: LiveServer, stream: bool) -> None:
    engine = server.service.engine

    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
            body = LONG | {"max_tokens": 300, "stream": stream}
            tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(3)]
            while engine.stats().num_running < 3:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(plant, engine, lambda launch, plan: _Poisoned(launch(plan)))
            answers = [await task for task in tasks]
        if stream:
            bad = [answer for answer in answers if '"error"' in answer.text]
            assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers)
            assert "not finite" in bad[0].text
        else:
            bad = [answer for answer in answers if answer.status_code == 500]
            assert bad[0].json()["error"]["code"] == "generation_failed"
            assert "not finite" in bad[0].json()["error"]["message"]
        assert len(bad) == 1
        for answer in answers:
            if answer not in bad:
                assert answer.status_code == 200 and '"finish_reason":"length"' in answer.text

    asyncio.run(run())
    wait_until_idle(server)


def test_a_step_that_breaks_ends_what_ran_and_the_server_lives(server: LiveServer) -> None:
    def broken(launch: Any, plan: Any) -> Any:
        raise RuntimeError("planted")

    plant(server.service.engine, broken)
    answer = httpx.post(server.url + "/v1/completions", json=SHORT, timeout=600)
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert httpx.post(server.url + "/v1/completions", json=SHORT, timeout=600).status_code == 200


def test_when_the_engine_dies_everyone_is_told() -> None:
    def die(_: Any) -> None:
        raise SystemExit("planted")

    with AsyncEngine("nemo-tiny", **ENGINE_OPTIONS) as engine, LiveServer(engine, page=False) as server:

        async def run() -> None:
            async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
                whole = asyncio.create_task(client.post("/v1/completions", json=LONG))
                stream = asyncio.create_task(client.post("/v1/completions", json=LONG | {"stream": True}))
                while engine.stats().num_running < 2:
                    await asyncio.sleep(0.01)
                with pytest.raises(RuntimeError):
                    await engine.call(die)
                assert (await whole).status_code == 500
                assert (await whole).json()["error"]["code"] == "engine_dead"
                text = (await stream).text
                assert "engine_dead" in text and text.endswith("data: [DONE]\n\n")
                assert (await client.post("/v1/completions", json=SHORT)).status_code == 500
                assert (await client.get("/health")).status_code == 503
                assert (await client.get("/v1/health/live")).status_code == 503
                assert (await client.get("/metrics")).status_code == 200

        asyncio.run(run())


def test_two_thousand_connections(server: LiveServer) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    port = int(server.url.rsplit(":", 1)[1])
    connections = []
    try:
        for _ in range(2000):
            connection = socket.create_connection(("127.0.0.1", port), timeout=600)
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")  # and no more
            connections.append(connection)
        assert httpx.post(server.url + "/v1/completions", json=SHORT, timeout=600).status_code == 200
    finally:
        for connection in connections:
            connection.close()
    assert httpx.get(server.url + "/health").status_code == 200
    wait_until_idle(server)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_grammar_that_outgrows_its_limits_is_the_clients_error(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    monkeypatch.setattr(grammar_trial, "MAX_LEXER_STATES", 400)
    pattern = f"(a|b)*a(a|b){{{40 + is_stream}}}"
    body = {"prompt": "x", "max_tokens": 500, "seed": 1, "structured_outputs": {"regex": pattern}, "stream": is_stream}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=600)
    if is_stream:
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        assert response.status_code == 200 and len(events) > 1
        error = events[-1]["error"]
    else:
        assert response.status_code == 400
        error = response.json()["error"]
    assert (error["code"], error["type"]) == ("grammar_too_complex", "invalid_request_error")
    assert httpx.post(f"{server.url}/v1/completions", json=SHORT, timeout=600).status_code == 200
