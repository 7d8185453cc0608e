"""``Vocabulary``: what a tokenizer file of any kind is to ``Tokenizer``, and ``AddedToken``, a token with a name of its
own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that only its id or a template puts into a prompt: no text of a user becomes it.

    ``special`` ones are control tokens, which an answer shows only if it is asked to; others are text that has an id of
    its own. In a template's text, ``lstrip`` and ``rstrip`` take the white space on that side of ``content`` away, and
    ``single_word`` needs something other than a word's character on both sides. ``normalized`` is kept as the file has
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
    """The tokens of one file, and text into ids.

    ``token_bytes`` has those of each id, none for control tokens. ``added`` is in the order of ids. ``begin_ids`` stand
    before a prompt. ``drops_first_space`` is whether a text loses the space at its very start. ``pattern`` is what else
    the ids of a text depend on. ``cuts_words`` is whether a text may be cut between a letter and a space without an
    effect on its ids. ``mistral`` has an ``instruct_tokenizer`` of mistral-common, if there is any.
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
        """Make ready to encode; ``ValueError`` where the file turns out not to allow it.

        What is said above needs none of it.
        """

    def encode(self, text: str, *, is_start: bool = True) -> list[int]:
        """Ids of ``text`` and nothing else; not ``is_start`` where a control token stands in front of it."""
        raise NotImplementedError
