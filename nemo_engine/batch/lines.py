"""One line of a batch file, in any of three forms, as a request to one of OpenAI's routes.

OpenAI's: ``{"custom_id", "method": "POST", "url", "body"}``. A workload's, see ``workload.items``. Plain: ``prompt``,
``prompt_token_ids`` or ``messages`` beside any other field of the route's body, and ``custom_id`` or ``id``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_engine.workload.content import prompt_token_ids
from nemo_engine.workload.items import parse_line

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
URLS = (CHAT, COMPLETIONS, RESPONSES)
MAX_ID = 512  # characters

_OF_OPENAI = {"custom_id", "method", "url", "body"}
_OF_WORKLOADS = {"output_tokens", "turns", "arrival_s", "prefix", "prefix_tokens", "think_s", "generate"}
_PROMPTS = ("prompt", "prompt_token_ids", "messages")


@dataclass(frozen=True, slots=True)
class Line:
    """A request. ``number`` is that of its line in the file, from 1. ``body`` is the body of a request to ``url``."""

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]

    def prompt_key(self) -> str:
        """A key that sorts lines with equal beginnings side by side."""
        body = self.body
        prompt = body.get("messages") or body.get("input") or body.get("prompt") or ""
        if isinstance(prompt, list) and prompt and all(isinstance(token_id, int) for token_id in prompt):
            prompt = "".join(chr(token_id % 0xD800) for token_id in prompt)
        texts = (prompt if isinstance(prompt, str) else json.dumps(prompt), body.get("tools"), body.get("instructions"))
        return "\0".join([self.url, *(json.dumps(text) for text in texts[1:] if text), texts[0]])


class LineError(Exception):
    """A line is no request: ``code`` and the message say why.

    ``custom_id``: that of the line, if it could be read.
    """

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id


def parse_request(data: object, number: int, vocab_size: int) -> Line:
    """The request that the JSON of line ``number`` holds. Raises ``LineError``.

    ``vocab_size``: if a workload has only lengths, prompts of ids below it are made up.
    """
    if not isinstance(data, dict):
        raise LineError("invalid_line", f"a line must be a JSON object, got {_short(data)}")
    custom_id = _id_of(data, number)
    if {"method", "url", "body"} & data.keys():
        return _openai(data, number, custom_id)
    if _OF_WORKLOADS & data.keys() or not any(name in data for name in _PROMPTS):
        return _workload(data, number, custom_id, vocab_size)
    fields = [name for name in _PROMPTS if name in data]
    if len(fields) > 1:
        raise LineError("invalid_line", f"{fields[0]} and {fields[1]} are given, and one is needed", custom_id)
    body = {name: value for name, value in data.items() if name not in ("id", "custom_id")}
    if fields[0] == "prompt_token_ids":
        ids = body["prompt"] = body.pop("prompt_token_ids")
        if not isinstance(ids, list) or any(
            isinstance(token_id, (str, list)) for token_id in ids
        ):  # texts, for the route
            raise LineError(
                "invalid_line", f"prompt_token_ids must be a list of token ids, got {_short(ids)}", custom_id
            )
    return Line(number, custom_id, CHAT if fields[0] == "messages" else COMPLETIONS, body)


def _id_of(data: Mapping[str, Any], number: int) -> str:
    for name in ("custom_id", "id"):
        value = data.get(name)
        if value is not None:
            if not isinstance(value, str) or not 0 < len(value) <= MAX_ID:
                raise LineError("invalid_id", f"{name} must be a text of 1 to {MAX_ID} characters, got {_short(value)}")
            return value
    return f"line-{number}"


def _openai(data: dict[str, Any], number: int, custom_id: str) -> Line:
    def refuse(code: str, message: str) -> LineError:
        return LineError(code, message, custom_id)

    if data.get("custom_id") is None:
        raise LineError("missing_required_parameter", "custom_id is missing")
    unknown = sorted(data.keys() - _OF_OPENAI)
    if unknown:
        raise refuse("invalid_line", f"{unknown[0]} is not a field here (those are {', '.join(sorted(_OF_OPENAI))})")
    if data.get("method") != "POST":
        raise refuse("invalid_method", f"method must be POST, got {_short(data.get('method'))}")
    url = data.get("url")
    if url not in URLS:
        raise refuse("invalid_url", f"url must be one of {', '.join(URLS)}, got {_short(url)}")
    body = data.get("body")
    if not isinstance(body, dict):
        raise refuse("invalid_request", f"body must be a JSON object, got {_short(body)}")
    return Line(number, custom_id, url, body)


def _workload(data: dict[str, Any], number: int, custom_id: str, vocab_size: int) -> Line:
    if "generate" in data:
        raise LineError("invalid_line", "generate stands for many requests: a batch file has one a line", custom_id)
    data = {name: value for name, value in data.items() if name != "custom_id"}
    try:
        item = parse_line(data | {"id": custom_id}, "this line", custom_id)
    except ValueError as error:
        raise LineError("invalid_line", str(error).removeprefix("this line: "), custom_id) from None
    if len(item.turns) > 1:
        raise LineError(
            "invalid_line", f"turns: a line of a batch file is one request, got {len(item.turns)} turns", custom_id
        )
    prompt = item.turns[0].prompt
    body: dict[str, Any] = {"max_tokens": item.output_tokens, "ignore_eos": True}
    if item.priority:
        body["priority"] = item.priority
    if isinstance(prompt, str):
        return Line(number, custom_id, COMPLETIONS, {"prompt": prompt} | body)
    if isinstance(prompt, tuple) and not isinstance(prompt[0], int):
        return Line(number, custom_id, CHAT, {"messages": [dict(message) for message in prompt]} | body)
    return Line(number, custom_id, COMPLETIONS, {"prompt": prompt_token_ids(item, 0, vocab_size)} | body)


def _short(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
