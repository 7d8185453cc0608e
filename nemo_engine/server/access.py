"""Who may ask, and how much: API keys, the size of bodies, and a line of JSON for every request. Plain ASGI: streams pass through."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import logging
import time
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nemo_engine.server.errors import ApiError, api_error
from nemo_engine.server.options import ServerOptions
from nemo_engine.server.service import ClientGone

OPEN_PATHS = frozenset({"/health", "/v1/health/live", "/v1/health/ready", "/metrics"})  # for probes, which have no keys
HEAD_PATHS = OPEN_PATHS | {"/", "/v1/models"}  # as probes and load balancers ask

_access_log = logging.getLogger("nemo_engine.access")


class Access:
    """Refuses what has no key or is too large, logs every request, and turns what is left unhandled into errors."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app = app
        self._keys = options.keys()
        self._max_bytes = int(options.max_request_mib * 2**20)
        self._logs = options.log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # where this application is mounted in another
        if scope["method"] == "HEAD" and path in HEAD_PATHS:
            scope = {**scope, "method": "GET"}  # the HTTP server, which has the scope as it was, leaves the body out
        started = time.monotonic()
        log: dict[str, Any] = scope.setdefault("nemo_engine.log", {})
        status = 499  # the client closed before the answer began
        has_begun = False
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_bytes:
                    raise HTTPException(413, self._too_large().message)  # FastAPI lets this one kind pass
            return message

        async def noted(message: Message) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status, has_begun = message["status"], True
            await send(message)

        try:
            refusal = self._refusal(scope, path)
            if refusal is not None:
                await refusal.response()(scope, receive, noted)
            else:
                await self._app(scope, counted, noted)
        except (ClientGone, ClientDisconnect):
            log["client_gone"] = True
        except Exception as error:
            if not has_begun:
                await api_error(error).response()(scope, receive, noted)
            else:
                api_error(error)  # logs what is not the client's fault
        finally:
            if self._logs and path not in OPEN_PATHS:
                line = {"method": scope["method"], "path": scope["path"][:200], "status": status} | log
                line["seconds"] = round(time.monotonic() - started, 4)
                _access_log.info("%s", json.dumps(line, ensure_ascii=True, default=str))

    def _refusal(self, scope: Scope, path: str) -> ApiError | None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit():
            return ApiError(400, "Content-Length must be a number")
        if int(length) > self._max_bytes:
            return self._too_large()
        if headers.get("content-encoding", "identity").lower() != "identity":
            kind = headers["content-encoding"]
            return ApiError(415, f"Content-Encoding must not be set: bodies are taken uncompressed, got {kind!r}")
        if not self._keys or path in OPEN_PATHS or scope["method"] == "OPTIONS":
            return None
        if any([hmac.compare_digest(key, own) for own in self._keys for key in _keys_of(headers)]):
            return None
        # A browser asks for the page's key by itself.
        ask = {"WWW-Authenticate": 'Basic realm="nemo_engine: any name, and the API key as the password"'}
        return ApiError(
            401,
            "an API key is needed: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers=ask if path == "/" else {"WWW-Authenticate": "Bearer"},
        )

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_bytes} bytes", code="request_too_large")


def _keys_of(headers: Headers) -> list[bytes]:
    """The keys that a request shows: as a bearer token, as ``X-API-Key``, or as the password of a browser on our own page."""
    found = []
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        found.append(value.strip().encode("latin-1"))
    elif kind.lower() == "basic" and headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
        try:
            found.append(base64.b64decode(value.strip(), validate=True).partition(b":")[2])
        except (binascii.Error, ValueError):
            pass
    if "x-api-key" in headers:
        found.append(headers["x-api-key"].encode("latin-1"))
    return found
