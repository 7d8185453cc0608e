"""``create_app``: the FastAPI application over one engine, for this server or to be mounted in another."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

from fastapi import APIRouter, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from starlette.responses import PlainTextResponse, Response

from nemo_engine import __version__
from nemo_engine.engine.async_engine import AsyncEngine
from nemo_engine.server import errors, status
from nemo_engine.server.access import Access
from nemo_engine.server.batch.routes import add_batch_routes
from nemo_engine.server.chat import create_chat_completion
from nemo_engine.server.completions import create_completion
from nemo_engine.server.openapi import describe
from nemo_engine.server.options import ServerOptions
from nemo_engine.server.parsing import Workers
from nemo_engine.server.protocol import (
    IGNORED_FIELDS_HEADER,
    AbortRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from nemo_engine.server.responses.protocol import ResponsesRequest
from nemo_engine.server.responses.route import create_response
from nemo_engine.server.service import Service
from nemo_engine.server.ui.monitor import conversation_pages, monitor_routes

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
        (403, "The host, or the page that asks, is not allowed."),
        (404, "No such model or route."),
        (408, "The request took longer than its time-out."),
        (413, "The body is too large, or has too many values."),
        (415, "The body is compressed."),
        (422, "Never sent: bad input is 400."),
        (429, "Too many requests wait."),
        (500, "The server failed."),
        (503, "The server is shutting down, or receives too much at once."),
    )
    if status != 422
}


class _Route(APIRoute):
    """A route whose function takes the checked body as ``request`` and the raw request as ``http``. A function without
    ``request`` is called as FastAPI does it.
    """

    workers: Workers

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        if self.body_field is None:
            return super().get_route_handler()
        model = get_type_hints(self.endpoint)["request"]

        async def handle(request: Request) -> Response:
            body = await self.workers.read(request, model)
            response: Response = await self.endpoint(request=body, http=request)
            return response

        return handle


def create_app(engine: AsyncEngine, options: ServerOptions | None = None, *, model: str = "model") -> FastAPI:
    """The application. ``model`` is the model's name where ``options`` has none.

    The engine stays the caller's to close.

    The routes share ``app.state.service``. ``app.state.batches`` answers batches, if there is a folder for them.
    """
    options = options or ServerOptions()
    service = Service(engine, options, model)
    app = FastAPI(
        title="nemo_engine",
        version=__version__,
        description="An OpenAI-compatible server for Mistral NeMo.",
        docs_url=None,  # FastAPI's page would load scripts from another site
        redoc_url=None,
    )
    app.state.service = service
    errors.install(app)
    _complete_document(app, service)
    router = _routes(service)
    app.state.batches = add_batch_routes(router, service)
    app.include_router(router)
    app.include_router(monitor_routes(service), responses=_ERRORS)
    app.add_middleware(Access, service=service)
    if options.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origin),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[IGNORED_FIELDS_HEADER, "X-Request-Id"],
        )
    return app


def _complete_document(app: FastAPI, service: Service) -> None:
    """Complete the OpenAPI document with the rules that FastAPI does not know."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            describe(make(), service)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _routes(service: Service) -> APIRouter:
    route = type("_RouteOfService", (_Route,), {"workers": service.workers})
    router = APIRouter(route_class=route, responses=_ERRORS)

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return status.models(service)

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return status.model(service, name)

    @router.post("/v1/completions")
    async def completions(request: CompletionRequest, http: Request) -> Response:
        return await create_completion(service, http, request)

    @router.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, http: Request) -> Response:
        return await create_chat_completion(service, http, request)

    @router.post("/v1/chat/completions/render")
    async def chat_render(request: ChatRequest, http: Request) -> Response:
        return await status.render(service, http, request)

    @router.post("/v1/responses")
    async def responses(request: ResponsesRequest, http: Request) -> Response:
        return await create_response(service, http, request)

    @router.post("/tokenize")
    async def tokenize(request: TokenizeRequest, http: Request) -> Response:
        return await status.tokenize(service, http, request)

    @router.post("/detokenize")
    async def detokenize(request: DetokenizeRequest, http: Request) -> Response:
        return await status.detokenize(service, http, request)

    @router.post("/abort")
    async def abort(request: AbortRequest, http: Request) -> Response:
        return await status.abort(service, http, request)

    if service.options.page:

        @router.post("/monitor/pages", include_in_schema=False)
        async def monitor_pages(request: ChatRequest, http: Request) -> Response:
            return await conversation_pages(service, http, request)

    @router.get("/health")
    @router.get("/v1/health/ready")
    async def ready() -> Response:
        return status.ready(service)

    @router.get("/v1/health/live")
    async def live() -> Response:
        return status.live(service)

    @router.get("/version")
    async def version() -> dict[str, Any]:
        return status.version(service)

    @router.get("/load")
    async def load() -> dict[str, Any]:
        return status.load(service)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return await service.metrics.response()

    return router
