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


def without(ranges: Ranges, excluded: Ranges) -> Ranges:
    """The part of ``ranges`` that is not in ``excluded``."""
    remaining: list[tuple[int, int]] = []
    for low, high in ranges:
        for excluded_low, excluded_high in excluded:
            if excluded_high < low or excluded_low > high:
                continue
            if low < excluded_low:
                remaining.append((low, excluded_low - 1))
            low = excluded_high + 1
            if low > high:
                break
        if low <= high:
            remaining.append((low, high))
    return tuple(remaining)


def chars_of(text: str) -> Ranges:
    """The characters of ``text``."""
    return merged((ord(char), ord(char)) for char in text)


SURROGATES = ((0xD800, 0xDFFF),)
ALL = without(((0, sys.maxunicode),), SURROGATES)
_DIGITS: Ranges = ((0x30, 0x39),)
_WORD = merged([(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
_SPACE = chars_of(" \t\n\r\f\v")
_TURKISH_AND_SIGNS = chars_of("\u017f\u212a\u0130\u0131")  # the other cases of s, k and i that are not ASCII


_NARROW = {"d": _DIGITS, "w": _WORD, "s": _SPACE}


@cache
def _unicode(name: str) -> Ranges:
    """The characters that Python's ``re``, or ECMA 262, counts among ``name`` (d, w or s)."""
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    spans = [(match.start(), match.end() - 1) for match in re.finditer(rf"\{name}+", every)]
    return merged([*_NARROW[name], *spans, *([(0xFEFF, 0xFEFF)] if name == "s" else [])])


def named_set(letter: str, is_unicode: bool) -> Ranges:
    """``\\d``, ``\\w``, ``\\s``, or the opposite: the characters surely in it, or if ``is_unicode`` all possible."""
    name = letter.lower()
    if letter == name:
        return _unicode(name) if is_unicode else _NARROW[name]
    return without(ALL, _NARROW[name] if is_unicode else _unicode(name))


def both_cases(ranges: Ranges, is_unicode: bool) -> Ranges:
    """``ranges`` and the same letters in the other case; if ``is_unicode`` also cases that are not ASCII."""
    pairs = list(ranges)
    for upper in range(0x41, 0x5B):
        for start, other in ((upper, upper + 32), (upper + 32, upper)):
            if any(low <= start <= high for low, high in ranges):
                pairs.append((other, other))
                if is_unicode and chr(upper) in "SKI":
                    pairs += _TURKISH_AND_SIGNS
    return merged(pairs)
