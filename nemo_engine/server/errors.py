"""Errors as OpenAI's clients expect them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from nemo_engine.engine.async_engine import EngineClosedError, EngineDeadError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    414: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_MAX_MESSAGE = 2000  # characters; a message may quote what a client sent
_MAX_LOGGED = 200
RETRY_AFTER = {"Retry-After": "1"}

_logger = logging.getLogger("nemo_engine.server")


class ApiError(Exception):
    """Ends a request with ``status`` and an error body; ``param`` names the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> dict[str, Any]:
        """The body of the response, and of an event when the response has begun."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = _shortened(self.message)
        param = None if self.param is None else self.param[:_MAX_MESSAGE]
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response."""
        return JSONResponse(self.body(), self.status, self.headers)

    def note(self, scope: Scope) -> None:
        """Have it logged with the request: why it was refused, without what the client sent."""
        reason = self.message.partition(", got ")[0][:_MAX_LOGGED]
        log_of(scope)["error"] = {"code": self.code, "param": self.param and self.param[:_MAX_LOGGED], "reason": reason}


def _shortened(message: str) -> str:
    half = _MAX_MESSAGE // 2
    return message if len(message) <= _MAX_MESSAGE + 5 else f"{message[:half]} [...] {message[-half:]}"


def log_of(scope: Scope) -> dict[str, Any]:
    """What will be logged of a request."""
    log: dict[str, Any] = scope.setdefault("nemo_engine.log", {})
    return log


def api_error(error: BaseException) -> ApiError:
    """What ``error`` means to a client.

    Bad input is the client's; everything unforeseen is ours, logged and not shown.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineClosedError):
        return ApiError(503, "the server is shutting down", code="shutting_down", headers=RETRY_AFTER)
    if isinstance(error, EngineDeadError):
        return ApiError(500, "the engine has stopped by an error", code="engine_dead")
    if isinstance(error, TimeoutError):
        return ApiError(408, "the request took longer than its time-out", param="timeout", code="timeout")
    if isinstance(error, ValueError):
        message = _shortened(str(error))
        if "more than max_model_len" in message:  # by these words clients know that they should send less
            message = f"this model's maximum context length is exceeded: {message}"
            return ApiError(400, message, code="context_length_exceeded")
        return ApiError(400, message, param=_param_of(message))
    _logger.error("a request failed: %s: %s", type(error).__name__, error, exc_info=error)
    return ApiError(500, "the server failed at this request; its log says why")


def _param_of(message: str) -> str | None:
    """The field that a message begins with, as the engine's messages do."""
    name = message.partition(" ")[0].rstrip(":")
    is_name = all(
        part.isidentifier() for part in name.replace("]", "").replace("[", ".").split(".") if not part.isdigit()
    )
    return name if name and is_name and ("_" in name or "[" in name or "." in name or name in _PLAIN_PARAMS) else None


_PLAIN_PARAMS = {
    "prompt",
    "messages",
    "input",
    "instructions",
    "tools",
    "temperature",
    "n",
    "seed",
    "stop",
    "logprobs",
    "priority",
}


_PLACES = {("body",), ("query",), ("path",)}  # that a path may begin with, besides a field
_UNION_TAG = re.compile(r"str|int|(list|dict)\[.*\]")  # in pydantic's paths: which of several types it tried


def _path_of(loc: Sequence[int | str]) -> str:
    path = ""
    for part in loc[1:] if tuple(loc[:1]) in _PLACES else loc:
        if not (isinstance(part, str) and _UNION_TAG.fullmatch(part)):
            path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path


def validation_error(error: ValidationError | RequestValidationError) -> ApiError:
    """Names the field, as a path, of the first thing wrong; where several types were tried, of what came nearest to
    one.
    """
    errors = error.errors()
    paths = [_path_of(entry["loc"]) for entry in errors]
    depth = 2 if tuple(errors[0]["loc"][:1]) in _PLACES else 1  # of the field
    tried = [index for index, entry in enumerate(errors) if entry["loc"][:depth] == errors[0]["loc"][:depth]]
    nearest = max(tried, key=lambda index: len(errors[index]["loc"]))
    first, path = errors[nearest], paths[nearest]
    kind = first["type"]
    if not path and kind in ("model_type", "model_attributes_type", "dict_type"):
        return ApiError(400, "the body must be a JSON object", code="invalid_json")
    if kind == "missing":
        return ApiError(400, f"{path} is missing", param=path, code="missing_required_parameter")
    same = dict.fromkeys(str(errors[index]["msg"]) for index in tried if paths[index] == path)
    given = first.get("input")
    if isinstance(given, str):
        given = given[:_MAX_MESSAGE]
    shown = repr(given)[:200] if given is None or isinstance(given, (str, int, float)) else type(given).__name__
    message = ", or: ".join(same).removeprefix("Value error, ") + f", got {shown}"
    return ApiError(400, f"{path}: {message}" if path else message, param=path or None, code="invalid_value")


def install(app: FastAPI) -> None:
    """Let every error of ``app`` leave in OpenAI's shape."""

    def answer(request: Request, error: ApiError) -> JSONResponse:
        error.note(request.scope)
        return error.response()

    async def on_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return answer(request, validation_error(error))

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers) if error.headers else None
        return answer(request, ApiError(error.status_code, str(error.detail), headers=headers))

    async def on_any(request: Request, error: Exception) -> JSONResponse:
        return answer(request, api_error(error))

    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    for kind in (ApiError, ValueError, EngineClosedError, EngineDeadError, TimeoutError, Exception):
        app.add_exception_handler(kind, on_any)
