"""``create_app``: the FastAPI application over one engine, for this server or to be mounted in another."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Coroutine
from json import JSONDecodeError
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.responses import PlainTextResponse, Response

from nemo_engine import __version__
from nemo_engine.async_engine import AsyncEngine
from nemo_engine.server import errors, state
from nemo_engine.server.access import Access
from nemo_engine.server.chat import create_chat_completion
from nemo_engine.server.completions import create_completion
from nemo_engine.server.monitor import monitor_routes
from nemo_engine.server.options import ServerOptions
from nemo_engine.server.protocol import (
    IGNORED_FIELDS_HEADER,
    AbortRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from nemo_engine.server.responses import create_response
from nemo_engine.server.responses_protocol import ResponsesRequest
from nemo_engine.server.service import Service

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
    for status, text in (
        (400, "The request is not valid; `param` names the field."),
        (401, "An API key is needed."),
        (404, "No such model or route."),
        (408, "The request took longer than its time-out."),
        (413, "The body is too large."),
        (415, "The body is compressed."),
        (422, "Never sent: bad input is 400."),
        (429, "Too many requests wait."),
        (500, "The server failed."),
        (503, "The server is shutting down."),
    )
    if status != 422
}


class _JsonRequest(Request):
    """Reads bodies strictly: UTF-8, no lone surrogates, no NaN, bounded depth."""

    async def json(self) -> Any:
        """The body."""
        if not hasattr(self, "_json"):
            body = (await self.body()).removeprefix(codecs.BOM_UTF8)
            try:
                self._json = from_json(body, allow_inf_nan=False)
            except ValueError as error:
                raise JSONDecodeError(str(error), "", 0) from None
        return self._json


class _Route(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


def create_app(engine: AsyncEngine, options: ServerOptions | None = None, *, model: str = "model") -> FastAPI:
    """The application. ``model`` is the model's name where ``options`` has none. The engine stays the caller's to close.

    ``app.state.service`` is what the routes share.
    """
    options = options or ServerOptions()
    service = Service(engine, options, model)
    app = FastAPI(
        title="nemo_engine",
        version=__version__,
        description="An OpenAI-compatible server for Mistral NeMo.",
        docs_url=None,  # it would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    errors.install(app)
    app.include_router(_routes(service))
    app.include_router(monitor_routes(service), responses=_ERRORS)
    app.add_middleware(Access, options=options)
    if options.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origin),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[IGNORED_FIELDS_HEADER, "X-Request-Id"],
        )
    return app


def _routes(service: Service) -> APIRouter:
    router = APIRouter(route_class=_Route, responses=_ERRORS)

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return state.models(service)

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return state.model(service, name)

    @router.post("/v1/completions")
    async def completions(request: CompletionRequest, http: Request) -> Response:
        return await create_completion(service, http, request)

    @router.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, http: Request) -> Response:
        return await create_chat_completion(service, http, request)

    @router.post("/v1/chat/completions/render")
    async def chat_render(request: ChatRequest, http: Request) -> Response:
        return await state.render(service, http, request)

    @router.post("/v1/responses")
    async def responses(request: ResponsesRequest, http: Request) -> Response:
        return await create_response(service, http, request)

    @router.post("/tokenize")
    async def tokenize(request: TokenizeRequest) -> Response:
        return await state.tokenize(service, request)

    @router.post("/detokenize")
    async def detokenize(request: DetokenizeRequest) -> Response:
        return await state.detokenize(service, request)

    @router.post("/abort")
    async def abort(request: AbortRequest) -> Response:
        return await state.abort(service, request)

    @router.get("/health")
    @router.get("/v1/health/ready")
    async def ready() -> Response:
        return state.ready(service)

    @router.get("/v1/health/live")
    async def live() -> Response:
        return state.live(service)

    @router.get("/version")
    async def version() -> dict[str, Any]:
        return state.version(service)

    @router.get("/load")
    async def load() -> dict[str, Any]:
        return state.load(service)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return await service.metrics.response()

    return router
