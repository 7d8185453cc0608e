"""The material of a verification: token ids of prompts, of a text, and of numbers to retrieve at growing context."""

from __future__ import annotations

import json
import logging
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nemo_engine.checkpoint.checkpoint import Checkpoint
from nemo_engine.text import load_tokenizer

ASSETS = Path(__file__).parent.parent / "assets" / "verify"
NUMBERS = ("70419", "38265", "91537")  # each context has one sequence for each
_TEXT_TOKENS = 2048  # the text is cut into sequences of so many tokens
_FIRST_CONTEXT = 512  # the first context of retrieval, in tokens; the next ones double
_NEEDLE = "The number of the archive is {}.\n"
_QUESTION = "The number of the archive is"
_WORDS = re.compile(r"\s?\w+|\s?[^\w\s]|\s")

_logger = logging.getLogger("nemo_engine")


@dataclass(frozen=True, slots=True)
class Material:
    """Token ids of the prompts, of the text, and of retrieval, where those of the number come last."""

    prompts: list[list[int]]
    texts: list[list[int]]
    retrieval: list[tuple[int, list[int], int]]  # context, ids, tokens of the number

    @property
    def sequences(self) -> list[list[int]]:
        """All of them."""
        return [*self.prompts, *self.texts, *(ids for _, ids, _ in self.retrieval)]


class Encoder(Protocol):
    """The part of a tokenizer that verification needs."""

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """Token ids."""


class WordHash:
    """Replaces a missing tokenizer: each word is one token, by its hash."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def encode(self, text: str, *, bos: bool) -> list[int]:
        """See ``Encoder``."""
        assert not bos
        return [zlib.crc32(word.encode()) % self._vocab_size for word in _WORDS.findall(text)]


def material_for(checkpoint: Checkpoint, tokenizer: str | Path | None, text: str | None, max_context: int) -> Material:
    """The material for ``checkpoint``, within its context and its vocabulary."""
    config = checkpoint.model_config
    place = checkpoint.tokenizer_path if tokenizer is None else Path(tokenizer)
    encoder: Encoder | None = load_tokenizer(place)
    if encoder is None:
        if tokenizer is not None:
            raise ValueError(f"tokenizer {str(tokenizer)!r} holds none that can be read")
        _logger.warning("%s has no tokenizer: words become tokens by a hash, and perplexity says little", place)
        encoder = WordHash(config.vocab_size)
    material = make_material(encoder, text, max_context, config.bos_token_id, config.max_position_embeddings)
    largest = max(map(max, material.sequences))
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer of {place} makes token {largest}, and the model's vocab_size is {config.vocab_size}: give "
            "its own tokenizer"
        )
    return material


def make_material(
    tokenizer: Encoder, text: str | None, max_context: int, bos: int | None, model_context: int = 1 << 30
) -> Material:
    """The stored prompts, the text in pieces, and numbers to retrieve at growing context. No sequence is longer than
    ``model_context``.
    """
    begin = [] if bos is None else [bos]
    prompts = [
        [*begin, *tokenizer.encode(prompt, bos=False)][:model_context]
        for prompt in json.loads((ASSETS / "prompts.json").read_text())
    ]
    filler = tokenizer.encode((ASSETS / "text.txt").read_text(encoding="utf-8"), bos=False)
    ids = filler if text is None else tokenizer.encode(text, bos=False)
    if len(ids) < 2:
        raise ValueError(f"text must have at least 2 tokens, got {len(ids)}")
    if model_context < 4:
        raise ValueError(f"the model's context must be at least 4 tokens, got {model_context}")
    size = min(_TEXT_TOKENS, model_context) - len(begin)
    texts = [[*begin, *ids[start : start + size]] for start in range(0, len(ids), size)]
    retrieval = []
    context = _FIRST_CONTEXT
    while context <= min(max_context, model_context):
        for number in NUMBERS:
            needle, question = (tokenizer.encode(part, bos=False) for part in (_NEEDLE.format(number), _QUESTION))
            answer = tokenizer.encode(f"{_QUESTION} {number}", bos=False)[len(question) :]
            room = context - len(begin) - len(needle) - len(question) - len(answer)
            around = (filler * (room // len(filler) + 1))[:room]
            before = len(around) // 3
            retrieval.append(
                (context, [*begin, *around[:before], *needle, *around[before:], *question, *answer], len(answer))
            )
        context *= 2
    return Material(prompts, texts, retrieval)
