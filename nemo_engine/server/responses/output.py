"""The answers of ``/v1/responses``: the response object and its output items."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from nemo_engine.outputs import CompletionOutput, Logprob
from nemo_engine.server.chat import Chat
from nemo_engine.server.errors import ApiError
from nemo_engine.server.logprobs import chat_logprobs
from nemo_engine.server.responses.input import ChatForm
from nemo_engine.server.responses.protocol import ResponsesRequest
from nemo_engine.server.service import Service


class Run:
    """A request under way, and its response object."""

    def __init__(self, service: Service, request: ResponsesRequest, form: ChatForm, chat: Chat) -> None:
        self.form = form
        self.chat = chat
        self.has_logprobs = request.has_logprobs
        self._request = request
        self._service = service
        self._tool_calls_id = None if chat.tools.style is None else chat.tools.style.trigger_id

    def response(
        self, status: str, output: list[dict[str, Any]], error: ApiError | None = None, *, is_over: bool = True
    ) -> dict[str, Any]:
        """The response object as it is now."""
        request, generation = self._request, self.chat.generation
        params = generation.effective[0].params
        text = request.text
        answer = {
            "id": generation.id,
            "object": "response",
            "created_at": generation.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None if error is None else _failure(error),
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": None,
            "metadata": request.metadata or {},
            "model": self._service.model_name,
            "output": output,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": {"format": (text.format if text else None) or {"type": "text"}, "verbosity": "medium"},
            "tool_choice": request.tool_choice or "auto",
            "tools": [_shown_tool(tool) for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": self._usage() if is_over else None,
        }
        if is_over and request.explain:
            answer["explain"] = generation.explain()
        return answer

    def logprobs(self, completion: CompletionOutput) -> list[dict[str, Any]]:
        """The log-probabilities of the tokens of ``completion`` in front of [TOOL_CALLS]."""
        if not self.has_logprobs:
            return []
        token_ids = self.text_tokens(completion.token_ids)
        entries: list[dict[int, Logprob]] = completion.logprobs or []
        return chat_logprobs(self.form.request, self._service.tokenizer, token_ids, entries[: len(token_ids)])

    def text_tokens(self, token_ids: list[int]) -> list[int]:
        """``token_ids`` up to [TOOL_CALLS], if calls are looked for."""
        if self.chat.tools.is_on and self._tool_calls_id in token_ids:
            return token_ids[: token_ids.index(self._tool_calls_id)]
        return token_ids

    def _usage(self) -> dict[str, Any]:
        usage = self.chat.generation.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }


def status_of(completion: CompletionOutput) -> str:
    """The API's status for the way in which an answer ended."""
    return {"length": "incomplete", "abort": "cancelled"}.get(completion.finish_reason or "", "completed")


def message_item(item_id: str, status: str, content: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """An output item with text."""
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": list(content)}


def text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of a message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def call_item(item_id: str, call_id: str, name: str, arguments: str, status: str) -> dict[str, Any]:
    """An output item that calls a function."""
    return {
        "id": item_id,
        "type": "function_call",
        "status": status,
        "call_id": call_id,
        "name": name,
        "arguments": arguments,
    }


def new_item_id(kind: str) -> str:
    """An id of an output item; ``kind`` is "msg" or "fc"."""
    return f"{kind}_{uuid4().hex}"


def whole_output(run: Run, completion: CompletionOutput) -> list[dict[str, Any]]:
    """The output items of a whole answer. Only the last can be incomplete; a call with complete JSON is complete."""
    content, calls = run.chat.parse(completion)
    items = []
    if content or not calls:
        logprobs = run.logprobs(completion)
        items.append(message_item(new_item_id("msg"), "completed", [text_part(content, logprobs)]))
    items += [call_item(new_item_id("fc"), call.id, call.name, call.arguments, "completed") for call in calls]
    if status_of(completion) != "completed" and not (calls and _is_json(calls[-1].arguments)):
        items[-1]["status"] = "incomplete"
    return items


def _failure(error: ApiError) -> dict[str, Any]:
    return {"code": "server_error" if error.status >= 500 else "invalid_prompt", "message": error.message}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _shown_tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {"description": None, "parameters": None, "strict": None} | tool
