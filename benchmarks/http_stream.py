"""A lean HTTP client for measuring servers: one POST a connection, its server-sent events with the times at which they came."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit


class HttpError(RuntimeError):
    """The server refused, or its answer broke off."""


async def post_events(url: str, body: dict[str, Any], headers: dict[str, str]) -> AsyncIterator[tuple[float, Any]]:
    """(``time.perf_counter()``, JSON) of each event of the answer, up to ``[DONE]``. Raises ``HttpError``, ``OSError``."""
    where = urlsplit(url)
    is_tls = where.scheme == "https"
    context = ssl.create_default_context() if is_tls else None
    reader, writer = await asyncio.open_connection(
        where.hostname, where.port or (443 if is_tls else 80), ssl=context, limit=1 << 20
    )
    try:
        content = json.dumps(body).encode()
        lines = [
            f"POST {where.path} HTTP/1.1",
            f"Host: {where.netloc}",
            "Content-Type: application/json",
            "Connection: close",
            f"Content-Length: {len(content)}",
            *[f"{name}: {value}" for name, value in headers.items()],
        ]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
        status, is_chunked = await _head(reader)
        if status != 200:
            rest = (await reader.read(2000)).decode("utf-8", "replace")
            raise HttpError(f"status {status}: {' '.join(rest.split())[:300]}")
        held = b""
        async for data in _pieces(reader, is_chunked):
            now = time.perf_counter()
            held += data
            while b"\n\n" in held:
                one, _, held = held.partition(b"\n\n")
                for line in one.splitlines():
                    if line == b"data: [DONE]":
                        return
                    if line.startswith(b"data: "):
                        yield now, json.loads(line[6:])
        raise HttpError("the answer ended without [DONE]")
    finally:
        writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """(status, whether the body comes in chunks)."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        raise HttpError("the server closed the connection without an answer") from None
    first, *fields = head.decode("latin-1").split("\r\n")
    is_chunked = any(field.lower().replace(" ", "") == "transfer-encoding:chunked" for field in fields)
    return int(first.split()[1]), is_chunked


async def _pieces(reader: asyncio.StreamReader, is_chunked: bool) -> AsyncIterator[bytes]:
    while is_chunked:
        size = int((await reader.readline()).split(b";")[0] or b"0", 16)
        if size == 0:
            return
        yield await reader.readexactly(size)
        await reader.readexactly(2)
    while data := await reader.read(1 << 16):
        yield data
