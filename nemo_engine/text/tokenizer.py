"""``Tokenizer``: text to token ids and back, for Tekken and SentencePiece files, over mistral-common.

Owns the bytes of every token. mistral-common is imported when a tokenizer is loaded, not before.
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

FILE_NAMES = ("tekken.json", "tokenizer.model.v3", "tokenizer.model")

MAX_SPECIAL_TOKENS = 1 << 16  # those that a file does not name are made up
_USUAL_LENGTH = 8  # characters of a token, and more
_PIECE = 1 << 16  # characters that are encoded at a time where only their number of tokens is wanted
_WORD_END = re.compile(r"(?<=[^\W\d_]) ")  # no token goes from a letter to a space

_logger = logging.getLogger("nemo_engine")


def load_tokenizer(path: Path) -> Tokenizer | None:
    """Load a tokenizer file, or that of a checkpoint directory; None if the directory has none that can be read.

    Raises ``FileNotFoundError`` for a path that does not exist and ``ValueError`` for a broken file.
    """
    if path.is_file():
        return Tokenizer(path)
    if not path.is_dir():
        raise FileNotFoundError(f"tokenizer {str(path)!r} does not exist")
    for name in FILE_NAMES:
        if (path / name).exists():
            return Tokenizer(path / name)
    if (path / "tokenizer.json").exists():
        _logger.warning(
            "%s holds tokenizer.json but none of %s: text is off and token ids work; copy the model's tekken.json there, "
            "or pass tokenizer=",
            path,
            ", ".join(FILE_NAMES),
        )
    return None


def _check_sizes(path: Path) -> None:
    """Refuse a Tekken file whose numbers of tokens are not backed by its content, before anything of that size is made."""
    if path.suffix != ".json":
        return
    try:
        data = json.loads(path.read_bytes())
        config, count = data["config"], len(data["vocab"])
        num_special, size = config["default_num_special_tokens"], config["default_vocab_size"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"tokenizer file {path} cannot be read: {type(error).__name__}: {error}") from None
    if type(num_special) is not int or not 0 <= num_special <= MAX_SPECIAL_TOKENS:
        raise ValueError(
            f"tokenizer file {path}: config.default_num_special_tokens must be an integer from 0 to {MAX_SPECIAL_TOKENS}, got {num_special!r}"
        )
    if type(size) is not int or not num_special < size <= num_special + count:
        raise ValueError(
            f"tokenizer file {path}: config.default_vocab_size must be an integer from {num_special + 1} to {num_special + count}, as there are "
            f"{num_special} special tokens and {count} in vocab, got {size!r}"
        )


class Tokenizer:
    """One tokenizer file, Tekken (``tekken.json``) or SentencePiece v3.

    ``fingerprint`` is equal for two files exactly if they have the same version, pattern, tokens and control tokens.
    """

    def __init__(self, path: Path) -> None:
        try:
            from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
        except ImportError as error:
            raise ImportError("text needs mistral-common: pip install mistral-common") from error
        _check_sizes(path)
        try:
            self.mistral: Any = MistralTokenizer.from_file(str(path))
            self._raw: Any = self.mistral.instruct_tokenizer.tokenizer
            self._is_tekken: bool = type(self._raw).__name__ == "Tekkenizer"
            self._special: dict[int, str] = self._special_tokens()
            self._bytes: list[bytes] = [self._bytes_of(token_id) for token_id in range(self._raw.n_words)]
        except ImportError:
            raise
        except Exception as error:
            raise ValueError(f"tokenizer file {path} cannot be read: {type(error).__name__}: {error}") from error
        self._longest = max(1, *map(len, self._bytes))
        self.path = path
        self.vocab_size: int = self._raw.n_words
        self.bos_id: int = self._raw.bos_id
        self.eos_id: int = self._raw.eos_id
        self.version = f"{self._raw.version.value}-{'tekken' if self._is_tekken else 'sentencepiece'}"
        names = {text: token_id for token_id, text in self._special.items()}
        self.tool_calls_id: int | None = names.get("[TOOL_CALLS]")
        self.fingerprint: str = self._make_fingerprint()

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Token ids of ``text``, after exactly one BOS if ``bos``; never an EOS.

        Text is text: "[INST]" in it becomes ordinary tokens. With ``bos``, one literal "<s>" at its start is taken for
        the BOS that stands there anyway.
        """
        if bos and text.startswith("<s>"):
            text = text[3:]
        check_unicode("text", text)
        ids: list[int] = self._raw.encode(text, bos=bos, eos=False)
        return ids

    def min_tokens(self, text: str) -> int:
        """The least number of tokens that ``text`` can have: as if all were of the longest."""
        return -(-(len(text) if text.isascii() else len(text.encode())) // self._longest)

    def exceeds(self, text: str, limit: int) -> bool:
        """Whether ``text`` is far too long for ``limit`` tokens: False may also mean that only encoding it will tell.

        Encodes little more than ``limit`` tokens, and nothing if the length of the text tells.
        """
        if self.min_tokens(text) > limit:
            return True
        if len(text) <= _USUAL_LENGTH * limit:
            return False
        start = count = 0
        while start < len(text) and count <= limit:
            found = _WORD_END.search(text, start + _PIECE)
            end = len(text) if found is None else found.start()
            count += len(self._raw.encode(text[start:end], bos=False, eos=False))
            start = end
        return count > limit

    def encode_bad_words(self, words: Iterable[str]) -> list[tuple[int, ...]]:
        """Id sequences of each word, as it begins a text and as it follows a space, by vLLM's rule.

        White space in front of a word does not count, but for a word that is nothing else: that is taken as it is.
        The second is kept if it has as many tokens as the first and starts differently. Raises ``ValueError`` for a word
        that has no tokens.
        """
        found: list[tuple[int, ...]] = []
        for word in words:
            check_unicode("bad_words", word)
            if word and not word.strip():
                found.append(self._encode_space(word))
                continue
            plain, spaced = (tuple(self.encode(prefix + word.lstrip(), bos=False)) for prefix in ("", " "))
            if not plain:
                raise ValueError(f"bad_words must hold words with at least one token, got {word!r}")
            found.append(plain)
            if spaced and len(spaced) == len(plain) and spaced[0] != plain[0]:
                found.append(spaced)
        return found

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
        return data if self._is_tekken else data.removeprefix(b" ")

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

    def _special_tokens(self) -> dict[int, str]:
        if self._is_tekken:
            return {i: self._raw.id_to_piece(i) for i in range(self._raw.num_special_tokens)}
        return {i: self._raw.id_to_piece(i) for i in range(self._raw.n_words) if self._raw.is_special(i)}

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._special:
            return b""
        if self._is_tekken:
            data: bytes = self._raw.id_to_byte_piece(token_id)
            return data
        piece: str = self._raw.id_to_piece(token_id)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    def _make_fingerprint(self) -> str:
        digest = hashlib.sha256(self.version.encode())
        pattern = getattr(getattr(self._raw, "_model", None), "_pat_str", "") if self._is_tekken else ""
        digest.update(json.dumps([pattern, self.bos_id, self.eos_id, sorted(self._special.items())]).encode())
        for data in self._bytes:
            digest.update(len(data).to_bytes(4, "little") + data)
        return digest.hexdigest()[:16]
