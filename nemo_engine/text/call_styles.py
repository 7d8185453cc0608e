"""The styles in which models write tool calls: Mistral's list, or tags around each call, as Hermes and most fine-tunes.

A style reads calls from answers, whole or streamed, and makes the grammar of answers that must or may be calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from nemo_engine.structured_outputs import StructuredOutputsParams
from nemo_engine.text.grammar import tool_call_grammar
from nemo_engine.text.tokenizer import Tokenizer
from nemo_engine.text.tool_calls import (
    MARKER,
    AnswerParser,
    Content,
    Event,
    ToolCall,
    ToolCallParser,
    merge_events,
    parse_answer,
    parse_tool_calls,
)
from nemo_engine.text.tools import tool_call_schema

_MAX_HELD = 1 << 16  # characters of white space that are held back because a call may follow


@dataclass(frozen=True, slots=True)
class CallForm:
    """The form of tool calls: ``open``, the JSON object of a call, ``close``, and ``between`` two of them.

    ``marker`` and ``end_marker`` are ``open`` and ``close`` without white space.
    """

    open: str
    close: str
    between: str

    @property
    def marker(self) -> str:
        """The text with which a call begins."""
        return self.open.strip()

    @property
    def end_marker(self) -> str:
        """The text with which a call ends."""
        return self.close.strip()


class CallReader(Protocol):
    """Reads one streamed answer."""

    @property
    def num_calls(self) -> int:
        """Calls that have started."""
        ...

    def feed(self, text: str, tool_calls_start: int | None = None) -> list[Event]:
        """Take in the ``text`` and ``tool_calls_start`` of one ``CompletionOutput`` with deltas."""
        ...

    def finish(self) -> list[Event]:
        """The answer has ended; returns what was held back."""
        ...


class CallStyle(Protocol):
    """``opening`` is the text that begins a call; ``trigger_id`` is its token, if it is a single one.

    ``shows_special``: the tags are control tokens, so answers must show these.
    """

    described: str
    opening: str
    trigger_id: int | None
    shows_special: bool

    def reader(self, *, is_forced: bool, shows_special: bool, seed: str | None = None) -> CallReader:
        """A reader of one streamed answer. ``is_forced``: the answer is calls and nothing else, and the prompt ends
        with the beginning of the first.
        """
        ...

    def read(
        self, text: str, tool_calls_start: int | None, *, is_forced: bool, is_truncated: bool, shows_special: bool
    ) -> tuple[str, list[ToolCall]]:
        """Read a whole answer as (content, calls)."""
        ...

    def forced(self, tools: Sequence[Mapping[str, Any]], names: Sequence[str], parallel: bool) -> object:
        """The form of an answer that must be calls, and whose beginning is at the end of the prompt."""
        ...

    def optional(
        self, tools: Sequence[Mapping[str, Any]], names: Sequence[str], parallel: bool, schema: Mapping[str, Any]
    ) -> object:
        """The form of an answer that may be calls or JSON of ``schema``."""
        ...


class ListCalls:
    """Mistral's style: the token [TOOL_CALLS], then a JSON list of calls."""

    described = "a list after [TOOL_CALLS]"
    opening = MARKER
    shows_special = False

    def __init__(self, trigger_id: int) -> None:
        self.trigger_id: int | None = trigger_id

    def reader(self, *, is_forced: bool, shows_special: bool, seed: str | None = None) -> CallReader:
        """See ``CallStyle``."""
        return AnswerParser(seed=seed, shows_special=shows_special, starts_with_calls=is_forced)

    def read(
        self, text: str, tool_calls_start: int | None, *, is_forced: bool, is_truncated: bool, shows_special: bool
    ) -> tuple[str, list[ToolCall]]:
        """See ``CallStyle``."""
        if is_forced:
            return parse_tool_calls(text, is_truncated=is_truncated)
        return parse_answer(text, tool_calls_start, is_truncated=is_truncated, shows_special=shows_special)

    def forced(self, tools: Sequence[Mapping[str, Any]], names: Sequence[str], parallel: bool) -> object:
        """See ``CallStyle``."""
        return {"json": tool_call_schema(tools, names, parallel)}

    def optional(
        self, tools: Sequence[Mapping[str, Any]], names: Sequence[str], parallel: bool, schema: Mapping[str, Any]
    ) -> object:
        """See ``CallStyle``."""
        assert self.trigger_id is not None
        return tool_call_grammar(self.trigger_id, tool_call_schema(tools, names, parallel), schema)


class TaggedCalls:
    """Hermes's style: ``<tool_call>``, the JSON object of a call, ``</tool_call>``, any number of times."""

    def __init__(self, form: CallForm, tokenizer: Tokenizer) -> None:
        self.form = form
        self.opening = form.open
        self.described = f"objects between {form.marker} and {form.end_marker}"
        self.trigger_id = tokenizer.added_id(form.marker)
        tags = {tag: tokenizer.added_id(tag) for tag in (form.marker, form.end_marker)}
        self._special = {tag: i for tag, i in tags.items() if i is not None and tokenizer.is_special(i)}
        self.shows_special = bool(self._special)

    def reader(self, *, is_forced: bool, shows_special: bool, seed: str | None = None) -> CallReader:
        """See ``CallStyle``."""
        return TaggedReader(self.form, is_forced=is_forced, seed=seed)

    def read(
        self, text: str, tool_calls_start: int | None, *, is_forced: bool, is_truncated: bool, shows_special: bool
    ) -> tuple[str, list[ToolCall]]:
        """See ``CallStyle``."""
        reader = TaggedReader(self.form, is_forced=is_forced)
        events = reader.feed(text) + reader.finish()
        if reader.is_malformed or (reader.is_cut and not is_truncated):
            return text, []
        return merge_events(events)

    def forced(self, tools: Sequence[Mapping[str, Any]], names: Sequence[str], parallel: bool) -> object:
        """See ``CallStyle``."""
        return StructuredOutputsParams(grammar=self._grammar("call", tools, names, parallel))

    def optional(
        self, tools: Sequence[Mapping[str, Any]], names: Sequence[str], parallel: bool, schema: Mapping[str, Any]
    ) -> object:
        """See ``CallStyle``."""
        start = f"{self._written(self.form.open)} call"
        rules = self._grammar(start, tools, names, parallel, " | answer")
        return StructuredOutputsParams(grammar=f"{rules}answer: %json {json.dumps(schema)}\n")

    def _grammar(
        self, start: str, tools: Sequence[Mapping[str, Any]], names: Sequence[str], parallel: bool, suffix: str = ""
    ) -> str:
        schema = tool_call_schema(tools, names, parallel)
        call = {**schema["items"], **({"$defs": schema["$defs"]} if "$defs" in schema else {})}
        again = self._written(self.form.between + self.form.open)
        return (
            f"start: {start}{' (' + again + ' call)*' if parallel else ''}{suffix}\n"
            f"call: object {self._written(self.form.close)}\nobject: %json {json.dumps(call)}\n"
        )

    def _written(self, text: str) -> str:
        """``text`` as a part of a grammar, in which control tokens are named by id."""
        tags = "|".join(map(re.escape, self._special)) or "(?!)"
        pieces = [piece for piece in re.split(f"({tags})", text) if piece]
        return " ".join(
            [f"<[{self._special[element]}]>" if element in self._special else json.dumps(element) for element in pieces]
        )


class TaggedReader:
    """Reads an answer with tagged calls piece by piece. The merged events do not depend on where pieces are cut.

    White space in front of a call, between calls and behind the last is left out. Text between tags that is no call
    becomes content, together with its tag, and sets ``is_malformed``. ``is_cut``: the text ended within a call.
    """

    def __init__(self, form: CallForm, *, is_forced: bool = False, seed: str | None = None) -> None:
        self.is_malformed = False
        self.is_cut = False
        self._form = form
        self._seed = seed
        self._num_before = 0  # calls before the open one
        self._held = ""  # content that may belong to a tag or be white space in front of one
        self._opened = ""  # the tag that the open call began with
        self._tail = ""  # text after the JSON object of the open call
        self._call: ToolCallParser | None = self._new_call() if is_forced else None

    @property
    def num_calls(self) -> int:
        """Calls that have started."""
        return self._num_before + (0 if self._call is None else self._call.num_calls)

    def feed(self, text: str, tool_calls_start: int | None = None) -> list[Event]:
        """Take in more text; returns what it adds."""
        events: list[Event] = []
        while text:
            text = self._in_content(text, events) if self._call is None else self._in_call(self._call, text, events)
        return events

    def finish(self) -> list[Event]:
        """The text has ended; returns what was held back."""
        events: list[Event] = []
        if self._call is not None:
            self._take(self._call, self._call.finish(), events)
            self.is_cut = self._call.is_cut
            if self._call.num_calls == 0 and self._opened:
                events.append(Content(self._opened))
                self.is_cut = True
            self._held = "" if self._form.end_marker.startswith(self._tail) else self._tail
            self._close()
        if self._held and not (self.num_calls and self._held.isspace()):
            events.append(Content(self._held))
        self._held = ""
        return events

    def _new_call(self) -> ToolCallParser:
        return ToolCallParser(seed=None if self._seed is None else f"{self._seed}\0{self._num_before}")

    def _close(self) -> None:
        self._num_before = self.num_calls
        self._call, self._tail = None, ""

    def _in_content(self, text: str, events: list[Event]) -> str:
        """Read content up to a tag; returns the text behind that."""
        text, marker = self._held + text, self._form.marker
        place = text.find(marker)
        if place >= 0:
            before = text[:place].rstrip()
            self._held, self._opened, self._call = "", marker, self._new_call()
            rest = text[place + len(marker) :]
        else:
            sizes = range(min(len(text), len(marker) - 1), 0, -1)
            num_held = next((size for size in sizes if marker.startswith(text[-size:])), 0)
            before = text[: len(text) - num_held]
            before = before.rstrip() if len(before) - len(before.rstrip()) <= _MAX_HELD else before
            self._held, rest = text[len(before) :], ""
        if before:
            events.append(Content(before))
        return rest

    def _in_call(self, call: ToolCallParser, text: str, events: list[Event]) -> str:
        """Read text between tags; returns the text behind them."""
        self._take(call, call.feed(text), events)
        end, tail = self._form.end_marker, self._tail
        if not tail or (len(tail) < len(end) and end.startswith(tail)):
            return ""
        self.is_malformed = self.is_malformed or not tail.startswith(end)
        self._close()
        return tail.removeprefix(end)

    def _take(self, call: ToolCallParser, hit: list[Event], events: list[Event]) -> None:
        """Pass on the events of the call's reader; keep text that follows its object."""
        for element in hit:
            if isinstance(element, Content):
                if call.num_calls == 0 and self._opened:
                    events.append(Content(self._opened))
                    self._opened = ""
                self._tail += element.text
            else:
                events.append(replace(element, index=self._num_before + element.index))
        self.is_malformed = self.is_malformed or call.is_malformed
