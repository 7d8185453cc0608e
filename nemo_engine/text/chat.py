"""Conversations to token ids, by the rules of mistral-common: what the model was trained on, and no text in between.

Text of a user never becomes a control token, because control tokens are put in as ids.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from nemo_engine.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
_ID_LENGTH = 9
_ID_ALPHABET = string.digits + string.ascii_letters
_KEYS = {
    "system": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "tool_calls", "refusal"},
    "tool": {"role", "content", "name", "tool_call_id"},
}


def tool_call_id_for_prompt(call_id: str) -> str:
    """The id that stands for ``call_id`` in a prompt: itself if it is 9 letters and digits, else 9 of its hash."""
    if re.fullmatch(r"[a-zA-Z0-9]{9}", call_id):
        return call_id
    number = int.from_bytes(blake2b(call_id.encode(), digest_size=16).digest(), "little")
    letters = []
    for _ in range(_ID_LENGTH):
        number, index = divmod(number, len(_ID_ALPHABET))
        letters.append(_ID_ALPHABET[index])
    return "".join(letters)


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    strict: bool = False,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
) -> list[int]:
    """The ids that ask the model for the next assistant message: one BOS, no EOS at the end.

    With ``add_generation_prompt`` off a conversation may also end with an assistant message, which an EOS then closes.

    ``messages`` and ``tools`` are OpenAI's. Neighbouring messages of one role are merged with a blank line between them, several
    system messages are joined and stand before the last user message, and an empty user message is put first if another role
    begins; with ``strict`` what the official template refuses is refused. ``continue_final_message`` leaves the last
    message, an assistant's, open to be continued. Raises ``ValueError`` naming the message.
    """
    from mistral_common.exceptions import MistralCommonException
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise ValueError(f"messages must be a non-empty list of messages, got {messages!r}")
    if tools is not None and not tools:
        raise ValueError("tools must not be an empty list; leave it out")
    checked = [_check_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    _check_end(checked[-1], len(checked) - 1, add_generation_prompt, continue_final_message)
    if strict:
        _check_alternation(checked)
    merged = _merge(checked)
    is_open = merged[-1]["role"] == "assistant"
    try:
        request = ChatCompletionRequest.from_openai(
            messages=merged, tools=[dict(tool) for tool in tools] if tools else None
        )
        if is_open:
            request.messages[-1].prefix = True
        tokens = tokenizer.mistral.encode_chat_completion(request).tokens
    except (MistralCommonException, ValueError, AssertionError, KeyError, TypeError) as error:
        raise ValueError(f"the conversation cannot be rendered: {error}") from error
    ids: list[int] = list(tokens)
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1 and ids[-1] != tokenizer.eos_id
    return [*ids, tokenizer.eos_id] if is_open and not continue_final_message else ids


def _check_message(message: object, name: str) -> dict[str, Any]:
    """One message in the form that mistral-common takes, its content a string."""
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} must be an object with role and content, got {message!r}")
    role = message.get("role")
    if role == "developer":
        role = "system"
    if role not in ROLES:
        raise ValueError(f"{name}.role must be one of {', '.join(ROLES)}, got {role!r}")
    unknown = {key for key, value in message.items() if value is not None} - _KEYS[role]
    if unknown:
        raise ValueError(
            f"{name} has fields that a {role} message does not take: {', '.join(sorted(map(str, unknown)))}"
        )
    checked: dict[str, Any] = {"role": role, "content": _check_content(message.get("content"), f"{name}.content")}
    if role == "tool":
        call_id = message.get("tool_call_id")
        if not isinstance(call_id, str) or not call_id:
            raise ValueError(f"{name}.tool_call_id must be a non-empty string, got {call_id!r}")
        checked["tool_call_id"] = tool_call_id_for_prompt(call_id)
        if message.get("name") is not None:
            checked["name"] = message["name"]
    if role == "assistant" and message.get("tool_calls"):
        checked["tool_calls"] = _check_tool_calls(message["tool_calls"], f"{name}.tool_calls")
        if checked["content"]:
            raise ValueError(
                f"{name} has both content and tool_calls: in this format an assistant message has one of them"
            )
        checked["content"] = None
    elif checked["content"] is None:
        raise ValueError(f"{name}.content must be a string or a list of text parts, got None")
    return checked


def _check_content(content: object, name: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"{name} must be a string or a list of text parts, got {content!r}")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
            what = f"a part of type {kind!r}" if kind not in (None, "text") else repr(part)
            raise ValueError(
                f'{name}[{index}] must be {{"type": "text", "text": ...}}: the model reads text only, got {what}'
            )
        texts.append(part["text"])
    return "\n\n".join(texts)


def _check_tool_calls(calls: object, name: str) -> list[dict[str, Any]]:
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        raise ValueError(f"{name} must be a list, got {calls!r}")
    checked = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{name}[{index}] must have a function with a name, got {call!r}")
        arguments = function.get("arguments", "{}")
        if not isinstance(arguments, (str, Mapping)):
            raise ValueError(f"{name}[{index}].function.arguments must be JSON text or an object, got {arguments!r}")
        call_id = call.get("id")
        if not isinstance(call_id, str) or not call_id:
            raise ValueError(f"{name}[{index}].id must be a non-empty string, got {call_id!r}")
        own = {"name": function["name"], "arguments": arguments if isinstance(arguments, str) else dict(arguments)}
        checked.append({"id": tool_call_id_for_prompt(call_id), "type": "function", "function": own})
    return checked


def _check_end(last: dict[str, Any], index: int, add_generation_prompt: bool, continue_final_message: bool) -> None:
    if continue_final_message and (last["role"] != "assistant" or "tool_calls" in last):
        raise ValueError(f"continue_final_message needs an assistant message with content last, got messages[{index}]")
    if not continue_final_message and add_generation_prompt and last["role"] == "assistant":
        raise ValueError(
            f"messages[{index}] is an assistant message, and nothing is left to answer; to have it continued, set "
            "continue_final_message"
        )


def _check_alternation(messages: list[dict[str, Any]]) -> None:
    """The rule of the official template: after an optional system message, user and assistant take turns."""
    turns = [(i, m) for i, m in enumerate(messages) if m["role"] in ("user", "assistant") and "tool_calls" not in m]
    if any(message["role"] == "system" for message in messages[1:]):
        index = next(i for i, message in enumerate(messages) if i and message["role"] == "system")
        raise ValueError(f"messages[{index}]: with strict, a system message may only stand first")
    for place, (index, message) in enumerate(turns):
        expected = ("user", "assistant")[place % 2]
        if message["role"] != expected:
            raise ValueError(
                f"messages[{index}]: with strict, user and assistant take turns, got {message['role']} for {expected}"
            )


def _merge(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """System messages joined and put first; neighbouring user or assistant texts joined; a user message first of all."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        before = merged[-1] if merged else None
        if message["role"] == "system":
            continue
        if (
            before is not None
            and before["role"] == message["role"] in ("user", "assistant")
            and "tool_calls" not in before
            and "tool_calls" not in message
        ):
            before["content"] = _join(before["content"], message["content"])
        else:
            merged.append(dict(message))
    if not merged or merged[0]["role"] != "user":
        merged.insert(0, {"role": "user", "content": ""})
    system = _join(*[message["content"] for message in messages if message["role"] == "system"])
    return [{"role": "system", "content": system}, *merged] if system else merged


def _join(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)
