"""HTTP/1.1 on a socket: uvicorn's protocol over httptools, with the limits that it leaves open.

Owns what happens before and after a request is the application's: the size of heads, the deadlines of silent, slow and
deaf clients, the number of connections. Knows nothing of keys, bodies and routes (``access``). A head is refused before
it is parsed as a whole: the parser below copies what it has of a header with each read.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from nemo_engine.server.errors import RETRY_AFTER, ApiError
from nemo_engine.server.options import ServerOptions

MAX_HEAD_BYTES = 64 * 1024
MAX_URL_BYTES = 8 * 1024
MAX_HEADERS = 256
MAX_PIPELINED = 64  # requests that wait for the answers of those before them
LINGER = 3.0  # seconds in which a client may still send what is not read, so that it comes to see the answer

_PIECE = 16 * 1024  # fed to the parser at a time: the limits are looked at in between
_DROP_PAUSE = 0.002  # seconds between two reads of what is dropped
_MAX_REFUSED = 256  # connections beyond the limit that are told so; others are dropped

_access_log = logging.getLogger("nemo_engine.access")


class Connections:
    """The open connections of one server. Looks at all of them now and then; each knows its own deadlines."""

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self._open: dict[HttpProtocol, None] = {}  # in the order in which they were opened
        self._is_watching = False
        shortest = min(options.header_timeout, options.keep_alive_timeout, options.send_timeout)
        self._interval = min(1.0, shortest / 4)

    def protocol(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> HttpProtocol:
        """A protocol for one connection, as ``uvicorn.Config.http`` takes it."""
        return HttpProtocol(self, config, server_state, app_state, _loop)

    def add(self, connection: HttpProtocol) -> int:
        """Count an open connection; returns by how many the limit is exceeded.

        An idle one makes room if there is one.
        """
        self._open[connection] = None
        if not self._is_watching:
            self._is_watching = True
            connection.loop.call_later(self._interval, self._watch, connection.loop)
        excess = len(self._open) - self.options.max_connections
        if excess > 0:
            idle = next((candidate for candidate in self._open if candidate.is_idle), None)
            if idle is not None:
                idle.transport.close()
                del self._open[idle]
                excess -= 1
        return excess

    def remove(self, connection: HttpProtocol) -> None:
        """A connection was closed."""
        self._open.pop(connection, None)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        now = time.monotonic()
        for connection in list(self._open):
            connection.check_deadlines(now)
        self._is_watching = bool(self._open)
        if self._is_watching:
            loop.call_later(self._interval, self._watch, loop)


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        connections: Connections,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._connections = connections
        self._options = connections.options
        self._active: RequestResponseCycle | None = None  # whose answer is sent or awaited; ``cycle`` is the newest
        self._held: list[bytes] = []  # read while requests wait for the answers of others
        self._refusal: ApiError | None = None
        self._is_in_head = False
        self._is_received = True  # the newest request, whole
        self._num_headers = self._head_bytes = 0
        self._num_unparsed = 0  # bytes fed since a head, a piece of a body or a message was complete
        self._head_since: float | None = None
        self._done_since: float | None = None  # after an answer to a request that is not received, or a refusal
        self._unsent_since = 0.0
        self._num_unsent = 0

    # ---- the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """It is open; the head of a request is due."""
        super().connection_made(transport)
        self._head_since = time.monotonic()
        excess = self._connections.add(self)
        if excess > _MAX_REFUSED:
            transport.abort()
        elif excess > 0:
            limit = self._options.max_connections
            self._refuse(ApiError(503, f"{limit} connections are open, and no more may be", code="too_many_connections",
                                  headers=RETRY_AFTER))  # fmt: skip

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed: all requests that wait for an answer hear of it."""
        self._connections.remove(self)
        for cycle in (self._active, *(cycle for cycle, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        self.pipeline.clear()
        self._held.clear()
        super().connection_lost(exc)

    @property
    def is_idle(self) -> bool:
        """Whether all requests have been answered and none has begun to arrive."""
        return self._active is not None and self._active.response_complete and self._head_since is None

    def check_deadlines(self, now: float) -> None:
        """Close what has been waited for long enough."""
        num_unsent = self.transport.get_write_buffer_size()
        if num_unsent == 0 or num_unsent < self._num_unsent:
            self._unsent_since = now
        self._num_unsent = num_unsent
        if num_unsent:
            if now - self._unsent_since > self._options.send_timeout:
                self._log(499, "send_timeout")
                self.transport.abort()
        elif self.transport.is_closing():
            self._done_since = self._done_since or now
            if now - self._done_since > LINGER:
                self.transport.abort()
        elif self._done_since is not None:
            if now - self._done_since > LINGER:
                self.transport.close()
        elif self._head_since is not None and now - self._head_since > self._options.header_timeout:
            if self.flow.read_paused:
                self._head_since = now  # it is not the client that is late
            elif self._is_in_head:
                seconds = self._options.header_timeout
                self._refuse(ApiError(408, f"the head of the request took longer than {seconds:g} s", code="timeout"))
            else:
                self.transport.close()

    # ---- what arrives

    def data_received(self, data: bytes) -> None:
        """Feed what was read to the parser, unless requests before it are to be answered first."""
        self._unset_keepalive_if_required()
        if self._refusal is not None:
            self.flow.pause_reading()  # what is dropped should cost others little
            self.loop.call_later(_DROP_PAUSE, self._read_on)
        elif self._held or self.pipeline:
            self._hold(data)
        else:
            self._feed(data)

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _hold(self, data: bytes) -> None:
        self._held.append(data)
        self.flow.pause_reading()

    def _feed(self, data: bytes) -> None:
        for start in range(0, len(data), _PIECE):
            if self.pipeline:
                self._hold(data[start:])
                return
            piece = data[start : start + _PIECE]
            if self._is_received and self._head_since is None:
                self._head_since = time.monotonic()
            self._num_unparsed += len(piece)
            try:
                self._parse(piece)
            except httptools.HttpParserError:
                self._refuse(self._refusal or ApiError(400, "this is no valid HTTP request", code="invalid_http"))
            if self._refusal is not None or self.transport.is_closing():
                return
            if self._num_unparsed > MAX_HEAD_BYTES + _PIECE:
                self._refuse(_head_too_large())
                return

    def _parse(self, piece: bytes) -> None:
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            # No other protocol is spoken here, and the body is the request's, which this parser would leave: so it
            # reads the head again, without the header that asks.
            method, version = self.parser.get_method(), self.parser.get_http_version().encode()
            lines = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.feed_data(b"\r\n".join([method + b" " + self.url + b" HTTP/" + version, *lines, b"", b""]))
            self._parse(piece[upgrade.args[0] :])

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._is_in_head, self._is_received = True, False
        self._head_since = self._head_since or time.monotonic()
        self._num_headers = self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """A piece of the request's target."""
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            self._stop(ApiError(414, f"the URL is longer than {MAX_URL_BYTES} bytes", code="url_too_long"))
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; those that follow a body in chunks are counted and left out."""
        self._num_headers += 1
        self._head_bytes += len(name) + len(value) + 4
        if self._num_headers > MAX_HEADERS or self._head_bytes > MAX_HEAD_BYTES:
            self._stop(_head_too_large())
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A head is whole: its request begins, or waits for the answers of those before it."""
        num_hosts = sum(name == b"host" for name, _ in self.headers)
        if num_hosts > 1 or (num_hosts == 0 and self.parser.get_http_version() == "1.1"):
            self._stop(ApiError(400, f"Host must be sent once, got {num_hosts} of them", code="invalid_http"))
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop(ApiError(429, f"more than {MAX_PIPELINED} requests were sent ahead", code="too_many_pipelined"))
        if self.parser.get_method() == b"CONNECT":
            self._stop(ApiError(400, "this is no proxy", code="invalid_http"))
        if self.parser.should_upgrade():
            return  # see ``_parse``
        super().on_headers_complete()
        self._is_in_head, self._head_since, self._num_unparsed = False, None, 0
        if not self.pipeline:
            self._active = self.cycle

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._num_unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is whole."""
        if self.parser.should_upgrade():
            return
        self._num_unparsed = 0
        self._is_received, self._done_since = True, None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer is whole: the next request's turn."""
        following = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if following is not None:
            self._active = following
        elif not self._is_received and not self._is_in_head:
            self._done_since = time.monotonic()
        if self._held and not self.pipeline:
            held, self._held = b"".join(self._held), []
            self._feed(held)

    # ---- refusals

    def _stop(self, error: ApiError) -> None:
        """In a callback of the parser: refuse the request."""
        self._refusal = error
        raise ValueError(error.message)

    def _refuse(self, error: ApiError) -> None:
        """Answer what cannot be read with ``error``, after the answers to what came before it, and read no more."""
        self._refusal = error
        self._head_since = None
        self._log(error.status, error.code)
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self._is_in_head or cycle.response_started or self.pipeline:
                cycle.keep_alive = False
                return
            cycle.disconnected = True
            cycle.message_event.set()
        body = json.dumps(error.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        lines = [f"{name}: {value}\r\n".encode() for name, value in (headers | (error.headers or {})).items()]
        lines += [name + b": " + value + b"\r\n" for name, value in self.server_state.default_headers]
        self._done_since = time.monotonic()
        self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body]))
        if self.transport.can_write_eof():
            self.transport.write_eof()  # closing at once would throw away the answer with what is unread
        else:
            self.transport.close()

    def _log(self, status: int, code: str | None) -> None:
        if self._options.log_requests:
            peer = self.client[0] if self.client else None
            _access_log.info("%s", json.dumps({"status": status, "code": code, "peer": peer}))


def _head_too_large() -> ApiError:
    return ApiError(
        431,
        f"the head of the request must have at most {MAX_HEADERS} headers and {MAX_HEAD_BYTES} bytes",
        code="headers_too_large",
    )
