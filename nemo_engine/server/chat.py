"""``/v1/chat/completions``: conversations, tool calls as NeMo makes them, streamed or whole."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request
from starlette.responses import Response

from nemo_engine.engine.input_processor import EncodedPrompt
from nemo_engine.outputs import CompletionOutput, RequestOutput
from nemo_engine.server.answer import respond
from nemo_engine.server.completions import is_answer_long
from nemo_engine.server.errors import ApiError
from nemo_engine.server.generation import Generation, raise_failure
from nemo_engine.server.headers import response_headers
from nemo_engine.server.logprobs import chat_logprobs, prompt_logprobs
from nemo_engine.server.params import Effective, effective
from nemo_engine.server.prompts import encode_conversation
from nemo_engine.server.protocol import ChatRequest
from nemo_engine.server.service import Service, while_connected
from nemo_engine.server.sse import DONE, EventStream, event
from nemo_engine.server.tools import ToolUse
from nemo_engine.text.call_styles import CallReader
from nemo_engine.text.messages import check_content
from nemo_engine.text.tool_calls import ArgumentsDelta, CallStarted, Content, Event, ToolCall


async def create_chat_completion(service: Service, http: Request, request: ChatRequest) -> Response:
    """Answer one request."""
    headers = response_headers(request)
    service.check_model(request.model)
    chat = await service.workers.run(http, prepare_chat, service, http, request)
    headers |= chat.generation.header()
    if request.stream:
        return await while_connected(http, EventStream(_stream(service, request, chat), headers).start())
    finals = await while_connected(http, chat.generation.collect())
    is_long = is_answer_long(request, request.logprobs)
    return await respond(lambda: _whole(service, request, chat, finals[0]), headers, is_long=is_long)


class Chat:
    """A conversation under way. ``echo``: the text that stands before every answer."""

    def __init__(self, generation: Generation, tools: ToolUse, echo: str, shows_special: bool) -> None:
        self.generation = generation
        self.tools = tools
        self.echo = echo
        self.shows_special = shows_special

    def parser(self) -> CallReader:
        """A reader of one streamed answer in which calls are looked for."""
        assert self.tools.style is not None
        return self.tools.style.reader(is_forced=self.tools.is_forced, shows_special=self.shows_special)

    def parse(self, completion: CompletionOutput) -> tuple[str, list[ToolCall]]:
        """(content, calls) of one whole answer."""
        if not self.tools.is_on or self.tools.style is None:
            return completion.text, []
        content, calls = self.tools.style.read(
            completion.text,
            completion.tool_calls_start,
            is_forced=self.tools.is_forced,
            is_truncated=completion.finish_reason == "length",
            shows_special=self.shows_special,
        )
        return content, calls if self.tools.parallel else calls[:1]


def checked_chat(service: Service, request: ChatRequest) -> tuple[ToolUse, EncodedPrompt, Effective]:
    """The tools, the prompt and the parameters of a request; ``ValueError`` or ``ApiError`` for what is wrong."""
    if request.add_special_tokens:
        raise ApiError(400, "add_special_tokens must be false: chat begins with its own", param="add_special_tokens")
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream", param="stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise ApiError(400, "prompt_logprobs is not supported in a stream", param="prompt_logprobs")
    max_logprobs = service.engine.config.max_logprobs
    if request.top_logprobs is not None and max_logprobs != -1 and not 0 <= request.top_logprobs <= max_logprobs:
        raise ApiError(
            400, f"top_logprobs must be in [0, {max_logprobs}], got {request.top_logprobs}", param="top_logprobs"
        )
    tools = ToolUse.of(request, service.renderer(request.chat_template))
    if tools.is_on and tools.style is not None and tools.style.shows_special:
        request.skip_special_tokens = False  # else the tags of calls would not be seen
    prompt = encode_conversation(service, request, tools)
    logprobs = None
    if request.logprobs:
        logprobs = request.top_logprobs or 0
    max_tokens = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
    effective_params = effective(
        service,
        request,
        len(prompt.token_ids),
        asked_tokens=max_tokens,
        logprobs=logprobs,
        tools=tools,
    )
    return tools, prompt, effective_params


def prepare_chat(service: Service, http: Request, request: ChatRequest, id_prefix: str = "chatcmpl-") -> Chat:
    """Check a request and put it into the form that the engine takes.

    Runs outside the event loop: grammars may be compiled.
    """
    service.check_admission(request.n or 1, service.turn_of(http))
    tools, prompt, effective_params = checked_chat(service, request)
    echo = ""
    if request.echo and request.messages[-1].get("role") == "assistant":
        echo = check_content(request.messages[-1].get("content"), "messages[-1].content") or ""
    generation = Generation(service, http, request, [prompt], [effective_params], id_prefix)
    return Chat(generation, tools, echo, request.skip_special_tokens is False)


def _whole(service: Service, request: ChatRequest, chat: Chat, final: RequestOutput) -> dict[str, Any]:
    choices = []
    for completion in final.outputs:
        content, calls = chat.parse(completion)
        content = chat.echo + content
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        entry: dict[str, Any] = {
            "index": completion.index,
            "message": message,
            "logprobs": None
            if not request.logprobs
            else {
                "content": chat_logprobs(request, service.tokenizer, completion.token_ids, completion.logprobs or []),
                "refusal": None,
            },
            "finish_reason": finish_reason(completion, bool(calls)),
            "stop_reason": completion.stop_reason,
        }
        if request.return_token_ids:
            entry["token_ids"] = completion.token_ids
        choices.append(entry)
    answer = _head(service, chat, "chat.completion") | {"choices": choices, "usage": chat.generation.usage()}
    if request.prompt_logprobs is not None:
        answer["prompt_logprobs"] = prompt_logprobs(final)
    if request.return_token_ids:
        answer["prompt_token_ids"] = final.prompt_token_ids
    if request.explain:
        answer["explain"] = chat.generation.explain()
    return answer


async def _stream(service: Service, request: ChatRequest, chat: Chat) -> AsyncIterator[bytes]:
    generation = chat.generation
    head = _head(service, chat, "chat.completion.chunk")
    options = request.stream_options
    with_usage_each = options is not None and bool(options.continuous_usage_stats)
    with_usage = with_usage_each or (options is not None and bool(options.include_usage))
    usage: dict[str, Any] = {"usage": None} if with_usage else {}
    parsers = [chat.parser() for _ in range(generation.n)] if chat.tools.is_on else []
    begun: set[int] = set()
    async for _, output in generation.outputs():
        raise_failure(output)
        if with_usage_each:
            usage = {"usage": generation.usage()}
        choices = []
        for completion in output.outputs:
            index = completion.index
            delta: dict[str, Any] = {}
            if index not in begun:
                begun.add(index)
                delta = {"role": "assistant", "content": ""}
                first = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
                more = {"prompt_token_ids": output.prompt_token_ids} if request.return_token_ids else {}
                yield event(head | {"choices": [first]} | more | usage)
                delta = {"content": chat.echo} if chat.echo else {}
            has_calls = False
            if parsers:
                parser = parsers[index]
                events = parser.feed(completion.text, completion.tool_calls_start)
                if completion.finish_reason is not None:
                    events += parser.finish()
                delta = _delta(events, chat.tools.parallel, delta)
                has_calls = parser.num_calls > 0
            elif completion.text:
                delta["content"] = delta.get("content", "") + completion.text
            entry: dict[str, Any] = {
                "index": index,
                "delta": delta,
                "logprobs": {
                    "content": chat_logprobs(
                        request, service.tokenizer, completion.token_ids, completion.logprobs or []
                    )
                }
                if request.logprobs
                else None,
                "finish_reason": finish_reason(completion, has_calls),
            }
            if completion.stop_reason is not None:
                entry["stop_reason"] = completion.stop_reason
            if request.return_token_ids:
                entry["token_ids"] = completion.token_ids
            if delta or completion.finish_reason is not None or request.logprobs or request.return_token_ids:
                choices.append(entry)
        if choices:
            yield event(head | {"choices": choices} | usage)
    tail: dict[str, Any] = {}
    if with_usage:
        tail["usage"] = generation.usage()
    if request.explain:
        tail["explain"] = generation.explain()
    if tail:
        yield event(head | {"choices": []} | tail)
    yield DONE


def _delta(events: Sequence[Event], parallel: bool, delta: dict[str, Any]) -> dict[str, Any]:
    """What events add to a client's message. Without ``parallel`` only the first call counts."""
    content = delta.get("content", "")
    calls: dict[int, dict[str, Any]] = {}
    for change in events:
        if isinstance(change, Content):
            content += change.text
        elif not parallel and change.index > 0:
            continue
        elif isinstance(change, CallStarted):
            calls[change.index] = {
                "index": change.index,
                "id": change.id,
                "type": "function",
                "function": {"name": change.name, "arguments": ""},
            }
        elif isinstance(change, ArgumentsDelta):
            call = calls.setdefault(change.index, {"index": change.index, "function": {"arguments": ""}})
            call["function"]["arguments"] += change.text
    added: dict[str, Any] = {"content": content} if content else {}
    if calls:
        added["tool_calls"] = [calls[index] for index in sorted(calls)]
    return added


def finish_reason(completion: CompletionOutput, has_calls: bool) -> str | None:
    """OpenAI's word for how an answer ended."""
    return "tool_calls" if has_calls and completion.finish_reason == "stop" else completion.finish_reason


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _head(service: Service, chat: Chat, kind: str) -> dict[str, Any]:
    generation = chat.generation
    return {"id": generation.id, "object": kind, "created": generation.created, "model": service.model_name}
