"""A check of users' text that several modules make."""

from __future__ import annotations


def check_unicode(name: str, text: str) -> None:
    """Raise ``ValueError`` if ``text`` holds a lone surrogate, which is no character and which no tokenizer knows.

    Python puts them where bytes of a command line or a file are no UTF-8, and JSON can write them ("\\ud800").
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must be Unicode text: character {error.start} is the lone surrogate {text[error.start]!r}, as bytes become "
            "that are not UTF-8"
        ) from None
