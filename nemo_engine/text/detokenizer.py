"""``Detokenizer``: the text of one completion as its tokens come, with stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from nemo_engine.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns token ids into text piece by piece, in constant time per token.

    The pieces, joined, equal ``tokenizer.decode`` of all ids: incomplete characters are held back until they are whole.
    With stop strings, the last ``longest stop - 1`` characters are held back too, until the end.

    ``mark_token_id`` is a token whose first place in the text is wanted; see ``mark``.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        min_tokens: int = 0,
        mark_token_id: int | None = None,
    ) -> None:
        self.num_tokens = 0  # consumed, the one that completed a stop string included
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._stop_by_end: dict[str, list[str]] = {}  # by their last character
        for text in self._stop:
            self._stop_by_end.setdefault(text[-1], []).append(text)
        self._keeps_stop = include_stop_str_in_output
        self._skips_special = skip_special_tokens
        self._min_tokens = min_tokens
        self._num_held = max(map(len, self._stop), default=1) - 1
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._pieces: list[str] = []  # released text
        self._num_taken = 0  # pieces that take_delta has returned
        self._num_released = 0  # characters
        self._mark_token_id = mark_token_id
        self._mark: int | None = None
        self._tail = ""  # decoded and held back
        self._is_at_start = True
        self._is_done = False

    @property
    def text(self) -> str:
        """All text released so far."""
        if len(self._pieces) > 1 and self._num_taken in (0, len(self._pieces)):
            self._pieces = ["".join(self._pieces)]
            self._num_taken = min(self._num_taken, 1)
        return "".join(self._pieces)

    @property
    def mark(self) -> int | None:
        """Where the first token ``mark_token_id`` stands: the number of characters in front of it in the whole text.

        Its own text, where control tokens are shown, comes after. None as long as the text released does not reach
        there, so also for good if a stop string cut the text in front of it. A character that was incomplete before the
        token counts as in front of it; a stop token that adds no text leaves no mark.
        """
        return self._mark if self._mark is not None and self._num_released >= self._mark else None

    def append(self, token_ids: Sequence[int], *, last_is_stop_token: bool = False) -> str | None:
        """Take in new ids; returns the stop string that they completed. After that, later ids have no effect.

        With ``last_is_stop_token`` the last id ended the request and adds no text, unless stop strings are to be
        included. Of several stop strings, the one that ends first in the text counts, then the first listed. They are
        not looked for in the text of the first ``min_tokens`` ids.
        """
        if self._is_done:
            return None
        if not self._stop:
            self.num_tokens += len(token_ids)
            self._release(self._decode(self._without_stop_token(token_ids, last_is_stop_token)))
            return None
        for index, token_id in enumerate(token_ids):
            is_last = index == len(token_ids) - 1
            self.num_tokens += 1
            new = self._decode(self._without_stop_token((token_id,), last_is_stop_token and is_last))
            match = self._find_stop(new) if self.num_tokens > self._min_tokens else None
            if match is not None:
                stop, end = match
                self._release((self._tail + new)[: end if self._keeps_stop else end - len(stop)])
                self._tail = ""
                self._is_done = True
                return stop
            held = self._tail + new
            cut = max(0, len(held) - self._num_held)
            self._release(held[:cut])
            self._tail = held[cut:]
        return None

    def take_delta(self) -> str:
        """What was released since the last call."""
        delta = "".join(self._pieces[self._num_taken :])
        self._num_taken = len(self._pieces)
        return delta

    def finish(self) -> None:
        """The completion has ended other than by a stop string: release what was held back."""
        if not self._is_done:
            self._release(self._tail + self._decoder.decode(b"", final=True))
            self._tail = ""
            self._is_done = True

    def _without_stop_token(self, token_ids: Sequence[int], last_is_stop_token: bool) -> Sequence[int]:
        return token_ids[:-1] if last_is_stop_token and not self._keeps_stop else token_ids

    def _decode(self, token_ids: Sequence[int]) -> str:
        if self._mark is None and self._mark_token_id is not None and self._mark_token_id in token_ids:
            place = list(token_ids).index(self._mark_token_id)
            before = self._decode(token_ids[:place])
            # Whatever comes next, the bytes of an incomplete character become one character: itself or U+FFFD.
            is_incomplete = bool(self._decoder.getstate()[0])
            self._mark = self._num_released + len(self._tail) + len(before) + is_incomplete
            return before + self._decode(token_ids[place:])
        token_bytes, skips = self._tokenizer.token_bytes, self._skips_special
        data = b"".join([token_bytes(token_id, skip_special_tokens=skips) for token_id in token_ids])
        if self._is_at_start and data:
            data = self._tokenizer.strip_start(data)
            self._is_at_start = False
        return self._decoder.decode(data)

    def _find_stop(self, new: str) -> tuple[str, int] | None:
        """The stop string that ``new`` completes, and where it ends in the held tail with ``new``."""
        text = ""
        for index, last in enumerate(new):
            for stop in self._stop_by_end.get(last, ()):
                text = text or self._tail + new
                end = len(self._tail) + index + 1
                if text.endswith(stop, 0, end):
                    return stop, end
        return None

    def _release(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._num_released += len(text)
