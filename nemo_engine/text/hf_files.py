"""Reading Hugging Face's tokenizer files: ``tokenizer.json`` and what ``tokenizer_config.json`` and
``special_tokens_map.json`` add.

What is wrong with a file is said with its path, the field and the reason.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from nemo_engine.text.vocabulary import AddedToken

FILE_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"
MAP_NAME = "special_tokens_map.json"
MAX_BYTES = 1 << 28  # of a file; those of the largest vocabularies are a tenth of it
MAX_TOKENS = 1 << 22

_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")

_logger = logging.getLogger("nemo_engine")


class _Duplicate(ValueError):
    """A name that stands twice in an object of a JSON file."""


@dataclass(slots=True)
class HFFiles:
    """What the files of one folder say.

    ``data`` is ``tokenizer.json``; ``vocab`` its model's, from written tokens to ids.

    ``added`` has the added tokens by id, with what the other files say of them. ``named`` has the tokens that have a
    role, such as "eos_token", by id. ``size`` is the number of ids, without holes.
    """

    path: Path
    data: dict[str, Any]
    vocab: dict[str, int]
    added: dict[int, AddedToken]
    named: dict[str, int] = field(default_factory=dict)
    begin_ids: tuple[int, ...] = ()
    size: int = 0
    texts: dict[int, str] = field(default_factory=dict)  # of ``vocab``, by id
    ids: dict[str, int] = field(default_factory=dict)  # of ``added``, by text

    def refuse(self, where: str, reason: str) -> NoReturn:
        """Raise the error that the file cannot be used."""
        refuse(self.path, where, reason)


def refuse(path: Path, where: str, reason: str) -> NoReturn:
    """Raise the error that a tokenizer's file cannot be used."""
    raise ValueError(f"tokenizer file {path} cannot be used: {where} {reason}")


def read_files(path: Path) -> HFFiles:
    """Read and check ``tokenizer.json`` at ``path`` and the files beside it. Raises ``ValueError``."""
    data = _read_json(path)
    model = data.get("model")
    if not isinstance(model, dict):
        refuse(path, "model", f"must be an object, got {_shown(model)}")
    if model.get("type", "BPE") != "BPE":
        refuse(path, "model.type", f"must be BPE, got {_shown(model['type'])}")
    vocab = _vocabulary(path, model.get("vocab"))
    files = HFFiles(path, data, vocab, {}, texts={token_id: text for text, token_id in vocab.items()})
    for index, entry in enumerate(_list(path, "added_tokens", data.get("added_tokens"))):
        where = f"added_tokens[{index}]"
        token_id = entry.get("id") if isinstance(entry, dict) else None
        _add(files, path, where, _added_token(path, where, token_id, entry))
    config = _read_json(path.with_name(CONFIG_NAME)) if path.with_name(CONFIG_NAME).exists() else {}
    _read_decoder(files, config)
    _read_names(files, config)
    files.size = _check_ids(files)
    files.begin_ids = _begin_ids(files, config)
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"it has {size} bytes, and at most {MAX_BYTES} are read")
        data = json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"tokenizer file {path} cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"tokenizer file {path} cannot be read: it must hold an object, got {_shown(data)}")
    return data


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _Duplicate(f"{name!r} stands twice in one object")
            seen.add(name)
    return members


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _list(path: Path, where: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        refuse(path, where, f"must be a list, got {_shown(value)}")
    return value


def _vocabulary(path: Path, vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, dict) or not vocab:
        refuse(path, "model.vocab", f"must be an object of tokens and their ids, got {_shown(vocab)}")
    for text, token_id in vocab.items():
        if type(token_id) is not int or not 0 <= token_id < MAX_TOKENS:
            refuse(path, f"model.vocab[{text!r}]", f"must be an id from 0 to {MAX_TOKENS - 1}, got {_shown(token_id)}")
    if len(set(vocab.values())) != len(vocab):
        texts: dict[int, str] = {}
        for text, token_id in vocab.items():
            if token_id in texts:
                refuse(path, "model.vocab", f"gives id {token_id} to both {texts[token_id]!r} and {text!r}")
            texts[token_id] = text
    return vocab


def _added_token(path: Path, where: str, token_id: Any, entry: Any) -> AddedToken:
    if not isinstance(entry, dict):
        refuse(path, where, f"must be an object, got {_shown(entry)}")
    if type(token_id) is not int or not 0 <= token_id < MAX_TOKENS:
        refuse(path, f"{where}.id", f"must be an integer from 0 to {MAX_TOKENS - 1}, got {_shown(token_id)}")
    content = _content(path, f"{where}.content", entry.get("content"))
    flags = {name: entry[name] for name in _FLAGS if name in entry}
    for name, value in flags.items():
        if type(value) is not bool:
            refuse(path, f"{where}.{name}", f"must be true or false, got {_shown(value)}")
    return AddedToken(token_id, content, **{"special": False, "normalized": not flags.get("special", False)} | flags)


def _content(path: Path, where: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        refuse(path, where, f"must be a text, got {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        refuse(path, where, f"must be Unicode text, got {_shown(value)}")
    return value


def _add(files: HFFiles, path: Path, where: str, token: AddedToken) -> None:
    """Take an added token in, if nothing else has its id or its text."""
    written = files.vocab.get(token.content, token.id)
    if written != token.id:
        refuse(path, where, f"gives {token.content!r} id {token.id}, and model.vocab gives it {written}")
    if token.content in files.ids:
        refuse(path, where, f"gives {token.content!r} id {token.id}, and it has {files.ids[token.content]}")
    known = files.added.get(token.id)
    other = files.texts.get(token.id, token.content) if known is None else known.content
    if other != token.content or known is not None:
        refuse(path, where, f"gives id {token.id} to {token.content!r}, and {other!r} has it")
    files.added[token.id], files.ids[token.content] = token, token.id


def _read_decoder(files: HFFiles, config: Mapping[str, Any]) -> None:
    """``added_tokens_decoder``: its flags count, its ids and texts must be those of ``tokenizer.json`` or new."""
    path = files.path.with_name(CONFIG_NAME)
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        refuse(path, "added_tokens_decoder", f"must be an object, got {_shown(decoder)}")
    for key, entry in decoder.items():
        where = f"added_tokens_decoder[{key!r}]"
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else None
        if token_id is None:
            refuse(path, where, "must be named by an id")
        token = _added_token(path, where, token_id, entry)
        known = files.added.get(token_id)
        other = known.content if known is not None else files.texts.get(token_id, token.content)
        if other != token.content:
            refuse(path, where, f"is {token.content!r}, and {FILE_NAME} gives id {token_id} to {other!r}")
        other_id = files.ids.get(token.content, files.vocab.get(token.content, token_id))
        if other_id != token_id:
            refuse(path, where, f"is {token.content!r}, and {FILE_NAME} gives it id {other_id}")
        files.added[token_id], files.ids[token.content] = token, token_id


def _read_names(files: HFFiles, config: Mapping[str, Any]) -> None:
    """Tokens with a role are control tokens, whatever else is said of them."""
    map_path = files.path.with_name(MAP_NAME)
    sources = [(files.path.with_name(CONFIG_NAME), config)]
    if map_path.exists():
        sources.append((map_path, _read_json(map_path)))
    for path, names in sources:
        for name in _NAMES:
            if names.get(name) is not None and name not in files.named:
                _name(files, path, name, names[name])
        for name in _LISTS:
            entries = names.get(name)
            if isinstance(entries, dict):  # roles that a model has beyond the usual ones
                entries = list(entries.values())
            for index, entry in enumerate(_list(path, name, entries)):
                _name(files, path, f"{name}[{index}]", entry)


def _name(files: HFFiles, path: Path, name: str, entry: Any) -> None:
    content = entry.get("content") if isinstance(entry, dict) else entry
    where = f"{name}.content" if isinstance(entry, dict) else name
    content = _content(path, where, content)
    token_id = files.ids.get(content, files.vocab.get(content))
    if token_id is None:
        if name in ("bos_token", "eos_token"):
            refuse(path, where, f"is {content!r}, which {FILE_NAME} does not have")
        _logger.warning("%s: %s is %r, which %s does not have: it is not used", path, where, content, FILE_NAME)
        return
    known = files.added.get(token_id, AddedToken(token_id, content))
    files.added[token_id], files.ids[content] = replace(known, special=True), token_id
    files.named[name] = token_id


def _check_ids(files: HFFiles) -> int:
    ids = {*files.vocab.values(), *files.added}
    size = max(ids) + 1
    if size != len(ids):
        hole = next(token_id for token_id in range(size) if token_id not in ids)
        files.refuse("model.vocab and added_tokens", f"have no token {hole}, and go up to {size - 1}")
    return size


def _begin_ids(files: HFFiles, config: Mapping[str, Any]) -> tuple[int, ...]:
    """What stands in front of a prompt: the post-processor's tokens, unless ``add_bos_token`` says otherwise."""
    path = files.path.with_name(CONFIG_NAME)
    begin, end = _template_ids(files, files.data.get("post_processor"))
    for name in ("add_bos_token", "add_eos_token"):
        if not isinstance(config.get(name), bool | None):
            refuse(path, name, f"must be true or false, got {_shown(config[name])}")
    adds_bos = config.get("add_bos_token")
    bos = files.named.get("bos_token")
    if adds_bos and bos is None:
        refuse(path, "add_bos_token", "is true, and no bos_token is named")
    if adds_bos is not None and adds_bos != bool(begin):
        _logger.warning(
            "%s: add_bos_token is %s and counts, the post-processor of %s says otherwise", path, adds_bos, FILE_NAME
        )
        begin = () if bos is None or not adds_bos else (bos,)
    if end or config.get("add_eos_token"):
        _logger.warning("%s: a prompt gets no end-of-sequence token here, though the tokenizer asks for it", files.path)
    if len(begin) == 1:
        files.named.setdefault("bos_token", begin[0])
    return begin


def _template_ids(files: HFFiles, processor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that a post-processor puts in front of a text and behind it."""
    if processor is None:
        return (), ()
    kind = processor.get("type") if isinstance(processor, dict) else processor
    if kind == "ByteLevel":  # offsets alone
        return (), ()
    if kind == "Sequence":
        begin: tuple[int, ...] = ()
        end: tuple[int, ...] = ()
        for part in _list(files.path, "post_processor.processors", processor.get("processors")):
            before, after = _template_ids(files, part)
            begin, end = before + begin, end + after
        return begin, end
    if kind != "TemplateProcessing":
        files.refuse("post_processor.type", f"must be TemplateProcessing, ByteLevel or Sequence, got {_shown(kind)}")
    sides: tuple[list[int], list[int]] = ([], [])
    place = 0
    special = processor.get("special_tokens")
    for index, piece in enumerate(_list(files.path, "post_processor.single", processor.get("single"))):
        where = f"post_processor.single[{index}]"
        if isinstance(piece, dict) and "Sequence" in piece:
            place += 1
            continue
        try:
            ids = special[piece["SpecialToken"]["id"]]["ids"]
        except (KeyError, TypeError, IndexError):
            files.refuse(where, f"names no token of post_processor.special_tokens: {_shown(piece)}")
        sides[min(place, 1)].extend(_known_ids(files, where, ids))
    if place != 1:
        files.refuse("post_processor.single", f"must hold the text once, and holds it {place} times")
    return tuple(sides[0]), tuple(sides[1])


def _known_ids(files: HFFiles, where: str, ids: Any) -> Iterable[int]:
    known = {*files.added, *files.vocab.values()}
    if not isinstance(ids, list) or not all(type(token_id) is int and token_id in known for token_id in ids):
        files.refuse(where, f"stands for ids that are no tokens: {_shown(ids)}")
    return ids
