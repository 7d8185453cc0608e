"""``Service``: what all routes share: the engine, the options, the model's names, admission and default parameters."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

from starlette.requests import Request

from nemo_engine.engine.async_engine import AsyncEngine
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.server.clients import ANYONE, Client, KeyRing
from nemo_engine.server.errors import RETRY_AFTER, ApiError
from nemo_engine.server.metrics import Metrics
from nemo_engine.server.options import ServerOptions
from nemo_engine.server.parsing import Workers
from nemo_engine.server.tracing import Tracing
from nemo_engine.text import Renderer, Tokenizer

# Of a checkpoint's generation_config.json, by our names.
_MODEL_DEFAULTS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}

IS_LINE = "nemo_engine.is_line"  # in the scope of a request that is a line of a batch: it has no connection to lose

_T = TypeVar("_T")
_logger = logging.getLogger("nemo_engine.server")


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


class Service:
    """One engine behind one server."""

    def __init__(self, engine: AsyncEngine, options: ServerOptions, model: str) -> None:
        self.engine = engine
        self.options = options
        self.model_names = tuple(options.served_model_name or (model,))
        self.model_root = model
        self.keys = KeyRing(options)
        self.workers = Workers(engine.max_model_len)
        self.metrics = Metrics(engine, options.metrics_prefix, self.model_name)
        self.tracing = Tracing(options.otlp_endpoint)
        self.created = int(time.time())
        self.is_draining = False
        # By client and the id of a response under way: the ids of its requests in the engine; and by these, whose they
        # are.
        self.running: dict[tuple[Client, str], set[str]] = {}
        self.owners: dict[str, Client] = {}
        self.server_defaults = options.sampling_defaults()
        _check_placement(engine, options)
        self.model_defaults = _read_model_defaults(engine)
        if self.model_defaults:
            _logger.warning("sampling defaults of the model's generation_config.json: %s", self.model_defaults)

    @property
    def model_name(self) -> str:
        """The model's name in responses."""
        return self.model_names[0]

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ``ApiError`` if the model has none."""
        tokenizer = self.engine.tokenizer
        if tokenizer is None:
            raise ApiError(400, "this model has no tokenizer: send token ids to /v1/completions")
        return tokenizer

    def renderer(self, chat_template: str | None = None) -> Renderer:
        """What makes prompts of conversations, by the template that a request brings if the server allows it.

        Raises ``ApiError``.
        """
        renderers = self.engine.renderers
        if renderers is None:
            raise ApiError(400, "this model has no tokenizer: send token ids to /v1/completions")
        if chat_template and not self.options.trust_request_chat_template:
            raise ApiError(
                400,
                "chat_template is not taken by this server: it was not started with --trust-request-chat-template",
                param="chat_template",
                code="unsupported_parameter",
            )
        return renderers.of(chat_template or None)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a place in the batch."""
        return max(self.engine.num_waiting_of(None), self.engine.num_unfinished - self.engine.config.max_num_seqs)

    def check_model(self, name: str | None) -> None:
        """404 for another model than this one."""
        if name is not None and name not in self.model_names:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist; this server has {', '.join(self.model_names)}",
                param="model",
                code="model_not_found",
            )

    def client_of(self, http: Request) -> Client:
        """Who asks; nobody in particular where there are no keys."""
        client: Client = http.scope.get("nemo_engine.client", ANYONE)
        return client

    def turn_of(self, http: Request) -> str:
        """With whom the requests of ``http`` take turns: the client, or who the proxy's header names."""
        header = self.options.fairness_header
        return (http.headers.get(header) if header else None) or self.client_of(http).name

    def check_admission(self, num_completions: int, turn: str = "") -> None:
        """503 while the server shuts down, 429 when too many requests wait, 400 for too many completions in one
        request.
        """
        if self.engine.error is not None:
            raise self.engine.error
        if self.is_draining or not self.engine.is_ready:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers=RETRY_AFTER)
        if num_completions > self.options.max_completions:
            raise ApiError(
                400,
                f"n times the number of prompts must be at most {self.options.max_completions}, got {num_completions}",
                param="n",
            )
        if (num_waiting := self.num_waiting) >= self.options.max_queue:
            raise ApiError(
                429,
                f"{num_waiting} requests wait already, and at most {self.options.max_queue} may",
                code="queue_full",
                headers=RETRY_AFTER,
            )
        limit = self.options.max_queue_per_key
        if limit is not None and (num_waiting := self.engine.num_waiting_of(turn)) >= limit:
            raise ApiError(
                429,
                f"{num_waiting} completions of this key wait already, and at most {limit} may",
                code="queue_full",
                headers=RETRY_AFTER,
            )

    def timeout(self, seconds: float | None) -> float | None:
        """Seconds that a request may take: what it asks for, at most what the server allows."""
        limits = [limit for limit in (seconds, self.options.request_timeout) if limit is not None]
        return min(limits, default=None)


async def while_connected(request: Request, work: Awaitable[_T]) -> _T:
    """The result of ``work``, which is cancelled when the client goes away: then ``ClientGone``."""
    if IS_LINE in request.scope:
        return await work
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_placement(engine: AsyncEngine, options: ServerOptions) -> None:
    """``ValueError`` for a placement of system text where that is not ours to choose."""
    renderers = engine.renderers
    if renderers is not None and options.system_placement == "first" and not renderers.default.places_system:
        raise ValueError(f'system_placement "first" is for Mistral\'s own format, and here is {renderers.line()}')


def _read_model_defaults(engine: AsyncEngine) -> dict[str, Any]:
    """What the checkpoint's own file says of sampling.

    ``ValueError`` naming file and field for a value that no request could have.
    """
    path = engine.model_path / "generation_config.json"
    if not path.is_file():
        return {}
    stored = json.loads(path.read_text())
    defaults: dict[str, Any] = {}
    for theirs, ours in _MODEL_DEFAULTS.items():
        value = stored.get(theirs)
        if value is None:
            continue
        if ours in ("top_k", "max_tokens") and isinstance(value, float) and value.is_integer():
            value = int(value)
        try:
            SamplingParams(**{ours: value})
        except ValueError as error:
            raise ValueError(
                f"{path}: {theirs} is no default that requests could have: {error}; correct or remove it"
            ) from None
        defaults[ours] = value
    return defaults
