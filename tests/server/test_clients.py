"""Clients among themselves: keys with names, what each may see and end, turns, hosts, pages of other sites, what is
logged.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
import pytest

from nemo_engine import AsyncEngine
from nemo_engine.outputs import RequestOutput
from nemo_engine.server.access import QUIET_PATHS
from nemo_engine.server.clients import LOOPBACK_NAMES, KeyRing, is_host_allowed
from nemo_engine.server.options import ServerOptions
from tests.server.live import LiveServer

BODY = {"prompt": [1, 2000, 2001], "max_tokens": 2, "ignore_eos": True}
LONG = BODY | {"max_tokens": 900}
ALICE, BOB, CAROL = ({"Authorization": f"Bearer {key}"} for key in ("alices", "bobs", "carols"))


@pytest.fixture(scope="module")
def narrow() -> Iterator[AsyncEngine]:
    """One request runs, the others wait."""
    options: dict[str, Any] = {
        "device": "cpu",
        "max_num_seqs": 1,
        "num_kv_pages": 100,
        "page_size": 16,
        "max_model_len": 1024,
    }
    with AsyncEngine("nemo-tiny", **options) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(narrow: AsyncEngine) -> Iterator[LiveServer]:
    with LiveServer(narrow, api_key=["alice:alices", "bob:bobs", "carols"], max_queue_per_key=3) as server:
        yield server


def post(
    server: LiveServer, body: dict[str, Any], headers: dict[str, str], path: str = "/v1/completions"
) -> httpx.Response:
    return httpx.post(server.url + path, json=body, headers=headers, timeout=600)


class Posts:
    """Requests under way, each in a thread of its own."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self._threads: list[threading.Thread] = []
        self.answers: list[httpx.Response] = []

    def send(self, body: dict[str, Any], headers: dict[str, str]) -> None:
        """Returns when the engine knows of one more request, or when it is answered."""
        engine, before = self._server.service.engine, self._server.service.engine.num_unfinished
        thread = threading.Thread(target=lambda: self.answers.append(post(self._server, body, headers)))
        thread.start()
        self._threads.append(thread)
        while engine.num_unfinished == before and thread.is_alive():
            thread.join(0.005)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)


def test_a_key_ends_and_sees_its_own_requests_only(server: LiveServer) -> None:
    posts = Posts(server)
    for headers in (ALICE, BOB):
        posts.send(LONG | {"request_id": "same"}, headers)  # ids of one do not keep those of another from being used
    shown = {}
    for name, headers in (("alice", ALICE), ("bob", BOB), ("carol", CAROL)):
        monitor = httpx.get(server.url + "/monitor", headers=headers).json()
        shown[name] = len(monitor["requests"])
    assert shown == {"alice": 1, "bob": 1, "carol": 0}
    abort = {"request_id": ["same", "cmpl-same"]}
    assert post(server, abort, CAROL, "/abort").json() == {"aborted": []}
    assert server.service.engine.num_unfinished == 2
    assert post(server, abort, BOB, "/abort").json() == {"aborted": ["cmpl-same"]}
    assert post(server, LONG | {"request_id": "same"}, ALICE).status_code == 400  # her own is in use
    assert post(server, abort, ALICE, "/abort").json() == {"aborted": ["cmpl-same"]}
    posts.join()
    assert [answer.json()["choices"][0]["finish_reason"] for answer in posts.answers] == ["abort"] * 2
    assert not server.service.running and not server.service.owners


def test_names_stand_in_logs_and_metrics(narrow: AsyncEngine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nemo_engine.access")
    with LiveServer(narrow, api_key=["dora:doras", "unnamed"], log_requests=True) as server:
        dora = {"X-API-Key": "doras"}
        assert post(server, BODY, dora).status_code == 200
        assert post(server, BODY | {"temperature": 9}, dora).status_code == 400
        assert post(server, BODY, {"X-API-Key": "unnamed"}).status_code == 200
        assert post(server, BODY, {"X-API-Key": "a secret"}).status_code == 401
        assert httpx.get(server.url + "/nowhere", headers=dora).status_code == 404
        metrics = httpx.get(server.url + "/metrics").text
        for path in QUIET_PATHS:  # nothing is logged of what a probe, or the page, asks again and again
            ask = {"messages": [{"role": "user", "content": "a"}]} if path == "/monitor/pages" else None
            answer = httpx.request("POST" if ask else "GET", server.url + path, headers=dora, json=ask)
            assert answer.status_code == 200, path
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "nemo_engine.access"]
    assert [line.get("key", "")[:4] for line in lines] == ["dora", "dora", "key-", "", "dora"]
    assert [line.get("error", {}).get("code") for line in lines] == [None, None, None, "invalid_api_key", None]
    assert lines[1]["error"]["param"] == "temperature" and lines[1]["error"]["reason"].startswith(
        "temperature must be in"
    )
    assert "error" not in lines[0] and lines[4]["error"]["reason"]
    assert "secret" not in caplog.text and "unnamed" not in caplog.text
    labels = 'engine="0",key="dora",model_name="nemo-tiny"'
    assert f'nemo_engine:key_requests_total{{{labels},status="200"}} 1.0' in metrics
    assert f'nemo_engine:key_requests_total{{{labels},status="400"}} 1.0' in metrics
    assert f"nemo_engine:key_generation_tokens_total{{{labels}}} 2.0" in metrics


@contextmanager
def held_up(server: LiveServer) -> Iterator[tuple[Posts, list[str]]]:
    """Sends requests, none of which begins before the end of the block, and their ids in the order in which they
    ended.
    """
    order: list[str] = []
    service, resume = server.service, threading.Event()

    def request_done(output: RequestOutput, *args: Any) -> None:
        order.append(output.request_id)

    with patch.object(service.metrics, "request_done", request_done):
        service.engine._steps.post(lambda: resume.wait(60))
        posts = Posts(server)
        try:
            yield posts, order
        finally:
            resume.set()
            posts.join()


def test_clients_take_turns_and_have_queues_of_their_own(server: LiveServer) -> None:
    with held_up(server) as (posts, order):
        for number in range(3):
            posts.send(BODY | {"request_id": f"a{number}"}, ALICE)
        refused = post(server, BODY, ALICE)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
        posts.send(BODY | {"request_id": "b0"}, BOB)  # another's queue has room
    assert order == ["cmpl-a0", "cmpl-b0", "cmpl-a1", "cmpl-a2"]
    assert post(server, BODY, ALICE).status_code == 200


def test_turns_by_the_header_of_a_proxy(narrow: AsyncEngine) -> None:
    with LiveServer(narrow, fairness_header="X-Tenant", page=False) as server:
        with held_up(server) as (posts, order):
            for name in ("a0", "a1", "a2", "b0"):
                posts.send(BODY | {"request_id": name}, {"X-Tenant": name[0]})
        assert order == ["cmpl-a0", "cmpl-b0", "cmpl-a1", "cmpl-a2"]


# ---- keys


def test_keys_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("eve:old\n")
    ring = KeyRing(ServerOptions(api_key_file=str(path), api_key=["fixed"]))

    def name_of(key: str) -> str | None:
        client = ring.find(httpx.Headers({"X-API-Key": key}))  # type: ignore[arg-type]
        return None if client is None else client.name

    fixed = name_of("fixed")
    assert (name_of("old"), name_of("new")) == ("eve", None) and fixed and "fixed" not in fixed
    path.write_text("eve:new\nfrank:franks\n")
    ring.reload()
    assert (name_of("old"), name_of("new"), name_of("franks")) == (None, "eve", "frank") and name_of("fixed") == fixed
    path.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no key"):
        ring.reload()
    assert name_of("new") == "eve"  # what was there stays


# ---- hosts and other sites


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [
        ("localhost", True), ("LOCALHOST:8000", True), ("localhost.:80", True), ("a.localhost", True), ("127.0.0.1:8000", True),
        ("127.9.8.7", True), ("[::1]:8000", True), ("[::1]", True), ("", False), ("evil.example:8000", False),
        ("localhost.evil.example", False), ("127.0.0.1.evil.example", False), ("xlocalhost", False), ("10.0.0.1", False),
        (".localhost", False), ("localhost:8000:9000", False), ("localhost@evil.example", False),
    ],
)  # fmt: skip
def test_the_names_of_loopback(host: str, is_allowed: bool) -> None:
    assert is_host_allowed(host, LOOPBACK_NAMES) is is_allowed
    assert is_host_allowed(host, None) and is_host_allowed(host, ["*"])


def test_other_hosts_are_refused(narrow: AsyncEngine) -> None:
    with LiveServer(narrow, allowed_hosts=["*.my.example", "127.0.0.1"], page=False) as server:
        for host, status in (("a.my.example", 200), ("my.example", 403), ("evil.example", 403)):
            answer = httpx.get(server.url + "/health", headers={"Host": host})
            assert answer.status_code == status
            assert status == 200 or answer.json()["error"]["code"] == "host_not_allowed"
        assert httpx.get(server.url + "/health").status_code == 200


def test_pages_of_other_sites_are_refused_where_there_are_no_keys(narrow: AsyncEngine, server: LiveServer) -> None:
    cross = {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}
    with LiveServer(narrow, cors_origin=["https://app.example"], page=False) as open_server:
        refused = post(open_server, {"request_id": "x"}, cross, "/abort")
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "origin_not_allowed"
        allowed = cross | {"Origin": "https://app.example"}
        assert post(open_server, {"request_id": "x"}, allowed, "/abort").status_code == 200
        assert post(open_server, {"request_id": "x"}, {"Sec-Fetch-Site": "same-origin"}, "/abort").status_code == 200
        # What a page may send without asking first is not read as JSON.
        plain = httpx.post(
            open_server.url + "/abort", content=b'{"request_id": "x"}', headers={"Content-Type": "text/plain"}
        )
        assert plain.status_code == 400
    assert post(server, {"request_id": "x"}, cross | ALICE, "/abort").status_code == 200
