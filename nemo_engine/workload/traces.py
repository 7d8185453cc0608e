"""Published traces as workloads: ShareGPT's JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemo_engine.workload.items import MOST_TOKENS, Item, Turn

_ASKS = ("human", "user")
_ANSWERS = ("gpt", "chatgpt", "assistant", "bing", "bard")


def read_sharegpt(
    path: Path, count_tokens: Callable[[str], int], *, is_multi_turn: bool = False, max_conversations: int | None = None
) -> Iterator[Item]:
    """Conversations of a list of ``{"id", "conversations": [{"from": "human"|"gpt", "value": ...}]}``, or JSON lines of
    ``{"messages": [...]}``.

    The first prompt and the length of its answer, or every turn of a conversation. Conversations that do not begin with
    a prompt and its answer are passed over, as all benchmarks do. Raises ``ValueError`` naming file, entry and field of
    what is no conversation.
    """
    count = 0
    for place, entry in _entries(path):
        turns = []
        pairs = _pairs(entry, f"{path}{place}")
        for ask, answer in pairs if is_multi_turn else pairs[:1]:
            num_in, num_out = count_tokens(ask), count_tokens(answer)
            if not (0 < num_in <= MOST_TOKENS and 0 < num_out <= MOST_TOKENS):
                break
            turns.append(Turn(ask, num_out, num_in))
        if turns:
            yield Item(str(entry.get("id") or count), tuple(turns))
            count += 1
            if count == max_conversations:
                return
    if not count:
        raise ValueError(f"{path}: holds no conversation of a prompt and its answer")


def is_sharegpt(path: Path) -> bool:
    """Whether a file is a list of JSON, and so no workload file."""
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"[")


def estimate_tokens(text: str) -> int:
    """Tokens of ``text`` where there is no tokenizer: a fourth of its characters."""
    return -(-len(text) // 4)


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = path.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            data = [(f"[{index}]", entry) for index, entry in enumerate(json.loads(text))]
        else:
            data = [
                (f":{number}", json.loads(line)) for number, line in enumerate(text.splitlines(), 1) if line.strip()
            ]
    except ValueError as error:
        raise ValueError(f"{path}: is neither a list of JSON nor lines of it: {error}") from None
    for place, entry in data:
        if not isinstance(entry, dict):
            raise ValueError(f"{path}{place}: must be a JSON object, got {entry!r:.80}")
        yield place, entry


def _pairs(entry: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """(prompt, answer) of the leading turns that alternate; a system message is left out."""
    field = "messages" if "messages" in entry else "conversations"
    messages = entry.get(field)
    if not isinstance(messages, list):
        raise ValueError(f"{where}: {field} must be a list, got {messages!r:.80}")
    said = []
    for index, message in enumerate(messages):
        author = message.get("from", message.get("role")) if isinstance(message, dict) else None
        text = message.get("value", message.get("content")) if isinstance(message, dict) else None
        if not isinstance(author, str) or not isinstance(text, str):
            raise ValueError(f"{where}: {field}[{index}] must have an author and a text, got {message!r:.80}")
        if author != "system":
            said.append((author, text))
    pairs = []
    for (asker, ask), (answerer, answer) in zip(said[::2], said[1::2]):
        if asker not in _ASKS or answerer not in _ANSWERS:
            break
        pairs.append((ask, answer))
    return pairs
