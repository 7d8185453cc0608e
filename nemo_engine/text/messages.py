"""Checks the messages of a conversation, OpenAI's, and puts them into the form that rendering takes. Knows no tokens.

Clients send back what they received, so what a response message holds besides its text is taken: fields that are null
or empty, ``annotations``, ``refusal`` (as the text, if there is no other) and ``parsed``. Any other field is refused by
name, since the model could not see it. ``name`` is taken on every message; the format has no place for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_engine.checks import check_unicode
from nemo_engine.text.tool_calls import hashed_id

ROLES = ("system", "user", "assistant", "tool")
MAX_JSON_VALUES = 100_000
FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

_KEYS = {
    "system": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "tool_calls", "refusal", "annotations", "parsed", "prefix"},
    "tool": {"role", "content", "name", "tool_call_id"},
}


@dataclass(slots=True)
class ChatCall:
    """A tool call of a message; ``id`` is the one of the prompt, ``arguments`` JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class ChatMessage:
    """One checked message. A developer's is a system message; ``call_id`` is of a tool's, as the prompt has it.

    ``is_prefix``: an assistant's message is the beginning of the answer.
    """

    role: str
    content: str
    calls: list[ChatCall] = field(default_factory=list)
    call_id: str = ""
    is_prefix: bool = False


def tool_call_id_for_prompt(call_id: str) -> str:
    """The id that stands for ``call_id`` in a prompt: itself if it is 9 letters and digits, else 9 of its hash."""
    return call_id if re.fullmatch(r"[a-zA-Z0-9]{9}", call_id) else hashed_id(call_id)


class CallIds:
    """Gives the ids of one conversation different ids of 9 letters and digits, in the order in which they appear.

    A conversation that grows keeps those that it had.
    """

    def __init__(self) -> None:
        self._short: dict[str, str] = {}
        self._taken: set[str] = set()

    def short(self, call_id: str) -> str:
        """The id that stands for ``call_id``: of ``tool_call_id_for_prompt``, or another hash if an id before has
        it.
        """
        if call_id not in self._short:
            attempt, short = 0, tool_call_id_for_prompt(call_id)
            while short in self._taken:
                attempt += 1
                short = hashed_id(f"{call_id}\0{attempt}")
            self._short[call_id] = short
            self._taken.add(short)
        return self._short[call_id]


def check_messages(messages: object, known: Collection[str] = ()) -> list[ChatMessage]:
    """The messages, checked one by one and tool results against calls. Raises ``ValueError`` naming message and field.

    A tool's message must answer a call of the assistant's turn before it. Calls may stay without an answer. ``known``
    are fields that a message may have besides.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise ValueError(f"messages must be a non-empty list of messages, got {messages!r}")
    ids = CallIds()
    checked: list[ChatMessage] = []
    waiting: list[str] = []  # prompt ids of calls that a tool's message may answer now
    before = ""
    for index, raw in enumerate(messages):
        name = f"messages[{index}]"
        message = _check_message(raw, name, ids, known)
        if message.role == "tool":
            if message.call_id not in waiting:
                raise ValueError(
                    f"{name}.tool_call_id must be that of a tool call of the assistant message before it that has no "
                    "answer yet, "
                    f"got {raw['tool_call_id']!r}"
                )
            waiting.remove(message.call_id)
        elif message.role == "assistant":
            waiting = (waiting if before == "assistant" else []) + [call.id for call in message.calls]
        elif message.role == "user":
            waiting = []
        before = before if message.role == "system" else message.role
        checked.append(message)
    return checked


def check_content(content: object, name: str, *, part_types: Sequence[str] = ("text",)) -> str | None:
    """A string, or the texts of a list of text parts with blank lines between them; None for None."""
    if content is None:
        return None
    if isinstance(content, str):
        check_unicode(name, content)
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"{name} must be a string or a list of text parts, got {content!r}")
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or kind not in part_types or not isinstance(part.get(kind), str):
            what = f"a part of type {kind!r}" if kind not in (None, *part_types) else repr(part)
            raise ValueError(
                f'{name}[{index}] must be {{"type": "text", "text": ...}}: the model reads text only, got {what}'
            )
        refuse_unknown(part, {"type", str(kind)}, f"{name}[{index}]", f"a part of type {kind}")
        check_unicode(f"{name}[{index}].{kind}", part[kind])
        texts.append(part[kind])
    return "\n\n".join(text for text in texts if text)


def refuse_unknown(given: Mapping[Any, Any], known: set[str], name: str, what: str) -> None:
    """Raise ``ValueError`` for keys that are not ``known`` and hold something."""
    unknown = sorted(str(key) for key, value in given.items() if key not in known and not asks_nothing(value))
    if unknown:
        raise ValueError(f"{name} has fields that {what} does not take: {', '.join(unknown)}")


def asks_nothing(value: object, depth: int = 8) -> bool:
    """Whether a field with ``value`` asks for nothing: None, false, "", or an object or list of such alone."""
    if isinstance(value, (Mapping, list, tuple)):
        inner = value.values() if isinstance(value, Mapping) else value
        return not value or (
            depth > 0 and len(value) <= 64 and all(asks_nothing(member, depth - 1) for member in inner)
        )
    return value is None or value is False or (isinstance(value, str) and not value)


def _check_message(message: object, name: str, ids: CallIds, known: Collection[str]) -> ChatMessage:
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} must be an object with role and content, got {message!r}")
    role = message.get("role")
    if role == "developer":
        role = "system"
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{name}.role must be one of {', '.join(ROLES)}, got {role!r}")
    if not message.keys() <= _KEYS[role]:
        refuse_unknown(message, _KEYS[role].union(known), name, f"a message of role {role}")
    if message.get("name") is not None and not isinstance(message["name"], str):
        raise ValueError(f"{name}.name must be a string, got {message['name']!r}")
    if role == "assistant":
        return _check_assistant(message, name, ids)
    content = check_content(message.get("content"), f"{name}.content")
    if content is None:
        raise ValueError(f"{name}.content must be a string or a list of text parts, got None")
    if role != "tool":
        return ChatMessage(role, content)
    _check_json(content, f"{name}.content")
    return ChatMessage(role, content, call_id=ids.short(_check_id(message.get("tool_call_id"), f"{name}.tool_call_id")))


def _check_assistant(message: Mapping[str, Any], name: str, ids: CallIds) -> ChatMessage:
    content = check_content(message.get("content"), f"{name}.content", part_types=("text", "refusal"))
    refusal = message.get("refusal")
    if refusal is not None and not isinstance(refusal, str):
        raise ValueError(f"{name}.refusal must be a string, got {refusal!r}")
    check_unicode(f"{name}.refusal", refusal or "")
    calls: object = message.get("tool_calls")
    if calls is None:
        calls = []
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        raise ValueError(f"{name}.tool_calls must be a list, got {calls!r}")
    checked = [_check_call(call, f"{name}.tool_calls[{index}]", ids) for index, call in enumerate(calls)]
    prefix = message.get("prefix")
    if prefix is not None and not isinstance(prefix, bool):
        raise ValueError(f"{name}.prefix must be true or false, got {prefix!r}")
    return ChatMessage("assistant", content or refusal or "", checked, is_prefix=bool(prefix))


def _check_call(call: object, name: str, ids: CallIds) -> ChatCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise ValueError(f"{name} must have a function with a name, got {call!r}")
    if call.get("type", "function") not in ("function", None):
        raise ValueError(f'{name}.type must be "function", got {call["type"]!r}')
    refuse_unknown(call, {"id", "type", "function", "index"}, name, "a tool call")
    refuse_unknown(function, {"name", "arguments", "parsed_arguments"}, f"{name}.function", "a function call")
    called = function.get("name")
    if not isinstance(called, str) or not FUNCTION_NAME.fullmatch(called):
        raise ValueError(f"{name}.function.name must be 1 to 64 letters, digits, _ and -, got {called!r}")
    call_id = _check_id(call.get("id"), f"{name}.id")
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        try:
            arguments = json.dumps(dict(arguments))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{name}.function.arguments cannot be written as JSON: {error}") from None
    elif arguments is not None and not isinstance(arguments, str):
        raise ValueError(f"{name}.function.arguments must be JSON text or an object, got {arguments!r}")
    _check_json(arguments or "{}", f"{name}.function.arguments")
    return ChatCall(ids.short(call_id), called, arguments or "{}")


def _check_id(call_id: object, name: str) -> str:
    if not isinstance(call_id, str) or not call_id:
        raise ValueError(f"{name} must be a non-empty string, got {call_id!r}")
    return call_id


def _check_json(text: str, name: str) -> None:
    """What is no JSON is rendered as a string; what Python cannot read at all or not in some tens of milliseconds, or a
    tokenizer cannot, is refused."""
    if text.count(",") + text.count("[") + text.count("{") > MAX_JSON_VALUES:
        raise ValueError(f"{name} cannot be read as JSON: it has more than {MAX_JSON_VALUES} values")
    check_unicode(name, text)
    try:
        written = json.dumps(json.loads(text), ensure_ascii=False)  # as it is rendered
    except json.JSONDecodeError:
        return
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be read as JSON: {error}") from None
    check_unicode(name, written)
