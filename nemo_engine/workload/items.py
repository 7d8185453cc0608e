"""One request of a workload, or a conversation of several turns, and the line of JSON that it is written as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

Messages = tuple[Mapping[str, str], ...]
Prompt = str | tuple[int, ...] | Messages | int

MOST_TOKENS = 10_000_000  # in one prompt or output; a larger number is surely a mistake
_TURN_FIELDS = {"prompt", "prompt_token_ids", "messages", "prompt_tokens", "output_tokens", "think_s"}
_ITEM_FIELDS = {"id", "arrival_s", "prefix", "prefix_tokens", "priority", "turns"}
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Turn:
    """A prompt, and the number of tokens of its answer.

    ``prompt`` is a text, token ids, OpenAI's messages, or only a number of tokens. ``num_tokens`` is its number of
    tokens, if that is known. ``think_s``: seconds from the previous answer to this turn.
    """

    prompt: Prompt
    output_tokens: int
    num_tokens: int | None = None
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Item:
    """A request (one turn) or a conversation: a turn's prompt follows all prompts and answers before it.

    ``arrival_s``: arrival of the first turn in seconds from the start; None if ``Arrivals`` makes the times. Items with
    equal ``prefix`` begin with the same ``prefix_tokens`` tokens. A larger ``priority`` is less urgent.
    """

    request_id: str
    turns: tuple[Turn, ...]
    arrival_s: float | None = None
    prefix: str | None = None
    prefix_tokens: int = 0
    priority: int = 0

    @property
    def output_tokens(self) -> int:
        """Output tokens of all turns."""
        return sum(turn.output_tokens for turn in self.turns)


def parse_line(data: object, where: str, default_id: str) -> Item:
    """An item from the JSON of a line.

    Raises ``ValueError`` that begins with ``where`` and names the field and its value.

    Fields: ``id``; ``arrival_s``; one of ``prompt`` (text), ``prompt_token_ids``, ``messages`` (OpenAI's) and
    ``prompt_tokens`` (a number; beside a text or messages it says how many tokens they are); ``output_tokens``;
    ``prefix`` (a name) with ``prefix_tokens``; ``priority``. In place of prompt and output, ``turns`` is a list of
    objects with those and ``think_s``.
    """
    read = _Line(data, where)
    item_id = read.text("id") if "id" in read.data else default_id
    if "turns" in read.data:
        read.only(_ITEM_FIELDS)
        raw = read.data["turns"]
        if not isinstance(raw, list) or not raw:
            raise read.wrong("turns", "a list of at least one turn")
        lines = [_Line(turn, where, f"turns[{index}]") for index, turn in enumerate(raw)]
        for line in lines:
            line.only(_TURN_FIELDS)
        turns = tuple(line.turn() for line in lines)
    else:
        read.only(_ITEM_FIELDS | _TURN_FIELDS - {"think_s"})
        turns = (read.turn(),)
    prefix = read.text("prefix") if "prefix" in read.data else None
    prefix_tokens = read.integer("prefix_tokens", 0, 0)
    if (prefix is None) != (prefix_tokens == 0):
        raise ValueError(f"{where}: prefix and prefix_tokens go together, got {prefix!r} and {prefix_tokens}")
    if prefix is not None and not all(isinstance(turn.prompt, int) for turn in turns):
        raise ValueError(
            f"{where}: prefix is for prompts given as prompt_tokens, got {prefix!r} beside a prompt of its own"
        )
    arrival = read.seconds("arrival_s") if "arrival_s" in read.data else None
    return Item(item_id, turns, arrival, prefix, prefix_tokens, read.integer("priority", 0, -(2**31)))


def as_json(item: Item) -> dict[str, Any]:
    """The JSON that ``parse_line`` reads as ``item``."""
    data: dict[str, Any] = {"id": item.request_id}
    if item.arrival_s is not None:
        data["arrival_s"] = item.arrival_s
    if item.prefix is not None:
        data |= {"prefix": item.prefix, "prefix_tokens": item.prefix_tokens}
    if item.priority:
        data["priority"] = item.priority
    turns = [_turn_json(turn) for turn in item.turns]
    return data | (turns[0] if len(turns) == 1 and not item.turns[0].think_s else {"turns": turns})


def _turn_json(turn: Turn) -> dict[str, Any]:
    prompt = turn.prompt
    if isinstance(prompt, int):
        data: dict[str, Any] = {"prompt_tokens": prompt}
    elif isinstance(prompt, str):
        data = {"prompt": prompt}
    elif isinstance(prompt[0], int):
        data = {"prompt_token_ids": list(prompt)}
    else:
        data = {"messages": [dict(message) for message in prompt]}
    if not isinstance(prompt, int) and turn.num_tokens is not None and "prompt_token_ids" not in data:
        data["prompt_tokens"] = turn.num_tokens
    data["output_tokens"] = turn.output_tokens
    return data | ({"think_s": turn.think_s} if turn.think_s else {})


class _Line:
    """Typed reads of one object; an error names the place, the field and the value."""

    def __init__(self, data: object, where: str, inner: str = "") -> None:
        self.where = where
        self.inner = f"{inner}." if inner else ""
        if not isinstance(data, dict):
            place = f"{where}: {inner}" if inner else where
            raise ValueError(f"{place}: must be a JSON object, got {_short(data)}")
        self.data = cast("dict[str, Any]", data)

    def wrong(self, field: str, needed: str) -> ValueError:
        got = _short(self.data[field]) if field in self.data else "nothing"
        return ValueError(f"{self.where}: {self.inner}{field} must be {needed}, got {got}")

    def only(self, known: set[str]) -> None:
        unknown = sorted(set(self.data) - known)
        if unknown:
            field = unknown[0]
            raise ValueError(
                f"{self.where}: {self.inner}{field} is not a field here (those are {', '.join(sorted(known))}), "
                f"got {_short(self.data[field])}"
            )

    def text(self, field: str) -> str:
        value = self.data.get(field)
        if not isinstance(value, str) or not value:
            raise self.wrong(field, "a text that is not empty")
        return value

    def integer(self, field: str, default: int | None, low: int, high: int = MOST_TOKENS) -> int:
        if field not in self.data and default is not None:
            return default
        value = self.data.get(field)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(field, f"an integer from {low} to {high}")
        return value

    def seconds(self, field: str) -> float:
        value = self.data.get(field)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise self.wrong(field, "a number of seconds of at least 0")
        return float(value)

    def turn(self) -> Turn:
        fields = [field for field in ("prompt", "prompt_token_ids", "messages") if field in self.data]
        if len(fields) > 1:
            raise ValueError(
                f"{self.where}: {self.inner}{fields[0]} and {self.inner}{fields[1]} are given, and one is needed"
            )
        output = self.integer("output_tokens", None, 1)
        think = self.seconds("think_s") if "think_s" in self.data else 0.0
        count = self.integer("prompt_tokens", None, 1) if "prompt_tokens" in self.data else None
        if not fields:
            if count is None:
                raise self.wrong("prompt_tokens", "given where there is no prompt, prompt_token_ids or messages")
            return Turn(count, output, count, think)
        field = fields[0]
        value = self.data[field]
        if field == "prompt":
            return Turn(self.text("prompt"), output, count, think)
        if field == "messages":
            return Turn(self._messages(value), output, count, think)
        if not isinstance(value, list) or not value:
            raise self.wrong(field, "a list of at least one token id")
        for index, token_id in enumerate(value):
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < 2**31:
                raise ValueError(
                    f"{self.where}: {self.inner}{field}[{index}] must be an integer from 0 to {2**31 - 1}, got "
                    f"{_short(token_id)}"
                )
        return Turn(tuple(value), output, len(value), think)

    def _messages(self, value: object) -> Messages:
        if not isinstance(value, list) or not value:
            raise self.wrong("messages", "a list of at least one message")
        for index, message in enumerate(value):
            if (
                not isinstance(message, dict)
                or message.get("role") not in _ROLES
                or not isinstance(message.get("content"), str)
            ):
                raise ValueError(
                    f"{self.where}: {self.inner}messages[{index}] must be an object with a role ({', '.join(_ROLES)}) "
                    "and a "
                    f"text as content, got {_short(message)}"
                )
        return tuple(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
