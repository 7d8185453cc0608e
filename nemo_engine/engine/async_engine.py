"""``AsyncEngine``: the engine for asyncio programs. One thread runs the steps, any number of event loops consume."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence, Sized
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from uuid import uuid4

from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.engine.base import BaseEngine, check_ids
from nemo_engine.engine.engine_task import EngineTask
from nemo_engine.engine.engine_thread import EngineClosedError, EngineDeadError, EngineSteps, EngineThread, Stream
from nemo_engine.engine.input_processor import EncodedPrompt, InputProcessor, Message, Prompt
from nemo_engine.option_names import refuse_unknown_arguments
from nemo_engine.outputs import RequestOutput, SchedulerStats
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.text import ChatRenderers, Tokenizer

__all__ = ["AsyncEngine", "EngineClosedError", "EngineDeadError"]

_LONG_TEXT = 10_000  # characters; longer prompts are encoded outside the event loop
_MANY_IDS = 100_000  # prompt ids times completions; a request with more is copied outside the event loop

_T = TypeVar("_T")


class AsyncEngine:
    """Serves any number of event loops with one model, in one process and without a child.

    Takes what ``Engine`` takes, and loads the model before it returns: in a running loop, ``await
    asyncio.to_thread(AsyncEngine, model, ...)``. Use it as a context manager (``with`` or ``async with``), or call
    ``close()``; garbage collection and the interpreter's exit close it too. It does not survive a fork. If ``model`` is
    an ``Engine``, the caller may go on using that, and has to close it.
    """

    def __init__(self, model: str | Path | BaseEngine, **options: Any) -> None:
        is_ours = not isinstance(model, BaseEngine)
        engine = model if isinstance(model, BaseEngine) else BaseEngine(model, **options)
        self._run_by(EngineThread(engine, owns=is_ours), engine)

    def _run_by(self, steps: EngineSteps, engine: BaseEngine) -> None:
        self._steps, self._engine = steps, engine
        weakref.finalize(self, self._steps.close)  # a daemon thread inside torch would abort the interpreter's exit

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
    def max_num_batched_tokens(self) -> int:
        """Tokens that a step computes at most."""
        return self._engine.max_num_batched_tokens

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it has one."""
        return self._engine.tokenizer

    @property
    def renderers(self) -> ChatRenderers | None:
        """Turns conversations into prompts; None if the model has no tokenizer."""
        return self._engine.renderers

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        steps = self._steps
        return steps.is_alive and steps.error is None and not (steps.is_draining or steps.is_closing)

    @property
    def error(self) -> EngineDeadError | None:
        """What ended the engine's thread, if something did."""
        return self._steps.error

    @property
    def num_unfinished(self) -> int:
        """Requests that were taken and have not ended."""
        return len(self._steps.streams)

    def stats(self) -> SchedulerStats:
        """Requests and pages after the last step, and totals since the start. Waits for nothing."""
        return self._steps.stats

    @property
    def last_step_id(self) -> int:
        """The last step that was committed; 0 before the first. Waits for nothing."""
        return self._steps.last_step_id

    def num_waiting_of(self, client: str | None) -> int:
        """Completions of ``client``, or of all for None, that wait for a place in the batch. Waits for nothing."""
        return self._steps.num_waiting_of(client)

    def room_for(self, num_prompt_tokens: int) -> int:
        """Tokens that may follow a prompt of that length; ``ValueError`` if there is no room for any."""
        return self._engine.room_for(num_prompt_tokens)

    @property
    def inputs(self) -> InputProcessor:
        """Encodes prompts and conversations and checks parameters, in any thread, for ``generate_encoded``."""
        self._steps.check_alive()
        return self._engine.inputs

    # ---- requests

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        **unknown: Any,
    ) -> AsyncIterator[RequestOutput]:
        """Complete one prompt; yields outputs as ``sampling_params.output_kind`` says, the last one with ``finished``.

        Dropping, closing or cancelling the iterator aborts the request and frees its pages. Outputs that wait to be
        taken are merged. The first ``next`` raises ``ValueError`` for bad input, ``EngineClosedError`` or
        ``EngineDeadError``. If ``request_id`` is None, a random one is made.
        """
        refuse_unknown_arguments(self.generate, unknown)
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
            return prompt, self._engine.chat_params([prompt], sampling_params)[0]

        encoded, params = await asyncio.to_thread(encode)
        async for output in self.generate_encoded(encoded, params, request_id, priority=priority):
            yield output

    async def generate_encoded(
        self,
        prompt: EncodedPrompt,
        params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        client: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """Like ``generate``, for a prompt and parameters that ``inputs`` has already checked.

        Waiting requests of equal priority are taken from each ``client`` in turn.
        """
        if request_id is None:
            request_id = f"req-{uuid4().hex}"
        stream = Stream(self._steps, request_id, asyncio.get_running_loop())
        is_finished = False
        try:
            if params.structured_outputs or params.bad_words or params.n * len(prompt.token_ids) > _MANY_IDS:
                await asyncio.to_thread(self._add, stream, prompt, params, priority, client)
            else:
                self._add(stream, prompt, params, priority, client)
            while not is_finished:
                output = await stream.next()
                is_finished = output.finished
                yield output
        finally:
            if not is_finished:
                self._steps.drop(stream)

    def _add(self, stream: Stream, prompt: EncodedPrompt, params: SamplingParams, priority: int, client: str) -> None:
        request_id = stream.request_id
        if not isinstance(request_id, str) or not request_id:
            raise ValueError(f"request_id must be a non-empty string, got {request_id!r}")
        self._steps.check_open()
        prepared = self._engine.prepare(request_id, prompt, params, params.output_kind, stream, priority, client=client)
        self._steps.add(prepared, stream)

    def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests; their iterators yield a last output with finish reason "abort". Unknown ids are passed over.

        May be called from any thread. If an id is no string, it raises ``ValueError`` and ends nothing.
        """
        ids = check_ids(request_id)
        self._steps.post(lambda: self._engine.abort(ids))

    async def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait until all have ended; those still there after ``timeout`` seconds are aborted.

        Returns whether all ended by themselves. Raises ``EngineDeadError`` if the thread ends by an error meanwhile.
        """
        self._steps.check_alive()
        self._steps.is_draining = True
        is_idle = await self._wait_idle(timeout)
        if not is_idle:
            self.abort(list(self._steps.streams))
            await self._wait_idle(None)
        self._steps.check_alive()
        return is_idle

    async def _wait_idle(self, timeout: float | None) -> bool:
        waiter = self._steps.idle_waiter()
        if waiter is None:
            return True
        done, _ = await asyncio.wait([waiter], timeout=timeout)
        return bool(done)

    async def call(self, function: Callable[[BaseEngine], _T]) -> _T:
        """Run ``function`` on the engine between two steps, in the engine's thread; it must be quick."""
        future: Future[_T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(self._engine))
                except Exception as error:
                    future.set_exception(error)

        self._steps.check_alive()
        self._steps.post(run)
        waiter = asyncio.wrap_future(future)
        while not waiter.done():
            await asyncio.wait([waiter], timeout=1.0)
            if not waiter.done() and not self._steps.is_alive:
                self._steps.check_alive()
                raise EngineClosedError("the engine is closed")
        return waiter.result()

    def close(self) -> None:
        """End all requests ("abort") and the thread, and give all memory back. May be called twice."""
        self._steps.close()

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


def _is_long(prompt: object) -> bool:
    """Whether encoding or checking ``prompt`` would hold up an event loop."""
    if isinstance(prompt, Mapping):
        prompt = prompt.get("prompt_token_ids") or prompt.get("prompt")
    return isinstance(prompt, Sized) and len(prompt) > _LONG_TEXT


def in_event_loop(engine: BaseEngine) -> AsyncEngine:
    """Over an engine whose steps run in the running event loop, which waits while a step is computed.

    That is faster than a thread, for a loop that does nothing else. The caller has to close ``engine``.
    """
    over = AsyncEngine.__new__(AsyncEngine)
    over._run_by(EngineTask(engine), engine)
    return over
