"""``MistralVocabulary``: Tekken and SentencePiece files, read by mistral-common, which is imported when one is
loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_engine.text.vocabulary import AddedToken, Vocabulary

TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # where NeMo's tokenizer cuts a text; other models of Mistral's differ
V3_TOKENS = (
    "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
)  # fmt: skip
_FILLER = re.compile(r"<SPECIAL_\d+>")

MAX_SPECIAL_TOKENS = 1 << 16  # mistral-common makes up those that a file does not name


class MistralVocabulary(Vocabulary):
    """A Tekken file (``tekken.json``) or a SentencePiece file of Mistral's. See ``Vocabulary``."""

    def __init__(self, path: Path) -> None:
        try:
            from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
        except ImportError as error:
            raise ImportError("text needs mistral-common: pip install mistral-common") from error
        _check_sizes(path)
        try:
            self.mistral = MistralTokenizer.from_file(str(path))
            self._raw: Any = self.mistral.instruct_tokenizer.tokenizer
            self._is_tekken: bool = type(self._raw).__name__ == "Tekkenizer"
            self.special = self._special_tokens()
            self._num_special = len(self.special)
            self.token_bytes = [self._bytes_of(token_id) for token_id in range(self._raw.n_words)]
        except ImportError as error:
            raise ImportError(
                f"tokenizer file {path} needs sentencepiece: pip install 'nemo-engine[sentencepiece]' ({error})"
            ) from error
        except Exception as error:
            raise ValueError(f"tokenizer file {path} cannot be read: {type(error).__name__}: {error}") from error
        self.added = tuple(AddedToken(token_id, text) for token_id, text in sorted(self.special.items()))
        self.bos_id = self._raw.bos_id
        self.eos_id = self._raw.eos_id
        self.begin_ids = (self.bos_id,)
        self.drops_first_space = not self._is_tekken
        self.version = f"{self._raw.version.value}-{'tekken' if self._is_tekken else 'sentencepiece'}"
        self.pattern = getattr(getattr(self._raw, "_model", None), "_pat_str", "") if self._is_tekken else ""

    def encode(self, text: str, *, is_start: bool = True) -> list[int]:
        """See ``Vocabulary``. mistral-common encodes every piece as if it stood first."""
        if self._is_tekken:  # the same without a look-up of the offset for every token
            offset = self._num_special
            return [rank + offset for rank in self._raw._model.encode(text)]
        ids: list[int] = self._raw.encode(text, bos=False, eos=False)
        return ids

    def _special_tokens(self) -> dict[int, str]:
        if self._is_tekken:
            return {i: self._raw.id_to_piece(i) for i in range(self._raw.num_special_tokens)}
        return {i: self._raw.id_to_piece(i) for i in range(self._raw.n_words) if self._raw.is_special(i)}

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self.special:
            return b""
        if self._is_tekken:
            data: bytes = self._raw.id_to_byte_piece(token_id)
            return data
        piece: str = self._raw.id_to_piece(token_id)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


def difference(mistral: Vocabulary, other: Vocabulary) -> str | None:
    """A difference between the tokens of ``other``, a ``tokenizer.json``, and those of Mistral's file; None if none.

    Names of control tokens that Mistral's format does not use may differ, as they do in Mistral's own checkpoints.
    """
    usual = {*mistral.special.values()} - {*V3_TOKENS}
    sizes = len(mistral.token_bytes), len(other.token_bytes)
    for token_id, (before, after) in enumerate(zip(mistral.token_bytes, other.token_bytes)):
        names = mistral.special.get(token_id), other.special.get(token_id)
        is_unused = (
            None not in names and names[0] not in V3_TOKENS and (names[1] in usual or _FILLER.fullmatch(names[1] or ""))
        )
        if before != after or (names[0] != names[1] and not is_unused):
            descriptions = [
                repr(data.decode("utf-8", "replace") if name is None else name)
                for name, data in zip(names, (before, after))
            ]
            return f"token {token_id} is {descriptions[0]} there and {descriptions[1]} in tokenizer.json"
    if sizes[0] != sizes[1]:
        return f"there are {sizes[0]} tokens, and {sizes[1]} in tokenizer.json"
    for name in ("bos_id", "eos_id"):
        if getattr(other, name) not in (None, getattr(mistral, name)):
            return f"{name} is {getattr(mistral, name)} there and {getattr(other, name)} with tokenizer.json"
    return None


class _Mistralised:
    """The text tokenizer that an ``InstructTokenizer`` of mistral-common needs."""

    model_settings_builder = None

    def __init__(self, vocabulary: Vocabulary, names: Mapping[str, int], version: Any) -> None:
        self._vocabulary = vocabulary
        self._names = names
        self.version = version
        self.bos_id, self.eos_id = names["<s>"], names["</s>"]

    def get_special_token(self, name: str) -> int:
        """The id of a control token; -1 for a token of formats that are not used here."""
        return self._names.get(name, -1)

    def encode(self, text: str, bos: bool, eos: bool) -> list[int]:
        """Ids of a text between control tokens."""
        assert not bos and not eos
        return self._vocabulary.encode(text, is_start=False)


def mistral_format(vocabulary: Vocabulary) -> Any:
    """Mistral's v3 format of conversations in the tokens of a ``tokenizer.json``, as ``Vocabulary.mistral`` has it;
    None if it lacks some.
    """
    names = {text: token_id for token_id, text in vocabulary.special.items()}
    if not names.keys() >= {*V3_TOKENS} or names["<s>"] != vocabulary.bos_id:
        return None
    from mistral_common.tokens.tokenizers.base import TokenizerVersion
    from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV3

    text: Any = _Mistralised(vocabulary, names, TokenizerVersion.v3)
    return SimpleNamespace(instruct_tokenizer=InstructTokenizerV3(text))


def _check_sizes(path: Path) -> None:
    """Refuse a Tekken file that declares more tokens than it contains, before memory for that many is allocated."""
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
            f"tokenizer file {path}: config.default_num_special_tokens must be an integer from 0 to "
            f"{MAX_SPECIAL_TOKENS}, got {num_special!r}"
        )
    if type(size) is not int or not num_special < size <= num_special + count:
        raise ValueError(
            f"tokenizer file {path}: config.default_vocab_size must be an integer from {num_special + 1} to "
            f"{num_special + count}, as there are "
            f"{num_special} special tokens and {count} in vocab, got {size!r}"
        )
