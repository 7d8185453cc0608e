"""Changes to single logits: masks of grammars, allowed_token_ids, bad_words, min_tokens and logit_bias.

Must not know of anything else.

A slot's changes are uploaded once, when it is filled; a batch's are those of its slots laid end to end, so that
applying them takes a fixed number of operations whatever the number of rows. Whether one applies at a position is
decided on the device: the host does not know the tokens there yet.
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
    """The changes that one slot wants, on the device; empty tensors where there are none.

    ``allowed`` (A,): the only tokens to choose from, None for all.
    ``ids``, ``values``, ``until`` (E,): add ``values`` to the logits of ``ids`` at positions below ``until``.
    ``word_ends`` (W,), ``word_starts`` (W, L), ``word_from`` (W,): mask the last token of a bad word at positions from
    ``word_from`` on, if the tokens just before are ``word_starts``, filled up on the left with -1.
    """

    allowed: Tensor | None
    ids: Tensor
    values: Tensor
    until: Tensor
    word_ends: Tensor
    word_starts: Tensor
    word_from: Tensor

    @staticmethod
    def of(fill: SlotFill, vocab_size: int, device: torch.device, hidden: Iterable[int] = ()) -> SlotEdits | None:
        """What ``fill`` asks for, None if nothing. Bad words count where they lie wholly in the output, as in vLLM.

        ``hidden`` ids are masked.
        """
        params = fill.params
        added: list[tuple[int, float, int]] = [(token_id, -torch.inf, _ALWAYS) for token_id in hidden]
        words = []
        for word in fill.bad_words_token_ids:
            if len(word) == 1:
                added.append((word[0], -torch.inf, _ALWAYS))
            else:
                words.append(word)
        if params.min_tokens:
            first_free = fill.num_prompt_tokens + params.min_tokens
            added.extend((token_id, -torch.inf, first_free) for token_id in fill.stop_token_ids)
        added.extend((token_id, bias, _ALWAYS) for token_id, bias in (params.logit_bias or {}).items())
        if not (added or words or params.allowed_token_ids):
            return None
        longest = max(map(len, words), default=1) - 1

        def ids(values: Sequence[int]) -> Tensor:
            assert all(0 <= value < vocab_size for value in values), (min(values), max(values), vocab_size)
            return to_device(values, device)

        return SlotEdits(
            allowed=ids(params.allowed_token_ids) if params.allowed_token_ids else None,
            ids=ids([token_id for token_id, _, _ in added]),
            values=to_device([value for _, value, _ in added], device, torch.float64),
            until=to_device([until for _, _, until in added], device),
            word_ends=ids([word[-1] for word in words]),
            word_starts=to_device(
                [token for word in words for token in [-1] * (longest + 1 - len(word)) + list(word[:-1])],
                device,
                torch.int32,
            ).view(len(words), longest),
            word_from=to_device([fill.num_prompt_tokens + len(word) - 1 for word in words], device),
        )


class LogitEdits:
    """The changes of all rows of a batch."""

    def __init__(self, edits: Mapping[int, SlotEdits], device: torch.device) -> None:
        """``edits``: by row, at least one."""

        def rows_of(lengths: Mapping[int, int]) -> Tensor:
            parts = [torch.full((length,), row, dtype=torch.int64, device=device) for row, length in lengths.items()]
            return torch.cat(parts)

        allowed = {row: edit.allowed for row, edit in edits.items() if edit.allowed is not None}
        self._allowed: tuple[Tensor, Tensor, Tensor] | None = None  # rows (N,), and for each allowed token row and id
        if allowed:
            each = to_device(list(allowed), device)
            self._allowed = (
                each,
                rows_of({row: len(ids) for row, ids in allowed.items()}),
                torch.cat([*allowed.values()]),
            )
        self._rows = rows_of({row: len(edit.ids) for row, edit in edits.items()})
        self._ids = torch.cat([edit.ids for edit in edits.values()])
        self._values = torch.cat([edit.values for edit in edits.values()])
        self._until = torch.cat([edit.until for edit in edits.values()])
        self._word_rows = rows_of({row: len(edit.word_ends) for row, edit in edits.items()})
        self._word_ends = torch.cat([edit.word_ends for edit in edits.values()])
        self._word_from = torch.cat([edit.word_from for edit in edits.values()])
        longest = max(edit.word_starts.shape[1] for edit in edits.values())
        self._word_starts = torch.cat(
            [
                torch.nn.functional.pad(edit.word_starts, (longest - edit.word_starts.shape[1], 0), value=-1)
                for edit in edits.values()
            ]
        )

    def apply_(self, logits: Tensor, slot_ids: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """Change ``logits`` in place. Shapes and dtypes as in ``Sampler.sample``.

        Masking adds -inf, and two changes to one logit add up: so neither order nor repetition matters.
        """
        if self._allowed is not None:
            each, rows, ids = self._allowed
            kept = logits[rows, ids]
            logits[each] = -torch.inf
            logits[rows, ids] = kept
        if len(self._ids):
            values = self._values.masked_fill(positions[self._rows] >= self._until, 0.0)
            logits.index_put_((self._rows, self._ids), values.to(logits.dtype), accumulate=True)
        if len(self._word_ends):
            now = positions[self._word_rows]
            length = self._word_starts.shape[1]
            before = now.unsqueeze(1) + torch.arange(-length, 0, device=now.device)
            history = token_ids[slot_ids[self._word_rows].unsqueeze(1), before.clamp_(min=0)]
            fits = ((history == self._word_starts) | (self._word_starts < 0)).all(dim=1) & (now >= self._word_from)
            values = torch.zeros_like(now, dtype=logits.dtype).masked_fill_(fits, -torch.inf)
            logits.index_put_((self._word_rows, self._word_ends), values, accumulate=True)


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
