"""NeMo's tool calls, read from an answer's text as it comes: ``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``.

The trigger is the token ``[TOOL_CALLS]``, never these characters: ``CompletionOutput.tool_calls_start`` is its place in
the text. No text after it is an error: text that is no list of calls is content. Knows no requests and no HTTP.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeAlias

from nemo_engine.text.json_scanner import JsonScanner

ID_LENGTH = 9
ID_ALPHABET = string.digits + string.ascii_letters
MAX_HELD = 1 << 20  # characters that are held back until it is clear whether they are calls
MARKER = "[TOOL_CALLS]"  # the text of the trigger where control tokens are shown

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_KEYS = ("name", "arguments", "id", "type")
_SPACE = " \t\n\r"


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is no part of a call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call whose name is known. ``index`` counts the calls from 0; ``id`` is 9 letters and digits, made here."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallFinished:
    """The end of a call. If ``is_complete`` is false, its arguments broke off and are no valid JSON."""

    index: int
    is_complete: bool


Event: TypeAlias = Content | CallStarted | ArgumentsDelta | CallFinished


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A whole call; ``arguments`` is the JSON text of an object."""

    id: str
    name: str
    arguments: str


def new_tool_call_id(seed: str | int | None = None, index: int = 0) -> str:
    """An id of 9 letters and digits: random, or a function of ``seed`` and ``index``."""
    if seed is None:
        return "".join(secrets.choice(ID_ALPHABET) for _ in range(ID_LENGTH))
    return hashed_id(f"{seed}\0{index}")


def hashed_id(text: str) -> str:
    """9 letters and digits that are a function of ``text``."""
    number = int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest(), "little")
    letters = []
    for _ in range(ID_LENGTH):
        number, index = divmod(number, len(ID_ALPHABET))
        letters.append(ID_ALPHABET[index])
    return "".join(letters)


class ToolCallParser:
    """Reads the text after the trigger piece by piece. The merged events do not depend on where pieces are cut.

    A call starts when its name is complete. Its arguments follow as they come, as the model wrote them; joined, they
    are JSON that equals its object. The keys ``id`` and ``type`` are passed over. White space may be anywhere, a single
    object may stand for the list, and text after the list is content. Arguments may be a string with JSON (they then
    come in one piece), null or missing (then ``{}``).

    If the text is no such list, ``is_malformed`` is set. Without an open call, the text held back since the trigger or
    the last call becomes content; an open call is finished as it is. All text that follows is content. ``finish`` does
    the same for text that breaks off, but does not set ``is_malformed`` if a call had started. Takes linear time and
    holds back at most ``MAX_HELD`` characters.
    """

    def __init__(self, *, seed: str | int | None = None) -> None:
        self.is_malformed = False
        self.is_cut = False  # the text ended within a call
        self.num_calls = 0  # calls that have started
        self._seed = seed
        self._state = "start"
        self._is_list = False
        self._scanner: JsonScanner | None = None
        self._key: str | None = None  # the key whose value is read; None while a key is read
        self._token: list[str] = []  # the text of the key or value that is read, unless that is passed on
        self._held: list[str] = []  # all text since the trigger or the last call, while no call is open
        self._num_held = 0
        self._is_open = False  # a call has started
        self._reset()

    def feed(self, text: str) -> list[Event]:
        """Take in more text; returns what it adds."""
        events: list[Event] = []
        place = 0
        while place < len(text):
            if self._state == "content":
                events.append(Content(text[place:]))
                break
            if self._scanner is not None:
                place = self._scan(self._scanner, text, place, events)
            else:
                place = self._step(text, place, events)
            if self._num_held > MAX_HELD:
                self._fail(text[place:], events)
                break
        return events

    def finish(self) -> list[Event]:
        """The text has ended; returns what was held back."""
        events: list[Event] = []
        held = "".join(self._held)
        if self._is_open:
            pending = self._scanner.pending if self._scanner is not None else ""
            if pending and self._streams:
                events.append(ArgumentsDelta(self.num_calls - 1, pending))
            self.is_cut = not self._has_arguments
            events.append(CallFinished(self.num_calls - 1, self._has_arguments))
        elif held.strip(_SPACE + ",") or (held and self.num_calls == 0):
            self.is_cut = True
            self.is_malformed = self.is_malformed or self.num_calls == 0
            events.append(Content(held))
        self._end_in("content")
        return events

    def _reset(self) -> None:
        """Get ready for the next call of the list."""
        self._is_open = False
        self._seen: set[str] = set()
        self._early: list[str] = []  # arguments that came before the name
        self._streams = False  # the arguments' text is passed on as it comes
        self._has_arguments = False

    def _end_in(self, state: str) -> None:
        self._state, self._scanner = state, None
        self._token, self._held, self._num_held = [], [], 0
        self._reset()

    def _hold(self, text: str) -> None:
        if not self._is_open:
            self._held.append(text)
            self._num_held += len(text)

    def _fail(self, rest: str, events: list[Event]) -> None:
        """From here on, all text is content; ``rest`` is the text that has not been read."""
        self.is_malformed = True
        held = "".join(self._held)
        if self._is_open:
            held = "".join(self._token) + (self._scanner.pending if self._scanner is not None else "")
            events.append(CallFinished(self.num_calls - 1, self._has_arguments))
        if held + rest:
            events.append(Content(held + rest))
        self._end_in("content")

    def _step(self, text: str, place: int, events: list[Event]) -> int:
        """Read a character between keys and values."""
        end = place
        while end < len(text) and text[end] in _SPACE:
            end += 1
        if end > place:
            if self._state != "tail":
                self._hold(text[place:end])
            return end
        char, state = text[place], self._state
        if state == "tail":
            self._end_in("content")
            return place
        if (state in ("key", "key_or_end") and char == '"') or (state == "value" and self._may_start(char)):
            self._scanner = JsonScanner()
            self._streams = state == "value" and self._key == "arguments" and char == "{"
            return place
        if state == "start" and char == "[":
            self._is_list, self._state = True, "item"
        elif state in ("start", "item") and char == "{":
            self._state = "key_or_end"
        elif state == "colon" and char == ":":
            self._state = "value"
        elif state == "next_key" and char == ",":
            self._state = "key"
        elif state == "next_key" and char == "}" and self._is_open:
            self._end_call(events)
            return place + 1
        elif state == "next_item" and char == ",":
            self._state = "item"
        elif state == "next_item" and char == "]":
            self._end_in("tail")
            return place + 1
        else:
            self._fail(text[place:], events)
            return len(text)
        self._hold(char)
        return place + 1

    def _may_start(self, char: str) -> bool:
        """Whether ``char`` may begin the value of the key."""
        return {"name": char == '"', "arguments": char in '{"n'}.get(self._key or "", True)

    def _scan(self, scanner: JsonScanner, text: str, place: int, events: list[Event]) -> int:
        """Read text within a key or a value."""
        end, passed = scanner.feed(text, place)
        self._hold(text[place:end])
        if not self._streams:
            self._token.append(passed)
            self._num_held += len(passed) if self._is_open else 0
        elif not self._is_open:
            self._early.append(passed)
        elif passed:
            events.append(ArgumentsDelta(self.num_calls - 1, passed))
        if scanner.is_broken or (scanner.is_done and not self._accept(events)):
            self._fail(text[end:], events)
            return len(text)
        return end

    def _accept(self, events: list[Event]) -> bool:
        """A key or value is complete; returns whether it is allowed at its place."""
        if self._num_held > MAX_HELD:
            return False
        token = "".join(self._token)
        if self._key is None:
            key = json.loads(token)
            if key not in _KEYS or key in self._seen:
                return False
            self._seen.add(key)
            self._key, self._state = key, "colon"
        else:
            if self._key == "name":
                name = json.loads(token)
                if _NAME.fullmatch(name) is None:
                    return False
                self._start_call(name, events)
            elif self._key == "arguments":
                if not self._streams:
                    arguments = _unwrap(token)
                    if arguments is None:
                        return False
                    if self._is_open:
                        events.append(ArgumentsDelta(self.num_calls - 1, arguments))
                    else:
                        self._early.append(arguments)
                self._has_arguments = True
            self._key, self._state = None, "next_key"
        self._scanner, self._token, self._streams = None, [], False
        self._num_held = 0 if self._is_open else self._num_held
        return True

    def _start_call(self, name: str, events: list[Event]) -> None:
        events.append(CallStarted(self.num_calls, new_tool_call_id(self._seed, self.num_calls), name))
        self.num_calls += 1
        self._is_open = True
        self._held, self._num_held = [], 0
        if self._early:
            events.append(ArgumentsDelta(self.num_calls - 1, "".join(self._early)))
            self._early = []

    def _end_call(self, events: list[Event]) -> None:
        if not self._has_arguments:
            events.append(ArgumentsDelta(self.num_calls - 1, "{}"))
        events.append(CallFinished(self.num_calls - 1, True))
        self._end_in("next_item" if self._is_list else "tail")


class AnswerParser:
    """An answer's text and calls from its deltas: content up to the token [TOOL_CALLS], then what ``ToolCallParser``
    says.

    ``starts_with_calls``: the token was given with the prompt, so the whole answer is calls. ``shows_special``: control
    tokens are shown (``skip_special_tokens=False``), and the token's own text is taken out.
    """

    def __init__(
        self, *, seed: str | int | None = None, shows_special: bool = False, starts_with_calls: bool = False
    ) -> None:
        self.calls = ToolCallParser(seed=seed)
        self._is_in_calls = starts_with_calls
        self._num_seen = 0
        self._num_skipped = len(MARKER) if shows_special and not starts_with_calls else 0

    @property
    def num_calls(self) -> int:
        """Calls that have started."""
        return self.calls.num_calls

    def feed(self, text: str, tool_calls_start: int | None = None) -> list[Event]:
        """Take in the ``text`` and ``tool_calls_start`` of one ``CompletionOutput`` with deltas."""
        events: list[Event] = []
        if not self._is_in_calls:
            here = len(text) if tool_calls_start is None else tool_calls_start - self._num_seen
            assert here >= 0, "text behind the token was taken for content"
            if text[:here]:
                events.append(Content(text[:here]))
            self._num_seen += len(text)
            self._is_in_calls = tool_calls_start is not None
            text = text[here:]
        skipped = min(self._num_skipped, len(text))
        self._num_skipped -= skipped
        return events + self.calls.feed(text[skipped:]) if self._is_in_calls else events

    def finish(self) -> list[Event]:
        """The answer has ended; returns what was held back."""
        return self.calls.finish()


def parse_tool_calls(
    text: str, *, is_truncated: bool = False, seed: str | int | None = None
) -> tuple[str, list[ToolCall]]:
    """Parse the whole text after the trigger into (content, calls).

    If it is no list of calls or breaks off within one, all of it is content. With ``is_truncated`` (the finish reason
    was "length"), a last call whose name is known is returned with its arguments as far as they came, as in a stream.
    """
    parser = ToolCallParser(seed=seed)
    events = parser.feed(text) + parser.finish()
    if parser.is_malformed or (parser.is_cut and not is_truncated):
        return text, []
    return merge_events(events)


def parse_answer(
    text: str,
    tool_calls_start: int | None,
    *,
    is_truncated: bool = False,
    seed: str | int | None = None,
    shows_special: bool = False,
) -> tuple[str, list[ToolCall]]:
    """Parse ``text`` and ``tool_calls_start`` of a whole ``CompletionOutput`` into (content, calls); see
    ``parse_tool_calls``.
    """
    if tool_calls_start is None:
        return text, []
    begin = tool_calls_start + (len(MARKER) if shows_special else 0)
    content, calls = parse_tool_calls(text[begin:], is_truncated=is_truncated, seed=seed)
    return text[:tool_calls_start] + content, calls


def merge_events(events: Sequence[Event]) -> tuple[str, list[ToolCall]]:
    """(content, calls) as a client has them after all events."""
    content = "".join([event.text for event in events if isinstance(event, Content)])
    started = [event for event in events if isinstance(event, CallStarted)]
    arguments: list[list[str]] = [[] for _ in started]
    for event in events:
        if isinstance(event, ArgumentsDelta):
            arguments[event.index].append(event.text)
    return content, [ToolCall(call.id, call.name, "".join(arguments[call.index])) for call in started]


def _unwrap(token: str) -> str | None:
    """The object that a JSON string holds as text, or ``{}`` for null and an empty string; None if it holds something
    else.
    """
    text = json.loads(token)
    if text is None:
        return "{}"
    # A surrogate that stands alone could not be written as UTF-8.
    text = text.strip(_SPACE).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if not text:
        return "{}"
    scanner = JsonScanner()
    end, passed = scanner.feed(text)
    return passed if text[0] == "{" and scanner.is_done and end == len(text) else None
