"""``TemplateRenderer``: turns conversations into prompts by a checkpoint's own template. It is imported only if there
is a template, for importing Jinja takes a while.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nemo_engine.checks import check_unicode
from nemo_engine.text.call_styles import CallStyle, ListCalls, TaggedCalls
from nemo_engine.text.chat import SystemPlacement, check_length, render_chat
from nemo_engine.text.chat_probe import (
    ANSWER,
    SYSTEM,
    THANKS,
    TOOL,
    USER,
    MessageForm,
    TemplateFacts,
    call_messages,
    probe,
)
from nemo_engine.text.chat_renderer import Messages, Tools
from nemo_engine.text.chat_sources import Templates
from nemo_engine.text.chat_template import ChatTemplate, ControlTokens, Part
from nemo_engine.text.messages import ChatMessage, asks_nothing, check_messages
from nemo_engine.text.tokenizer import Tokenizer
from nemo_engine.text.tools import check_tools

_TAKEN = (
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "tokenize",
)
_USUAL = ("role", "content", "name", "tool_calls", "tool_call_id", "refusal", "annotations", "parsed", "prefix")
_REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names of one thing; transformers gives templates the first two


class TemplateRenderer:
    """A template, or several by name: "tool_use" serves conversations with tools where there is one.

    Raises ``ValueError``.
    """

    name = "template"
    places_system = False

    def __init__(
        self, tokenizer: Tokenizer, control: ControlTokens, templates: Templates, special: Mapping[str, str]
    ) -> None:
        self._tokenizer = tokenizer
        self.source: str | None = templates.source
        self._control = control
        texts = templates.texts
        if "default" not in texts and "tool_use" not in texts:
            raise ValueError(f"{self.source} has no template named default or tool_use, but {', '.join(texts)}")
        self._plain, self._facts = self._load(texts.get("default", texts.get("tool_use", "")), control, special)
        self._with_tools, self._tool_facts = self._plain, self._facts
        if "tool_use" in texts and "default" in texts:
            self._with_tools, self._tool_facts = self._load(texts["tool_use"], control, special)
        ends = dict.fromkeys(self._facts.ends + self._tool_facts.ends)
        self.end_names = tuple(token.content for token in ends)
        self.end_ids = frozenset(token.id for token in ends)
        self.no_tools = None
        if self._tool_facts.no_tools is not None:
            self.no_tools = f"tools are not taken: the chat template of {self.source} {self._tool_facts.no_tools}"
        self.calls: CallStyle | None = None
        if self._tool_facts.call_form is not None:
            self.calls = TaggedCalls(self._tool_facts.call_form, tokenizer)
        elif self._tool_facts.writes_list and tokenizer.tool_calls_id is not None:
            self.calls = ListCalls(tokenizer.tool_calls_id)
        self.fields = _fields_beside(self._plain) | _fields_beside(self._with_tools)

    def _load(
        self, text: str, control: ControlTokens, special: Mapping[str, str]
    ) -> tuple[ChatTemplate, TemplateFacts]:
        template = ChatTemplate(text, str(self.source), control, special)
        return template, probe(template)

    def render(
        self,
        messages: Messages,
        *,
        tools: Tools = None,
        documents: object = None,
        chat_template_kwargs: object = None,
        strict: bool = False,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        system_placement: SystemPlacement = "last",
        start_tool_calls: bool = False,
        max_tokens: int | None = None,
    ) -> list[int]:
        """See ``Renderer``. ``strict`` changes nothing: what a template takes, it takes as it is."""
        if system_placement not in ("last", "first"):
            raise ValueError(f'system_placement must be "last" or "first", got {system_placement!r}')
        if system_placement == "first":
            raise ValueError(
                f'system_placement "first" is for Mistral\'s own format; here the template of {self.source} places '
                "system text"
            )
        if tools:
            check_tools(tools)
            if self.no_tools is not None:
                raise ValueError(self.no_tools)
        template, facts = (self._with_tools, self._tool_facts) if tools else (self._plain, self._facts)
        extra = _fields_beside(template)
        checked = check_messages(messages, extra)
        is_open = _is_open(checked, continue_final_message)
        if max_tokens is not None:
            check_length(self._tokenizer, [message.content for message in checked], max_tokens)
        parts = template.render(
            [_for_template(raw, element, facts.form, extra) for raw, element in zip(messages, checked)],
            tools=[dict(tool) for tool in tools] if tools else None,
            documents=_check_documents(documents, template),
            variables=_check_variables(chat_template_kwargs, template),
            add_generation_prompt=add_generation_prompt and not is_open,
            continue_final_message=is_open,
        )
        if start_tool_calls:
            parts = self._started(parts, checked[-1], tools)
        if max_tokens is not None:
            check_length(self._tokenizer, [part for part in parts if isinstance(part, str)], max_tokens)
        return self._control.encode(parts)

    def difference_from_mistral(self) -> str | None:
        """A difference between its prompts and those of Mistral's rules; None if they are the same in all cases that
        are tried.
        """
        return _difference_from_mistral(self, self._tokenizer)

    def _started(self, parts: list[Part], last: ChatMessage, tools: Tools) -> list[Part]:
        """The prompt, with the beginning of a call added."""
        if not tools or last.role == "assistant" or self.calls is None:
            raise ValueError("start_tool_calls needs tools, and a last message that is not an assistant's")
        opening = self._control.split(self.calls.opening, self.calls.opening)
        if isinstance(parts[-1], str) and isinstance(opening[0], str):
            return [*parts[:-1], parts[-1] + opening[0], *opening[1:]]
        return parts + opening


def _difference_from_mistral(template: TemplateRenderer, tokenizer: Tokenizer) -> str | None:
    if tokenizer.mistral is None:
        return "the tokenizer lacks control tokens of Mistral's format"
    called = call_messages(MessageForm(text_arguments=True, short_ids=True))
    tries: tuple[tuple[str, list[dict[str, Any]], Tools], ...] = (
        ("a question", [USER], None),
        ("a system text", [SYSTEM, USER], None),
        ("several turns", [USER, ANSWER, THANKS], None),
        ("several turns with a system text", [SYSTEM, USER, ANSWER, THANKS], None),
        ("tools", [USER], [TOOL]),
        ("tool calls and their results", called, [TOOL]),
    )
    for what, messages, tools in tries:
        expected = render_chat(tokenizer, messages, tools=tools if tools is None else check_tools(tools))
        try:
            ids = template.render(messages, tools=tools)
        except ValueError as error:
            return f"it does not take {what}: {error}"
        if ids != expected:
            return f"its prompts of {what} are others than those of Mistral's format"
    return None


def _fields_beside(template: ChatTemplate) -> frozenset[str]:
    """The fields of messages, beside the usual ones, that a template reads."""
    fields = template.words - {"prefix"}
    return fields.union(_REASONING) if fields.intersection(_REASONING) else fields


def _is_open(messages: Sequence[ChatMessage], continue_final_message: bool) -> bool:
    """Whether the last message is to be continued."""
    last = len(messages) - 1
    for index, message in enumerate(messages):
        if message.is_prefix and index != last:
            raise ValueError(f"messages[{index}].prefix may be true in the last message only")
    is_open = continue_final_message or messages[-1].is_prefix
    if is_open and (messages[-1].role != "assistant" or messages[-1].calls):
        raise ValueError(f"continue_final_message needs an assistant message with content last, got messages[{last}]")
    return is_open


def _for_template(
    raw: Mapping[str, Any], checked: ChatMessage, form: MessageForm, extra: Collection[str]
) -> dict[str, Any]:
    """A message in the form for templates: without empty fields, and with arguments of calls as objects."""
    message: dict[str, Any] = {"role": checked.role}
    if not checked.calls or checked.content or raw.get("content") is not None or form.empty_content:
        message["content"] = [{"type": "text", "text": checked.content}] if form.parts else checked.content
    if raw.get("name"):
        message["name"] = raw["name"]
    if checked.calls:
        call_ids = [call["id"] for call in raw["tool_calls"]]
        message["tool_calls"] = [
            {
                "id": call.id if form.short_ids else call_id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments, form)},
            }
            for call, call_id in zip(checked.calls, call_ids)
        ]
    if checked.role == "tool":
        message["tool_call_id"] = checked.call_id if form.short_ids else raw["tool_call_id"]
    for key, value in raw.items():
        if key in extra and key not in _USUAL and value is not None:
            check_value(value, key)
            message[key] = value
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _arguments(text: str, form: MessageForm) -> Any:
    if form.text_arguments:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def check_value(value: object, name: str) -> None:
    """Raise ``ValueError`` for a value that is no JSON, or has text that is no valid Unicode."""
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be written as JSON: {error}") from None
    check_unicode(name, written)


def _check_documents(documents: object, template: ChatTemplate) -> list[dict[str, Any]] | None:
    if asks_nothing(documents):
        return None
    if not isinstance(documents, Sequence) or not all(isinstance(element, Mapping) for element in documents):
        raise ValueError(f"documents must be a list of objects, got {documents!r}")
    check_value(documents, "documents")
    if "documents" not in template.words:
        raise ValueError(f"documents are not taken: {template.name} does not read them")
    return [dict(element) for element in documents]


def _check_variables(variables: object, template: ChatTemplate) -> dict[str, Any]:
    if variables is None:
        return {}
    if not isinstance(variables, Mapping):
        raise ValueError(f"chat_template_kwargs must be an object, got {variables!r}")
    check_value(variables, "chat_template_kwargs")
    for name in variables:
        if name in _TAKEN:
            raise ValueError(f"chat_template_kwargs.{name} must be given as {name} itself")
        if name not in template.words:
            raise ValueError(f"chat_template_kwargs.{name} has no effect: {template.name} does not read it")
    return dict(variables)
