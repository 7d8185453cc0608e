"""``/v1/completions``: prompts as text or token ids, several at once, with echo and log-probabilities as OpenAI had
them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.responses import Response

from nemo_engine.engine.input_processor import EncodedPrompt
from nemo_engine.outputs import CompletionOutput, Logprob, RequestOutput
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.server.answer import respond
from nemo_engine.server.errors import ApiError
from nemo_engine.server.generation import Generation, raise_failure
from nemo_engine.server.headers import response_headers
from nemo_engine.server.logprobs import TextOffsets, completion_logprobs, prompt_logprobs
from nemo_engine.server.params import effective
from nemo_engine.server.prompts import encode_prompts
from nemo_engine.server.protocol import CompletionRequest, GenerationRequest
from nemo_engine.server.service import Service, while_connected
from nemo_engine.server.sse import DONE, EventStream, event


async def create_completion(service: Service, http: Request, request: CompletionRequest) -> Response:
    """Answer one request."""
    headers = response_headers(request)
    service.check_model(request.model)
    run = await service.workers.run(http, _prepare, service, http, request)
    if request.stream:
        events = EventStream(_stream(service, request, run), headers | run.generation.header())
        return await while_connected(http, events.start())
    finals = await while_connected(http, run.generation.collect())
    is_long = is_answer_long(request, request.logprobs)
    headers |= run.generation.header()
    return await respond(lambda: _whole(service, request, run, finals), headers, is_long=is_long)


class _Run:
    """A request under way. ``drops_output``: only the echo was asked for (``max_tokens`` 0)."""

    def __init__(self, generation: Generation, drops_output: bool) -> None:
        self.generation = generation
        self.drops_output = drops_output

    def usage(self) -> dict[str, Any]:
        """Token counts so far."""
        usage = self.generation.usage()
        if self.drops_output:
            usage["total_tokens"] -= usage["completion_tokens"]
            usage["completion_tokens"] = 0
        return usage


def _prepare(service: Service, http: Request, request: CompletionRequest) -> _Run:
    drops_output = request.max_tokens == 0 and bool(request.echo)
    if request.echo and request.stream and request.logprobs is not None:
        raise ApiError(400, "echo with logprobs is not supported in a stream", param="stream")
    if request.prompt_logprobs is not None and request.stream:
        raise ApiError(400, "prompt_logprobs is not supported in a stream", param="prompt_logprobs")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream", param="stream_options")
    prompts = encode_prompts(service, http, request)
    if request.echo and request.logprobs is not None and request.prompt_logprobs is None:
        request.prompt_logprobs = request.logprobs
    effective_params = [
        effective(
            service,
            request,
            len(prompt.token_ids),
            asked_tokens=1 if drops_output else request.max_tokens,
            logprobs=request.logprobs,
        )
        for prompt in prompts
    ]
    return _Run(Generation(service, http, request, prompts, effective_params, "cmpl-"), drops_output)


def _whole(service: Service, request: CompletionRequest, run: _Run, finals: list[RequestOutput]) -> dict[str, Any]:
    choices = []
    for index, (prompt, final) in enumerate(zip(run.generation.prompts, finals)):
        echo = _prompt_text(service, prompt) if request.echo else None
        params = run.generation.effective[index].params
        for completion in final.outputs:
            entry: dict[str, Any] = {
                "index": index * run.generation.n + completion.index,
                "text": (echo or "") + ("" if run.drops_output else completion.text),
                "logprobs": None
                if request.logprobs is None
                else _logprobs(service, request, echo, final, params, None if run.drops_output else completion),
                "finish_reason": "length" if run.drops_output else completion.finish_reason,
                "stop_reason": completion.stop_reason,
            }
            if request.prompt_logprobs is not None and not (request.echo and request.logprobs is not None):
                entry["prompt_logprobs"] = prompt_logprobs(final)
            if request.return_token_ids:
                entry["token_ids"] = [] if run.drops_output else completion.token_ids
                entry["prompt_token_ids"] = final.prompt_token_ids
            choices.append(entry)
    answer = _head(service, run) | {"choices": choices, "usage": run.usage()}
    if request.explain:
        answer["explain"] = run.generation.explain()
    return answer


async def _stream(service: Service, request: CompletionRequest, run: _Run) -> AsyncIterator[bytes]:
    generation, tokenizer = run.generation, service.engine.tokenizer
    head = _head(service, run)
    options = request.stream_options
    with_usage = options is not None and bool(options.include_usage or options.continuous_usage_stats)
    with_usage_each = options is not None and bool(options.continuous_usage_stats)
    usage: dict[str, Any] = {"usage": None} if with_usage else {}
    places: dict[int, TextOffsets] = {}
    echo_due = set(range(len(generation.prompts))) if request.echo else set()
    async for index, output in generation.outputs():
        raise_failure(output)
        choices = []
        for completion in output.outputs:
            number = index * generation.n + completion.index
            text = "" if run.drops_output else completion.text
            if index in echo_due:
                text = _prompt_text(service, generation.prompts[index]) + text
            logprobs = None
            if completion.logprobs is not None:
                if number not in places:
                    skips = generation.effective[index].params.skip_special_tokens
                    places[number] = TextOffsets(tokenizer, skips_special=skips)
                offsets = [places[number].take(token_id) for token_id in completion.token_ids]
                logprobs = completion_logprobs(request, tokenizer, completion.token_ids, completion.logprobs, offsets)
            entry: dict[str, Any] = {
                "index": number,
                "text": text,
                "logprobs": logprobs,
                "finish_reason": "length" if run.drops_output else completion.finish_reason,
                "stop_reason": completion.stop_reason,
            }
            if request.return_token_ids:
                entry["token_ids"] = [] if run.drops_output else completion.token_ids
            choices.append(entry)
        if len({choice["index"] for choice in choices}) == generation.n:
            echo_due.discard(index)
        if with_usage_each:
            usage = {"usage": run.usage()}
        yield event(head | {"choices": choices} | usage)
    tail: dict[str, Any] = {}
    if with_usage:
        tail["usage"] = run.usage()
    if request.explain:
        tail["explain"] = generation.explain()
    if tail:
        yield event(head | {"choices": []} | tail)
    yield DONE


def is_answer_long(request: GenerationRequest, logprobs: int | bool | None) -> bool:
    """Whether the answer may take long to write."""
    fields = (request.prompt_logprobs is not None, request.return_token_ids, request.explain)
    return logprobs not in (None, False) or any(fields)


def _head(service: Service, run: _Run) -> dict[str, Any]:
    generation = run.generation
    return {
        "id": generation.id,
        "object": "text_completion",
        "created": generation.created,
        "model": service.model_name,
    }


def _prompt_text(service: Service, prompt: EncodedPrompt) -> str:
    if prompt.text is not None:
        return prompt.text
    return service.tokenizer.decode(prompt.token_ids)


def _logprobs(
    service: Service,
    request: CompletionRequest,
    echo: str | None,
    final: RequestOutput,
    params: SamplingParams,
    completion: CompletionOutput | None,
) -> dict[str, Any] | None:
    """Log-probabilities of one choice: of the prompt's tokens if ``echo`` is its text, then of ``completion``."""
    tokenizer = service.engine.tokenizer
    token_ids: list[int] = []
    entries: list[dict[int, Logprob] | None] = []
    offsets: list[int] = []
    if echo is not None:
        token_ids += final.prompt_token_ids
        entries += final.prompt_logprobs or []
        # The text of a prompt may begin with the name of its BOS.
        shift = 0 if tokenizer is None else max(0, len(echo) - len(tokenizer.decode(token_ids)))
        places = TextOffsets(tokenizer, start=shift)
        offsets += [places.take(token_id) for token_id in token_ids]
    if completion is not None:
        places = TextOffsets(tokenizer, start=len(echo or ""), skips_special=params.skip_special_tokens)
        token_ids += completion.token_ids
        entries += completion.logprobs or []
        offsets += [places.take(token_id) for token_id in completion.token_ids]
    return completion_logprobs(request, tokenizer, token_ids, entries, offsets)
