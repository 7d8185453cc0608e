"""Server-sent events: a response that sends each event as it comes, and stops its work when the client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nemo_engine.server.errors import api_error

DONE = b"data: [DONE]\n\n"

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def event(data: Any) -> bytes:
    """One event of JSON."""
    return b"data: " + _encode(data).encode("utf-8", "replace") + b"\n\n"


def named_event(name: str, data: Any) -> bytes:
    """One event of JSON with a name."""
    return b"event: " + name.encode() + b"\n" + event(data)


class EventStream(Response):
    """Sends what ``events`` yields. An error after the response has begun becomes a last event.

    The first event is awaited before the response begins, so that what is refused at once has a status of its own. A
    client that reads slowly holds up only its own ``events``; one that goes away closes them.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], headers: dict[str, str] | None = None) -> None:
        self.background: BackgroundTask | None = None
        self.status_code = 200
        self.body = b""
        self._events = events
        self._first: bytes | None = None
        all_headers = {
            "Content-Type": f"{self.media_type}; charset=utf-8",
            "Cache-Control": "no-cache",
            "X-Accel-Buffering": "no",
        }
        self.raw_headers = [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in (all_headers | (headers or {})).items()
        ]

    async def start(self) -> EventStream:
        """Wait for the first event; raises what goes wrong before it."""
        self._first = await anext(self._events, None)
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        work = asyncio.ensure_future(self._send(send))
        watcher = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait((work, watcher), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watcher.cancel()
            if not work.done():
                work.cancel()
            await asyncio.gather(work, watcher, return_exceptions=True)
            await self._events.aclose()  # type: ignore[attr-defined]

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            if self._first is not None:
                await send({"type": "http.response.body", "body": self._first, "more_body": True})
                async for data in self._events:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                return  # the server says so of a client that has gone
            await send({"type": "http.response.body", "body": event(api_error(error).body()) + DONE, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
