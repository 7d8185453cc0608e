"""Conversations to token ids, by the rules of mistral-common: what the model was trained on, and no text in between.

Text of a user never becomes a control token, because control tokens are put in as ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from nemo_engine.text.messages import ChatMessage, check_messages
from nemo_engine.text.tokenizer import Tokenizer
from nemo_engine.text.tools import check_tools

SystemPlacement = Literal["last", "first"]


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    strict: bool = False,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    system_placement: SystemPlacement = "last",
    start_tool_calls: bool = False,
    max_tokens: int | None = None,
) -> list[int]:
    """The ids that ask the model for the next assistant message: one BOS, no EOS at the end.

    With ``add_generation_prompt`` off a conversation may also end with an assistant message, which an EOS then closes.

    ``messages`` and ``tools`` are OpenAI's; see ``check_messages`` and ``check_tools`` for what is taken. Neighbouring
    messages of one role are merged with a blank line between them, several system messages are joined and stand before
    the last user message, an empty user message is put first if another role begins, and an assistant message with
    nothing in it is left out; with ``strict`` what the official template refuses is refused.
    ``continue_final_message``, or ``"prefix": true`` in it, leaves the last message, an assistant's, open to be
    continued. Raises ``ValueError`` naming the message.

    The format gives an assistant's turn either text or tool calls. One with both is rendered as the model writes it
    when it does: the text, then the token [TOOL_CALLS] and the calls.

    ``system_placement`` "last" is the format's own rule: system text and tool list stand in front of the last user
    message, so they move from turn to turn, and what follows is computed anew. "first" puts them in front of the first
    user message, where they stay: the ids of a turn then begin with those of the turn before. ``start_tool_calls`` ends
    the prompt with the token [TOOL_CALLS], so that the answer is a list of calls. Texts that make far more than
    ``max_tokens`` are refused before they are encoded.
    """
    from mistral_common.exceptions import MistralCommonException

    checked = check_messages(messages)
    if tools is not None:
        check_tools(tools)
    if system_placement not in ("last", "first"):
        raise ValueError(f'system_placement must be "last" or "first", got {system_placement!r}')
    # System text moves to the front, so the last message is the last that is not the system's.
    end = max((index for index, message in enumerate(checked) if message.role != "system"), default=0)
    for index, message in enumerate(checked):
        if message.is_prefix and index != end:
            raise ValueError(f"messages[{index}].prefix may be true in the last message only")
    continue_final_message = continue_final_message or checked[end].is_prefix
    _check_end(checked[end], end, add_generation_prompt, continue_final_message)
    if strict:
        _check_alternation(checked)
    merged = _merge(checked)
    system = _join(*[message.content for message in checked if message.role == "system"])
    if max_tokens is not None:
        check_length(tokenizer, [system, *(message.content for message in merged)], max_tokens)
    try:
        ids = _encode(tokenizer, merged, system, tools or (), system_placement, continue_final_message)
    except (MistralCommonException, ValueError, AssertionError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"the conversation cannot be rendered: {error}") from error
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
    assert ids[-1] != tokenizer.eos_id or (checked[end].role == "assistant" and not continue_final_message)
    return ids + _tool_calls_start(tokenizer, checked[end], tools) if start_tool_calls else ids


def _encode(
    tokenizer: Tokenizer,
    messages: list[ChatMessage],
    system: str,
    tools: Sequence[Mapping[str, Any]],
    placement: SystemPlacement,
    is_open: bool,
) -> list[int]:
    """The ids of checked and merged messages, message by message through mistral-common's encoders."""
    from mistral_common.protocol.instruct import messages as wire
    from mistral_common.protocol.instruct.tool_calls import FunctionCall, Tool
    from mistral_common.protocol.instruct.tool_calls import ToolCall as WireCall

    instruct = tokenizer.mistral.instruct_tokenizer
    available = [Tool.from_openai(dict(tool)) for tool in tools] or None
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    first, last = users[0], users[-1]
    ids: list[int] = list(instruct.start())
    if system and hasattr(instruct, "BEGIN_SYSTEM"):  # formats after v3 have a place of its own for it
        ids += instruct.encode_system_message(wire.SystemMessage(content=system))[0]
        system = ""
    for index, message in enumerate(messages):
        if message.role == "user":
            # The encoders put tools and system text where is_last says, those of v1 where is_first says.
            is_last = index == (first if placement == "first" else last)
            ids += instruct.encode_user_message(
                wire.UserMessage(content=message.content),
                available,
                is_last,
                index == first,
                system_prompt=system or None,
            )[0]
        elif message.role == "tool":
            result = wire.ToolMessage(content=message.content or "{}", tool_call_id=message.call_id)
            ids += instruct.encode_tool_message(result, index < last)[0]
        else:
            stays_open = is_open and index == len(messages) - 1
            calls = [
                WireCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
                for call in message.calls
            ]
            if message.content:
                text = wire.AssistantMessage(content=message.content, prefix=stays_open or bool(calls))
                ids += instruct.encode_assistant_message(text, index < last)
            if calls:
                ids += instruct.encode_assistant_message(
                    wire.AssistantMessage(tool_calls=calls, prefix=stays_open), index < last
                )
    return ids


def _tool_calls_start(tokenizer: Tokenizer, last: ChatMessage, tools: Sequence[Mapping[str, Any]] | None) -> list[int]:
    if tokenizer.tool_calls_id is None:
        raise ValueError(
            f"start_tool_calls needs a tokenizer with [TOOL_CALLS], and this one ({tokenizer.version}) has none"
        )
    if not tools or last.role == "assistant":
        raise ValueError("start_tool_calls needs tools, and a last message that is not an assistant's")
    return [tokenizer.tool_calls_id]


def check_length(tokenizer: Tokenizer, texts: Sequence[str], max_chars: int) -> None:
    """Refuse messages whose ``texts`` alone have more than ``most`` tokens, before they are encoded as a whole."""
    left = max_chars
    for text in texts:
        if left < 0 or tokenizer.exceeds(text, left):
            raise ValueError(f"messages have at least {max_chars + 1} tokens: more than max_model_len {max_chars}")
        left -= tokenizer.min_tokens(text)


def _check_end(last: ChatMessage, index: int, add_generation_prompt: bool, continue_final_message: bool) -> None:
    if continue_final_message and (last.role != "assistant" or last.calls):
        raise ValueError(f"continue_final_message needs an assistant message with content last, got messages[{index}]")
    if not continue_final_message and add_generation_prompt and last.role == "assistant":
        raise ValueError(
            f"messages[{index}] is an assistant message, and nothing is left to answer; to have it continued, set "
            "continue_final_message"
        )


def _check_alternation(messages: list[ChatMessage]) -> None:
    """The rule of the official template: after an optional system message, user and assistant take turns."""
    for index, message in enumerate(messages):
        if message.role == "system" and index:
            raise ValueError(f"messages[{index}]: with strict, a system message may only stand first")
        if message.calls and message.content:
            raise ValueError(
                f"messages[{index}]: with strict, an assistant message has content or tool_calls, not both"
            )
    turns = [(i, m) for i, m in enumerate(messages) if m.role in ("user", "assistant") and not m.calls]
    for place, (index, message) in enumerate(turns):
        expected = ("user", "assistant")[place % 2]
        if message.role != expected:
            raise ValueError(
                f"messages[{index}]: with strict, user and assistant take turns, got {message.role} for {expected}"
            )


def _merge(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Neighbours of one role made one, less system messages and empty ones of the assistant; a user message first of
    all.
    """
    merged: list[ChatMessage] = []
    texts: list[list[str]] = []  # of each
    for message in messages:
        before = merged[-1] if merged else None
        if message.role == "system" or (message.role == "assistant" and not message.content and not message.calls):
            continue
        # Text after calls would stand in front of them, so it remains a turn of its own.
        is_same = before is not None and before.role == message.role in ("user", "assistant")
        if before is not None and is_same and not (before.calls and message.content):
            texts[-1].append(message.content)
            before.calls += message.calls
        else:
            merged.append(ChatMessage(message.role, "", list(message.calls), message.call_id))
            texts.append([message.content])
    for message, parts in zip(merged, texts):
        message.content = _join(*parts)
    if not merged or merged[0].role != "user":
        merged.insert(0, ChatMessage("user", ""))
    return merged


def _join(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)
