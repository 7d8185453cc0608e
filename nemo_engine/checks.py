"""Checks of users' values that several modules make; each raises ``ValueError`` naming argument, value and limit."""

from __future__ import annotations

import sys


def check_unicode(name: str, text: str) -> None:
    """Raise ``ValueError`` if ``text`` holds a lone surrogate, which is no character and which no tokenizer knows.

    Python puts them where bytes of a command line or a file are no UTF-8, and JSON can write them ("\\ud800").
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be Unicode text: character {error.start} is the lone surrogate {text[error.start]!r}, as "
            "bytes become "
            "that are not UTF-8"
        ) from None


def check_int(name: str, value: object, *, low: int, high: int | None = None, low_text: str = "") -> int:
    """``value``, an integer from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        limit = low_text or f"at least {low}"
        raise ValueError(f"{name} must be {limit if high is None else f'from {low} to {high}'}, got {value}")
    return value


def check_positive(name: str, value: object) -> float:
    """``value``, a finite number greater than 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} must be finite and greater than 0, got {value}")
    return float(value)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """``value`` is among ``choices``."""
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
