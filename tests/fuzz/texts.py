"""What tokens of the bundled tokenizer mean: their bytes, the text of a completion with its stop strings, and what a
grammar allows.
"""

from __future__ import annotations

import base64
import codecs
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
from fuzz.cases import TOKENS
from numpy.typing import NDArray

import nemo_engine
from nemo_engine import SamplingParams

TEKKEN = Path(nemo_engine.__file__).parent / "assets" / "nemo-tiny" / "tekken.json"


@cache
def vocabulary() -> list[bytes]:
    """The bytes of each id of the bundled tokenizer; control tokens have none in a text."""
    data = json.loads(TEKKEN.read_bytes())
    special = data["config"]["default_num_special_tokens"]
    return [b""] * special + [base64.b64decode(entry["token_bytes"]) for entry in data["vocab"]][: TOKENS - special]


@cache
def grammar_mask(form: str, text: bytes, vocab: int, eos: tuple[int, ...]) -> NDArray[np.bool_]:
    """What may follow ``text`` by the choice or the expression in ``form``, token by token."""
    wanted = json.loads(form)
    if "choice" in wanted:
        choices = [choice.encode() for choice in wanted["choice"]]

        def may_begin(data: bytes) -> bool:
            return any(choice.startswith(data) for choice in choices)

        is_whole = text in choices
    else:
        letters, least, most = re.fullmatch(r"(\[.*\])\{(\d+),(\d+)\}", wanted["regex"]).groups()  # type: ignore[union-attr]

        def may_begin(data: bytes) -> bool:
            return re.fullmatch(f"{letters}{{0,{most}}}".encode(), data) is not None

        is_whole = re.fullmatch(f"{letters}{{{least},{most}}}".encode(), text) is not None
    allowed = np.zeros(vocab, bool)
    for token, data in enumerate(vocabulary()[:vocab]):
        allowed[token] = bool(data) and token not in eos and may_begin(text + data)
    allowed[list(eos)] = is_whole
    return allowed


class Reader:
    """The text of one completion, token by token, and the stop string that ends it."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._count = 0

    def take(self, token: int) -> str | None:
        """Add a token; returns the stop string that it completed, by which the text is then cut."""
        before = len(self.text)
        self._count += 1
        self.text += self._decoder.decode(vocabulary()[token] if token < TOKENS else b"")
        if self._count <= self.params.min_tokens or len(self.text) == before:
            return None
        found = []
        for place, stop in enumerate(self.params.stop or ()):
            start = self.text.find(stop, max(0, before - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), place, stop))
        if not found:
            return None
        end, _, stop = min(found)
        self.text = self.text[: end if self.params.include_stop_str_in_output else end - len(stop)]
        return stop

    def finish(self) -> None:
        self.text += self._decoder.decode(b"", final=True)
