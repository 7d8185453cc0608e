"""``answer_all``: the requests of a reader, a bounded number at a time, through a function that answers one, into
results.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from nemo_engine.batch.lines import Line
from nemo_engine.batch.reader import BadLine, Reader
from nemo_engine.batch.results import Results, head


@dataclass(frozen=True, slots=True)
class Answer:
    """What a route answers: its status, and the body as one line of JSON. ``error``: (code, message) if it is one."""

    status: int
    request_id: str
    body: bytes
    error: tuple[str, str] | None = None
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0


@dataclass(slots=True)
class BatchSummary:
    """What a run did.

    ``num_resumed``: lines that were done before it; the counts of tokens, and the seconds, are this run's alone.
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
        """Count a line that is done; None is one that was no request."""
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
    """Whoever is told of every line that is done."""

    def update(self, summary: BatchSummary) -> None:
        """One more is."""


async def answer_all(
    reader: Reader,
    results: Results,
    answer: Callable[[Line], Awaitable[Answer]],
    *,
    max_open: int,
    watcher: Watcher | None = None,
) -> BatchSummary:
    """Answer what is not done.

    At most ``max_open`` requests are open at a time, and two windows of so many lines are held.

    ``answer`` returns errors that are the request's as answers; what it raises ends the run, as what ``results`` raise
    does.
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
    except BaseExceptionGroup as errors:
        raise _first(errors) from None
    finally:
        await feed.close()
    return summary


class _Feed:
    """Lines in the order of their windows; the next window is read while the one before is answered."""

    def __init__(self, reader: Reader, size: int) -> None:
        self._reader = reader
        self._size = size
        self._lines: deque[Line | BadLine] = deque()
        self._coming: asyncio.Future[list[Line | BadLine]] | None = None
        self._is_over = False
        self._lock = asyncio.Lock()

    async def next(self) -> Line | BadLine | None:
        """The next one; None at the end."""
        while not self._lines and not self._is_over:
            async with self._lock:
                if not self._lines and not self._is_over:
                    await self._refill()
        return self._lines.popleft() if self._lines else None

    async def _refill(self) -> None:
        window = await (self._coming or self._read())
        self._coming = None
        self._is_over = not window
        self._lines.extend(window)
        if window:
            self._coming = self._read()

    def _read(self) -> asyncio.Future[list[Line | BadLine]]:
        return asyncio.ensure_future(asyncio.to_thread(self._reader.window, self._size))

    async def close(self) -> None:
        """Wait for what is being read."""
        if self._coming is not None:
            await asyncio.gather(self._coming, return_exceptions=True)


def success(line: Line, answer: Answer) -> bytes:
    """The line of an answer, as OpenAI's batches have it."""
    return head(line.number, line.custom_id) + b',"response":%s,"error":null}\n' % _response(answer)


def failure(number: int, custom_id: str | None, code: str, message: str, answer: Answer | None) -> bytes:
    """The line of a failure: with the number of its line, and the reason."""
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
