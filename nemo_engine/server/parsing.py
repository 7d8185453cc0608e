"""From the bytes of a body to a checked request, such that no body keeps the interpreter to itself for long.

The parser is one call into C, during which no other thread runs: neither the event loop nor the engine. Its time goes
with the number of values, keys and escapes, so these are counted before it is called. What is left of a large body's
work runs in threads of its own.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.requests import Request

from nemo_engine.server.errors import ApiError, validation_error
from nemo_engine.server.protocol import ApiRequest

MAX_KEYS = 50_000
MAX_CONTAINERS = 100_000  # lists and objects
MAX_VALUES = 250_000  # or two for each token of the context, if that is more
MAX_ESCAPES = 1_000_000

_SMALL_BODY = 32 * 1024  # bytes; handled in the event loop
_STRETCH = 2**20  # bytes that are counted at a time

_M = TypeVar("_M", bound=ApiRequest)
_T = TypeVar("_T")


class Workers:
    """Threads for what large bodies ask for.

    They are few, and not those of small bodies, which so do not wait behind large ones.
    """

    def __init__(self, max_model_len: int) -> None:
        self.max_values = max(MAX_VALUES, 2 * max_model_len)
        self._large = ThreadPoolExecutor(2, thread_name_prefix="large-bodies")

    async def run(self, http: Request, function: Callable[..., _T], *args: Any) -> _T:
        """``function(*args)`` outside the event loop, for the request ``http``."""
        executor = self._large if _size_of(http) > _SMALL_BODY else None
        return await asyncio.get_running_loop().run_in_executor(executor, function, *args)

    async def read(self, http: Request, model: type[_M]) -> _M:
        """The body of ``http`` as ``model``. Raises ``ApiError``."""
        kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        body = http.scope.get("nemo_engine.body")
        if body is None or body.size == 0:
            raise ApiError(400, "the body must be a JSON object, and it is empty", code="invalid_json")
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            raise ApiError(400, "the body must be a JSON object, sent as application/json", code="invalid_json")
        data = body.take()
        try:
            if len(data) <= _SMALL_BODY:
                return parse(data, model, self.max_values)
            return await self.run(http, parse, data, model, self.max_values)
        finally:
            body.release()


def _size_of(http: Request) -> int:
    body = http.scope.get("nemo_engine.body")
    return 0 if body is None else body.size


def parse(data: bytes, model: type[_M], max_values: int = MAX_VALUES) -> _M:
    """``data`` as ``model``. Raises ``ApiError``."""
    return validated(read_json(data, max_values), model)


def read_json(data: bytes, max_values: int = MAX_VALUES) -> Any:
    """What ``data`` holds, read strictly: UTF-8, no lone surrogates, no NaN, bounded depth. Raises ``ApiError``."""
    data = data.removeprefix(codecs.BOM_UTF8)
    if len(data) > _SMALL_BODY:
        check_complexity(data, max_values)
    try:
        return from_json(data, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


def validated(value: Any, model: type[_M]) -> _M:
    """The JSON ``value`` as ``model``. Raises ``ApiError``."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise validation_error(error) from None


def check_complexity(data: bytes, max_values: int = MAX_VALUES) -> None:
    """Raise ``ApiError`` for JSON with more keys, values or escapes than are parsed in some tens of milliseconds."""
    num_escapes = _count(data, b"\\")
    if num_escapes > MAX_ESCAPES:
        raise _too_complex("escapes in its strings", MAX_ESCAPES)
    # In strings too: an upper bound.
    num_containers = _count(data, b"[") + _count(data, b"{")
    if _count(data, b":") <= MAX_KEYS and num_containers <= MAX_CONTAINERS and _count(data, b",") <= max_values:
        return
    num_keys = num_values = num_containers = 0
    for start, end in _outside_strings(data):
        for at in range(start, end, _STRETCH):
            to = min(at + _STRETCH, end)
            num_keys += data.count(b":", at, to)
            num_values += data.count(b",", at, to)
            num_containers += data.count(b"[", at, to) + data.count(b"{", at, to)
        if num_keys > MAX_KEYS:
            raise _too_complex("keys", MAX_KEYS)
        if num_containers > MAX_CONTAINERS:
            raise _too_complex("lists and objects", MAX_CONTAINERS)
        if num_values > max_values:
            raise _too_complex("values", max_values)


def _too_complex(what: str, limit: int) -> ApiError:
    return ApiError(413, f"the body must have at most {limit} {what}", code="request_too_complex")


def _count(data: bytes, what: bytes) -> int:
    return sum(data.count(what, at, at + _STRETCH) for at in range(0, len(data), _STRETCH))


def _outside_strings(data: bytes) -> Iterator[tuple[int, int]]:
    """Where ``data`` is outside of strings, start and end of each stretch."""
    at = 0
    while True:
        quote = data.find(b'"', at)
        if quote < 0:
            yield at, len(data)
            return
        yield at, quote
        end = quote
        is_escaped = True
        while is_escaped:
            end = data.find(b'"', end + 1)
            if end < 0:
                return
            first = end
            while data[first - 1] == 0x5C:  # a backslash
                first -= 1
            is_escaped = (end - first) % 2 == 1
        at = end + 1
