"""The prompts of one HTTP request in the engine: one stream of outputs, with time-out, metrics and ``explain``."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from secrets import token_hex
from typing import Any

from starlette.requests import Request

from nemo_engine.engine.input_processor import EncodedPrompt
from nemo_engine.outputs import GRAMMAR_TOO_COMPLEX, NO_TOKEN_LEFT, CacheReport, RequestOutput
from nemo_engine.server.errors import ApiError
from nemo_engine.server.params import Effective
from nemo_engine.server.protocol import GenerationRequest
from nemo_engine.server.service import Service

_HEADER_ID = re.compile(r"[!-~]{1,200}")


class Generation:
    """Prompts that were sent together. Each becomes a request of the engine; all have the same parameters."""

    def __init__(
        self,
        service: Service,
        http: Request,
        request: GenerationRequest,
        prompts: list[EncodedPrompt],
        effective: list[Effective],
        id_prefix: str,
    ) -> None:
        self.id = id_prefix + (request.request_id or _id_of_header(http) or token_hex(16))
        self._may_repeat = request.request_id is None
        self.created = int(time.time())
        self.prompts = prompts
        self.effective = effective
        self.n = effective[0].params.n
        self.finals: list[RequestOutput | None] = [None] * len(prompts)
        self.num_output_tokens = 0
        self._service = service
        self._timeout = service.timeout(request.timeout)
        self._priority = request.priority or 0
        self._client = service.client_of(http)
        self._turn = service.turn_of(http)
        self._trace_headers = http.headers
        self._log = http.scope.setdefault("nemo_engine.log", {})
        self._log.update(id=self.id, prompt_tokens=sum(len(p.token_ids) for p in prompts), n=self.n)
        self._texts: dict[tuple[int, int], list[str]] | None = {} if service.options.log_prompts else None

    async def outputs(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Yields (index of the prompt, output) as outputs come.

        Raises ``TimeoutError`` when the time is over; closing the iterator aborts the requests that run.
        """
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        self._service.check_admission(
            len(self.prompts) * self.n, self._turn
        )  # again, where no other request can come between
        request_ids = self._take_ids()
        streams = [
            self._service.engine.generate_encoded(
                prompt, params.params, request_id, priority=self._priority, client=self._turn
            )
            for prompt, params, request_id in zip(self.prompts, self.effective, request_ids)
        ]
        merged = _Only(streams[0]) if len(streams) == 1 else _merge(streams)
        try:
            if deadline is None:
                async for index, output in merged:
                    self._note(index, output)
                    yield index, output
                return
            while True:
                try:
                    async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                        index, output = await anext(merged)
                except StopAsyncIteration:
                    return
                self._note(index, output)
                yield index, output
        finally:
            self._give_back(request_ids)
            await merged.aclose()  # type: ignore[attr-defined]
            unfinished = sum(final is None or not final.finished for final in self.finals) * self.n
            if unfinished:  # the client has gone, the time is over, or the engine has ended
                self._log.setdefault("finish_reasons", []).extend(["abort"] * unfinished)
                self._service.metrics.aborted(unfinished)
            self._log["output_tokens"] = self.num_output_tokens
            if self._texts is not None:
                self._log["prompts"] = [self._shown(prompt) for prompt in self.prompts]
                self._log["texts"] = ["".join(parts) for _, parts in sorted(self._texts.items())]

    def _take_ids(self) -> list[str]:
        """Take the ids that the requests will have in the engine.

        Raises ``ValueError`` if another request of the client has the id that it chose; a proxy may repeat one.
        """
        running, owners = self._service.running, self._service.owners
        key = (self._client, self.id)
        if key in running and not self._may_repeat:
            raise ValueError(f"request_id {self.id!r} is in use by an unfinished request")
        ids = self._ids(self.id)
        if any(request_id in owners for request_id in ids):
            ids = self._ids(f"{self.id}-{token_hex(16)}")
        running.setdefault(key, set()).update(ids)
        owners.update(dict.fromkeys(ids, self._client))
        return ids

    def _ids(self, name: str) -> list[str]:
        if len(self.prompts) == 1:
            return [name]
        return [
            f"{name}-{index}-{token_hex(16)}" for index in range(len(self.prompts))
        ]  # made here: a client cannot have chosen these

    def _give_back(self, ids: list[str]) -> None:
        running, key = self._service.running, (self._client, self.id)
        running[key].difference_update(ids)
        if not running[key]:
            del running[key]
        for request_id in ids:
            del self._service.owners[request_id]

    def _shown(self, prompt: EncodedPrompt) -> str | list[int]:
        tokenizer = self._service.engine.tokenizer
        if prompt.text is not None or tokenizer is None:
            return prompt.text or prompt.token_ids
        return tokenizer.decode(prompt.token_ids, skip_special_tokens=False)

    def header(self) -> dict[str, str]:
        """``X-Request-Id``."""
        return {"X-Request-Id": ascii(self.id)[1:-1]}

    async def collect(self) -> list[RequestOutput]:
        """The final output of each prompt. Raises ``ApiError`` if one failed inside the engine."""
        async for _ in self.outputs():
            pass
        finals = [final for final in self.finals if final is not None]
        assert len(finals) == len(self.prompts)
        for final in finals:
            raise_failure(final)
        return finals

    def usage(self) -> dict[str, Any]:
        """Token counts so far, as OpenAI has them."""
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        cached = sum(final.num_cached_tokens for final in self.finals if final is not None)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def explain(self) -> dict[str, Any]:
        """The effective parameters and their origins, whether speculation makes drafts or why it does not, and each
        prompt's times, cached tokens and preemptions.
        """
        requests = []
        for final in self.finals:
            if final is None or final.metrics is None:
                continue
            m = final.metrics
            requests.append(
                {
                    "queue_seconds": _between(m.arrival_time, m.scheduled_ts),
                    "prefill_seconds": _between(m.scheduled_ts, m.first_token_ts),
                    "decode_seconds": _between(m.first_token_ts, m.last_token_ts),
                    "prompt_tokens": len(final.prompt_token_ids),
                    "cached_tokens": final.num_cached_tokens,
                    "cache": None if final.cache_report is None else _describe(final.cache_report),
                    "preemptions": m.num_preemptions,
                }
            )
        parameters = self.effective[0]
        is_off = self._service.engine.config.speculative_config is None
        speculation = "the server has no speculative_config" if is_off else parameters.params.why_no_drafts or "on"
        return {"parameters": parameters.explain(), "speculation": speculation, "requests": requests}

    def _note(self, index: int, output: RequestOutput) -> None:
        """Count ``output``; if it is the last of its request, report the request to metrics and traces."""
        self.finals[index] = output
        is_delta = output.sampling_params is not None and output.sampling_params.output_kind.name == "DELTA"
        if is_delta or output.finished:
            self.num_output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
            if self._texts is not None:
                for completion in output.outputs:
                    self._texts.setdefault((index, completion.index), []).append(completion.text)
        if output.finished:
            reasons = [completion.finish_reason for completion in output.outputs]
            self._log.setdefault("finish_reasons", []).extend(reasons)
            self._log["cached_tokens"] = self._log.get("cached_tokens", 0) + output.num_cached_tokens
            self._service.metrics.request_done(output, self.effective[index].params, self._client.name)
            self._service.tracing.request_done(output, self.id, self._service.model_name, self._trace_headers)


def _id_of_header(http: Request) -> str | None:
    """The id in ``X-Request-Id``, which proxies set, if it is printable."""
    header = http.headers.get("x-request-id", "")
    return header if _HEADER_ID.fullmatch(header) else None


def raise_failure(output: RequestOutput) -> None:
    """Raise ``ApiError`` if a completion of ``output`` failed inside the engine, or the engine was closed over it."""
    for completion in output.outputs:
        if completion.finish_reason == "error" and completion.error == NO_TOKEN_LEFT:
            raise ApiError(400, NO_TOKEN_LEFT, code="no_token_left")
        if completion.finish_reason == "error" and (completion.error or "").startswith(GRAMMAR_TOO_COMPLEX):
            raise ApiError(400, completion.error or "", param="structured_outputs", code="grammar_too_complex")
        if completion.finish_reason == "error":
            raise ApiError(500, f"the request failed: {completion.error}", code="generation_failed")


def _describe(report: CacheReport) -> dict[str, Any]:
    """The first page that the prefix cache did not have, counted from 0, and the reason."""
    broke = report.num_cached_pages if report.reason is not None else None
    return {
        "page_size": report.page_size,
        "full_pages": report.num_full_pages,
        "cached_pages": report.num_cached_pages,
        "broke_at_page": broke,
        "broke_at_token": None if broke is None else broke * report.page_size,
        "reason": report.reason,
    }


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round(end - start, 6)


class _Only:
    """One stream, in the form of ``_merge``. An event loop keeps a list of generators, which costs more than this."""

    def __init__(self, stream: AsyncIterator[RequestOutput]) -> None:
        self._stream = stream

    def __aiter__(self) -> _Only:
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        return 0, await self._stream.__anext__()

    async def aclose(self) -> None:
        await self._stream.aclose()  # type: ignore[attr-defined]


async def _merge(streams: list[AsyncIterator[RequestOutput]]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Yields the outputs of all streams as they come; at most one of each waits. An error of one ends all."""
    queue: asyncio.Queue[tuple[int, RequestOutput | BaseException]] = asyncio.Queue(maxsize=len(streams))

    async def pump(index: int) -> None:
        try:
            async for output in streams[index]:
                await queue.put((index, output))
        except Exception as error:
            await queue.put((index, error))
        finally:
            await streams[index].aclose()  # type: ignore[attr-defined]

    tasks = [asyncio.create_task(pump(index)) for index in range(len(streams))]
    try:
        num_open = len(streams)
        while num_open:
            index, output = await queue.get()
            if isinstance(output, BaseException):
                raise output
            num_open -= output.finished
            yield index, output
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
