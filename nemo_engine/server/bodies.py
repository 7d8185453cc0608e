"""The bodies of requests: each is received within a limit of time and size, and all together stay within a limit of
memory.
"""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from nemo_engine.server.errors import RETRY_AFTER, ApiError
from nemo_engine.server.options import ServerOptions

_SMALL = 64 * 1024  # bytes; a smaller body is always taken, for the HTTP server has read that many anyway


def is_upload(method: str, path: str) -> bool:
    """Whether a body is a file for batches, which is never held in memory."""
    return method == "POST" and path == "/v1/files"


class Bodies:
    """The bodies that are being received, or are yet to be parsed."""

    def __init__(self, options: ServerOptions) -> None:
        self.num_bytes = 0
        self._most_bytes = int(options.max_request_mib * 2**20)
        self._most_together = int(options.max_bodies_mib * 2**20)
        self._timeout = options.body_timeout

    def check_length(self, text: str) -> ApiError | None:
        """The error for a body of that ``Content-Length``, None if it may be sent."""
        if not text.isascii() or not text.isdigit():
            return ApiError(400, "Content-Length must be a number")
        if len(text) > 18 or int(text) > self._most_bytes:
            return self._too_large()
        return None

    async def receive(self, receive: Receive) -> Body:
        """Receive a request's body.

        Raises ``ApiError`` if it is too large or too slow, or if all bodies together become too large.
        """
        body = Body(self)
        try:
            async with asyncio.timeout(self._timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    self._add(body, message.get("body", b""))
                    if not message.get("more_body", False):
                        return body
        except TimeoutError:
            body.release()
            raise ApiError(408, f"the body took longer than {self._timeout:g} s", code="timeout") from None
        except BaseException:
            body.release()
            raise

    def _add(self, body: Body, piece: bytes) -> None:
        body.pieces.append(piece)
        body.num_bytes += len(piece)
        body.size += len(piece)
        self.num_bytes += len(piece)
        if body.num_bytes > self._most_bytes:
            raise self._too_large()
        if self.num_bytes > self._most_together and body.num_bytes > _SMALL:
            raise ApiError(
                503,
                f"bodies of {self._most_together} bytes are being received, and no more may be",
                code="too_many_bodies",
                headers=RETRY_AFTER,
            )

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._most_bytes} bytes", code="request_too_large")


class Body:
    """One body, whose size counts until it is released."""

    def __init__(self, bodies: Bodies) -> None:
        self.pieces: list[bytes] = []
        self.num_bytes = 0
        self.size = 0  # bytes; it keeps its value after ``release``
        self._bodies = bodies

    def take(self) -> bytes:
        """Return the body and forget it."""
        data = self.pieces[0] if len(self.pieces) == 1 else b"".join(self.pieces)
        self.pieces = []
        return data

    def release(self) -> None:
        """Count it no more among the bodies in memory."""
        self._bodies.num_bytes -= self.num_bytes
        self.num_bytes = 0
        self.pieces = []
