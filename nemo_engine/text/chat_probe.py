"""Finds out by small conversations what a chat template does: the tokens that end a turn, whether it takes tools, and
the form of calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from nemo_engine.text.call_styles import CallForm
from nemo_engine.text.chat_template import ChatTemplate, Part
from nemo_engine.text.template_meter import Metered
from nemo_engine.text.vocabulary import AddedToken

Messages: TypeAlias = list[dict[str, Any]]
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up_word",
        "description": "Look a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "The word."}},
            "required": ["word"],
        },
    },
}
SYSTEM: dict[str, Any] = {"role": "system", "content": "Answer briefly."}
USER: dict[str, Any] = {"role": "user", "content": "What does quokka mean?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "A small wallaby."}
THANKS: dict[str, Any] = {"role": "user", "content": "Thank you."}

_CALL_IDS = ("probe1234", "probe5678")
_WORDS = ("quokka", "numbat")


@dataclass(frozen=True, slots=True)
class MessageForm:
    """The form of messages that a template takes.

    ``parts``: content is a list of parts. ``empty_content``: a message with calls has content "" rather than none.
    ``text_arguments``: arguments of calls are JSON text rather than objects. ``short_ids``: calls have ids of 9 letters
    and digits.
    """

    parts: bool = False
    empty_content: bool = False
    text_arguments: bool = False
    short_ids: bool = False


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """``ends`` are the tokens that close an assistant's turn. ``writes_list``: calls are Mistral's list.

    ``no_tools`` says why tools are refused, None if they are taken.
    """

    form: MessageForm
    ends: tuple[AddedToken, ...]
    call_form: CallForm | None
    writes_list: bool
    no_tools: str | None


def call_messages(form: MessageForm, num_calls: int = 1, *, with_results: bool = True) -> Messages:
    """A conversation with a question, calls of the tool, and their results."""
    ids = _CALL_IDS if form.short_ids else ("call_probe_1", "call_probe_2")
    calls = []
    for call_id, word in list(zip(ids, _WORDS))[:num_calls]:
        arguments = {"word": word}
        function = {"name": "look_up_word", "arguments": json.dumps(arguments) if form.text_arguments else arguments}
        calls.append({"id": call_id, "type": "function", "function": function})
    message: dict[str, Any] = {"role": "assistant", "tool_calls": calls}
    if form.empty_content:
        message["content"] = [] if form.parts else ""
    results: Messages = [
        {"role": "tool", "name": "look_up_word", "tool_call_id": call["id"], "content": '{"is": "an animal"}'}
        for call in calls
    ]
    return put(form, [USER]) + [message] + (put(form, results) if with_results else [])


def put(form: MessageForm, messages: Sequence[dict[str, Any]]) -> Messages:
    """The messages in ``form``."""
    if not form.parts:
        return list(messages)
    return [
        {**element, "content": [{"type": "text", "text": element["content"]}]}
        if isinstance(element.get("content"), str)
        else element
        for element in messages
    ]


def probe(template: ChatTemplate) -> TemplateFacts:
    """Try a template. Raises ``ValueError`` if it takes no conversation at all.

    All tries together have the limits of one rendering.
    """
    with Metered():
        return _probe(template)


def _probe(template: ChatTemplate) -> TemplateFacts:
    form = _find_form(template)
    ends = _find_ends(template, form)
    shows_tools = _shows_tools(template, form)
    if not shows_tools:
        return TemplateFacts(form, ends, None, False, "shows the model none")
    for short_ids in (False, True):
        for text_arguments in (False, True):
            for empty_content in (False, True):
                tried = MessageForm(form.parts, empty_content, text_arguments, short_ids)
                parts = _try(template, call_messages(tried), tools=[TOOL], add_generation_prompt=False)
                if parts is None:
                    continue
                if _writes_list(parts):
                    return TemplateFacts(tried, ends, None, True, None)
                call_form = _read_calls(template, tried)
                if call_form is not None:
                    return TemplateFacts(tried, ends, call_form, False, None)
    return TemplateFacts(form, ends, None, False, "writes calls in a form that is not read here")


def flat(parts: Sequence[Part]) -> str:
    """The prompt as one text, with the names of control tokens."""
    return "".join([part if isinstance(part, str) else part.content for part in parts])


def _try(template: ChatTemplate, messages: Messages, **options: Any) -> list[Part] | None:
    try:
        return template.render(messages, **options)
    except ValueError:
        return None


def _find_form(template: ChatTemplate) -> MessageForm:
    first: ValueError | None = None
    for form in (MessageForm(), MessageForm(parts=True)):
        for messages in ([USER], [SYSTEM, USER]):
            try:
                if str(USER["content"]) in flat(template.render(put(form, messages))):
                    return form
            except ValueError as error:
                first = first or error
    raise first or ValueError(f"{template.name} leaves out what a user says")


def _find_ends(template: ChatTemplate, form: MessageForm) -> tuple[AddedToken, ...]:
    """The control tokens that directly follow an answer, in the last turn and in an earlier one."""
    hit: dict[int, AddedToken] = {}
    for messages in ([USER, ANSWER], [USER, ANSWER, THANKS]):
        parts = _try(template, put(form, messages), add_generation_prompt=False) or []
        for part, after in zip(parts, parts[1:]):
            is_end = isinstance(part, str) and part.rstrip().endswith(str(ANSWER["content"]))
            if is_end and isinstance(after, AddedToken):
                hit.setdefault(after.id, after)
    return tuple(hit.values())


def _shows_tools(template: ChatTemplate, form: MessageForm) -> bool:
    for messages in ([USER], [SYSTEM, USER]):
        parts = _try(template, put(form, messages), tools=[TOOL])
        if parts is not None and "look_up_word" in flat(parts):
            return True
    return False


def _writes_list(parts: Sequence[Part]) -> bool:
    for part, after in zip(parts, parts[1:]):
        if isinstance(part, AddedToken) and part.content == "[TOOL_CALLS]" and isinstance(after, str):
            try:
                calls, _ = json.JSONDecoder().raw_decode(after.strip())
            except ValueError:
                return False
            return isinstance(calls, list) and [_is_call(call, _WORDS[0]) for call in calls] == [True]
    return False


def _read_calls(template: ChatTemplate, form: MessageForm) -> CallForm | None:
    """The form of calls in which each stands between ``<tool_call>`` and ``</tool_call>``."""
    parts = _try(template, call_messages(form, 2), tools=[TOOL], add_generation_prompt=False)
    single = parts is None
    if single:  # some templates take only one call in a turn
        parts = _try(template, call_messages(form), tools=[TOOL], add_generation_prompt=False)
    text = flat(parts or ())
    spans = []
    for hit in re.finditer(r"<tool_call>\s*", text):
        try:
            call, length = json.JSONDecoder().raw_decode(text[hit.end() :])
        except ValueError:
            continue
        close = re.compile(r"\s*</tool_call>").match(text, hit.end() + length)
        if close is not None and any(_is_call(call, word) for word in _WORDS):
            spans.append((hit.start(), hit[0], close[0], close.end()))
    if len(spans) != (1 if single else 2):
        return None
    between = "\n" if single else text[spans[0][3] : spans[1][0]]
    return CallForm(spans[0][1], spans[0][2], between if not between.strip() else "\n")


def _is_call(call: object, word: str) -> bool:
    return isinstance(call, dict) and call.get("name") == "look_up_word" and call.get("arguments") == {"word": word}
