"""Finds the chat templates of a checkpoint, in transformers' order, and the texts of ``bos_token`` and the like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_engine.text.hf_files import CONFIG_NAME, MAP_NAME
from nemo_engine.text.tokenizer import Tokenizer

TEMPLATE_NAME = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
JSON_NAME = "chat_template.json"
MAX_BYTES = 1 << 22  # the largest file of a template

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class Templates:
    """Texts of templates by name, such as "default" and "tool_use"; ``source`` names the file or the option that they
    come from.
    """

    source: str
    texts: Mapping[str, str]


def find_templates(folders: Sequence[Path]) -> Templates | None:
    """The templates of the first of ``folders`` that has some, None if none has.

    ``chat_template.jinja`` and ``additional_chat_templates/*.jinja`` come before ``tokenizer_config.json``, and that
    before ``chat_template.json``. Raises ``ValueError`` for a file that cannot be read.
    """
    return next((hit for folder in folders if (hit := _find(folder)) is not None), None)


def _find(folder: Path) -> Templates | None:
    texts: dict[str, str] = {}
    if (folder / TEMPLATE_NAME).is_file():
        texts["default"] = _read(folder / TEMPLATE_NAME)
    for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        texts[path.stem] = _read(path)
    if texts:
        name = TEMPLATE_NAME if "default" in texts else TEMPLATE_FOLDER
        return Templates(name, texts)
    for name in (CONFIG_NAME, JSON_NAME):
        hit = _object(folder / name).get("chat_template")
        if hit is not None:
            return Templates(name, _named(folder / name, hit))
    return None


def given_template(option: str) -> Templates:
    """The template of the option ``chat_template``, which is the path of a file or, if no file is there, the text."""
    if not any(sign in option for sign in "{\n"):
        path = Path(option).expanduser()
        if not path.is_file():
            raise ValueError(f"chat_template must be a template's file or text, got {option!r}, which is no file")
        return Templates(path.name, {"default": _read(path)})
    return Templates("chat_template", {"default": option})


def special_texts(folders: Sequence[Path], tokenizer: Tokenizer) -> dict[str, str]:
    """The texts that templates know as ``bos_token``, ``eos_token`` and so on."""
    hit: dict[str, str] = {}
    for path in [folder / name for folder in folders for name in (CONFIG_NAME, MAP_NAME)]:
        config = _object(path)
        for name in _SPECIAL:
            value = config.get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and text:
                hit.setdefault(name, text)
    for name, token_id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if name not in hit and token_id is not None and tokenizer.is_special(token_id):
            hit[name] = tokenizer.special_text(token_id)
    return hit


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return value


def _named(path: Path, value: object) -> dict[str, str]:
    """Templates by name, read from a single template or a list of named ones."""
    if isinstance(value, str):
        return {"default": value}
    entries = value if isinstance(value, list) else None
    if isinstance(value, dict):
        entries = [{"name": name, "template": text} for name, text in value.items()]
    texts: dict[str, str] = {}
    for index, entry in enumerate(entries or ()):
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str) or name in texts:
            raise ValueError(f"{path}: chat_template[{index}] must have a template, and a name that no other has")
        texts[name] = text
    if not texts:
        raise ValueError(f"{path}: chat_template must be a text or a list of named templates, got {str(value)[:80]!r}")
    return texts
