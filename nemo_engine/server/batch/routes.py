"""``/v1/files`` and ``/v1/batches``, as OpenAI's clients call them; refused where the server has no folder for
files.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, Response

from nemo_engine.batch.lines import CHAT, COMPLETIONS, RESPONSES
from nemo_engine.server.batch.store import BatchStore, new_id
from nemo_engine.server.batch.worker import BatchWorker
from nemo_engine.server.errors import ApiError
from nemo_engine.server.headers import response_headers
from nemo_engine.server.multipart import Form, receive_form
from nemo_engine.server.protocol import ApiRequest
from nemo_engine.server.responses.protocol import check_metadata
from nemo_engine.server.service import Service

FILES, BATCHES = "/v1/files", "/v1/batches"
_MOST_LISTED = 10_000


class BatchRequest(ApiRequest):
    """The body of ``/v1/batches``."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"output_expires_after": ()}

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None


assert {CHAT, COMPLETIONS, RESPONSES} == set(BatchRequest.model_fields["endpoint"].annotation.__args__)  # type: ignore[union-attr]


def add_batch_routes(router: APIRouter, service: Service) -> BatchWorker | None:
    """Add the routes; returns who answers the batches, if there is a folder for them."""
    folder = service.options.batch_dir
    if folder is None:

        async def refuse() -> Response:
            raise ApiError(404, "this server takes no files: it was not started with --batch-dir", code="no_batch_dir")

        for path in (FILES, BATCHES):
            for rest in ("", "/{rest:path}"):
                router.add_api_route(path + rest, refuse, methods=["GET", "POST", "DELETE"], include_in_schema=False)
        return None
    store = BatchStore(Path(folder))
    worker = BatchWorker(service, store)
    _add_files(router, service, store)
    _add_batches(router, service, store, worker)
    return worker


def _add_files(router: APIRouter, service: Service, store: BatchStore) -> None:
    @router.post(FILES, include_in_schema=False)
    async def upload(http: Request) -> dict[str, Any]:
        name = new_id("file-")
        path = store.folder / name
        is_kept = False
        try:
            with path.open("wb") as file:
                max_bytes = int(service.options.max_batch_file_mib * 2**20)
                pieces = _pieces(http, service.options.body_timeout)
                form = await receive_form(http.headers.get("content-type", ""), pieces, file, max_bytes)
            _check_form(form)
            shown = store.add_file(service.client_of(http).name, name, form.filename or "", "batch", name)
            is_kept = True
            return shown
        except OSError as error:
            raise ApiError(507, f"the file cannot be kept: {error.strerror}", code="no_room") from None
        finally:
            if not is_kept:
                path.unlink(missing_ok=True)

    @router.get(FILES)
    async def files(
        http: Request,
        after: str | None = None,
        limit: int = _MOST_LISTED,
        order: str = "desc",
        purpose: str | None = None,
    ) -> dict[str, Any]:
        _check_list(limit, order)
        return store.page(
            "file", service.client_of(http), after, limit, order == "asc",
            lambda entry: purpose is None or entry.shown["purpose"] == purpose,
        )  # fmt: skip

    @router.get(FILES + "/{file_id}")
    async def file(file_id: str, http: Request) -> dict[str, Any]:
        return store.find(file_id, "file", service.client_of(http)).shown

    @router.get(FILES + "/{file_id}/content")
    async def content(file_id: str, http: Request) -> Response:
        entry = store.find(file_id, "file", service.client_of(http))
        return FileResponse(store.path_of(entry), media_type="application/octet-stream")

    @router.delete(FILES + "/{file_id}")
    async def delete(file_id: str, http: Request) -> dict[str, Any]:
        store.delete(store.find(file_id, "file", service.client_of(http)))
        return {"id": file_id, "object": "file", "deleted": True}


def _add_batches(router: APIRouter, service: Service, store: BatchStore, worker: BatchWorker) -> None:
    @router.post(BATCHES)
    async def create(request: BatchRequest, http: Request) -> Response:
        headers = response_headers(request)
        check_metadata(request.metadata)
        service.check_admission(1)
        batch = worker.create(
            service.client_of(http), request.input_file_id, request.endpoint, request.completion_window,
            request.metadata
        )  # fmt: skip
        return JSONResponse(batch, headers=headers)

    @router.get(BATCHES)
    async def batches(http: Request, after: str | None = None, limit: int = 20) -> dict[str, Any]:
        worker.start()
        _check_list(limit, "desc")
        return store.page("batch", service.client_of(http), after, limit, False, lambda entry: True)

    @router.get(BATCHES + "/{batch_id}")
    async def batch(batch_id: str, http: Request) -> dict[str, Any]:
        worker.start()
        return store.find(batch_id, "batch", service.client_of(http)).shown

    @router.post(BATCHES + "/{batch_id}/cancel")
    async def cancel(batch_id: str, http: Request) -> dict[str, Any]:
        entry = store.find(batch_id, "batch", service.client_of(http))
        worker.cancel(entry)
        return entry.shown


def _check_list(limit: int, order: str) -> None:
    if not 1 <= limit <= _MOST_LISTED:
        raise ApiError(400, f"limit must be from 1 to {_MOST_LISTED}, got {limit}", param="limit")
    if order not in ("asc", "desc"):
        raise ApiError(400, f"order must be asc or desc, got {order[:100]!r}", param="order")


def _check_form(form: Form) -> None:
    if form.filename is None:
        raise ApiError(400, "file is missing", param="file", code="missing_required_parameter")
    purpose = form.fields.get("purpose")
    if purpose != "batch":
        raise ApiError(400, f"purpose must be batch, got {(purpose or 'nothing')[:100]!r}", param="purpose")
    others = [name for name in form.fields if name != "purpose"]
    if others:
        raise ApiError(400, f"{others[0][:100]} is not supported", param=others[0][:100], code="unsupported_parameter")


async def _pieces(http: Request, timeout: float) -> AsyncIterator[bytes]:
    """The body as it comes, each piece within ``timeout`` seconds."""
    while True:
        try:
            async with asyncio.timeout(timeout):
                message = await http.receive()
        except TimeoutError:
            raise ApiError(408, f"no more of the body came within {timeout:g} s", code="timeout") from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return
