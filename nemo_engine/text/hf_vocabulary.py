"""``HFVocabulary``: a ``tokenizer.json`` of byte-level BPE, or of BPE with byte fallback, read and run by the
tokenizers library.

Owns the way from written tokens to bytes, and that text never becomes an added token: the library is given a vocabulary
without them. Where merges are those of byte strings by rank, as Mistral's and OpenAI's are, tiktoken encodes: the ids
are the same, several times as fast.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemo_engine.text.hf_files import HFFiles, read_files
from nemo_engine.text.mistral_vocabulary import TEKKEN_PATTERN, mistral_format
from nemo_engine.text.vocabulary import Vocabulary

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_UNPRINTED = [byte for byte in range(256) if byte not in set(_PRINTED)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTED} | {chr(256 + index): byte for index, byte in enumerate(_UNPRINTED)}
_TO_LATIN_1 = {ord(letter): byte for letter, byte in _BYTE_OF.items()}
_NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
_SHORT = 64  # characters of a piece whose ids are kept
_MAX_KNOWN = 1 << 16
# What such a regular expression matches never goes from a visible character to a space: those of NeMo, of Llama 3, of
# Qwen 2.
_CUTS_AT_SPACES = {
    TEKKEN_PATTERN,
    *(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        + most
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        for most in ("{1,3}", "")
    ),
}
_BEFORE_WORDS = re.compile(r"(?<=\S)(?= \S)")
_BEFORE_SPACES = re.compile(f"(?<=[^ {_SPACE}])(?=[ {_SPACE}])")
_LOSSLESS = ("ByteLevel", "Split", "Digits", "Punctuation")  # pre-tokenizers that only cut


Merges = list[tuple[str, str]]

BYTE_LEVEL, BYTE_FALLBACK = "byte-level-bpe", "byte-fallback-bpe"


class HFVocabulary(Vocabulary):
    """One ``tokenizer.json`` with the files beside it. See ``Vocabulary``."""

    def __init__(self, path: Path) -> None:
        files = read_files(path)
        model = files.data["model"]
        _check_model(files, model)
        self.added = tuple(files.added[token_id] for token_id in sorted(files.added))
        self.special = {token.id: token.content for token in self.added if token.special}
        self.bos_id = files.named.get("bos_token")
        self.eos_id = files.named.get("eos_token")
        self.begin_ids = files.begin_ids
        is_byte_level = not model.get("byte_fallback", False)
        self.version = BYTE_LEVEL if is_byte_level else BYTE_FALLBACK
        ordinary = {text: token_id for text, token_id in files.vocab.items() if token_id not in files.added}
        written = _byte_level_bytes(files, ordinary) if is_byte_level else _byte_fallback_bytes(files, ordinary)
        _check_bytes(files, written)
        self.token_bytes = [written.get(token_id, b"") for token_id in range(files.size)]
        for token in self.added:
            self.token_bytes[token.id] = b"" if token.special else token.content.encode()
        if is_byte_level:
            _check_byte_level(files)
            self.drops_first_space = False
        else:
            self.drops_first_space = _check_byte_fallback(files)
        parts = {name: files.data.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")}
        flags = [[token.id, token.content, token.special] for token in self.added]
        merges = _split_merges(files)
        self.pattern = json.dumps([parts, self.begin_ids, flags, merges, model.get("ignore_merges", False)])
        self._files, self._ordinary, self._written, self._merges = files, ordinary, written, merges
        self._prefix = "never" if is_byte_level else _prefix_rule(files)
        self._ranked: Any = None
        self._library: Any = None
        self._cut: re.Pattern[str] | None = None
        self._known: dict[str, list[int]] = {}

    def prepare(self) -> None:
        """See ``Vocabulary``."""
        files, ordinary, merges = self._files, self._ordinary, self._merges
        self._ranked = _tiktoken(files, ordinary, self._written, merges) if self.version == BYTE_LEVEL else None
        if self._ranked is None:
            self._library = _library(files, ordinary, merges)
            self._cut = _cut(files, ordinary)
        regex = "" if self._ranked is None else self._ranked._pat_str
        self.cuts_words = self._cut is not None or regex in _CUTS_AT_SPACES
        del self._files, self._ordinary, self._written, self._merges

    @cached_property
    def mistral(self) -> Any:  # type: ignore[override]
        """See ``Vocabulary``.

        In byte-level BPE alone: Mistral's format over SentencePiece has rules of its own for spaces.
        """
        return mistral_format(self) if self.version == BYTE_LEVEL else None

    def encode(self, text: str, *, is_start: bool = True) -> list[int]:
        """See ``Vocabulary``."""
        if self._ranked is not None:
            ids: list[int] = self._ranked.encode(
                text, disallowed_special=()
            )  # encode_ordinary panics where this raises
            return ids
        is_prefixed = self._prefix == "each" or text[:1] not in (" ", _SPACE) and (self._prefix == "bare" or is_start)
        if text and self._prefix != "never" and is_prefixed:
            text = _SPACE + text
        if self._cut is None or len(text) < _SHORT:
            return self._encode(text)
        known, token_ids = self._known, []
        for piece in self._cut.split(text):
            piece_ids = known.get(piece)
            if piece_ids is None:
                piece_ids = self._encode(piece)
                if len(piece) <= _SHORT:
                    if len(known) >= _MAX_KNOWN:
                        known.clear()
                    known[piece] = piece_ids
            token_ids += piece_ids
        return token_ids

    def _encode(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing more particular
            raise ValueError(f"the text cannot be encoded: {error}") from None
        return ids


def _check_model(files: HFFiles, model: Mapping[str, Any]) -> None:
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            files.refuse(f"model.{name}", f"must be empty, got {model[name]!r}")
    if model.get("dropout"):
        files.refuse("model.dropout", f"must be none, as a text has one list of ids, got {model['dropout']!r}")
    for name in ("byte_fallback", "ignore_merges", "fuse_unk"):
        if type(model.get(name, False)) is not bool:
            files.refuse(f"model.{name}", f"must be true or false, got {model[name]!r}")
    if not isinstance(model.get("merges"), list):
        files.refuse("model.merges", "must be a list")


def _byte_level_bytes(files: HFFiles, ordinary: Mapping[str, int]) -> dict[int, bytes]:
    try:
        return {token_id: text.translate(_TO_LATIN_1).encode("latin-1") for text, token_id in ordinary.items()}
    except UnicodeEncodeError as error:
        files.refuse(
            "model.vocab",
            f"is not written in GPT-2's alphabet of bytes, and model.byte_fallback is false: {error.object!r} has "
            "another letter",
        )


def _byte_fallback_bytes(files: HFFiles, ordinary: Mapping[str, int]) -> dict[int, bytes]:
    values = {}
    for text, token_id in ordinary.items():
        match = _BYTE_PIECE.fullmatch(text)
        try:
            values[token_id] = text.replace(_SPACE, " ").encode() if match is None else bytes([int(match[1], 16)])
        except UnicodeEncodeError:
            files.refuse(f"model.vocab[{text!r}]", "must be Unicode text")
    return values


def _check_bytes(files: HFFiles, written: Mapping[int, bytes]) -> None:
    """Any text must have ids."""
    single = {data[0] for data in written.values() if len(data) == 1}
    lacking = [byte for byte in range(256) if byte not in single and byte not in _NEVER_IN_UTF8]
    if lacking:
        files.refuse("model.vocab", f"has no token for byte 0x{lacking[0]:02X} that is not an added token")


def _kinds(part: Any, inner: str) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as the list of its steps."""
    if part is None:
        return []
    if not isinstance(part, dict):
        return [{"type": part}]
    if part.get("type") == "Sequence" and isinstance(part.get(inner), list):
        return [step for member in part[inner] for step in _kinds(member, inner)]
    return [part]


def _check_byte_level(files: HFFiles) -> None:
    """Refuse what would make ids that are not the bytes of a text."""
    for step in _kinds(files.data.get("normalizer"), "normalizers"):
        files.refuse("normalizer", f"must be none for byte-level BPE, got {step.get('type')}")
    steps = _kinds(files.data.get("pre_tokenizer"), "pretokenizers")
    _check_lossless(files, steps)
    if sum(step.get("type") == "ByteLevel" for step in steps) != 1:
        files.refuse("pre_tokenizer", "must have one step ByteLevel for byte-level BPE")
    if any(step.get("type") == "ByteLevel" and step.get("add_prefix_space", True) for step in steps):
        files.refuse("pre_tokenizer.add_prefix_space", "must be false: it puts a space in front of a text")
    kinds = [step.get("type") for step in _kinds(files.data.get("decoder"), "decoders")]
    if kinds != ["ByteLevel"]:
        files.refuse("decoder", f"must be ByteLevel for byte-level BPE, got {kinds}")


def _check_lossless(files: HFFiles, steps: list[dict[str, Any]]) -> None:
    for step in steps:
        kind = step.get("type")
        if kind not in _LOSSLESS:
            files.refuse("pre_tokenizer", f"must be of {', '.join(_LOSSLESS)}, got {kind}")
        if step.get("behavior") == "Removed":
            files.refuse("pre_tokenizer", f"must not remove what it cuts at: {kind} does")


def _check_byte_fallback(files: HFFiles) -> bool:
    """Refuse what would make ids that are not the bytes of a text but for spaces; whether the first space of a text is
    dropped.
    """
    for step in _kinds(files.data.get("normalizer"), "normalizers"):
        is_space = step.get("pattern") == {"String": " "} and step.get("content") == _SPACE
        if not (step.get("type") == "Replace" and is_space or step == {"type": "Prepend", "prepend": _SPACE}):
            files.refuse("normalizer", f"may put {_SPACE} in front and for spaces, got {step}")
    steps = _kinds(files.data.get("pre_tokenizer"), "pretokenizers")
    _check_lossless(files, [step for step in steps if step.get("type") != "Metaspace"])
    if len(steps) > 1 and any(step.get("type") == "Metaspace" for step in steps):
        files.refuse("pre_tokenizer", "must be Metaspace alone, or without it")
    if any(step.get("type") == "ByteLevel" for step in steps):
        files.refuse("pre_tokenizer", "must not be ByteLevel where model.byte_fallback is true")
    if any(step.get("type") == "Metaspace" and step.get("replacement") != _SPACE for step in steps):
        files.refuse("pre_tokenizer.replacement", f"must be {_SPACE}")
    drops = has_space = False
    for step in _kinds(files.data.get("decoder"), "decoders"):
        kind = step.get("type")
        if kind == "Strip" and step.get("content") == " " and (step.get("start"), step.get("stop")) in ((1, 0), (0, 0)):
            drops |= step["start"] == 1
        elif kind == "Metaspace" and step.get("replacement") == _SPACE:
            has_space = True
            drops |= step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
        elif kind == "Replace" and step.get("pattern") == {"String": _SPACE} and step.get("content") == " ":
            has_space = True
        elif kind not in ("ByteFallback", "Fuse"):
            files.refuse("decoder", f"may be of Replace, ByteFallback, Fuse, Strip and Metaspace, got {step}")
    if not has_space:
        files.refuse("decoder", f"must make {_SPACE} a space")
    return drops


def _prefix_rule(files: HFFiles) -> str:
    """Where BPE with byte fallback gets a space: in front of "each" piece of text between added tokens, of each that
    has none ("bare"), of the "first" if it has none, or "never".
    """
    if any(step.get("type") == "Prepend" for step in _kinds(files.data.get("normalizer"), "normalizers")):
        return "each"
    for step in _kinds(files.data.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
            if scheme not in ("always", "first", "never"):
                files.refuse("pre_tokenizer.prepend_scheme", f"must be always, first or never, got {scheme!r}")
            return {"always": "bare", "first": "first", "never": "never"}[scheme]
    return "never"


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer that puts no space in front of a text."""
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Sequence":
        inner = "normalizers" if "normalizers" in part else "pretokenizers"
        kept = [_without_prefix(member) for member in part.get(inner, [])]
        return part | {inner: [member for member in kept if member is not None]}
    if part.get("type") == "Prepend":
        return None
    return part | {"prepend_scheme": "never"} if part.get("type") == "Metaspace" else part


def _cut(files: HFFiles, ordinary: Mapping[str, int]) -> re.Pattern[str] | None:
    """Where any text may be cut without an effect on its ids, None where no such place is known."""
    steps = _kinds(files.data.get("pre_tokenizer"), "pretokenizers")
    kinds = [step.get("type") for step in steps]
    if files.data["model"].get("byte_fallback", False):
        splits = kinds == ["Metaspace"] and steps[0].get("split", True)
        is_whole = kinds in ([], ["Metaspace"]) and not splits and not files.data["model"].get("ignore_merges", False)
        joins = any(re.search(f"[^{_SPACE}]{_SPACE}", text) for text in ordinary)
        return _BEFORE_SPACES if splits or (is_whole and not joins) else None
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return _BEFORE_WORDS
    if (
        kinds == ["Split", "ByteLevel"]
        and not steps[1].get("use_regex", True)
        and steps[0].get("behavior") == "Isolated"
    ):
        pattern = steps[0].get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        return _BEFORE_WORDS if regex in _CUTS_AT_SPACES and not steps[0].get("invert") else None
    return None


def _split_merges(files: HFFiles) -> Merges:
    merges = []
    for index, merge in enumerate(files.data["model"]["merges"]):
        pair = merge.split(" ") if type(merge) is str else merge
        if type(pair) is not list or len(pair) != 2 or type(pair[0]) is not str or type(pair[1]) is not str:
            files.refuse(f"model.merges[{index}]", f"must be two tokens, got {merge!r}")
        merges.append((pair[0], pair[1]))
    return merges


def _library(files: HFFiles, ordinary: Mapping[str, int], merges: Merges) -> Any:
    """The tokenizers library over the tokens that text may become."""
    import tokenizers

    model = files.data["model"]
    merges = [pair for pair in merges if "".join(pair) in ordinary and set(pair) <= ordinary.keys()]
    bare: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [],
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    bare |= {name: _without_prefix(files.data.get(name)) for name in ("normalizer", "pre_tokenizer", "decoder")}
    unknown = model.get("unk_token")
    bare["model"] = model | {
        "type": "BPE",
        "vocab": ordinary,
        "merges": merges,
        "unk_token": unknown if unknown in ordinary else None,
    }
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(bare))
    except BaseException as error:  # the library's panics are no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise ValueError(f"tokenizer file {files.path} cannot be read: {type(error).__name__}: {error}") from None


def _tiktoken(files: HFFiles, ordinary: Mapping[str, int], written: Mapping[int, bytes], merges: Merges) -> Any:
    """tiktoken's encoding of the same ids, None where the merges are not those of byte strings by rank."""
    model = files.data["model"]
    steps = _kinds(files.data.get("pre_tokenizer"), "pretokenizers")
    if not model.get("ignore_merges", False) or [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, byte_level = steps
    pattern = split.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    if not isinstance(regex, str) or split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    if byte_level.get("use_regex", True) or len({*written.values()}) != len(written):
        return None
    single = {data for data in written.values() if len(data) == 1}
    if len(single) != 256 or not _is_ranked(merges, ordinary):
        return None
    import tiktoken

    ranks = {data: token_id for token_id, data in written.items()}
    try:
        return tiktoken.Encoding(str(files.path), pat_str=regex, mergeable_ranks=ranks, special_tokens={})
    except ValueError:  # the library's regular expressions allow more than tiktoken's
        return None


def _is_ranked(merges: Merges, ordinary: Mapping[str, int]) -> bool:
    """Whether the merges are all pairs of tokens that make a token, in the order of its id."""
    merges = [(left, right) for left, right in merges if left in ordinary and right in ordinary]
    ranks = [ordinary.get(left + right, -1) for left, right in merges]
    if -1 in ranks or any(before > after for before, after in pairwise(ranks)) or len(set(merges)) != len(merges):
        return False
    splits = (
        1 for text in ordinary for cut in range(1, len(text)) if text[:cut] in ordinary and text[cut:] in ordinary
    )
    return sum(splits) == len(merges)
