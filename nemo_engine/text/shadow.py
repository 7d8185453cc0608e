"""Shadows: marked characters of users' texts, which can be recognised in the output of a template.

A shadow is a lone surrogate that stands for an ASCII character. No accepted text has one (``checks.check_unicode``),
nor has a template, so every shadow in an output comes from a user's text. A text and its shadow have the same length,
so equal places can be cut from both. Operations of templates on texts (``==``, ``in``, ``split``, ``upper``, ...) see
through shadows: the functions here return the result for the plain texts, and keep the shadows in their places.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

_BASE = 0xDC00  # the shadow of character c is chr(_BASE + ord(c))
_ANY = re.compile("[\udc00-\udc7f]")
_ESCAPE = re.compile(r"\\(\\|udc([0-7][0-9a-f]))")
_TEST_NAMES = frozenset(
    (
        "startswith",
        "endswith",
        "find",
        "rfind",
        "index",
        "rindex",
        "count",
        "isdigit",
        "isdecimal",
        "isnumeric",
        "isalpha",
        "isalnum",
        "isupper",
        "islower",
        "istitle",
        "isspace",
        "isidentifier",
        "isprintable",
        "isascii",
    )
)
_CASE_NAMES = frozenset(("upper", "lower", "capitalize", "title", "swapcase", "casefold"))


def _codes(text: str) -> np.ndarray:
    """The code points of ``text``. numpy drops NULs at the end of a text, so another character is put there."""
    return np.array(text + "x").reshape(1).view(np.uint32)[:-1]


def _text(codes: np.ndarray) -> str:
    return str(np.append(codes, np.uint32(ord("x"))).view(f"<U{len(codes) + 1}")[0])[:-1]


class Shadower:
    """Casts shadows of some ASCII characters."""

    def __init__(self, characters: Iterable[str]) -> None:
        self._table = np.arange(128, dtype=np.uint32)
        for character in characters:
            self._table[ord(character)] = _BASE + ord(character)
        self._pattern = re.compile("[" + "".join(map(re.escape, sorted(characters))) + "]" if characters else "(?!)")

    def cast(self, text: str) -> str:
        """``text`` with the shadows of its characters."""
        if self._pattern.search(text) is None:
            return text
        codes = _codes(text).copy()
        is_ascii = codes < 128
        codes[is_ascii] = self._table[codes[is_ascii]]
        return _text(codes)


def shadow_first(text: str) -> str:
    """``text`` with a shadow for the first character that can have one."""
    for index, character in enumerate(text):
        if can_have_shadow(character):
            return text[:index] + chr(_BASE + ord(character)) + text[index + 1 :]
    return text


def can_have_shadow(character: str) -> bool:
    """Whether ``character`` is ASCII, no white space, and not escaped by JSON or Python."""
    return "!" <= character <= "~" and character not in "\"'\\"


def has_shadow(text: str) -> bool:
    """Whether any character of ``text`` is a shadow."""
    return not text.isascii() and _ANY.search(text) is not None


def plain(text: str) -> str:
    """``text`` without shadows."""
    if not has_shadow(text):
        return text
    codes = _codes(text)
    return _text(np.where((codes >= _BASE) & (codes < _BASE + 128), codes - _BASE, codes))


def are_alike(text: str, marked: str) -> bool:
    """Whether ``marked`` equals ``text`` except for shadows."""
    if len(text) != len(marked):
        return False
    before, after = _codes(text), _codes(marked)
    return bool(((before == after) | (after - np.uint32(_BASE) == before)).all())


def places_of(characters: Iterable[str], text: str) -> list[int]:
    """The places in ``text`` of any of the characters."""
    codes = _codes(text)
    is_one = np.zeros(len(codes), dtype=bool)
    for character in characters:
        is_one |= codes == ord(character)
    places: list[int] = np.flatnonzero(is_one).tolist()
    return places


def plain_value(value: Any) -> Any:
    """``value`` with all strings in it without shadows."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {plain_value(key): plain_value(inner) for key, inner in value.items()}
    return type(value)(map(plain_value, value)) if type(value) in (list, tuple) else value


def from_escapes(text: str) -> str:
    """``text`` with each escape of a shadow replaced by the shadow."""
    return (
        _ESCAPE.sub(lambda hit: chr(_BASE + int(hit[2], 16)) if hit[2] else hit[0], text) if "\\udc" in text else text
    )


def as_text(value: Any) -> str:
    """``str(value)``. Lists and objects write a shadow as an escape, which is turned back into the shadow."""
    text = str(value)
    return from_escapes(text) if isinstance(value, (list, dict, tuple)) else text


def are_equal(left: Any, right: Any) -> bool:
    """``left == right`` of the plain texts."""
    if isinstance(left, str) and isinstance(right, str):
        return len(left) == len(right) and (left == right or plain(left) == plain(right))
    return bool(left == right)


def is_in(item: Any, container: Any) -> bool:
    """``item in container`` of the plain texts."""
    if isinstance(container, str) and isinstance(item, str):
        return item in container or plain(item) in plain(container)
    if item in container:
        return True
    if not isinstance(item, str) or isinstance(container, (str, range)):
        return False
    wanted = plain(item)
    return any(isinstance(element, str) and plain(element) == wanted for element in container)


def call_method(text: str, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``text.name(*args)``, of the plain texts."""
    if name in _TEST_NAMES:
        return getattr(plain(text), name)(*map(plain_value, args))
    if name in _CASE_NAMES:
        return like(text, getattr(plain(text), name)())
    if (
        kwargs
        or not args
        or not isinstance(args[0], str)
        or not args[0]
        or not (has_shadow(text) or has_shadow(args[0]))
    ):
        return method(*args, **kwargs)
    if name in ("strip", "lstrip", "rstrip", "removeprefix", "removesuffix"):
        plain_text, removed = plain(text), plain(args[0])
        start = 0
        if name in ("strip", "lstrip", "removeprefix"):
            head = plain_text.removeprefix(removed) if name == "removeprefix" else plain_text.lstrip(removed)
            start = len(plain_text) - len(head)
        return text[start : start + len(getattr(plain_text, name)(removed))]
    if name in ("split", "rsplit", "partition", "rpartition"):
        return _cut(text, name, plain(args[0]), args[1:])
    if name == "replace" and len(args) > 1 and isinstance(args[1], str):
        return args[1].join(_cut(text, "split", plain(args[0]), args[2:]))
    return method(*args, **kwargs)


def _cut(text: str, name: str, separator: str, limits: tuple[Any, ...]) -> Any:
    plain_text = plain(text)
    pieces = getattr(plain_text, name)(separator, *limits)
    gap = len(separator) if name in ("split", "rsplit") else 0
    start, cut = 0, []
    for piece in pieces:
        cut.append(text[start : start + len(piece)])
        start += len(piece) + gap
    return tuple(cut) if isinstance(pieces, tuple) else cut


def like(text: str, changed: str) -> str:
    """``changed``, made from ``text`` letter by letter, with shadows where ``text`` has them."""
    if len(changed) != len(text) or not has_shadow(text):
        return changed
    before, after = _codes(text), _codes(changed)
    is_shadow = (before >= _BASE) & (before < _BASE + 128) & (after < 128)
    return _text(np.where(is_shadow, after + _BASE, after))
