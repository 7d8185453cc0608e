"""``respond``: a whole response as JSON.

A response that may be long is made outside the event loop, which has other streams to serve.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

_MANY = 1000  # elements of a list that one call of the encoder writes
_MAX_DEPTH = 5


async def respond(build: Callable[[], dict[str, Any]], headers: dict[str, str], *, is_long: bool) -> Response:
    """The response with the body that ``build`` returns, which log-probabilities make tens of megabytes long."""

    def make(write: Callable[[Any], bytes]) -> Response:
        return Response(write(build()), headers=headers, media_type="application/json")

    return await asyncio.to_thread(make, written) if is_long else make(to_json)


def written(value: Any) -> bytes:
    """``value`` as JSON, made by many calls of the encoder: other threads cannot run during a call."""
    return b"".join(_pieces(value, 0))


def _pieces(value: Any, depth: int) -> Iterator[bytes]:
    if depth < _MAX_DEPTH and isinstance(value, dict):
        yield b"{"
        for index, (key, inner) in enumerate(value.items()):
            yield (b"," if index else b"") + to_json(str(key)) + b":"
            yield from _pieces(inner, depth + 1)
        yield b"}"
    elif depth < _MAX_DEPTH and isinstance(value, list) and len(value) > _MANY:
        yield b"["
        for start in range(0, len(value), _MANY):
            yield (b"," if start else b"") + to_json(value[start : start + _MANY])[1:-1]
        yield b"]"
    elif (
        depth < _MAX_DEPTH and isinstance(value, list) and value and isinstance(value[0], dict) and "index" in value[0]
    ):
        yield b"["  # a list of choices, each of which may be long
        for index, inner in enumerate(value):
            yield b"," if index else b""
            yield from _pieces(inner, depth + 1)
        yield b"]"
    else:
        yield to_json(value)
