"""HTTP as hostile and as odd clients speak it, over sockets: heads, deadlines, connections, pipelines, chunks,
upgrades.
"""

from __future__ import annotations

import json
import re
import select
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from nemo_engine import AsyncEngine
from nemo_engine.server import http_protocol
from tests.helpers.patience import insistent
from tests.server.live import LiveServer

BODY = json.dumps({"prompt": [1, 2000, 2001], "max_tokens": 2}).encode()
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def hasty(engine: AsyncEngine) -> Iterator[LiveServer]:
    """A server whose deadlines are short."""
    options = {
        "header_timeout": 0.4,
        "body_timeout": 0.6,
        "keep_alive_timeout": 0.4,
        "send_timeout": 0.5,
        "page": False,
    }
    with LiveServer(engine, **options, max_request_mib=1.0) as server:
        yield server


def connect(server: LiveServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=600)


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = b""
    try:
        while data := connection.recv(65536):
            found += data
    except ConnectionError:
        pass
    return found


def ask(server: LiveServer, *pieces: bytes) -> bytes:
    """What the server answers until it closes."""
    with connect(server) as connection:
        for piece in pieces:
            try:
                connection.sendall(piece)
            except ConnectionError:
                break
        return rest(connection)


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", answer)]


def check_refused(answer: bytes, status: int, code: str) -> None:
    assert statuses(answer) == [status], answer[:300]
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head and b"content-type: application/json" in head
    assert json.loads(body)["error"]["code"] == code


# ---- heads


@pytest.mark.parametrize("piece", [1000, 2**20])
@pytest.mark.parametrize(
    "where", [b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: ", b"GET /health HTTP/1.1\r\nHost: x\r\nX-"]
)
def test_a_head_without_end_is_refused_early(live: LiveServer, where: bytes, piece: int) -> None:
    count = 4 * http_protocol.MAX_HEAD_BYTES // piece + 1
    check_refused(ask(live, where, *[b"a" * piece] * count), 431, "headers_too_large")


def test_the_limits_of_heads(live: LiveServer) -> None:
    def of_bytes(count: int) -> bytes:
        return GET + b"Connection: close\r\nX-A: " + b"a" * count + b"\r\n\r\n"

    assert statuses(ask(live, of_bytes(http_protocol.MAX_HEAD_BYTES - 200))) == [200]
    check_refused(ask(live, of_bytes(http_protocol.MAX_HEAD_BYTES)), 431, "headers_too_large")
    many = b"X: 1\r\n" * (http_protocol.MAX_HEADERS - 2)
    assert statuses(ask(live, GET + many + b"Connection: close\r\n\r\n")) == [200]
    check_refused(ask(live, GET + many + b"X: 1\r\nConnection: close\r\n\r\n"), 431, "headers_too_large")
    url = b"/health?" + b"a" * http_protocol.MAX_URL_BYTES
    check_refused(ask(live, b"GET " + url + b" HTTP/1.1\r\nHost: x\r\n\r\n"), 414, "url_too_long")


@pytest.mark.parametrize(
    "head",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET /health\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http:// HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        POST + b"Content-Length: -5\r\n\r\n",
        POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n",
    ],
)
def test_what_is_no_request_is_said(live: LiveServer, head: bytes) -> None:
    check_refused(ask(live, head), 400, "invalid_http")


# ---- bodies


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + end


def test_bodies_in_chunks(live: LiveServer) -> None:
    head = POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    whole = ask(live, head, chunked(BODY))
    assert statuses(whole) == [200]
    for pieces in ([chunked(*[BODY[i : i + 1] for i in range(len(BODY))])],
                   [chunked(BODY)[i : i + 1] for i in range(len(chunked(BODY)))]):  # fmt: skip
        assert statuses(ask(live, head, *pieces)) == [200]
    check_refused(ask(live, head, b"zz\r\n"), 400, "invalid_http")
    check_refused(ask(live, head, chunked(BODY, end=b""), b"1;x=", b"a" * 300_000), 431, "headers_too_large")
    check_refused(ask(live, head, chunked(BODY, end=b"0\r\nX: "), b"a" * 300_000), 431, "headers_too_large")
    check_refused(ask(live, head, chunked(BODY, end=b"0\r\n"), b"X: 1\r\n" * 300), 431, "headers_too_large")


def test_what_follows_a_body_in_chunks_is_no_header(engine: AsyncEngine) -> None:
    with LiveServer(engine, api_key=["k"], page=False) as server:
        head = POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        assert statuses(ask(server, head, chunked(BODY, end=b"0\r\nAuthorization: Bearer k\r\n\r\n"))) == [401]
        assert statuses(ask(server, POST + b"Authorization: Bearer k\r\nConnection: close\r\n"
                            + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)) == [200]  # fmt: skip


def test_expect_100_continue(engine: AsyncEngine) -> None:
    with LiveServer(engine, api_key=["k"], max_request_mib=1.0, page=False) as server:
        expecting = POST + b"Expect: 100-continue\r\nConnection: close\r\n"
        length = b"Content-Length: %d\r\n" % len(BODY)
        assert statuses(ask(server, expecting + b"Authorization: Bearer k\r\n" + length + b"\r\n", BODY)) == [100, 200]
        # What is refused by its head is refused without a "100 Continue".
        assert statuses(ask(server, expecting + length + b"\r\n")) == [401]
        large = expecting + b"Authorization: Bearer k\r\nContent-Length: 2000000\r\n\r\n"
        assert statuses(ask(server, large)) == [413]


def test_a_refused_body_that_is_sent_all_the_same(engine: AsyncEngine, live: LiveServer) -> None:
    with LiveServer(engine, api_key=["k"], page=False) as server, httpx.Client(base_url=server.url) as client:
        for _ in range(2):  # over one connection
            refused = client.post("/v1/completions", content=b"a" * 3_000_000)
            assert refused.status_code == 401
        with connect(server) as connection:  # never sent: the connection does not wait for ever
            connection.sendall(POST + b"Content-Length: 1000\r\n\r\n")
            started = time.monotonic()
            assert statuses(rest(connection)) == [401]
            assert time.monotonic() - started < http_protocol.LINGER + 60


def test_a_body_is_received_after_the_key_is_seen(engine: AsyncEngine) -> None:
    with LiveServer(engine, api_key=["k"], page=False) as server, connect(server) as connection:
        connection.sendall(POST + b"Content-Length: 1000\r\n\r\n{")
        assert b" 401 " in connection.recv(4096)


# ---- versions, upgrades, pipelines


def test_http_1_0(live: LiveServer) -> None:
    answer = ask(live, b"GET /health HTTP/1.0\r\n\r\n")
    assert statuses(answer) == [200] and b"connection: close" in answer
    length = b"Content-Length: %d\r\n" % len(BODY)
    assert statuses(ask(live, POST.replace(b"1.1", b"1.0") + length + b"\r\n" + BODY)) == [200]


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c", b"x"])
def test_upgrades_are_not_taken(live: LiveServer, protocol: bytes) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: " + protocol + b"\r\n"
    keys = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    assert statuses(ask(live, GET + upgrade + keys + b"\r\n" + GET + b"Connection: close\r\n\r\n")) == [200, 200]
    length = b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(BODY)
    for pieces in ([length, BODY], [length + BODY]):
        assert statuses(ask(live, POST + upgrade, *pieces)) == [200]


def test_requests_that_are_sent_ahead_are_answered_in_order(live: LiveServer) -> None:
    one = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    last = GET + b"Connection: close\r\n\r\n"
    for pieces in ([one * 3 + GET + b"\r\n" + one + last], [bytes([byte]) for byte in one * 2 + last]):
        answer = ask(live, *pieces)
        count = len(pieces) == 1 and 6 or 3
        assert statuses(answer) == [200] * count and b"ready" in answer[-120:]
    # What is no request is said after the answers to those before it.
    assert statuses(ask(live, one + one + b"nonsense\r\n\r\n")) == [200, 200]
    many = ask(live, one + (GET + b"\r\n") * 5000)
    assert 1 <= len(statuses(many)) < 5000 and set(statuses(many)) == {200}  # then it is closed


def test_a_client_that_leaves_with_requests_ahead_ends_them_all(live: LiveServer) -> None:
    long = json.dumps({"prompt": [1, 2000], "max_tokens": 900, "ignore_eos": True, "stream": True}).encode()
    one = POST + b"Content-Length: %d\r\n\r\n" % len(long) + long
    with connect(live) as connection:
        connection.sendall(one * 3)
        assert connection.recv(4096)
    deadline = time.monotonic() + 120
    while live.service.running:
        assert time.monotonic() < deadline, live.service.running
        time.sleep(0.01)


# ---- deadlines


@insistent
def test_silent_connections_are_closed(hasty: LiveServer) -> None:
    connections = [connect(hasty) for _ in range(20)]
    assert [rest(connection) for connection in connections] == [b""] * 20
    idle = connect(hasty)
    idle.sendall(GET + b"\r\n")
    assert statuses(rest(idle)) == [200]  # then it is closed


@insistent
@pytest.mark.parametrize("start", [b"G", b"GET / HTTP/1.1\r\nHost: x\r\nX-A:", b"\r\n"])
def test_half_a_head_is_not_waited_for(hasty: LiveServer, start: bytes) -> None:
    answer = ask(hasty, start)
    if start != b"\r\n":
        check_refused(answer, 408, "timeout")
    # Nor if something comes now and then.
    with connect(hasty) as connection:
        connection.sendall(GET + b"\r\n" + start)
        connection.settimeout(0.05)
        started = time.monotonic()
        while time.monotonic() - started < 60:
            try:
                connection.sendall(b"\r\n" if start == b"\r\n" else b"a")
                if not connection.recv(4096):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            raise AssertionError("the connection is still open")


@insistent
def test_half_a_body_is_not_waited_for(hasty: LiveServer) -> None:
    for head in (b"Content-Length: 1000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n4\r\n"):
        answer = ask(hasty, POST + head, b'{"p"')
        assert statuses(answer) == [408]
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"
    assert (
        httpx.post(
            hasty.url + "/v1/completions", content=BODY, headers={"content-type": "application/json"}
        ).status_code
        == 200
    )


@insistent
def test_a_client_that_reads_nothing_is_cut_off(hasty: LiveServer) -> None:
    body = json.dumps({"prompt": "a" * 900_000, "return_token_strs": True}).encode()
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.connect(("127.0.0.1", int(hasty.url.rsplit(":", 1)[1])))
    deaf.sendall(POST.replace(b"/v1/completions", b"/tokenize") + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    deaf.settimeout(60)
    found = deaf.recv(1024)
    (length,) = re.findall(rb"content-length: (\d+)", found)
    assert int(length) > 8_000_000, "more than the system keeps for a client that does not read"
    deadline = time.monotonic() + 60
    while hasty.num_connections:
        assert time.monotonic() < deadline, "it is still connected"
        time.sleep(0.02)
    assert len(found + rest(deaf)) < int(length)


# ---- connections and bodies together


def test_more_connections_than_allowed_are_told(engine: AsyncEngine) -> None:
    with LiveServer(engine, max_connections=3, page=False) as server:
        kept = [connect(server) for _ in range(3)]
        for connection in kept[1:]:
            connection.sendall(POST + b"Expect: 100-continue\r\nContent-Length: 1000\r\n\r\n")
            assert b" 100 " in connection.recv(4096)
        answer = ask(server)
        check_refused(answer, 503, "too_many_connections")
        assert b"Retry-After: 1" in answer
        # One that has had its answer, and asks for nothing now, makes room.
        kept[0].sendall(GET + b"\r\n")
        assert kept[0].recv(4096)
        assert statuses(ask(server, GET + b"Connection: close\r\n\r\n")) == [200]
        assert rest(kept[0]) == b""
        for connection in kept:
            connection.close()


def test_bodies_together_stay_within_their_limit(engine: AsyncEngine) -> None:
    with LiveServer(engine, max_bodies_mib=1.0, max_request_mib=1.0, page=False) as server:
        held = [connect(server) for _ in range(8)]
        head = POST + b"Content-Length: 1000000\r\n\r\n"
        for connection in held:
            connection.sendall(head + b" " * 300_000)
        told: list[socket.socket] = []
        while len(told) < 4:  # of 8, 3 are held
            told = select.select(held, [], [], 60)[0]
            assert told, "too many are held"
        time.sleep(0.5)
        refused = [connection.recv(4096) for connection in select.select(held, [], [], 0)[0]]
        assert 4 <= len(refused) <= 5 and all(b" 503 " in a and b"too_many_bodies" in a for a in refused), refused
        assert all(b"retry-after: 1" in answer.lower() for answer in refused)
        # Small ones are let in all the same, and what is freed may be used again.
        json_header = {"content-type": "application/json"}
        assert httpx.post(server.url + "/v1/completions", content=BODY, headers=json_header).status_code == 200
        for connection in held:
            connection.close()
        deadline = time.monotonic() + 120
        large = BODY + b" " * 700_000
        while httpx.post(server.url + "/v1/completions", content=large, headers=json_header).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
