"""A lean HTTP client for measuring servers: one request a connection, server-sent events with the times at which they
came.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

_LINE_END = re.compile(rb"\r\n|\n|\r")
_LIMIT = 1 << 20  # bytes of a header or of a chunk's first line


class HttpError(RuntimeError):
    """The server refused, or its answer broke off or is no HTTP."""


class EventReader:
    """Server-sent events out of pieces that may end anywhere; lines end in CR, LF or both."""

    def __init__(self) -> None:
        self._held = b""
        self._data: list[str] = []

    def feed(self, piece: bytes) -> Iterator[str]:
        """The data of each event that ``piece`` completes."""
        self._held += piece
        begin = 0
        for end in _LINE_END.finditer(self._held):
            if end.end() == len(self._held) and end[0] == b"\r":
                break  # an LF may follow
            line = self._held[begin : end.start()]
            begin = end.end()
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" ").decode("utf-8", "replace"))
            elif not line and self._data:
                yield "\n".join(self._data)
                self._data = []
        self._held = self._held[begin:]


async def post_events(url: str, body: dict[str, Any], headers: dict[str, str]) -> AsyncGenerator[tuple[float, Any]]:
    """(``time.perf_counter()``, JSON) of each event of the answer, up to ``[DONE]``.

    Raises ``HttpError``, ``OSError``.
    """
    reader, writer = await _connect(url)
    try:
        _write(writer, "POST", url, headers, json.dumps(body).encode())
        pieces = await _answer(reader)
        events = EventReader()
        async for piece in pieces:
            now = time.perf_counter()
            for data in events.feed(piece):
                if data == "[DONE]":
                    return
                try:
                    yield now, json.loads(data)
                except ValueError:
                    raise HttpError(f"an event is no JSON: {data[:200]}") from None
        raise HttpError("the answer ended without [DONE]")
    finally:
        writer.close()


async def get_json(url: str, headers: dict[str, str]) -> Any:
    """The JSON at ``url``. Raises ``HttpError``, ``OSError``."""
    reader, writer = await _connect(url)
    try:
        _write(writer, "GET", url, headers, b"")
        content = b"".join([piece async for piece in await _answer(reader)])
    finally:
        writer.close()
    try:
        return json.loads(content)
    except ValueError:
        raise HttpError(f"the answer is no JSON: {content[:200]!r}") from None


async def _connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    where = urlsplit(url)
    is_tls = where.scheme == "https"
    context = ssl.create_default_context() if is_tls else None
    return await asyncio.open_connection(
        where.hostname, where.port or (443 if is_tls else 80), ssl=context, limit=_LIMIT
    )


def _write(writer: asyncio.StreamWriter, method: str, url: str, headers: dict[str, str], content: bytes) -> None:
    where = urlsplit(url)
    lines = [
        f"{method} {where.path or '/'} HTTP/1.1",
        f"Host: {where.netloc.rpartition('@')[2]}",
        "Content-Type: application/json",
        "Connection: close",
        f"Content-Length: {len(content)}",
        *[f"{name}: {value}" for name, value in headers.items()],
    ]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)


async def _answer(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The pieces of the body of an answer of status 200."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(first.split()[1])
    except asyncio.IncompleteReadError:
        raise HttpError("the server closed the connection without an answer") from None
    except (asyncio.LimitOverrunError, IndexError, ValueError):
        raise HttpError("the answer is no HTTP") from None
    pairs = (line.partition(":") for line in lines)
    fields = {name.strip().lower(): value.strip().lower() for name, _, value in pairs}
    pieces = _pieces(reader, fields)
    if status != 200:
        text = ""
        try:
            text = b"".join([piece async for piece in pieces]).decode("utf-8", "replace")
        except HttpError:  # its status says enough
            pass
        raise HttpError(f"status {status}: {' '.join(text.split())[:300]}")
    return pieces


async def _pieces(reader: asyncio.StreamReader, fields: dict[str, str]) -> AsyncIterator[bytes]:
    """The body as it comes: in chunks, of a known length, or up to the end of the connection."""
    try:
        if fields.get("transfer-encoding") == "chunked":
            while size := int((await reader.readuntil(b"\n")).split(b";")[0], 16):
                left = size
                while left:  # a large chunk is not waited for
                    data = await reader.read(left)
                    if not data:
                        raise HttpError("the answer broke off inside a chunk")
                    left -= len(data)
                    yield data
                await reader.readexactly(2)
            return
        left = int(fields["content-length"]) if "content-length" in fields else -1
        while left:
            data = await reader.read(min(left, 1 << 16) if left > 0 else 1 << 16)
            if not data:
                if left > 0:
                    raise HttpError(f"the answer broke off {left} bytes before its end")
                return
            left -= len(data) if left > 0 else 0
            yield data
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
        raise HttpError("the answer broke off") from None
