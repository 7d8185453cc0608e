"""``bench serve``: our own server under its load, servers that break in every way, and what its numbers are made of."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nemo_engine import AsyncEngine
from nemo_engine.benchmarks import serve
from nemo_engine.benchmarks.http_stream import EventReader
from nemo_engine.benchmarks.load import Asking, Server, Trip, load
from nemo_engine.cli import main
from nemo_engine.workload import Arrivals, Item, Limits, Turn
from tests.server.live import ENGINE_OPTIONS, MODEL, LiveServer

CLOSED = Arrivals("closed", concurrency=2)
ONE = [Item("a", (Turn(4, 3),))]


@pytest.fixture(scope="module")
def live() -> Iterator[LiveServer]:
    with AsyncEngine(MODEL, **ENGINE_OPTIONS) as engine, LiveServer(engine) as server:
        yield server


class Canned:
    """A server that reads a request and sends ``pieces``, each by itself, to every connection."""

    def __init__(self, *pieces: bytes, pause: float = 0.002) -> None:
        self._pieces = pieces
        self._pause = pause  # seconds after each
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.server = Server("canned", f"http://127.0.0.1:{self._socket.getsockname()[1]}")
        self.requests: list[bytes] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, suppress(OSError):  # the client may have had enough
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.requests.append(connection.recv(1 << 16))
                for piece in self._pieces:
                    connection.sendall(piece)
                    threading.Event().wait(self._pause)

    def __enter__(self) -> Canned:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def ask(server: Server, items: list[Item] = ONE, arrivals: Arrivals = CLOSED, **asking: Any) -> list[Trip]:
    return asyncio.run(load(server, items, arrivals, Asking(**asking), "salt "))


def bench(path: Path, *options: object) -> tuple[int, list[dict[str, Any]]]:
    code = main(["bench", "serve", "--json", str(path), "--pause", "0", *map(str, options)])
    return code, [json.loads(line) for line in path.read_text().splitlines()]


# ---- server-sent events


EVENT = 'data: {"choices": [{"text": "é"}]}'
USAGE = 'data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3}}'


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_in_pieces_of_any_size(end: str, size: int) -> None:
    text = end.join([": a comment", "event: x", "data: one", "data:two", "", "data: [DONE]", "", ""])
    reader = EventReader()
    data = text.encode()
    found = [event for start in range(0, len(data), size) for event in reader.feed(data[start : start + size])]
    assert found == ["one\ntwo", "[DONE]"]


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
BODY = "\r\n\r\n".join([EVENT, EVENT, EVENT, USAGE, "data: [DONE]", ""]).encode()


@pytest.mark.parametrize("size", [1, 5, 40, 10_000])
@pytest.mark.parametrize("kind", ["chunks", "length", "close"])
def test_an_answer_in_pieces_of_any_size(kind: str, size: int) -> None:
    """Neither chunks nor TCP's pieces end where events do."""
    if kind == "chunks":
        body = chunked(*[BODY[i : i + 13] for i in range(0, len(BODY), 13)])
        whole = HEAD + b"transfer-encoding: Chunked\r\n\r\n" + body
    elif kind == "length":
        whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    else:
        whole = HEAD + b"\r\n" + BODY
    pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
    with Canned(*pieces) as canned:
        (trip,) = ask(canned.server)
    assert trip.error is None and trip.num_tokens == 3 and trip.num_prompt_tokens == 4
    assert len(trip.gaps) == 2 and trip.ttft is not None
    assert trip.end - trip.sent == pytest.approx(trip.ttft + sum(trip.gaps))


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "HttpError: the server closed the connection without an answer"),
        (b"SSH-2.0\r\n\r\n", "HttpError: the answer is no HTTP"),
        (b"HTTP/1.1 500 Oops\r\n\r\nit\nbroke", "HttpError: status 500: it broke"),
        (b"HTTP/1.1 429 Busy\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"wait"), "HttpError: status 429: wait"),
        (HEAD + b"\r\n" + BODY[:60], "HttpError: the answer ended without [DONE]"),
        (HEAD + b"Content-Length: 999\r\n\r\n" + BODY[:60], "HttpError: the answer broke off 939 bytes before its end"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nfff\r\ndata: {}", "HttpError: the answer broke off inside a chunk"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "HttpError: the answer broke off"),
        (HEAD + b"\r\ndata: {no\n\n", "HttpError: an event is no JSON: {no"),
        (HEAD + b'\r\ndata: {"error": {"message": "out of memory"}}\n\n', "HttpError: out of memory"),
        (HEAD + b'\r\ndata: [1]\n\n', "AttributeError: 'list' object has no attribute 'get'"),
        (HEAD + b"\r\n" + BODY.replace(USAGE.encode() + b"\r\n\r\n", b""), "the server told no usage, so its tokens "
                                                                           "cannot be counted"),
        (HEAD + b"\r\n" + f"{USAGE}\n\ndata: [DONE]\n\n".encode(), "the answer has no text"),
        (HEAD + b"\r\n" + BODY.replace(b'"completion_tokens": 3', b'"completion_tokens": 2'), "2 tokens came, and 3 "
                                                                                              "were asked for"),
    ],
)  # fmt: skip
def test_what_breaks_says_how(answer: bytes, error: str) -> None:
    with Canned(answer) as canned:
        (trip,) = ask(canned.server)
    assert trip.error == error


def test_no_server_and_no_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        (trip,) = ask(Server("mute", url), timeout=0.2)  # it accepts, and says nothing
        assert trip.error == "no end within 0.2 s"
    (trip,) = ask(Server("none", url))
    assert trip.error is not None and "ConnectionRefusedError" in trip.error
    assert [trip.error for trip in ask(Server("dead", url, dead="it did not start"))] == ["it did not start"]


def test_the_end_of_an_answer_is_no_token() -> None:
    events = [EVENT, EVENT, 'data: {"choices": [{"text": "", "finish_reason": "length"}]}', USAGE, "data: [DONE]", ""]
    with Canned(HEAD + b"\r\n", *[f"{event}\n\n".encode() for event in events], pause=0.05) as canned:
        (trip,) = ask(canned.server)
    assert trip.error is None and len(trip.gaps) == 1
    assert trip.ttft is not None and trip.end - trip.sent - trip.ttft - trip.gaps[0] > 0.03  # of 0.05 s


def test_keys_and_names_are_sent_and_hosts_without_users() -> None:
    with Canned(HEAD + b"\r\n" + BODY) as canned:
        server = canned.server
        server.model, server.api_key = "some-model", "secret"
        assert ask(server)[0].error is None
        head, _, body = canned.requests[0].partition(b"\r\n\r\n")
    assert b"Authorization: Bearer secret" in head and json.loads(body)["model"] == "some-model"
    assert head.startswith(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:")


# ---- what is asked


def test_bodies() -> None:
    turns = Item("a", (Turn(3, 2), Turn(2, 2)), None, "p", 4)
    ids = Asking().body(turns, 1, [], [[7, 8]])
    assert len(ids["prompt"]) == 4 + 3 + 2 + 2 and ids["prompt"][7:9] == [7, 8] and ids["prompt"][0] == 1
    assert ids["return_token_ids"] and ids["max_tokens"] == 2 and ids["ignore_eos"]
    text = Asking(prompts="text").body(turns, 1, ["answer"], [])["prompt"]
    assert len(text.split()) == 4 + 3 + 1 + 2 and text.split()[7] == "answer"
    said = Asking(route="chat", ignore_eos=False).body(turns, 1, ["answer"], [])
    assert [message["role"] for message in said["messages"]] == ["system", "user", "assistant", "user"]
    assert "ignore_eos" not in said
    given = Item("g", (Turn((9, 8), 1),))
    assert Asking().body(given, 0, [], [])["prompt"] == [9, 8]
    assert Asking().body(Item("t", (Turn("Hello", 1),)), 0, [], [])["prompt"] == "Hello"


@pytest.mark.parametrize(
    ("turn", "options", "error"),
    [
        (Turn(({"role": "user", "content": "x"},), 1), {}, "messages are no text for a completion: use --route chat"),
        (Turn((1, 2), 1), {"prompts": "text"}, "token ids are no text for a completion: use --prompts ids"),
        (Turn((1, 2), 1), {"route": "chat"}, "a prompt of token ids is no text for a chat"),
    ],
)
def test_what_cannot_be_asked_is_named(turn: Turn, options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=f"request 'odd': {error}"):
        Asking(**options).check([*ONE, Item("odd", (turn,))])


# ---- our own server


def test_closed_loops_against_our_server(tmp_path: Path, live: LiveServer, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = bench(
        tmp_path / "r.jsonl", f"one={live.url}", f"two={live.url}/v1/", "--synthetic", "requests=6,input=8,output=5",
        "--concurrency", 1, 3, "--rounds", 2, "--warmup", 0, "--slo-ttft", "10s", "--slo-itl", "5s",
    )  # fmt: skip
    assert code == 0
    assert [(record["server"], record["arrivals"]["concurrency"]) for record in found] == [
        ("one", 1), ("two", 1), ("one", 3), ("two", 3),
    ]  # fmt: skip
    for record in found:
        assert record["status"] == "ok" and record["errors"] == 0 and record["model"] == "nemo-tiny"
        assert record["new_tokens"] == 2 * 6 * 5 and record["prompt_tokens"] == 2 * 6 * 8
        assert len(record["output_tokens_per_second"]) == 2 and record["slo"] == {"ttft_s": 10.0, "itl_s": 5.0}
        assert record["goodput_requests_per_second"] == pytest.approx(record["requests_per_second"])
        assert record["ttft_s"]["p50"] <= record["ttft_s"]["p99"] < record["e2e_s"]["p99"]
    assert found[1]["first_against_this"]["first"] == "one" and "first_against_this" not in found[0]
    ratio = found[1]["first_against_this"]["output_tokens_per_second"]["median"]
    rates = zip(found[0]["output_tokens_per_second"], found[1]["output_tokens_per_second"])
    assert ratio == pytest.approx(sum(a / b for a, b in rates) / 2)
    assert "one has of this" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [("--rate", 200), ("--rate", 200, "--arrivals", "constant"), ("--rate", 200, "--arrivals", "gamma")]
)
def test_open_loops_against_our_server(tmp_path: Path, live: LiveServer, options: tuple[object, ...]) -> None:
    code, (record,) = bench(
        tmp_path / "r.jsonl", live.url, "--synthetic", "requests=10,input=4,output=2", *options, "--rounds", 1,
        "--warmup", 0
    )  # fmt: skip
    assert code == 0 and record["new_tokens"] == 20 and record["arrivals"]["rate"] == 200
    assert record["late_s"]["p50"] < 0.1


def test_recorded_arrivals(tmp_path: Path, live: LiveServer) -> None:
    workload = tmp_path / "w.jsonl"
    workload.write_text(
        '{"prompt_tokens": 4, "output_tokens": 2, "arrival_s": 0}\n{"prompt": "def f", "output_tokens": 2, '
        '"arrival_s": 0.4}\n'
    )
    code, (record,) = bench(
        tmp_path / "r.jsonl", live.url, "--workload", workload, "--rounds", 1, "--warmup", 0, "--slo-ttft", "1us"
    )
    assert code == 0 and record["new_tokens"] == 4 and record["goodput_requests_per_second"] == [0.0]
    assert record["requests_per_second"][0] < 2 / 0.4


@pytest.mark.parametrize("options", [(), ("--prompts", "text"), ("--route", "chat")])
def test_conversations_take_their_answers_back(tmp_path: Path, live: LiveServer, options: tuple[str, ...]) -> None:
    spec = "requests=2,input=8,output=6,turns=2,prefixes=1,prefix_tokens=16"
    code, (record,) = bench(
        tmp_path / "r.jsonl", live.url, "--synthetic", spec, "--concurrency", 2, "--rounds", 1, "--warmup", 0, *options
    )
    assert code == 0 and record["new_tokens"] == 2 * 2 * 6
    if not options:
        assert record["prompt_tokens"] == 2 * (24 + 24 + 6 + 8)


def test_a_request_that_is_refused_fails_and_the_rest_count(tmp_path: Path, live: LiveServer) -> None:
    workload = tmp_path / "w.jsonl"
    workload.write_text(
        # longer than the context
        '{"prompt_tokens": 4, "output_tokens": 2}\n{"prompt_tokens": 2000, "output_tokens": 2}\n'
    )
    code, (record,) = bench(
        tmp_path / "r.jsonl", live.url, "--workload", workload, "--concurrency", 2, "--rounds", 2, "--warmup", 0
    )
    assert code == 1 and record["status"] == "failed" and record["errors"] == 2 and record["new_tokens"] == 4
    assert "status 400" in record["error"] and len(record["first_errors"]) == 1


def test_a_server_without_ids_cannot_continue_with_ids() -> None:
    item = Item("a", (Turn(4, 3), Turn(4, 3)))
    with Canned(HEAD + b"\r\n" + BODY) as canned:
        (trip,) = ask(canned.server, [item])
    assert trip.error is not None and "tells no token ids of its answer" in trip.error


def test_an_absent_server_is_failed_and_in_no_ratio(tmp_path: Path, live: LiveServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    code, found = bench(
        tmp_path / "r.jsonl", f"ours={live.url}", f"gone={url}", "--synthetic", "requests=2,input=4,output=2",
        "--concurrency", 2, "--rounds", 1, "--warmup", 0,
    )  # fmt: skip
    assert code == 1 and [record["status"] for record in found] == ["ok", "failed"]
    assert "ConnectionRefusedError" in found[1]["error"] and "first_against_this" not in found[1]
    assert found[1]["output_tokens_per_second"] == [0.0]


# ---- servers that are started


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'{"data": [{"id": "tiny"}]}')
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200); self.end_headers(); self.wfile.write(BODY)
BODY = %r
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_started_server_is_measured_and_ended_and_a_broken_one_named(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER % BODY)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path / "log"
    code, found = bench(
        tmp_path / "r.jsonl", f"good=http://127.0.0.1:{port}", "bad=http://127.0.0.1:1", "--synthetic",
        "requests=2,input=4,output=3", "--concurrency", 1, "--rounds", 1, "--warmup", 0, "--log", log,
        "--start", f"good={sys.executable} {tmp_path / 'server.py'} {port}",
        "--start", f"bad={sys.executable} -c \"raise SystemExit('no such model')\"",
    )  # fmt: skip
    assert code == 1 and [record["status"] for record in found] == ["ok", "failed"]
    assert found[0]["model"] == "tiny" and found[1]["errors"] == 2
    assert found[1]["error"] == "it did not start: it ended with status 1, after ...no such model"
    assert "==== good" in log.read_text() and "no such model" in log.read_text()
    with socket.create_server(("127.0.0.1", port)):  # it is free again
        pass


# ---- arithmetic


def test_measures_of_known_trips() -> None:
    slow = Trip(10.0, ttft=0.5, end=12.0, num_prompt_tokens=7, num_tokens=4, gaps=[0.5, 0.5, 0.5])
    fast = Trip(10.0, ttft=0.1, end=10.5, num_prompt_tokens=7, num_tokens=5, gaps=[0.1] * 4)
    single = Trip(11.0, ttft=0.2, end=11.2, num_prompt_tokens=7, num_tokens=1)
    failed = Trip(10.0, end=14.0, num_tokens=3, error="broke")
    found = serve.measures([[slow, fast], [single, failed]], Limits(0.3, 0.2))
    assert found["output_tokens_per_second"] == [pytest.approx(9 / 2), pytest.approx(1 / 4)]
    assert found["goodput_requests_per_second"] == [pytest.approx(1 / 2), pytest.approx(1 / 4)]
    assert found["ttft_s"]["p50"] == pytest.approx(0.2) and found["tpot_s"]["p50"] == pytest.approx(0.3)
    assert found["e2e_s"]["p50"] == pytest.approx(0.5) and found["itl_s"]["p99"] == pytest.approx(0.5)
    assert (found["errors"], found["error"], found["status"]) == (1, "broke", "failed")
    assert found["new_tokens"] == 10


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ((), "request '0' has no arrival_s: give --concurrency N for a closed loop, or --rate X for an open one"),
        (("--concurrency", "0"), "concurrency must be at least 1 for closed arrivals, got 0"),
        (("--concurrency", "1", "--rate", "2"), "--concurrency is a closed loop"),
        (("--rate", "0"), "rate must be finite and greater than 0 for poisson arrivals, got 0.0"),
        (("--rate", "1", "--burstiness", "0"), "burstiness must be finite and greater than 0"),
        (("--rate", "1", "--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--rate", "1", "--start", "b=x"), "--start must name a server of this command, once: a; got 'b'"),
        (("--rate", "1", "--start", "a"), "--start must be NAME=COMMAND, got 'a'"),
        (("--rate", "1", "--synthetic", "input=x"), "--synthetic: input"),
    ],
)
def test_bad_options_are_named(options: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "a=http://127.0.0.1:1", *options]) == 2
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    ("urls", "error"),
    [
        (("a=127.0.0.1:1",), "a server must be [NAME=]http://... or https://..., got 'a=127.0.0.1:1'"),
        (("a=http://x", "a=http://y"), "server 'a' is named twice"),
    ],
)
def test_bad_addresses_are_named(urls: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *urls, "--concurrency", "1"]) == 2
    assert error in capsys.readouterr().err


def test_a_bad_line_and_a_bad_time_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text('{"prompt_tokens": 4, "output_tokens": 2}\n{"prompt_tokens": 4}\n')
    assert main(["bench", "serve", "http://127.0.0.1:1", "--workload", str(path), "--concurrency", "1"]) == 2
    assert f"{path}:2: output_tokens must be an integer" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["bench", "serve", "http://127.0.0.1:1", "--slo-ttft", "soon"])
    assert ended.value.code == 2 and "a time above 0 such as 30ms" in capsys.readouterr().err
