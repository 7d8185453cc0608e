"""Workload items as token ids, for engines and servers that take ids: filler, texts by the model's tokenizer, messages
by its chat format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_engine.workload import Item, prompt_messages, prompt_token_ids

if TYPE_CHECKING:
    from nemo_engine.text import Tokenizer


class TokenPrompts:
    """Prompts of ids for the checkpoint in ``path``; its tokenizer is loaded when the first text comes.

    What a workload gives as a number of tokens begins with the beginning-of-text token, as all real prompts do; ids
    that it gives are left as they are.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._path, self._vocab_size = path, vocab_size
        self._bos = int(json.loads((path / "config.json").read_text()).get("bos_token_id") or 1)
        self._loaded: Tokenizer | None = None

    def prompt(self, item: Item, turn: int, answers: Sequence[Sequence[int]]) -> list[int]:
        """The whole prompt of a turn after the ``answers`` to those before.

        ``ValueError`` naming the request that cannot be rendered.
        """
        prompts = [turn_item.prompt for turn_item in item.turns]
        if any(isinstance(turn_item, tuple) and not isinstance(turn_item[0], int) for turn_item in prompts):
            from nemo_engine.text import ChatRenderers

            tokenizer = self._tokenizer(item)
            try:
                said = prompt_messages(item, turn, [tokenizer.decode(answer) for answer in answers])
                return ChatRenderers(tokenizer, [self._path]).default.render(said)
            except ValueError as error:
                raise ValueError(f"request {item.request_id!r}, turn {turn}: {error}") from None
        if any(isinstance(turn_item, str) for turn_item in prompts):
            turns = [
                replace(turn_item, prompt=tuple(self._tokenizer(item).encode(turn_item.prompt, bos=not index)))
                if isinstance(turn_item.prompt, str)
                else turn_item
                for index, turn_item in enumerate(item.turns)
            ]
            item = replace(item, turns=tuple(turns))
        ids = prompt_token_ids(item, turn, self._vocab_size, answers)
        return [self._bos, *ids[1:]] if isinstance(prompts[0], int) else ids

    def check(self, items: Sequence[Item]) -> None:
        """``ValueError`` naming the first request that cannot be rendered, or that holds an id beyond the
        vocabulary.
        """
        for item in items:
            answers: list[list[int]] = []
            for turn, turn_item in enumerate(item.turns):
                ids = self.prompt(item, turn, answers)
                if max(ids) >= self._vocab_size:
                    raise ValueError(
                        f"request {item.request_id!r}: token ids must be below {self._vocab_size}, got {max(ids)}"
                    )
                answers.append([self._vocab_size - 1] * turn_item.output_tokens)

    def _tokenizer(self, item: Item) -> Tokenizer:
        if self._loaded is None:
            from nemo_engine.text import load_tokenizer

            self._loaded = load_tokenizer(self._path)
        if self._loaded is None:
            raise ValueError(
                f"request {item.request_id!r}: a prompt of text needs a tokenizer, and {self._path} has none"
            )
        return self._loaded
