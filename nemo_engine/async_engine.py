"""``AsyncEngine``: the engine for asyncio programs. One thread of this process runs the steps; event loops consume.

Owns that thread and the way to and from it. Requests are checked and encoded by the caller, queued through an inbox that the
thread empties between two steps, and their outputs wait, merged, until they are taken: so a slow consumer holds up nobody,
and what waits for it is never more than one output.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence, Sized
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from uuid import uuid4

from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.engine import Engine, PreparedRequest
from nemo_engine.inputs import EncodedPrompt, InputProcessor, Message, Prompt
from nemo_engine.outputs import RequestOutput
from nemo_engine.sampling_params import RequestOutputKind, SamplingParams
from nemo_engine.scheduler import SchedulerStats
from nemo_engine.text import Tokenizer

_LONG_TEXT = 10_000  # characters; longer prompts are encoded outside the event loop

_T = TypeVar("_T")
_logger = logging.getLogger("nemo_engine")


class EngineDeadError(RuntimeError):
    """The engine's thread has ended by an error, which is the cause of this one. Nothing can be asked of the engine any more."""


class EngineClosedError(RuntimeError):
    """The engine was closed or is being drained, and takes no requests."""


class _Stream:
    """The outputs of one request on their way from the engine's thread to one event loop. At most one waits, merged."""

    __slots__ = ("_engine", "_error", "_is_woken", "_lock", "_pending", "_waiter", "loop", "request_id")

    def __init__(self, engine: AsyncEngine, request_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id = request_id
        self.loop = loop
        self._engine = engine
        self._lock = threading.Lock()
        self._pending: RequestOutput | None = None
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_woken = False

    def append(self, output: RequestOutput) -> None:
        """Engine's thread: add an output to what waits."""
        with self._lock:
            before = self._pending
            self._pending = output if before is None else _merged(before, output)
        self._wake()
        if output.finished:
            self._engine._ended(self)

    def fail(self, error: BaseException) -> None:
        """Engine's thread: there will be no output any more."""
        with self._lock:
            self._error = error
        self._wake()
        self._engine._ended(self)

    def _wake(self) -> None:
        if not self._is_woken:
            self._is_woken = True
            self._engine._to_wake.setdefault(self.loop, []).append(self)

    def wake(self) -> None:
        """Event loop: something waits."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> RequestOutput:
        """Event loop: what waits, as soon as something does."""
        while True:
            with self._lock:
                output, self._pending = self._pending, None
                self._is_woken = False
                error = self._error
            if output is not None:
                return output
            if error is not None:
                raise error
            self._waiter = self.loop.create_future()
            # Between the look and the waiter something may have come, whose wake-up found no waiter.
            if self._pending is None and self._error is None:
                await self._waiter
            self._waiter = None


class AsyncEngine:
    """Serves any number of event loops with one model, in one process and without a child.

    Takes what ``Engine`` takes, and loads the model before it returns: in a running loop, ``await asyncio.to_thread(AsyncEngine,
    model, ...)``. Use it as a context manager (``with`` or ``async with``), or call ``close()``.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self._engine = Engine(model, **options)
        self._condition = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._streams: dict[str, _Stream] = {}  # written under the condition's lock
        self._to_wake: dict[asyncio.AbstractEventLoop, list[_Stream]] = {}  # engine's thread only
        self._idle: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._stats = self._engine.stats()
        self._is_draining = False
        self._is_closing = False
        self._error: EngineDeadError | None = None
        self._thread = threading.Thread(target=self._run, name="nemo-engine", daemon=True)
        self._thread.start()

    # ---- facts

    @property
    def config(self) -> EngineConfig:
        """The options that the engine was made with."""
        return self._engine.config

    @property
    def model_config(self) -> ModelConfig:
        """The model's shape."""
        return self._engine.model_config

    @property
    def model_path(self) -> Path:
        """Where the checkpoint lies."""
        return self._engine.model_path

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together that a request may have."""
        return self._engine.max_model_len

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it has one."""
        return self._engine.tokenizer

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._error is None and not (self._is_draining or self._is_closing)

    @property
    def error(self) -> EngineDeadError | None:
        """What ended the engine's thread, if something did."""
        return self._error

    @property
    def num_unfinished(self) -> int:
        """Requests that were taken and have not ended."""
        return len(self._streams)

    def stats(self) -> SchedulerStats:
        """Requests and pages after the last step, and totals since the start. Waits for nothing."""
        return self._stats

    def room_for(self, num_prompt_tokens: int) -> int:
        """Tokens that a request may generate after a prompt of that length; ``ValueError`` if there is no room for one."""
        return self._engine.room_for(num_prompt_tokens)

    @property
    def inputs(self) -> InputProcessor:
        """Encodes prompts and conversations and checks parameters, in any thread, for ``generate_encoded``."""
        return self._engine.inputs

    # ---- requests

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Complete one prompt; yields outputs as ``sampling_params.output_kind`` says, the last one with ``finished``.

        Dropping, closing or cancelling the iterator aborts the request and frees its pages. Outputs that are not taken are merged.
        The first ``next`` raises ``ValueError`` for bad input, ``EngineClosedError`` or ``EngineDeadError``. ``request_id`` None makes
        one up.
        """
        inputs = self.inputs

        def encode() -> tuple[EncodedPrompt, SamplingParams]:
            return inputs.encode(prompt), inputs.effective_params(sampling_params)

        encoded, params = await asyncio.to_thread(encode) if _is_long(prompt) else encode()
        async for output in self.generate_encoded(encoded, params, request_id, priority=priority):
            yield output

    async def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        **options: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Answer one conversation, as ``generate`` does a prompt; ``options`` are those of ``Engine.chat``."""
        inputs = self.inputs

        def encode() -> tuple[EncodedPrompt, SamplingParams]:
            (prompt,) = inputs.encode_conversations([messages], **options)
            return prompt, inputs.effective_params(sampling_params, is_chat=True)

        encoded, params = await asyncio.to_thread(encode)
        async for output in self.generate_encoded(encoded, params, request_id, priority=priority):
            yield output

    async def generate_encoded(
        self, prompt: EncodedPrompt, params: SamplingParams, request_id: str | None = None, *, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """As ``generate``, for a prompt and parameters that have been through ``inputs`` already."""
        if request_id is None:
            request_id = f"req-{uuid4().hex}"
        stream = _Stream(self, request_id, asyncio.get_running_loop())
        if params.structured_outputs is None:
            self._add(stream, prompt, params, priority)
        else:  # its grammar may have to be compiled
            await asyncio.to_thread(self._add, stream, prompt, params, priority)
        is_finished = False
        try:
            while not is_finished:
                output = await stream.next()
                is_finished = output.finished
                yield output
        finally:
            if not is_finished:
                self.abort(stream.request_id)

    def _add(self, stream: _Stream, prompt: EncodedPrompt, params: SamplingParams, priority: int) -> None:
        request_id = stream.request_id
        if not isinstance(request_id, str) or not request_id:
            raise ValueError(f"request_id must be a non-empty string, got {request_id!r}")
        self._check_open()
        prepared = self._engine.prepare(request_id, prompt, params, params.output_kind, stream, priority)
        with self._condition:
            self._check_open()
            if request_id in self._streams:
                raise ValueError(f"request_id {request_id!r} is in use by an unfinished request")
            self._streams[request_id] = stream
            self._inbox.append(lambda: self._submit(prepared, stream))
            self._condition.notify()

    def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests, whose iterators then yield what they had as "abort"; unknown ids are passed over. From any thread."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        self._post(lambda: self._engine.abort(ids))

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait until all have ended; those still there after ``timeout`` seconds are aborted.

        Returns whether all ended by themselves.
        """
        self._is_draining = True
        is_idle = await self._wait_idle(timeout)
        if not is_idle:
            self.abort(list(self._streams))
            await self._wait_idle(None)
        return is_idle

    async def _wait_idle(self, timeout: float | None) -> bool:
        loop = asyncio.get_running_loop()
        with self._condition:
            if not self._streams or self._error is not None:
                return True
            waiter = loop.create_future()
            self._idle.append((loop, waiter))
        done, _ = await asyncio.wait([waiter], timeout=timeout)
        return bool(done)

    async def call(self, function: Callable[[Engine], _T]) -> _T:
        """Run ``function`` on the engine between two steps, in its thread; for a look at its state. It must be quick."""
        done: Future[_T] = Future()

        def run() -> None:
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(function(self._engine))
                except Exception as error:
                    done.set_exception(error)

        self._check_alive()
        self._post(run)
        waiter = asyncio.wrap_future(done)
        while not waiter.done():
            await asyncio.wait([waiter], timeout=1.0)
            if not waiter.done() and not self._thread.is_alive():
                self._check_alive()
                raise EngineClosedError("the engine is closed")
        return waiter.result()

    def close(self) -> None:
        """End all requests ("abort") and the thread, and give all memory back. May be called twice."""
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> AsyncEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    # ---- the engine's thread

    def _run(self) -> None:
        engine = self._engine
        try:
            while True:
                with self._condition:
                    while not (self._inbox or self._is_closing or engine.has_unfinished_requests()):
                        self._condition.wait()
                    commands, self._inbox = self._inbox, []
                    is_closing = self._is_closing
                for command in commands:
                    command()
                if is_closing:
                    break
                if engine.has_unfinished_requests():
                    engine.advance()
                self._stats = engine.stats()
                self._wake_all()
            engine.abort(list(self._streams))
        except BaseException as error:
            _logger.critical("the engine's thread has ended by an error", exc_info=error)
            self._die(error)
        finally:
            self._close_engine()

    def _submit(self, prepared: PreparedRequest, stream: _Stream) -> None:
        try:
            self._engine.submit(prepared)
        except Exception as error:
            stream.fail(error)

    def _ended(self, stream: _Stream) -> None:
        with self._condition:
            self._streams.pop(stream.request_id, None)
            if not self._streams:
                for loop, waiter in self._idle:
                    _call_in(loop, _resolve, waiter)
                self._idle.clear()

    def _wake_all(self) -> None:
        if self._to_wake:
            to_wake, self._to_wake = self._to_wake, {}
            for loop, streams in to_wake.items():
                if not _call_in(loop, _wake_streams, streams):  # the loop was closed with requests under way
                    self._engine.abort([stream.request_id for stream in streams])

    def _die(self, error: BaseException) -> None:
        dead = EngineDeadError(f"the engine's thread has ended by an error: {type(error).__name__}: {error}")
        dead.__cause__ = error
        with self._condition:
            self._error = dead
            streams = list(self._streams.values())
        for stream in streams:
            stream.fail(dead)

    def _close_engine(self) -> None:
        self._wake_all()
        try:
            self._engine.close()
        except Exception:
            _logger.exception("the engine could not be closed")
        self._stats = self._engine.stats()

    def _post(self, command: Callable[[], None]) -> None:
        with self._condition:
            self._inbox.append(command)
            self._condition.notify()

    def _check_alive(self) -> None:
        if self._error is not None:
            raise EngineDeadError(str(self._error)) from self._error.__cause__

    def _check_open(self) -> None:
        self._check_alive()
        if self._is_closing:
            raise EngineClosedError("the engine is closed")
        if self._is_draining:
            raise EngineClosedError("the engine is being drained and takes no more requests")


def _is_long(prompt: object) -> bool:
    """Whether encoding or checking ``prompt`` would hold up an event loop."""
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt_token_ids") or prompt.get("prompt")
    return isinstance(prompt, Sized) and len(prompt) > _LONG_TEXT


def _merged(before: RequestOutput, after: RequestOutput) -> RequestOutput:
    """One output in the place of two that were not taken in between."""
    params = after.sampling_params
    if params is None or params.output_kind is not RequestOutputKind.DELTA:
        return after
    by_index = {output.index: output for output in before.outputs}
    for new in after.outputs:
        old = by_index.get(new.index)
        if old is not None:
            new.text = old.text + new.text
            old.token_ids.extend(new.token_ids)
            new.token_ids = old.token_ids
            if old.logprobs is not None and new.logprobs is not None:
                old.logprobs.extend(new.logprobs)
                new.logprobs = old.logprobs
        by_index[new.index] = new
    after.outputs = [by_index[index] for index in sorted(by_index)]
    return after


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[[Any], None], argument: object) -> bool:
    try:
        loop.call_soon_threadsafe(function, argument)
    except RuntimeError:
        return False
    return True


def _wake_streams(streams: list[_Stream]) -> None:
    for stream in streams:
        stream.wake()


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
