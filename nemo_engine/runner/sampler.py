"""``Sampler``: what each slot wants of the logits, and the tokens and log-probabilities that come out of a step's
logits.

Owns the sampling parameters, seeds and token counts of all slots. Must not know the model, pages or the scheduler.

Decisions (does any row sample, are any logits edited, ...) are made on the host, from what ``fill`` was given: a step
asks the device nothing, and a feature that no row of a batch uses costs nothing. What follows from a batch's slots is
kept until other slots are sampled or one is filled.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_engine.ops import Ops, sample, sampling
from nemo_engine.ops.sample import SampleFacts, SlotParams
from nemo_engine.runner.logit_edits import LogitEdits, SlotEdits, apply_masks_, mask_table
from nemo_engine.runner.transfer import Download, to_device
from nemo_engine.sampling_params import DEFAULT_TEMPERATURE, SamplingParams
from nemo_engine.step import TOKEN_NOT_FINITE, SlotFill, TokenLogprobs

_What = int | tuple[int, ...]  # that many of the best tokens (-1: all), or exactly these tokens
Masks = Sequence[tuple[int, bytes]]  # see ``StepPlan.masks``
_STATE = struct.Struct("ddqdqdddq")  # what a slot wants, in the order of ``SlotParams``, and whether it hides ids
STATE_WORDS = _STATE.size // 8
_MOST_BEST = 64  # of the operation that need not sort; more alternatives than that take its definition


class Report:
    """Log-probabilities on their way to the host: of ``rows``, the chosen (or prompt) token first in each."""

    def __init__(self, rows: Sequence[int], ids: Tensor, values: Tensor, ranks: Tensor) -> None:
        self.rows = rows
        self._columns = (Download(ids), Download(values), Download(ranks))

    def entries(self) -> Iterator[tuple[int, TokenLogprobs]]:
        """(row, its log-probabilities). Waits for the device."""
        for row, ids, values, ranks in zip(self.rows, *[column.tolist() for column in self._columns], strict=True):
            yield row, TokenLogprobs(token_ids=ids, logprobs=values, ranks=ranks)


@dataclass(frozen=True, slots=True)
class _Batch:
    """What follows from which slots are sampled together, and which of them have masks in this step."""

    slots: tuple[int, ...]
    masked: tuple[int, ...]
    facts: SampleFacts | None  # of the rows whose logits stay as they are; None where nothing asks for them
    edits: LogitEdits | None  # of the other rows
    edited_facts: SampleFacts | None  # of those alone
    reports: dict[
        _What, tuple[list[int], Tensor]
    ]  # rows that want log-probabilities, by which ones, also on the device


class Sampler:
    """Chooses tokens for slots 1 to ``num_slots``, and reports log-probabilities.

    Noise comes from (seed, position) alone and rows never mix, so that a row's token depends only on its own logits,
    parameters, seed and history. Penalties count a slot's output as it is sampled: every token that ``sample`` returns
    for a slot belongs to its request until ``fill`` is called for the slot again, with the request's whole history.
    """

    def __init__(
        self, num_slots: int, vocab_size: int, ops: Ops, device: torch.device, without_token: Sequence[int] = ()
    ) -> None:
        """without_token: ids that only a request chooses that names them, in ``allowed_token_ids``, ``logit_bias`` or
        its grammar.
        """
        assert 1 <= vocab_size <= 1 << 22, vocab_size
        self._num_slots = num_slots
        self._vocab_size = vocab_size
        self._ops = ops
        self._device = device
        self._mask_table = mask_table(device)
        # Together in memory, so that requests enter them by one operation. An even number of words keeps each aligned.
        self._state = torch.zeros(8, num_slots + 1 + (num_slots + 1) % 2, dtype=torch.int64, device=device)
        self.slot_params = SlotParams.off(num_slots, vocab_size, device, self._state[:, : num_slots + 1])
        self._without_token = frozenset(without_token)
        self._is_hidden: Tensor | None = None  # (V,) and by slot, whether it applies there
        self._hides = torch.zeros(num_slots + 1, dtype=torch.bool, device=device)
        if without_token:
            self._is_hidden = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._is_hidden[list(without_token)] = True
        self._params: dict[int, SamplingParams] = {
            0: SamplingParams(temperature=0.0)
        }  # padding, as in ``SlotParams.off``
        self._edits: dict[int, SlotEdits] = {}
        self._batch: _Batch | None = None
        self._wants: tuple[tuple[int, ...], bool, bool] = ((), True, True)

    def fill(self, fill: SlotFill) -> array[int]:
        """A request enters ``fill.slot``; nothing is left of the one before. Returns the ``STATE_WORDS`` words that
        ``enter`` takes.
        """
        slot, params = fill.slot, fill.params
        assert 1 <= slot <= self._num_slots, slot
        self._batch = None
        self._wants = ((), True, True)
        self._params[slot] = params
        self._edits.pop(slot, None)
        named = self._without_token.intersection(params.logit_bias or ())
        has_own_mask = params.allowed_token_ids is not None or params.structured_outputs is not None
        hidden = self._without_token - named if named and not has_own_mask else ()
        edits = SlotEdits.of(fill, self._vocab_size, hidden)
        if edits is not None:
            self._edits[slot] = edits
        is_cut = not params.is_greedy
        values = (
            DEFAULT_TEMPERATURE if params.temperature is None else params.temperature,
            params.min_p if is_cut else 0.0,
            (self._top_k_of(params) if is_cut else 0) or self._vocab_size,
            params.top_p if is_cut else 1.0,
            sampling.seed_key(fill.seed),
            params.frequency_penalty,
            params.presence_penalty,
            params.repetition_penalty,
            not (named or has_own_mask),
        )
        return array("q", _STATE.pack(*values))

    def enter(self, fills: Sequence[SlotFill], slots: Tensor, state: Tensor, token_ids: Tensor) -> None:
        """Write what ``fill`` returned of ``fills``, which is on the device now: slots (F,), state (F, STATE_WORDS),
        int64.

        token_ids: (num_slots + 1, max_len) int32, where the slots' tokens are already.
        """
        self._state.index_copy_(1, slots, state[:, :-1].T)
        if self._is_hidden is not None:
            self._hides.index_copy_(0, slots, state[:, -1] != 0)
        for fill in fills:
            if fill.params.has_penalties:
                prompt, output = token_ids[fill.slot, : len(fill.token_ids)].tensor_split([fill.num_prompt_tokens])
                counts, mask = self.slot_params.output_counts[fill.slot], self.slot_params.prompt_mask[fill.slot]
                counts.zero_().index_add_(0, output, torch.ones_like(output))
                mask.zero_().index_fill_(0, prompt.long(), True)

    def _top_k_of(self, params: SamplingParams) -> int:
        """``params.top_k``, 0 where it cuts nothing."""
        return params.top_k if params.top_k < self._vocab_size else 0

    def _hidden(self, logits: Tensor, slot_ids: Tensor) -> Tensor:
        """``logits`` with -inf for the ids without a token, in rows of slots that name none."""
        if self._is_hidden is None:
            return logits
        return logits.masked_fill(self._hides[slot_ids].unsqueeze(1) & self._is_hidden, -torch.inf)

    # ---- the tokens of a step

    def needs_only_tokens(self, slots: tuple[int, ...], masks: Masks = ()) -> bool:
        """Whether the logits of these slots go straight into ``sample_``: none are masked or edited, none reported."""
        return not masks and self._wants_of(slots)[1]

    def needs_only_draws(self, slots: tuple[int, ...], masks: Masks) -> bool:
        """Whether, besides, no ids are hidden and no slot has penalties, so that ``slot_params`` alone say the rest."""
        return not masks and self._is_hidden is None and self._wants_of(slots)[2]

    def _wants_of(self, slots: tuple[int, ...]) -> tuple[tuple[int, ...], bool, bool]:
        if self._wants[0] != slots:
            plain = not any(slot in self._edits or self._params[slot].has_logprobs for slot in slots)
            self._wants = (slots, plain, plain and not any(self._params[slot].has_penalties for slot in slots))
        return self._wants

    def sample_any(self, logits: Tensor, slot_ids: Tensor, positions: Tensor) -> Tensor:
        """Choose a token for each row, of whatever slots: the host need not know them. It is what a graph captures."""
        tokens: Tensor = self._ops.sample_(self._hidden(logits, slot_ids), slot_ids, positions, self.slot_params)
        return tokens

    def sample(
        self,
        logits: Tensor,
        slots: tuple[int, ...],
        slot_ids: Tensor,
        positions: Tensor,
        token_ids: Tensor,
        masks: Masks = (),
    ) -> tuple[Tensor, list[Report]]:
        """Choose the next token of each row, and report log-probabilities to those that ask.

        ``logits`` is left as it is.

        logits: (R, V), row i of slot ``slots[i]``, 0 in padding. slot_ids: (R,) int64, ``slots`` on the device.
        positions: (R,) int64, the index that the token will have in its request. token_ids: (num_slots + 1, max_len)
        int32, each slot's history. masks: of some of ``slots``, applied before any other change. Returns (R,) int64:
        the token, or TOKEN_NOT_FINITE where the row's logits hold a NaN or +inf, or TOKEN_ALL_MASKED where they are all
        -inf after masks and biases; and raw log-probabilities, of failed rows too.
        """
        assert logits.shape == (len(slots), self._vocab_size), (logits.shape, len(slots), self._vocab_size)
        if not slots:
            return torch.empty(0, dtype=torch.int64, device=logits.device), []
        batch, masked = self._batch, tuple([slot for slot, _ in masks])
        if batch is None or batch.slots != slots or batch.masked != masked:
            batch = self._batch = self._make_batch(slots, masked)
        shown = self._hidden(logits, slot_ids)
        if batch.edits is None:
            tokens = self._ops.sample_(shown, slot_ids, positions, self.slot_params, batch.facts)
        else:
            tokens = self._sample_edited(shown, batch, slot_ids, positions, token_ids, masks)
        return tokens, [
            self._report(logits[index], tokens[index], rows, what) for what, (rows, index) in batch.reports.items()
        ]

    def _sample_edited(
        self,
        logits: Tensor,
        batch: _Batch,
        slot_ids: Tensor,
        positions: Tensor,
        token_ids: Tensor,
        masks: Masks,
    ) -> Tensor:
        """The tokens of a batch some of whose rows are edited: those in a copy of their own, the others beside them,
        with padding in their stead.
        """
        edits = batch.edits
        assert edits is not None
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        slots, places = slot_ids[edits.index], positions[edits.index]
        edited = logits.index_select(0, edits.index).to(wide)
        is_finite = edited.amax(dim=1) < torch.inf  # false for NaN; an edit may hide it
        if masks:
            place_of = {batch.slots[row]: place for place, row in enumerate(edits.rows)}
            places_of_masks = [place_of[slot] for slot in batch.masked]
            apply_masks_(edited, places_of_masks, [mask for _, mask in masks], self._mask_table)
        edits.apply_(edited, slots, places, token_ids)
        tokens = self._ops.sample_(edited, slots, places, self.slot_params, batch.edited_facts)
        tokens = torch.where(is_finite, tokens, TOKEN_NOT_FINITE)
        if len(edits.rows) == len(batch.slots):
            return tokens
        others = slot_ids.index_fill(0, edits.index, 0)
        all_tokens: Tensor = self._ops.sample_(logits, others, positions, self.slot_params, batch.facts)
        return all_tokens.index_copy_(0, edits.index, tokens)

    def _make_batch(self, slots: tuple[int, ...], masked: tuple[int, ...]) -> _Batch:
        params = [self._params[slot] for slot in slots]
        edits = {row: self._edits[slot] for row, slot in enumerate(slots) if slot in self._edits}
        changed = {*masked}.union([slots[row] for row in edits])
        rows = [row for row, slot in enumerate(slots) if slot in changed]
        others = [row for row, slot in enumerate(slots) if slot not in changed]
        reports: dict[_What, list[int]] = {}
        for row, row_params in enumerate(params):
            if row_params.logprob_token_ids:
                reports.setdefault(tuple(row_params.logprob_token_ids), []).append(row)
            elif row_params.has_logprobs:
                reports.setdefault(row_params.logprobs or 0, []).append(row)
        return _Batch(
            slots=slots,
            masked=masked,
            facts=self._facts(params, others),
            edits=LogitEdits(rows, edits, self._vocab_size, self._device) if rows else None,
            edited_facts=self._facts([params[row] for row in rows], range(len(rows))) if rows else None,
            reports={what: (rows, self._index(rows)) for what, rows in reports.items()},
        )

    def _facts(self, params: Sequence[SamplingParams], rows: Sequence[int]) -> SampleFacts | None:
        """What ``rows`` of a batch with ``params`` want; the others are padding. The definition asks for it, and what
        runs on a CPU.
        """
        if self._ops.sample_ is not sample.sample_ and self._device.type != "cpu":
            return None
        drawn = [row for row in rows if not params[row].is_greedy]
        active = [params[row] for row in drawn]
        return SampleFacts(
            drawn=None if len(drawn) == len(params) else self._index(drawn),
            num_drawn=len(drawn),
            has_min_p=any(row_params.min_p > 0.0 for row_params in active),
            max_top_k=max(map(self._top_k_of, active), default=0),
            has_top_p=any(row_params.top_p < 1.0 for row_params in active),
            penalised=self._index([row for row in rows if params[row].has_penalties]),
            has_repetition=any(params[row].repetition_penalty != 1.0 for row in rows),
        )

    def _index(self, rows: Sequence[int]) -> Tensor:
        return to_device(rows, self._device)

    # ---- log-probabilities

    def report_prompt(self, logits: Tensor, targets: Tensor, slot: int) -> Report:
        """Raw log-probabilities of consecutive prompt tokens of one slot.

        logits: (C, V). targets: (C,) int64, the prompt token that each row of logits predicts.
        """
        count = self._params[slot].prompt_logprobs
        assert count is not None, slot
        return self._report(logits, targets, range(len(logits)), count)

    def _report(self, logits: Tensor, chosen: Tensor, rows: Sequence[int], what: _What) -> Report:
        """The chosen tokens first; then the ``what`` best ones (-1: all), or exactly those of the tuple ``what``.

        Ranks are vLLM's: 1 to k for the best ones, and for the others the number of tokens at least as likely.
        logits: (R, V); chosen: (R,) int64.
        """
        if isinstance(what, int):
            count = self._vocab_size if what == -1 else min(what, self._vocab_size)
            top_logprobs = self._ops.top_logprobs if count <= _MOST_BEST else sample.top_logprobs
            return Report(rows, *top_logprobs(logits, chosen, count))
        wide = logits if logits.dtype == torch.float64 else logits.float()
        ids = torch.cat([chosen.clamp(min=0).unsqueeze(1), self._index(list(what)).expand(len(logits), -1)], dim=1)
        ranks = sampling.num_at_least(wide, wide.gather(1, ids))
        return Report(rows, ids, wide.log_softmax(dim=1).gather(1, ids), ranks)
