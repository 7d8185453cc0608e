"""Writes ``tokenizer.json`` as Hugging Face has it: of a Tekken file, and of BPE with byte fallback as SentencePiece's
become.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
_ALPHABET = {byte: chr(byte) for byte in _PRINTED} | {
    byte: chr(256 + index) for index, byte in enumerate(sorted({*range(256)} - {*_PRINTED}))
}
CONTROLS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "<pad>", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
)  # fmt: skip


def written(data: bytes) -> str:
    """Bytes in GPT-2's alphabet."""
    return "".join(map(_ALPHABET.__getitem__, data))


def added(token_id: int, content: str, **flags: bool) -> dict[str, Any]:
    """An entry of ``added_tokens``."""
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content} | usual | flags


def tekken_as_hf(tekken: Path, renamed: dict[int, str] | None = None, grown: Sequence[str] = ()) -> dict[str, Any]:
    """``tokenizer.json`` of a Tekken file, by the rules by which NeMo's was made. renamed: control tokens; grown: more
    of them, at the end.
    """
    data = json.loads(tekken.read_text())
    config = data["config"]
    first, size = config["default_num_special_tokens"], config["default_vocab_size"]
    names = {i: CONTROLS[i] if i < len(CONTROLS) else f"<SPECIAL_{i}>" for i in range(first)} | (renamed or {})
    names |= {size + index: name for index, name in enumerate(grown)}
    tokens = [written(base64.b64decode(entry["token_bytes"])) for entry in data["vocab"][: size - first]]
    ids = {text: first + rank for rank, text in enumerate(tokens)}
    merges = [
        pair
        for text in tokens
        for pair in sorted(
            ((text[:cut], text[cut:]) for cut in range(1, len(text)) if text[:cut] in ids and text[cut:] in ids),
            key=lambda pair: (ids[pair[0]], ids[pair[1]]),
        )
    ]
    split = {"type": "Split", "pattern": {"Regex": config["pattern"]}, "behavior": "Isolated", "invert": False}
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in ((1, "<s>"), (2, "</s>"))}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair_of = [*single, {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(i, name) for i, name in sorted(names.items())],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_alone]},
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": pair_of, "special_tokens": special},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {name: i for i, name in sorted(names.items()) if i < size} | ids,
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def cut_tekken(source: Path, size: int, to: Path) -> Path:
    """A Tekken file of the first ``size`` ids of another."""
    data = json.loads(source.read_text())
    config = data["config"]
    data["vocab"] = data["vocab"][: size - config["default_num_special_tokens"]]
    data["config"] = config | {"default_vocab_size": size, "num_vocab_tokens": len(data["vocab"])}
    to.write_text(json.dumps(data))
    return to


def config_of(data: dict[str, Any], **more: Any) -> dict[str, Any]:
    """``tokenizer_config.json`` beside such a ``tokenizer.json``."""
    decoder = {
        str(token["id"]): {name: token[name] for name in token if name != "id"} for token in data["added_tokens"]
    }
    usual = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
    }
    return {"added_tokens_decoder": decoder, "tokenizer_class": "PreTrainedTokenizerFast"} | usual | more


def write(folder: Path, data: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    """Write both files into ``folder``; returns the path of ``tokenizer.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps(config_of(data) if config is None else config))
    return folder / "tokenizer.json"


def byte_fallback(words: Sequence[str], *, legacy: bool = False) -> dict[str, Any]:
    """``tokenizer.json`` of BPE with byte fallback whose merges make ``words``, in which a space is written U+2581.

    legacy: the normalizer puts the space in front of every piece, and otherwise the pre-tokenizer does it to the first.
    """
    ids = {name: index for index, name in enumerate(("<unk>", "<s>", "</s>"))}
    ids |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges: list[list[str]] = []
    for letter in sorted({letter for word in words for letter in word}):
        ids[letter] = len(ids)
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in ids:
                ids[word[:end]] = len(ids)
                merges.append([word[: end - 1], word[end - 1 : end]])
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    steps = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(i, name) for i, name in enumerate(("<unk>", "<s>", "</s>"))],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if legacy else None,
        "pre_tokenizer": None if legacy else metaspace,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges,
        },
    }
