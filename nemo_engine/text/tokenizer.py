"""``Tokenizer``: text to token ids and back, over a ``Vocabulary`` of any kind; ``load_tokenizer``, which chooses the
file.

The libraries are imported when a tokenizer is loaded that needs them, not before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nemo_engine.checks import check_unicode
from nemo_engine.text.hf_files import FILE_NAME as HF_FILE_NAME
from nemo_engine.text.hf_vocabulary import HFVocabulary
from nemo_engine.text.mistral_vocabulary import MistralVocabulary, difference
from nemo_engine.text.vocabulary import AddedToken, Vocabulary

FILE_NAMES = ("tekken.json", "tokenizer.model.v3", "tokenizer.model", HF_FILE_NAME)

_USUAL_LENGTH = 8  # characters of a token, and more
_PIECE = 1 << 16  # characters that are encoded at a time where only their number of tokens is wanted
_WORD_END = re.compile(r"(?<=[^\W\d_]) ")  # where ``Vocabulary.cuts_words`` holds

_logger = logging.getLogger("nemo_engine")


def load_tokenizer(path: Path) -> Tokenizer | None:
    """Load a tokenizer file, or that of a checkpoint directory; None if the directory has none.

    Of a directory with one of Mistral's files and ``tokenizer.json``, Mistral's serves if both have the same tokens,
    and else ``tokenizer.json``, which fine-tunes change. Raises ``FileNotFoundError`` for a path that does not exist
    and ``ValueError`` for a broken file.
    """
    if path.is_file():
        return Tokenizer(path)
    if not path.is_dir():
        raise FileNotFoundError(f"tokenizer {str(path)!r} does not exist")
    files = [path / name for name in FILE_NAMES if (path / name).exists()]
    if not files:
        return None
    if files[0].name == HF_FILE_NAME or files[-1].name != HF_FILE_NAME:
        return Tokenizer(files[0])
    return _choose(files[0], files[-1])


def _choose(first: Path, other: Path) -> Tokenizer:
    """The tokenizer of a directory that has a file of Mistral's and ``tokenizer.json``."""
    try:
        mistral = MistralVocabulary(first)
    except ImportError as error:
        return Tokenizer(other, note=f"{first.name} needs a library that is not installed ({error})")
    try:
        hf = HFVocabulary(other)
        reason = difference(mistral, hf)
        if reason is None:
            return Tokenizer(first, mistral, note=f"{other.name} has the same tokens")
        hf.prepare()
    except ValueError as error:
        _logger.warning("%s: it is left aside for %s", error, first.name)
        return Tokenizer(first, mistral, note=f"{other.name} cannot be used")
    _logger.warning("%s serves and %s does not: %s", other, first.name, reason)
    return Tokenizer(other, hf, note=f"{first.name} has other tokens: {reason}")


class Tokenizer:
    """One tokenizer file: Tekken (``tekken.json``), SentencePiece v3, or Hugging Face's ``tokenizer.json``.

    ``fingerprint`` is equal for two files exactly if they have the same version, pattern, tokens and control tokens.
    ``note`` says why this file was taken, where there was a choice. ``bos_id`` and ``eos_id`` are None where a
    ``tokenizer.json`` names none.
    """

    def __init__(self, path: Path, vocabulary: Vocabulary | None = None, *, note: str = "") -> None:
        if vocabulary is None:
            # mistral-common, too, knows Tekken files by their name.
            is_hf = path.suffix == ".json" and "tekken" not in path.name
            vocabulary = HFVocabulary(path) if is_hf else MistralVocabulary(path)
            vocabulary.prepare()
        self._vocabulary: Vocabulary = vocabulary
        self._bytes, self._special = self._vocabulary.token_bytes, self._vocabulary.special
        self._longest = max(1, *map(len, self._bytes))
        self._added = {token.content: token for token in self._vocabulary.added}
        self.path = path
        self.note = note
        self.vocab_size: int = len(self._bytes)
        self.bos_id: int | None = self._vocabulary.bos_id
        self.eos_id: int | None = self._vocabulary.eos_id
        self.version: str = self._vocabulary.version
        self.tool_calls_id: int | None = self.added_id("[TOOL_CALLS]")
        self.fingerprint: str = self._make_fingerprint()

    def describe(self) -> str:
        """Which file it is, of which kind, and why it was taken."""
        reason = f", as {self.note}" if self.note else ""
        return f"{self.path.name}, {self.version}{reason}"

    @property
    def mistral(self) -> Any:
        """mistral-common's ``MistralTokenizer``, or for a ``tokenizer.json`` with the control tokens of Mistral's v3
        what has its ``instruct_tokenizer``; None where Mistral's rules cannot be written in these tokens.
        """
        return self._vocabulary.mistral

    @property
    def added_tokens(self) -> tuple[AddedToken, ...]:
        """The control tokens and all others that no text becomes, by ascending id."""
        return tuple(self._vocabulary.added)

    def added_id(self, content: str) -> int | None:
        """The id of the added token that is written ``content``, None if there is none."""
        token = self._added.get(content)
        return None if token is None else token.id

    def encode_span(self, text: str, *, is_start: bool = False) -> list[int]:
        """Ids of a part of a prompt that stands between control tokens, or at the very start of it; no BOS, and text is
        text.
        """
        check_unicode("text", text)
        return self._vocabulary.encode(text, is_start=is_start)

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Token ids of ``text``, after exactly one BOS if ``bos``; never an EOS.

        Text is text: "[INST]" in it becomes ordinary tokens. With ``bos``, one literal "<s>" at its start is taken for
        the BOS that stands there anyway.
        """
        begin = self._vocabulary.begin_ids if bos else ()
        for token_id in begin:
            text = text.removeprefix(self._special.get(token_id) or "")
        check_unicode("text", text)
        return [*begin, *self._vocabulary.encode(text)]

    def min_tokens(self, text: str) -> int:
        """The least number of tokens that ``text`` can have: as if all were of the longest."""
        return -(-(len(text) if text.isascii() else len(text.encode())) // self._longest)

    def exceeds(self, text: str, limit: int) -> bool:
        """Whether ``text`` is far too long for ``limit`` tokens: False may also mean that only encoding it will tell.

        Encodes little more than ``limit`` tokens, and nothing if the length of the text tells.
        """
        if len(text) <= min(_USUAL_LENGTH, self._longest / 4) * limit:  # a character has at most 4 bytes
            return False
        if self.min_tokens(text) > limit:
            return True
        if len(text) <= _USUAL_LENGTH * limit or not self._vocabulary.cuts_words:
            return False
        start = count = 0
        while start < len(text) and count <= limit:
            match = _WORD_END.search(text, start + _PIECE)
            end = len(text) if match is None else match.start()
            count += len(self._vocabulary.encode(text[start:end]))
            start = end
        return count > limit

    def encode_bad_words(self, words: Iterable[str]) -> list[tuple[int, ...]]:
        """Id sequences of each word, as it begins a text and as it follows a space, by vLLM's rule.

        White space in front of a word does not count, but for a word that is nothing else: that is taken as it is. The
        second is kept if it has as many tokens as the first and starts differently. Raises ``ValueError`` for a word
        that has no tokens.
        """
        sequences: list[tuple[int, ...]] = []
        for word in words:
            check_unicode("bad_words", word)
            if word and not word.strip():
                sequences.append(self._encode_space(word))
                continue
            plain, spaced = (tuple(self.encode(prefix + word.lstrip(), bos=False)) for prefix in ("", " "))
            if not plain:
                raise ValueError(f"bad_words must hold words with at least one token, got {word!r}")
            sequences.append(plain)
            if spaced and len(spaced) == len(plain) and spaced[0] != plain[0]:
                sequences.append(spaced)
        return sequences

    def _encode_space(self, text: str) -> tuple[int, ...]:
        """Ids of white space as it follows a letter: at the start of a text SentencePiece puts a space before it."""
        letter, ids = self.encode("x", bos=False), self.encode("x" + text, bos=False)
        return tuple(ids[len(letter) :] if ids[: len(letter)] == letter else self.encode(text, bos=False))

    def decode(
        self, ids: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """The text of ``ids``: their bytes joined and read as UTF-8, U+FFFD where they are not.

        Control tokens are left out or shown by name. Neither kind of file ever puts spaces around them, so
        ``spaces_between_special_tokens`` changes nothing. A SentencePiece text loses the space at its very start.
        """
        data = b"".join([self.token_bytes(i, skip_special_tokens=skip_special_tokens) for i in ids])
        return self.strip_start(data).decode("utf-8", "replace")

    def strip_start(self, data: bytes) -> bytes:
        """The first bytes of a text without the space that SentencePiece puts there."""
        return data.removeprefix(b" ") if self._vocabulary.drops_first_space else data

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        """The bytes that ``token_id`` adds to a text; those of a control token are its name, or none.

        A model may have more ids than its tokenizer: those above add nothing. ``ValueError`` for a negative one.
        """
        if token_id in self._special:
            return b"" if skip_special_tokens else self._special[token_id].encode()
        if token_id < 0:
            raise ValueError(f"a token id must be at least 0, got {token_id}")
        return self._bytes[token_id] if token_id < self.vocab_size else b""

    def differs_from(self, vocab_size: int) -> str | None:
        """What it means that a model has ``vocab_size`` ids, if the tokenizer has another number of them."""
        if vocab_size == self.vocab_size:
            return None
        sizes = f"the model has {vocab_size} token ids, its tokenizer {self.vocab_size}"
        if vocab_size > self.vocab_size:
            return (
                f"{sizes}: those from {self.vocab_size} on have no text, and are chosen only where a request names them"
            )
        return f"{sizes}: text that takes one from {vocab_size} on is refused"

    def is_special(self, token_id: int) -> bool:
        """Whether ``token_id`` is a control token."""
        return token_id in self._special

    def special_text(self, token_id: int) -> str:
        """The name of a control token, such as "[INST]"."""
        return self._special[token_id]

    def decode_token(self, token_id: int) -> str:
        """One token on its own, to be shown beside its log-probability; U+FFFD where it is part of a character."""
        return self.token_bytes(token_id, skip_special_tokens=False).decode("utf-8", "replace")

    def _make_fingerprint(self) -> str:
        digest = hashlib.sha256(self.version.encode())
        pattern = self._vocabulary.pattern
        digest.update(json.dumps([pattern, self.bos_id, self.eos_id, sorted(self._special.items())]).encode())
        for data in self._bytes:
            digest.update(len(data).to_bytes(4, "little") + data)
        return digest.hexdigest()[:16]
