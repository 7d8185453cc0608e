"""Values of flags: times with their units, and lists, which have one syntax in every command."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any

_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0}


def seconds(text: str) -> float:
    """``30ms``, ``1.5s``; raises ``argparse.ArgumentTypeError`` for a number without a unit too."""
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]+)?)\s*(s|ms|us|min|)", text)
    try:
        value = float(match[1]) if match else -1.0
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"a time above 0 such as 30ms or 1.5s is needed, got {text!r}")
    assert match is not None
    if not match[2]:
        raise argparse.ArgumentTypeError(f"a time needs its unit: {value:g}ms or {value:g}s, got {text!r}")
    return value * _UNITS[match[2]]


def above_zero(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """``convert``, int or float, for finite numbers above 0."""

    def parse(text: str) -> Any:
        value = convert(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    return parse


class ListOf:
    """The ``type`` of a flag whose value is a list; goes with ``Several``.

    convert: makes an item of a word, and raises ``ValueError`` or ``argparse.ArgumentTypeError``. what: the items.
    """

    def __init__(self, convert: Callable[[str], Any], what: str) -> None:
        self.convert, self.what = convert, what

    def __call__(self, text: str) -> list[Any]:
        """The items of one word. Raises ``argparse.ArgumentTypeError``."""
        try:
            return [self.convert(part) for part in text.removesuffix(",").split(",")]
        except argparse.ArgumentTypeError:
            raise
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{self.what} are needed, with spaces or commas between them, got {text!r}"
            ) from None

    def takes(self, text: str) -> bool:
        """Whether ``text`` is a word of the list."""
        try:
            self(text)
        except argparse.ArgumentTypeError:
            return False
        return True


class Several(argparse.Action):
    """Collects a list: the words behind the flag, the parts between commas, and those of the flag given again."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        """Add ``values``, a list for each word, to what was given before."""
        before = getattr(namespace, self.dest, None)
        before = [] if before is None or before is self.default else before
        setattr(namespace, self.dest, [*before, *(item for part in values for item in part)])


def add_list(group: Any, flag: str, convert: Callable[[str], Any], what: str, **options: Any) -> None:
    """Add ``flag``, whose value is a list of what ``convert`` makes: ``5 10``, ``5,10``, or the flag given again."""
    group.add_argument(flag, type=ListOf(convert, what), action=Several, nargs="+", **options)


def join_lists(words: Sequence[str], actions: dict[str, argparse.Action]) -> list[str]:
    """``--rate 5 10 nemo`` as ``--rate=5,10 nemo``: a list ends where a word is none of its items, so that an argument
    may stand behind it, which argparse would take as one more.
    """
    joined: list[str] = []
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word == "--":
            return [*joined, word, *words[at:]]
        kind = getattr(actions.get(word), "type", None)
        items: list[str] = []
        while isinstance(kind, ListOf) and at < len(words) and kind.takes(words[at]):
            items.append(words[at].removesuffix(","))
            at += 1
        joined.append(f"{word}={','.join(items)}" if items else word)
    return joined
