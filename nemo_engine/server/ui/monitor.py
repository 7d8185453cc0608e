"""The page at ``/`` and what its live view shows: ``/monitor`` as JSON, ``/monitor/stream`` once a second.

Owns the files of the page and the picture of the engine; ``ServerOptions.page`` turns all of it off.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from base64 import b64encode
from collections.abc import AsyncIterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from nemo_engine import __version__
from nemo_engine.outputs import RequestView, StepRecord
from nemo_engine.server.clients import ANYONE, Client
from nemo_engine.server.prompts import encode_conversation
from nemo_engine.server.protocol import ChatRequest
from nemo_engine.server.service import Service
from nemo_engine.server.sse import EventStream, event

MAX_CELLS = 4096  # of the map of pages
MIN_SHOWN = 256  # pages
MAX_REQUESTS = 100  # that are listed
MAX_STEPS = 160
INTERVAL = 1.0  # seconds between two events

PAGE_STATES = ("free", "cached", "used", "shared")  # by the bytes of ``page_states``

_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def monitor_routes(service: Service) -> APIRouter:
    """The routes of the page; none if it is turned off."""
    router = APIRouter()
    if not service.options.page:
        return router
    page = {path.name: PageFile(path) for path in files("nemo_engine.server.ui").joinpath("page").iterdir()}
    index = page.pop("index.html")
    monitor = Monitor(service)

    router.add_api_route("/", index.response, methods=["GET"], include_in_schema=False)
    for name, file in page.items():
        router.add_api_route(f"/page/{name}", file.response, methods=["GET"], include_in_schema=False)

    @router.get("/monitor")
    async def snapshot(http: Request) -> dict[str, Any]:
        return await monitor.snapshot(service.client_of(http))

    @router.get("/monitor/stream", include_in_schema=False)
    async def stream(http: Request) -> Response:
        return await EventStream(monitor.events(service.client_of(http))).start()

    return router


async def conversation_pages(service: Service, http: Request, request: ChatRequest) -> Response:
    """``/monitor/pages``: which pages hold the conversation of a chat request, as a next request would find them.

    ``runs``: (first page, number of pages) of neighbours, in the order of the conversation.
    """
    prompt = await service.workers.run(http, encode_conversation, service, request)
    pages = await service.engine.call(lambda engine: engine.cached_pages(prompt.token_ids))
    runs: list[list[int]] = []
    for page in pages:
        if runs and page == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([page, 1])
    return JSONResponse({"num_tokens": len(prompt.token_ids), "num_pages": len(pages), "runs": runs})


class PageFile:
    """A file of the page, which browsers keep and ask about each time."""

    def __init__(self, path: Traversable) -> None:
        kind = _KINDS[PurePath(path.name).suffix]
        self._body = path.read_bytes()
        self._etag = f'"{hashlib.sha256(self._body).hexdigest()[:32]}"'
        text = kind if kind == "image/svg+xml" else f"{kind}; charset=utf-8"
        self._headers = {"Content-Type": text, "ETag": self._etag} | _HEADERS

    async def response(self, request: Request) -> Response:
        """The file, or that it has not changed."""
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self._etag in known:
            return Response(status_code=304, headers=self._headers)
        return Response(self._body, headers=self._headers)


class Monitor:
    """Pictures of one engine, taken while somebody looks; those who look at the same time share them."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._started = time.monotonic()
        self._lock = asyncio.Lock()
        self._taken = -INTERVAL
        self._last: dict[str, Any] = {}
        self._requests: list[tuple[RequestView, int | None, Client]] = []

    async def snapshot(self, client: Client = ANYONE) -> dict[str, Any]:
        """The picture of now, at most half an ``INTERVAL`` old, with the requests of ``client`` alone."""
        async with self._lock:
            if time.monotonic() - self._taken >= INTERVAL / 2:
                self._last = await self._take()
                self._taken = time.monotonic()
            requests = [_request(view, place) for view, place, owner in self._requests if owner == client]
            return self._last | {"requests": requests[:MAX_REQUESTS]}

    async def events(self, client: Client = ANYONE) -> AsyncIterator[bytes]:
        """Pictures as server-sent events, until the server has nothing more to do."""
        engine = self._service.engine
        while True:
            yield event(await self.snapshot(client))
            if not engine.is_ready and engine.num_unfinished == 0:
                return
            await asyncio.sleep(INTERVAL)

    async def _take(self) -> dict[str, Any]:
        service, engine = self._service, self._service.engine
        await service.metrics.update()
        since = max(0, engine.last_step_id - MAX_STEPS)
        limit = MAX_REQUESTS * (10 if service.keys else 1)  # among others' there may be few of whoever looks
        states, requests, steps, stats = await engine.call(
            lambda e: (e.page_states(), e.requests(limit), e.steps_since(since)[-MAX_STEPS:], e.stats())
        )
        config = engine.config
        self._requests = [
            (view, place, service.owners.get(view.request_id, ANYONE))
            for view, place in zip(requests, queue_places(requests))
        ]
        return {
            "status": "draining" if service.is_draining or not engine.is_ready else "ready",
            "uptime": round(time.monotonic() - self._started, 1),
            "engine": {
                "model": service.model_name,
                "root": service.model_root,
                "version": __version__,
                "max_model_len": engine.max_model_len,
                "max_num_seqs": config.max_num_seqs,
                "max_num_batched_tokens": engine.max_num_batched_tokens,
                "page_size": config.page_size,
                "prefix_caching": config.enable_prefix_caching,
            },
            "stats": dataclasses.asdict(stats),
            "pages": page_map(states),
            "steps": _steps(steps),
            "history": _columns(service.metrics.history.view()),
        }


def page_map(states: bytes) -> dict[str, Any]:
    """The states of the first ``num_shown`` pages, ``pages_per_cell`` neighbours a cell; all others are free.

    Pages are handed out from the first, so what is shown grows, by powers of two, with what has been in use. ``counts``
    are of all pages. ``cells``: for each state but free, base64 of a byte a cell: the share of its pages in that state,
    255 being all.
    """
    num_touched = len(states.rstrip(b"\0"))
    num_shown = min(len(states), max(MIN_SHOWN, 1 << (num_touched - 1).bit_length()))
    per_cell = max(1, -(-num_shown // MAX_CELLS))
    starts = range(0, num_shown, per_cell)
    cells = {}
    for state, name in enumerate(PAGE_STATES):
        if state:
            shares = [states.count(state, at, min(at + per_cell, num_shown)) for at in starts]
            sizes = [min(per_cell, num_shown - at) for at in starts]
            cells[name] = b64encode(bytes(n * 255 // size for n, size in zip(shares, sizes))).decode()
    return {
        "num_shown": num_shown,
        "num_cells": len(starts),
        "pages_per_cell": per_cell,
        "counts": {name: states.count(state) for state, name in enumerate(PAGE_STATES)},
        "cells": cells,
    }


def queue_places(views: list[RequestView]) -> list[int | None]:
    """For each of ``views``, those that run before those that wait: its place in the queue from 1, None if it runs."""
    num_running = sum(view.state != "waiting" for view in views)
    return [None if index < num_running else index - num_running + 1 for index in range(len(views))]


def _request(view: RequestView, place: int | None) -> dict[str, Any]:
    return {
        "id": view.request_id,
        "state": view.state,
        "queue_place": place,
        "age": round(view.age, 2),
        "prompt_tokens": view.num_prompt_tokens,
        "cached_tokens": view.num_cached_tokens,
        "computed_tokens": view.num_computed_tokens,
        "output_tokens": view.num_output_tokens,
        "pages": view.num_pages,
        "preemptions": view.num_preemptions,
    }


def _steps(records: list[StepRecord]) -> dict[str, list[float | int]]:
    """Number, rows, tokens and milliseconds of each step but the first, which only tells when the next one began."""
    pairs = list(zip(records, records[1:]))
    return {
        "id": [after.step_id for _, after in pairs],
        "decodes": [after.num_decodes for _, after in pairs],
        "prefills": [after.num_prefills for _, after in pairs],
        "prefill_tokens": [after.num_prefill_tokens for _, after in pairs],
        "milliseconds": [round((after.time - before.time) * 1000, 2) for before, after in pairs],
    }


def _columns(entries: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """A list of numbers a name, rather than names in every entry: a tenth of the bytes."""
    names = entries[0] if entries else ()
    return {name: [_short(entry[name]) for entry in entries] for name in names}


def _short(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value
