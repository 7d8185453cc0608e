"""What runs an engine's steps for event loops, with its inbox and the streams of outputs: ``EngineThread``, or
``engine_task.EngineTask`` in the event loop itself.

Requests come in through an inbox that is emptied between two steps. Outputs wait, merged into one, until the event loop
takes them: a slow consumer holds up nobody, and at most one output waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Any

from nemo_engine.engine.base import FORKED, BaseEngine, PreparedRequest
from nemo_engine.outputs import RequestOutput, SchedulerStats
from nemo_engine.sampling_params import RequestOutputKind

_logger = logging.getLogger("nemo_engine")


class EngineDeadError(RuntimeError):
    """An error has ended the engine's thread; it is the cause of this one.

    Nothing can be asked of the engine any more.
    """


class EngineClosedError(RuntimeError):
    """The engine was closed or is being drained, and takes no requests."""


class Stream:
    """The outputs of one request on their way from the engine's steps to one event loop. At most one waits, merged."""

    __slots__ = ("_error", "_is_woken", "_lock", "_pending", "_steps", "_waiter", "is_dropped", "loop", "request_id")

    def __init__(self, steps: EngineSteps, request_id: str, loop: asyncio.AbstractEventLoop) -> None:
        self.request_id = request_id
        self.loop = loop
        self.is_dropped = False  # its consumer has gone; written under the lock of the condition of the steps
        self._steps = steps
        self._lock = threading.Lock()
        self._pending: RequestOutput | None = None
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._is_woken = False

    def append(self, output: RequestOutput) -> None:
        """Between steps: add an output to what waits."""
        with self._lock:
            waiting = self._pending
            self._pending = output if waiting is None else _merged(waiting, output)
        self._wake()
        if output.finished:
            self._steps.ended(self)

    def fail(self, error: BaseException) -> None:
        """Between steps: end the stream with ``error``, after the output that waits."""
        with self._lock:
            self._error = error
        self._wake()
        self._steps.ended(self)

    def _wake(self) -> None:
        if not self._is_woken:
            self._is_woken = True
            self._steps.wake_later(self)

    def wake(self) -> None:
        """Event loop: let ``next`` look for an output."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> RequestOutput:
        """Event loop: wait for an output and take it; raises the error that ended the stream."""
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
            # An output may have come before the waiter was there, so that its wake-up found none: look again.
            if self._pending is None and self._error is None:
                await self._waiter
            self._waiter = None


class EngineSteps(ABC):
    """The steps of ``engine``, run while there is something to do."""

    def __init__(self, engine: BaseEngine) -> None:
        self.streams: dict[str, Stream] = {}  # unfinished requests; written under the condition's lock
        self.is_draining = False
        self.is_closing = False
        self.error: EngineDeadError | None = None
        self._engine = engine
        self._condition = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._num_arriving: Counter[str | None] = Counter()  # completions in the inbox, by client
        self._idle_waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """Whether steps are run, in this process."""

    @property
    @abstractmethod
    def stats(self) -> SchedulerStats:
        """Requests and pages after the last step, and totals since the start."""

    @property
    @abstractmethod
    def last_step_id(self) -> int:
        """The last step that was committed; 0 before the first."""

    @abstractmethod
    def close(self) -> None:
        """End all requests ("abort") and run no more steps. May be called twice."""

    @abstractmethod
    def wake_later(self, stream: Stream) -> None:
        """After this step, wake the consumer of ``stream``."""

    @abstractmethod
    def _notify(self) -> None:
        """Something is in the inbox. The condition's lock is held."""

    def check_open(self) -> None:
        """Raise ``EngineDeadError`` or ``EngineClosedError`` if no requests are taken."""
        self.check_alive()
        if self.is_closing:
            raise EngineClosedError("the engine is closed")
        if self.is_draining:
            raise EngineClosedError("the engine is being drained and takes no more requests")

    def check_alive(self) -> None:
        """Raise ``EngineDeadError`` if an error has ended the steps, ``EngineClosedError`` in a forked process, to
        which no thread comes along.
        """
        if self.error is not None:
            raise EngineDeadError(str(self.error)) from self.error.__cause__
        if not self.is_alive and not self.is_closing:
            raise EngineClosedError(FORKED)

    def add(self, prepared: PreparedRequest, stream: Stream) -> None:
        """Queue a request whose outputs go to ``stream``, unless that was dropped. ``ValueError`` if its id is in use.

        May be called from any thread.
        """
        request_id = stream.request_id
        with self._condition:
            self.check_open()
            if stream.is_dropped:
                return
            if request_id in self.streams:
                raise ValueError(f"request_id {request_id!r} is in use by an unfinished request")
            self.streams[request_id] = stream
            client, count = _client_of(prepared)
            self._num_arriving[client] += count
            self._inbox.append(lambda: self._submit(prepared, stream))
            self._notify()

    def num_waiting_of(self, client: str | None) -> int:
        """Completions of ``client`` that wait for a place in the batch; for None, of all but the inbox's. From any
        thread.
        """
        return self._num_arriving[client] + self._engine.num_waiting_of(client)

    def drop(self, stream: Stream) -> None:
        """End the request of ``stream``, whose consumer has gone, even if it is not added yet. From any thread."""
        with self._condition:
            stream.is_dropped = True
            self._inbox.append(lambda: self._abort(stream))
            self._notify()

    def post(self, command: Callable[[], None]) -> None:
        """Have ``command`` run between two steps. What it raises ends the steps. From any thread."""
        with self._condition:
            self._inbox.append(command)
            self._notify()

    def idle_waiter(self) -> asyncio.Future[None] | None:
        """A future of the running loop that is done when no request is left; None if no request is there now."""
        loop = asyncio.get_running_loop()
        with self._condition:
            if not self.streams or self.error is not None:
                return None
            waiter = loop.create_future()
            self._idle_waiters.append((loop, waiter))
        return waiter

    # ---- between steps

    def _advance(self) -> None:
        try:
            self._engine.advance()
        except Exception:
            if self._engine.is_dead:
                raise
            _logger.exception("a step failed; the requests that were running end with it")

    def _run_commands(self) -> None:
        with self._condition:
            commands, self._inbox = self._inbox, []
        for command in commands:
            command()

    def _submit(self, prepared: PreparedRequest, stream: Stream) -> None:
        client, count = _client_of(prepared)
        try:
            self._engine.submit(prepared)
        except Exception as error:
            stream.fail(error)
        with self._condition:
            self._num_arriving[client] -= count
            if not self._num_arriving[client]:
                del self._num_arriving[client]

    def _abort(self, stream: Stream) -> None:
        if self.streams.get(stream.request_id) is stream:  # not another request that has its id by now
            self._engine.abort(stream.request_id)

    def ended(self, stream: Stream) -> None:
        """The last output of a request has come."""
        with self._condition:
            self.streams.pop(stream.request_id, None)
            if not self.streams:
                for loop, waiter in self._idle_waiters:
                    call_in(loop, _resolve, waiter)
                self._idle_waiters.clear()

    def _die(self, error: BaseException) -> None:
        _logger.critical("the engine has ended by an error", exc_info=error)
        dead = EngineDeadError(f"the engine has ended by an error: {type(error).__name__}: {error}")
        dead.__cause__ = error
        with self._condition:
            self.error = dead
            streams = list(self.streams.values())
        for stream in streams:
            stream.fail(dead)


class EngineThread(EngineSteps):
    """Runs the steps of ``engine`` in a thread, which sleeps while there is nothing to do.

    owns: whether the engine is this thread's alone, which closes it at the end; otherwise other threads may use it.
    """

    def __init__(self, engine: BaseEngine, *, owns: bool) -> None:
        super().__init__(engine)
        self._owns = owns
        self._stats, self._last_step_id = engine.stats(), 0
        self._to_wake: dict[asyncio.AbstractEventLoop, list[Stream]] = {}  # used by the engine's thread alone
        self._is_ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nemo-engine", daemon=True)
        self._thread.start()
        try:
            self._is_ready.wait()
        except BaseException:  # an interrupt
            self.close()
            raise
        self.check_alive()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs, in this process."""
        return self._thread.is_alive()

    @property
    def stats(self) -> SchedulerStats:
        """Requests and pages after the last step, and totals since the start. Waits for nothing."""
        return self._stats

    @property
    def last_step_id(self) -> int:
        """The last step that was committed; 0 before the first. Waits for nothing."""
        return self._last_step_id

    def close(self) -> None:
        """End all requests ("abort"), then the thread, and give the engine's memory back. May be called twice."""
        if not self.is_alive:  # after a fork the lock may be held for ever
            self.is_closing = True
            return
        with self._condition:
            self.is_closing = True
            self._notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def wake_later(self, stream: Stream) -> None:
        """After this step, wake the consumer of ``stream``."""
        self._to_wake.setdefault(stream.loop, []).append(stream)

    def _notify(self) -> None:
        self._condition.notify()

    # ---- in the thread

    def _run(self) -> None:
        engine = self._engine
        try:
            if self._owns:
                engine.settle()
            self._is_ready.set()
            is_closing = False
            while not is_closing:
                with self._condition:
                    while not (self._inbox or self.is_closing or engine.has_work()):
                        self._condition.wait()
                    is_closing = self.is_closing  # from here on the inbox takes no request
                self._run_commands()
                if not is_closing and engine.has_work():
                    self._advance()
                self._stats, self._last_step_id = engine.stats(), engine.last_step_id
                self._wake_all()
            engine.abort(list(self.streams))
        except BaseException as error:
            self._die(error)
            self._is_ready.set()
        finally:
            self._wake_all()
            try:
                if self._owns:
                    engine.close()
            except Exception:
                _logger.exception("the engine could not be closed")
            self._stats = engine.stats()

    def _wake_all(self) -> None:
        if self._to_wake:
            to_wake, self._to_wake = self._to_wake, {}
            for loop, streams in to_wake.items():
                if not call_in(loop, _wake_streams, streams):  # the loop was closed with requests under way
                    for stream in streams:
                        self._abort(stream)


def _client_of(prepared: PreparedRequest) -> tuple[str, int]:
    """(client, number of completions) of a request."""
    completions = prepared.user.completions
    return completions[0].request.client, len(completions)


def _merged(earlier: RequestOutput, later: RequestOutput) -> RequestOutput:
    """One output that says what two say together, for a consumer that took neither yet."""
    params = later.sampling_params
    if params is None or params.output_kind is not RequestOutputKind.DELTA:
        return later
    by_index = {output.index: output for output in earlier.outputs}
    for new in later.outputs:
        old = by_index.get(new.index)
        if old is not None:
            new.text = old.text + new.text
            old.token_ids.extend(new.token_ids)
            new.token_ids = old.token_ids
            if old.logprobs is not None and new.logprobs is not None:
                old.logprobs.extend(new.logprobs)
                new.logprobs = old.logprobs
        by_index[new.index] = new
    later.outputs = [by_index[index] for index in sorted(by_index)]
    return later


def call_in(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: Any) -> bool:
    """Have ``loop`` call ``function``, from any thread; False if it is closed."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        return False
    return True


def _wake_streams(streams: list[Stream]) -> None:
    for stream in streams:
        stream.wake()


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
