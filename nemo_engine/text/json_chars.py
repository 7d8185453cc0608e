"""Sets of characters, as sorted ranges of code points, and the named ones of regular expressions."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from functools import cache

Ranges = tuple[tuple[int, int], ...]  # of code points, both ends in, sorted and apart


def merged(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """The ranges of ``pairs``, which may overlap."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(pairs):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


def without(ranges: Ranges, taken: Ranges) -> Ranges:
    """The part of ``ranges`` that is not in ``taken``."""
    left: list[tuple[int, int]] = []
    for low, high in ranges:
        for taken_low, taken_high in taken:
            if taken_high < low or taken_low > high:
                continue
            if low < taken_low:
                left.append((low, taken_low - 1))
            low = taken_high + 1
            if low > high:
                break
        if low <= high:
            left.append((low, high))
    return tuple(left)


def chars_of(text: str) -> Ranges:
    """The characters of ``text``."""
    return merged((ord(char), ord(char)) for char in text)


SURROGATES = ((0xD800, 0xDFFF),)
ALL = without(((0, sys.maxunicode),), SURROGATES)
_DIGITS: Ranges = ((0x30, 0x39),)
_WORD = merged([(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
_SPACE = chars_of(" \t\n\r\f\v")
_TURKISH_AND_SIGNS = chars_of("\u017f\u212a\u0130\u0131")  # what upper and lower case of s, k and i are, besides ASCII


_NARROW = {"d": _DIGITS, "w": _WORD, "s": _SPACE}


@cache
def _unicode(name: str) -> Ranges:
    """What Python's ``re``, and ECMA 262 somewhere else, count among ``name`` (d, w or s)."""
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    spans = [(match.start(), match.end() - 1) for match in re.finditer(rf"\{name}+", every)]
    return merged([*_NARROW[name], *spans, *([(0xFEFF, 0xFEFF)] if name == "s" else [])])


def named_set(letter: str, is_unicode: bool) -> Ranges:
    """``\\d``, ``\\w``, ``\\s`` and their opposites: what they surely hold, or with ``wide`` what they may hold."""
    name = letter.lower()
    if letter == name:
        return _unicode(name) if is_unicode else _NARROW[name]
    return without(ALL, _NARROW[name] if is_unicode else _unicode(name))


def both_cases(ranges: Ranges, is_unicode: bool) -> Ranges:
    """``ranges`` and the same letters in the other case; with ``wide`` also what those may mean besides ASCII."""
    pairs = list(ranges)
    for upper in range(0x41, 0x5B):
        for start, other in ((upper, upper + 32), (upper + 32, upper)):
            if any(low <= start <= high for low, high in ranges):
                pairs.append((other, other))
                if is_unicode and chr(upper) in "SKI":
                    pairs += _TURKISH_AND_SIGNS
    return merged(pairs)
