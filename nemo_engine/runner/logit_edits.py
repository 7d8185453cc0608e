"""Changes to single logits: masks of grammars, allowed_token_ids, bad_words, min_tokens and logit_bias.

Must not know of anything else.

A slot's changes stay on the host. Those of a batch's slots are laid end to end and uploaded at once, when the batch
changes: making and applying them takes a fixed number of operations whatever the number of rows. Whether one applies at
a position is decided on the device: the host does not know the tokens there yet.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_engine.runner.transfer import to_device
from nemo_engine.step import SlotFill

_ALWAYS = 1 << 62  # a position that no request reaches


@dataclass(frozen=True, slots=True)
class SlotEdits:
    """The changes that one slot wants, on the host; empty where there are none. Arrays hold 8 bytes an entry.

    ``allowed``: the only tokens to choose from; empty for all. ``ids``, ``values``, ``until``: add ``values`` to the
    logits of ``ids`` at positions below ``until``. ``words``: mask the last token of each at positions from
    ``word_from`` on, if the tokens just before are the others.
    """

    allowed: array[int]
    ids: array[int]
    values: array[float]
    until: array[int]
    words: tuple[tuple[int, ...], ...]
    word_from: array[int]

    @staticmethod
    def of(fill: SlotFill, vocab_size: int, hidden: Iterable[int] = ()) -> SlotEdits | None:
        """What ``fill`` asks for, None if nothing. Bad words count where they lie wholly in the output, as in vLLM.

        ``hidden`` ids are masked.
        """
        params = fill.params
        added: list[tuple[int, float, int]] = [(token_id, -torch.inf, _ALWAYS) for token_id in hidden]
        added.extend((word[0], -torch.inf, _ALWAYS) for word in fill.bad_words_token_ids if len(word) == 1)
        words = tuple([word for word in fill.bad_words_token_ids if len(word) > 1])
        if params.min_tokens:
            first_free = fill.num_prompt_tokens + params.min_tokens
            added.extend((token_id, -torch.inf, first_free) for token_id in fill.stop_token_ids)
        added.extend((token_id, bias, _ALWAYS) for token_id, bias in (params.logit_bias or {}).items())
        if not (added or words or params.allowed_token_ids):
            return None
        edits = SlotEdits(
            allowed=array("q", params.allowed_token_ids or ()),
            ids=array("q", [token_id for token_id, _, _ in added]),
            values=array("d", [value for _, value, _ in added]),
            until=array("q", [until for _, _, until in added]),
            words=words,
            word_from=array("q", [fill.num_prompt_tokens + len(word) - 1 for word in words]),
        )
        for ids in (edits.allowed, edits.ids, [word[-1] for word in words]):
            assert all(0 <= token_id < vocab_size for token_id in ids), (min(ids), max(ids), vocab_size)
        return edits


class LogitEdits:
    """The changes of a batch: which rows have any, and what they are. One upload.

    ``rows``: ascending, at least one; ``index`` (E,) int64, the same on the device.
    """

    def __init__(
        self, rows: Sequence[int], edits: Mapping[int, SlotEdits], vocab_size: int, device: torch.device
    ) -> None:
        """``edits``: by row, of some of ``rows``. The others are only copied, for masks that come with a step."""
        self.rows = rows
        place_of = {row: place for place, row in enumerate(rows)}
        each = [(place_of[row], edit) for row, edit in edits.items()]
        words = [(place, word) for place, edit in each for word in edit.words]
        length = max([len(word) for _, word in words], default=1) - 1
        starts = [token for _, word in words for token in [-1] * (length + 1 - len(word)) + list(word[:-1])]
        parts = (
            array("q", rows),
            array("q", [place for place, edit in each if edit.allowed]),
            _joined(array("q", [place]) * len(edit.allowed) for place, edit in each),
            _joined(edit.allowed for _, edit in each),
            _joined(array("q", [place]) * len(edit.ids) for place, edit in each),
            _joined(edit.ids for _, edit in each),
            _joined(edit.values for _, edit in each),
            _joined(edit.until for _, edit in each),
            array("q", [place for place, _ in words]),
            array("q", [word[-1] for _, word in words]),
            _joined(edit.word_from for _, edit in each),
            array("q", starts),
        )
        packed = torch.frombuffer(bytearray().join(part.tobytes() for part in parts), dtype=torch.int64)
        uploaded = to_device(packed, device).split([len(part) for part in parts])
        self.index, self._limited, allowed_rows, allowed, self._rows, ids, values, self._until = uploaded[:8]
        self._word_rows, word_ends, self._word_from, self._word_starts = uploaded[8:]
        self._values = values.view(torch.float64)
        self._word_starts = self._word_starts.view(-1, length) if words else self._word_starts
        # Where in the logits of all edited rows, laid end to end.
        self._allowed = allowed_rows * vocab_size + allowed
        self._at = self._rows * vocab_size + ids
        self._word_at = self._word_rows * vocab_size + word_ends

    def apply_(self, logits: Tensor, slot_ids: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """Change ``logits`` in place. logits: (E, V), of ``rows`` alone, dense; slot_ids and positions: (E,) likewise.

        token_ids as in ``Sampler.sample``. Masking adds -inf, and two changes to one logit add up: so neither order nor
        repetition matters.
        """
        flat = logits.view(-1)
        if len(self._limited):
            kept = flat[self._allowed]
            logits.index_fill_(0, self._limited, -torch.inf)
            flat.index_copy_(0, self._allowed, kept)
        if len(self._at):
            values = self._values.masked_fill(positions[self._rows] >= self._until, 0.0)
            flat.index_add_(0, self._at, values.to(logits.dtype))
        if len(self._word_at):
            now = positions[self._word_rows]
            length = self._word_starts.shape[1]
            before = now.unsqueeze(1) + torch.arange(-length, 0, device=now.device)
            history = token_ids[slot_ids[self._word_rows].unsqueeze(1), before.clamp_(min=0)]
            fits = ((history == self._word_starts) | (self._word_starts < 0)).all(dim=1) & (now >= self._word_from)
            values = torch.zeros_like(now, dtype=logits.dtype).masked_fill_(fits, -torch.inf)
            flat.index_add_(0, self._word_at, values)


def _joined(arrays: Iterable[array[int] | array[float]]) -> array[int]:
    """One after the other, as words of 8 bytes."""
    whole = array("q")
    for part in arrays:
        whole.frombytes(part.tobytes())
    return whole


def mask_table(device: torch.device) -> Tensor:
    """(256, 8) fp32: for each byte of a mask, what its bits add to eight logits."""
    bits = torch.arange(256, device=device).unsqueeze(1) >> torch.arange(8, device=device) & 1
    return torch.zeros(256, 8, device=device).masked_fill_(bits == 0, -torch.inf)


def apply_masks_(logits: Tensor, rows: Sequence[int], masks: Sequence[bytes], table: Tensor) -> None:
    """Add -inf to the logits of ``rows`` where ``masks`` have no bit (see ``StepPlan.masks``), with one upload.

    logits: (R, V), changed in place. table: ``mask_table``.
    """
    count, vocab_size = len(rows), logits.shape[1]
    width = -(-vocab_size // 32) * 4
    fitting = [mask if len(mask) == width else bytes(width) for mask in masks]
    packed = bytearray(b"".join([array("q", rows).tobytes(), *fitting]))
    words = to_device(torch.frombuffer(packed, dtype=torch.uint8), logits.device, torch.uint8)
    index, data = words[: 8 * count].view(torch.int64), words[8 * count :]
    added = table.index_select(0, data.int()).view(count, 8 * width)[:, :vocab_size]
    logits.index_add_(0, index, added.to(logits.dtype))
