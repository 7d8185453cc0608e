"""``answer_all``: has the requests of a reader answered, a bounded number at a time, and records the results."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from nemo_engine.batch.lines import Line
from nemo_engine.batch.reader import BadLine, Reader
from nemo_engine.batch.results import Results, head


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a route: its status, and the body as one line of JSON. ``error``: (code, message) of an error."""

    status: int
    request_id: str
    body: bytes
    error: tuple[str, str] | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0


@dataclass(slots=True)
class BatchSummary:
    """The numbers of a run.

    ``num_resumed``: lines that were done before it. The counts of tokens, and the seconds, are this run's alone.
    """

    num_answered: int = 0
    num_failed: int = 0
    num_resumed: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    seconds: float = 0.0
    _start: float = field(default_factory=time.monotonic, repr=False)

    @property
    def num_done(self) -> int:
        """Lines that are done, in this run and before."""
        return self.num_answered + self.num_failed + self.num_resumed

    def note(self, answer: Answer | None) -> None:
        """Count a line that is done; None stands for a line that was no request."""
        if answer is None or answer.error is not None:
            self.num_failed += 1
        else:
            self.num_answered += 1
        if answer is not None:
            self.num_prompt_tokens += answer.num_prompt_tokens
            self.num_cached_tokens += answer.num_cached_tokens
            self.num_output_tokens += answer.num_output_tokens
        self.seconds = time.monotonic() - self._start

    def __str__(self) -> str:
        parts = [f"{self.num_answered} answered", f"{self.num_failed} failed"]
        if self.num_resumed:
            parts.append(f"{self.num_resumed} done before")
        if self.num_output_tokens and self.seconds:
            parts.append(f"{self.num_output_tokens / self.seconds:.0f} tokens/s")
        if self.num_prompt_tokens:
            share = 100 * self.num_cached_tokens / self.num_prompt_tokens
            parts.append(f"{share:.1f} % of {self.num_prompt_tokens} prompt tokens from the prefix cache")
        return f"{', '.join(parts)}, {self.seconds:.1f} s"


class Watcher(Protocol):
    """An object that is told of every line that is done."""

    def update(self, summary: BatchSummary) -> None:
        """One more line is done."""


async def answer_all(
    reader: Reader,
    results: Results,
    answer: Callable[[Line], Awaitable[Answer]],
    *,
    max_open: int,
    watcher: Watcher | None = None,
) -> BatchSummary:
    """Answer the requests that are not done.

    At most ``max_open`` requests are open at a time, and two windows of so many lines are in memory.

    ``answer`` returns an error of the request as an answer. An exception of ``answer`` or of ``results`` ends the run.
    """
    summary = BatchSummary(num_resumed=results.num_resumed)
    feed = _Feed(reader, max_open)

    async def work() -> None:
        while (line := await feed.next()) is not None:
            if isinstance(line, BadLine):
                results.failed(line.number, failure(line.number, line.custom_id, line.code, line.message, None))
                summary.note(None)
            else:
                answered = await answer(line)
                if answered.error is None:
                    results.answered(line.number, success(line, answered))
                else:
                    results.failed(line.number, failure(line.number, line.custom_id, *answered.error, answered))
                summary.note(answered)
            if watcher is not None:
                watcher.update(summary)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(max_open):
                group.create_task(work())
        feed.check()
    except BaseExceptionGroup as errors:
        raise _first(errors) from None
    finally:
        await feed.close()
    return summary


class _Feed:
    """Lines in the order of their windows; the next window is read while the previous one is answered."""

    def __init__(self, reader: Reader, size: int) -> None:
        self._reader = reader
        self._size = size
        self._thread = ThreadPoolExecutor(1, "batch-reader")
        self._lines: deque[Line | BadLine] = deque()
        self._coming = self._read()

    async def next(self) -> Line | BadLine | None:
        """The next line; None at the end."""
        while not self._lines:
            coming = self._coming
            await self._has_come.wait()  # all who wait go on together, and the first takes the window
            if self._coming is coming:
                if coming.exception() is not None or not coming.result():
                    return None
                self._lines.extend(coming.result())
                self._coming = self._read()
        return self._lines.popleft()

    def check(self) -> None:
        """At the end: raise what has made an end of reading."""
        self._coming.result()

    def _read(self) -> asyncio.Future[list[Line | BadLine]]:
        self._has_come = has_come = asyncio.Event()
        coming = asyncio.get_running_loop().run_in_executor(self._thread, self._reader.window, self._size)
        coming.add_done_callback(lambda _: has_come.set())
        return coming

    async def close(self) -> None:
        """Wait for the window that is being read, but not for a slow pipe."""
        self._reader.stop()
        await asyncio.gather(self._coming, return_exceptions=True)
        self._thread.shutdown(wait=False)  # it has nothing left to do


def success(line: Line, answer: Answer) -> bytes:
    """The line of an answer in the form of OpenAI's batches."""
    return head(line.number, line.custom_id) + b',"response":%s,"error":null}\n' % _response(answer)


def failure(number: int, custom_id: str | None, code: str, message: str, answer: Answer | None) -> bytes:
    """The line of a failure, with the number of the request's line and the reason."""
    error: dict[str, Any] = {"code": code, "message": message}
    response = b"null" if answer is None else _response(answer)
    return head(number, custom_id) + b',"line":%d,"response":%s,"error":%s}\n' % (
        number,
        response,
        json.dumps(error).encode(),
    )


def _response(answer: Answer) -> bytes:
    request_id = json.dumps(answer.request_id).encode()
    return b'{"status_code":%d,"request_id":%s,"body":%s}' % (answer.status, request_id, answer.body)


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
