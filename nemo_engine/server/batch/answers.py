"""Batch files over an engine in this process: each line goes through the route of its url as a request over HTTP would,
without HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from nemo_engine.batch.job import Bar, BatchJob
from nemo_engine.batch.lines import CHAT, COMPLETIONS, RESPONSES, Line, LineError
from nemo_engine.batch.reader import Reader
from nemo_engine.batch.run import Answer, BatchSummary, answer_all
from nemo_engine.engine.async_engine import EngineClosedError, EngineDeadError, in_event_loop
from nemo_engine.engine.base import BaseEngine
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.server.chat import create_chat_completion
from nemo_engine.server.clients import ANYONE, Client
from nemo_engine.server.completions import create_completion
from nemo_engine.server.errors import ApiError, api_error, log_of
from nemo_engine.server.options import ServerOptions
from nemo_engine.server.parsing import Workers, read_json, validated
from nemo_engine.server.protocol import IGNORED_FIELDS_HEADER, ApiRequest, ChatRequest, CompletionRequest
from nemo_engine.server.responses.protocol import ResponsesRequest
from nemo_engine.server.responses.route import create_response
from nemo_engine.server.service import IS_LINE, Service

_ROUTES: dict[str, tuple[type[ApiRequest], Callable[..., Awaitable[Response]]]] = {
    CHAT: (ChatRequest, create_chat_completion),
    COMPLETIONS: (CompletionRequest, create_completion),
    RESPONSES: (ResponsesRequest, create_response),
}
_IN_LINES = (
    "logprobs",
    "prompt_logprobs",
    "logprob_token_ids",
)  # what changes an answer's form is asked for by the line
_ANY_NUMBER = 2**31  # the queue has no limit here: the file says how many requests there are
_WAIT_FOR_ROOM = 0.5  # seconds between two tries while a server's queue is full
_MOST_WARNINGS = 20
_IGNORED = IGNORED_FIELDS_HEADER.lower().encode()  # as it stands in a response

_T = TypeVar("_T")

_logger = logging.getLogger("nemo_engine.server")


class BatchAnswers:
    """Answers lines by the routes of ``service``, as requests of ``client``."""

    def __init__(self, service: Service, client: Client = ANYONE, only_url: str | None = None) -> None:
        self._service = service
        self._client = client
        self._only_url = only_url
        self._ignored: set[bytes] = set()

    @property
    def max_open(self) -> int:
        """The number of open requests that keeps the engine busy while answers are written and lines are read."""
        return 2 * self._service.engine.config.max_num_seqs

    def reader(self, job: BatchJob) -> Reader:
        """The requests of ``job``, as this server reads them."""
        return job.reader(
            self._read_json, self._service.engine.model_config.vocab_size, int(self._service.options.max_request_mib *
            2**20)
        )  # fmt: skip

    async def answer(self, line: Line) -> Answer:
        """The answer to one line, an error if it is the line's.

        A dead or closed engine raises, which ends the run.
        """
        model, route = _ROUTES[line.url]
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": line.url, "headers": [], "query_string": b"",
                                 "nemo_engine.client": self._client, IS_LINE: True}  # fmt: skip
        while True:
            try:
                self._check(line)
                request = validated(line.body, model)
                response = await route(self._service, Request(scope), request)
            except (EngineDeadError, EngineClosedError):
                raise
            except Exception as raised:
                error = api_error(raised)
                if error.code == "shutting_down":
                    raise EngineClosedError(error.message) from None
                if error.code != "queue_full":
                    return _failed(scope, error)
                await asyncio.sleep(_WAIT_FOR_ROOM)
            else:
                self._warn(dict(response.raw_headers).get(_IGNORED), line.number)
                return _answered(scope, response)

    def _check(self, line: Line) -> None:
        if self._only_url is not None and line.url != self._only_url:
            raise ApiError(
                400,
                f"url must be the batch's endpoint, {self._only_url}, got {line.url}",
                param="url",
                code="mismatched_endpoint",
            )
        if line.body.get("stream"):
            raise ApiError(400, "stream must be false in a batch: an answer is one line", param="stream")

    def _warn(self, ignored: bytes | None, number: int) -> None:
        """Say once which fields had no effect."""
        if ignored and ignored not in self._ignored and len(self._ignored) < _MOST_WARNINGS:
            self._ignored.add(ignored)
            _logger.warning(
                "line %d: these fields had no effect, here and wherever else they stand: %s", number, ignored.decode()
            )

    def _read_json(self, data: bytes) -> Any:
        try:
            return read_json(data, self._service.workers.max_values)
        except ApiError as error:
            raise LineError(error.code or "invalid_json", error.message.replace("the body", "the line")) from None


def _answered(scope: dict[str, Any], response: Response) -> Answer:
    log = log_of(scope)
    return Answer(
        response.status_code,
        log["id"],
        bytes(response.body),
        None,
        log.get("prompt_tokens", 0),
        log.get("cached_tokens", 0),
        log.get("output_tokens", 0),
    )


def _failed(scope: dict[str, Any], error: ApiError) -> Answer:
    body = error.body()
    code = error.code or body["error"]["type"]
    return Answer(
        error.status, log_of(scope).get("id", ""), json.dumps(body).encode(), (code, body["error"]["message"])
    )


def batch_options(
    model: str, sampling: Mapping[str, Any], engine: Mapping[str, Any], server: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of a run, in the form that OUT.run keeps.

    Raises ``ValueError`` for sampling parameters that only a line may have.
    """
    for name in _IN_LINES:
        if sampling.get(name) is not None:
            raise ValueError(f"{name} must stand in the lines that ask for it: it changes the form of their answers")
    SamplingParams(**sampling)
    return {"model": model} | {
        name: value if isinstance(value, (str, int, float, type(None))) else json.loads(json.dumps(value, default=str))
        for name, value in sorted({**engine, **server, **sampling}.items())
    }


def run_batch(
    model: str,
    job: BatchJob,
    sampling: Mapping[str, Any],
    engine_options: Mapping[str, Any],
    server_options: Mapping[str, Any],
) -> BatchSummary:
    """Load ``model`` and answer the lines of ``job``."""
    options = ServerOptions(**{"max_queue": _ANY_NUMBER, **server_options})
    with BaseEngine(model, **engine_options) as engine:
        return _run(engine, options, model, job, sampling, progress=True)


def batch_of_engine(
    engine: BaseEngine,
    source: str | Path,
    target: str | Path,
    sampling_params: SamplingParams | Mapping[str, Any] | None,
    *,
    names: str | Sequence[str] | None,
    force: bool,
    progress: bool,
) -> BatchSummary:
    """``Engine.batch``."""
    sampling = _set_fields(sampling_params)
    model = str(engine.model_path)
    served_names = [names] if isinstance(names, str) else list(names or [])
    engine_options = {
        field.name: getattr(engine.config, field.name)
        for field in dataclasses.fields(engine.config)
        if getattr(engine.config, field.name) != field.default
    }
    recorded = batch_options(
        model, sampling, engine_options, {"served_model_name": served_names} if served_names else {}
    )
    options = ServerOptions(max_queue=_ANY_NUMBER, served_model_name=served_names or [engine.model_path.name, model])
    with BatchJob(source, target, recorded, force=force) as job:
        return _run(engine, options, model, job, sampling, progress=progress)


def _set_fields(params: SamplingParams | Mapping[str, Any] | None) -> dict[str, Any]:
    if params is None or isinstance(params, Mapping):
        return dict(params or {})
    default = SamplingParams()
    names = (field.name for field in dataclasses.fields(params) if field.name != "output_kind")
    return {name: getattr(params, name) for name in names if getattr(params, name) != getattr(default, name)}


def _run(
    engine: BaseEngine,
    options: ServerOptions,
    model: str,
    job: BatchJob,
    sampling: Mapping[str, Any],
    *,
    progress: bool,
) -> BatchSummary:
    async def run(bar: Bar | None) -> BatchSummary:
        with in_event_loop(engine) as steps:
            service = Service(steps, options, model)
            service.workers = _NoWorkers(engine.max_model_len)
            service.server_defaults |= sampling
            answers = BatchAnswers(service)
            return await answer_all(
                answers.reader(job), job.results, answers.answer, max_open=answers.max_open, watcher=bar
            )

    with _shown(job, progress) as bar:
        return _finished(run(bar))


class _NoWorkers(Workers):
    """Work is done where it is asked for: nobody waits beside, and a thread would take its turns from the steps."""

    async def run(self, http: Request, function: Callable[..., _T], *args: Any) -> _T:
        """Call ``function(*args)``."""
        return function(*args)


def _finished(work: Coroutine[Any, Any, BatchSummary]) -> BatchSummary:
    """Run ``work`` and return its result, even if this thread runs an event loop already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as beside:
        return beside.submit(asyncio.run, work).result()


@contextlib.contextmanager
def _shown(job: BatchJob, progress: bool) -> Iterator[Bar | None]:
    if not progress:
        yield None
        return
    bar = Bar(job)
    try:
        yield bar
    finally:
        bar.close()
