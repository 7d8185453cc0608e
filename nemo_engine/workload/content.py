"""The content of prompts: their own text or ids, or filler where a workload has only lengths.

Filler depends on names and counts alone.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from nemo_engine.workload.items import Item

_FIRST_ID = 1000  # below it, Tekken has control tokens
_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week "
    "company system program question work number night point home water room mother area money story fact month lot "
    "right study book"
).split()


def filler_ids(name: str, count: int, vocab_size: int) -> list[int]:
    """``count`` ids without control tokens, equal for equal ``name``."""
    first = _FIRST_ID if vocab_size > 2 * _FIRST_ID else min(3, vocab_size - 1)
    return random.Random(f"filler {name}").choices(range(first, vocab_size), k=count)


def filler_text(name: str, count: int) -> str:
    """``count`` common words, near one token each, equal for equal ``name``."""
    return " ".join(random.Random(f"filler {name}").choices(_WORDS, k=count))


def prompt_token_ids(item: Item, turn: int, vocab_size: int, answers: Sequence[Sequence[int]] = ()) -> list[int]:
    """The whole prompt of a turn, prefix, earlier prompts and their ``answers`` included, for prompts of ids or
    lengths.
    """
    ids = filler_ids(f"prefix {item.prefix}", item.prefix_tokens, vocab_size) if item.prefix is not None else []
    for index in range(turn + 1):
        prompt = item.turns[index].prompt
        if isinstance(prompt, int):
            ids += filler_ids(f"{item.request_id} {index}", prompt, vocab_size)
        elif isinstance(prompt, tuple) and isinstance(prompt[0], int):
            ids += prompt
        else:
            raise ValueError(f"request {item.request_id!r}: a prompt of text has no token ids without a tokenizer")
        if index < turn:
            ids += answers[index]
    return ids


def prompt_messages(item: Item, turn: int, answers: Sequence[str] = ()) -> list[Mapping[str, str]]:
    """A turn as OpenAI's messages, with earlier turns and their ``answers``.

    Raises ``ValueError`` for prompts of token ids.
    """
    messages: list[Mapping[str, str]] = []
    if item.prefix is not None:
        messages.append({"role": "system", "content": filler_text(f"prefix {item.prefix}", item.prefix_tokens)})
    for index in range(turn + 1):
        prompt = item.turns[index].prompt
        if isinstance(prompt, int):
            messages.append({"role": "user", "content": filler_text(f"{item.request_id} {index}", prompt)})
        elif isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        elif isinstance(prompt[0], int):
            raise ValueError(f"request {item.request_id!r}: a prompt of token ids is no text for a chat")
        else:
            messages += prompt
        if index < turn:
            messages.append({"role": "assistant", "content": answers[index]})
    return messages
