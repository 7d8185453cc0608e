"""``Vocabulary``: the interface of every kind of tokenizer file for ``Tokenizer``; and ``AddedToken``, a token with a
name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that enters a prompt by its id or by a template alone: no text of a user becomes it.

    ``special`` ones are control tokens, which an answer shows only on request; others are text with an id for the
    whole. In a template's text, ``lstrip`` and ``rstrip`` remove the white space on that side of ``content``, and
    ``single_word`` matches only between characters that are no part of a word. ``normalized`` is stored as the file has
    it.
    """

    id: int
    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


class Vocabulary:
    """The tokens of one file, and the encoding of text.

    ``token_bytes`` has the bytes of each id, none for control tokens. ``added`` is in the order of ids. ``begin_ids``
    come before a prompt. ``drops_first_space``: a text loses the space at its very start. ``pattern`` is whatever else
    the ids of a text depend on. ``cuts_words``: a text may be cut between a letter and a space without an effect on its
    ids. ``mistral`` has an ``instruct_tokenizer`` of mistral-common, if there is any.
    """

    version: str
    token_bytes: Sequence[bytes]
    special: Mapping[int, str]
    added: Sequence[AddedToken]
    bos_id: int | None
    eos_id: int | None
    begin_ids: Sequence[int]
    drops_first_space: bool
    pattern: str
    cuts_words: bool = True
    mistral: Any = None

    def prepare(self) -> None:
        """Get ready to encode; ``ValueError`` if the file turns out to be unusable.

        The attributes above do not need it.
        """

    def encode(self, text: str, *, is_start: bool = True) -> list[int]:
        """Ids of ``text`` and nothing else. ``is_start`` is false behind a control token."""
        raise NotImplementedError
