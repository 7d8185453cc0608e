"""Who may ask, and how much: hosts, API keys, the size of bodies, and a line of JSON for every request.

Plain ASGI: streams pass through.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nemo_engine.server.bodies import Bodies, is_upload
from nemo_engine.server.clients import is_cross_site, is_host_allowed
from nemo_engine.server.errors import ApiError, api_error, log_of
from nemo_engine.server.service import ClientGone, Service

OPEN_PATHS = frozenset({"/health", "/v1/health/live", "/v1/health/ready", "/metrics"})  # for probes, which have no keys
QUIET_PATHS = OPEN_PATHS | {"/monitor", "/monitor/pages"}  # asked again and again: logged when they fail
HEAD_PATHS = OPEN_PATHS | {"/", "/v1/models"}  # as probes and load balancers ask

_access_log = logging.getLogger("nemo_engine.access")


class Access:
    """Refuses what has no key or is too large, logs every request, and turns what is left unhandled into errors.

    The body is received before the application is asked, once the head is known to be in order. ``scope`` says who asks
    ("nemo_engine.client") and what is to be logged ("nemo_engine.log").
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._keys = service.keys
        self._metrics = service.metrics
        self._options = service.options
        self._bodies = Bodies(service.options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # where this application is mounted in another
        if scope["method"] == "HEAD" and path in HEAD_PATHS:
            scope = {**scope, "method": "GET"}  # the HTTP server, which has the scope as it was, leaves the body out
        started = time.monotonic()
        log = log_of(scope)
        status = 499  # the client closed before the answer began
        has_begun = False

        async def noted(message: Message) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status, has_begun = message["status"], True
            await send(message)

        try:
            self._check(scope, path)
            await self._handle(scope, receive, noted)
        except (ClientGone, ClientDisconnect):
            log["client_gone"] = True
        except asyncio.CancelledError:
            log["cancelled"] = (
                True  # the server ends; nobody waits for this task but the HTTP server, which logs it with a traceback
            )
        except Exception as raised:
            error = api_error(raised)  # logs what is not the client's fault
            error.note(scope)
            if not has_begun:
                await error.response()(scope, receive, noted)
        finally:
            if "key" in log:
                self._metrics.key_answered(log["key"], status)
            if self._options.log_requests and (path not in QUIET_PATHS or status >= 400):
                line = {"method": scope["method"], "path": scope["path"][:200], "status": status} | log
                line["seconds"] = round(time.monotonic() - started, 4)
                _access_log.info("%s", json.dumps(line, ensure_ascii=True, default=str))

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if scope.get("nemo_engine.is_upload"):  # the route takes it piece by piece
            await self._app(scope, receive, send)
            return
        if "transfer-encoding" not in headers and headers.get("content-length", "0") == "0":
            await self._app(scope, receive, send)
            return
        body = await self._bodies.receive(receive)
        scope["nemo_engine.body"] = body
        is_taken = False

        async def replayed() -> Message:
            nonlocal is_taken
            if is_taken:
                return await receive()
            is_taken = True
            return {"type": "http.request", "body": body.take(), "more_body": False}

        try:
            await self._app(scope, replayed, send)
        finally:
            body.release()

    def _check(self, scope: Scope, path: str) -> None:
        """Raise ``ApiError`` for what the head alone shows to be refused."""
        headers = Headers(scope=scope)
        if not is_host_allowed(headers.get("host", ""), self._options.allowed_hosts):
            raise ApiError(
                403,
                f"this server does not answer to the host {headers.get('host', '')[:200]!r}; --allowed-hosts names "
                "those that it does",
                code="host_not_allowed",
            )
        self._check_client(scope, path, headers)
        if self._options.batch_dir is not None and is_upload(scope["method"], path):
            scope["nemo_engine.is_upload"] = True
        else:
            refusal = self._bodies.check_length(headers.get("content-length", "0"))
            if refusal is not None:
                raise refusal
        if headers.get("content-encoding", "identity").lower() != "identity":
            kind = headers["content-encoding"]
            raise ApiError(415, f"Content-Encoding must not be set: bodies are taken uncompressed, got {kind!r}")

    def _check_client(self, scope: Scope, path: str, headers: Headers) -> None:
        is_probe = path in OPEN_PATHS or scope["method"] == "OPTIONS"
        client = self._keys.find(headers)
        if client is None and not is_probe:
            # A browser asks for the page's key by itself.
            ask = {"WWW-Authenticate": 'Basic realm="nemo_engine: any name, and the API key as the password"'}
            raise ApiError(
                401,
                "an API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers=ask if path == "/" else {"WWW-Authenticate": "Bearer"},
            )
        if client is not None:
            scope["nemo_engine.client"] = client
            if client.name:
                log_of(scope)["key"] = client.name
        origins = self._options.cors_origin or ()
        is_allowed = "*" in origins or headers.get("origin") in origins
        if not self._keys and scope["method"] == "POST" and is_cross_site(headers) and not is_allowed:
            raise ApiError(
                403,
                "a page of another site asks; --cors-origin names the origins that may",
                code="origin_not_allowed",
            )
