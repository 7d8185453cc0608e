"""``Sampler``: what each slot wants of the logits, and the tokens that come out of a step's logits.

Owns the sampling parameters, seeds and token counts of all slots. Must not know the model, pages or the scheduler.

Decisions (is any row penalised, does any sample, ...) are made on the host, from what ``fill`` was given: a step asks
the device nothing, and a feature that no row of a batch uses costs nothing. What follows from a batch's slots is kept
for as long as the runner passes the very same tuple.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_engine.ops import sampling
from nemo_engine.runner.logit_edits import LogitEdits, SlotEdits
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.step import TOKEN_ALL_MASKED, TOKEN_NOT_FINITE, SlotFill, TokenLogprobs

_Report = int | tuple[int, ...]  # that many of the best tokens (-1: all), or exactly these tokens


@dataclass(frozen=True, slots=True)
class _Draw:
    """The rows of a batch that sample: ``rows`` (N,) int64, None for all; then (N,) tensors, None where all are off."""

    rows: Tensor | None
    seed_keys: Tensor
    temperature: Tensor
    min_p: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    max_top_k: int


@dataclass(frozen=True, slots=True)
class _Penalties:
    """The rows of a batch with penalties: (N,) tensors."""

    rows: Tensor
    slots: Tensor
    frequency: Tensor
    presence: Tensor
    repetition: Tensor | None  # None where all are 1


@dataclass(frozen=True, slots=True)
class _Batch:
    """What follows from which slots are sampled together."""

    slots: tuple[int, ...]
    draw: _Draw | None
    penalties: _Penalties | None
    edits: LogitEdits | None
    reports: dict[_Report, list[int]]  # rows that want log-probabilities, by which ones


class Sampler:
    """Chooses tokens for slots 1 to ``num_slots``, and reports log-probabilities.

    Noise comes from (seed, position) alone and rows never mix, so that a row's token depends only on its own logits,
    parameters, seed and history. Penalties count a slot's output as it is sampled: every token that ``sample`` returns
    for a slot belongs to its request until ``fill`` is called for the slot again, with the request's whole history.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        assert 1 <= vocab_size <= 1 << 22, vocab_size
        self._num_slots = num_slots
        self._vocab_size = vocab_size
        self._device = device

        def per_slot(dtype: torch.dtype) -> Tensor:
            return torch.zeros(num_slots + 1, dtype=dtype, device=device)

        self._seed_keys = per_slot(torch.int64)
        self._temperature = per_slot(torch.float64)
        self._min_p = per_slot(torch.float64)
        self._top_k = per_slot(torch.int64)
        self._top_p = per_slot(torch.float64)
        self._frequency = per_slot(torch.float64)
        self._presence = per_slot(torch.float64)
        self._repetition = per_slot(torch.float64)
        self._output_counts: Tensor | None = None  # (num_slots + 1, V) int32, made for the first request with penalties
        self._prompt_mask: Tensor | None = None  # (num_slots + 1, V) bool
        self._params: dict[int, SamplingParams] = {}
        self._edits: dict[int, SlotEdits] = {}
        self._batch: _Batch | None = None

    def fill(self, fill: SlotFill) -> None:
        """A request enters ``fill.slot``; nothing is left of the one before."""
        slot, params = fill.slot, fill.params
        assert 1 <= slot <= self._num_slots, slot
        self._batch = None
        self._params[slot] = params
        if not params.is_greedy:
            assert params.temperature is not None
            self._seed_keys[slot] = sampling.seed_key(fill.seed)
            self._temperature[slot] = params.temperature
            self._min_p[slot] = params.min_p
            self._top_k[slot] = self._top_k_of(params) or self._vocab_size
            self._top_p[slot] = params.top_p
        if params.has_penalties:
            self._frequency[slot] = params.frequency_penalty
            self._presence[slot] = params.presence_penalty
            self._repetition[slot] = params.repetition_penalty
            self._count_history(fill)
        self._edits.pop(slot, None)
        edits = SlotEdits.of(fill, self._vocab_size, self._device)
        if edits is not None:
            self._edits[slot] = edits

    def _top_k_of(self, params: SamplingParams) -> int:
        """``params.top_k``, 0 where it cuts nothing."""
        return params.top_k if params.top_k < self._vocab_size else 0

    def _count_history(self, fill: SlotFill) -> None:
        if self._output_counts is None or self._prompt_mask is None:
            shape = (self._num_slots + 1, self._vocab_size)
            self._output_counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._prompt_mask = torch.zeros(shape, dtype=torch.bool, device=self._device)
        token_ids = torch.tensor(fill.token_ids, dtype=torch.int64)
        prompt, output = token_ids[: fill.num_prompt_tokens], token_ids[fill.num_prompt_tokens :]
        counts = torch.bincount(output, minlength=self._vocab_size)
        self._output_counts[fill.slot] = counts.to(self._device, torch.int32)
        self._prompt_mask[fill.slot] = (torch.bincount(prompt, minlength=self._vocab_size) > 0).to(self._device)

    # ---- the tokens of a step

    def sample(
        self, logits: Tensor, slots: tuple[int, ...], slot_ids: Tensor, positions: Tensor, token_ids: Tensor
    ) -> Tensor:
        """Choose the next token of each row. ``logits`` is left as it is, so log-probabilities can be taken afterwards.

        logits: (R, V) fp32 or fp64, row i of slot ``slots[i]``. slot_ids: (R,) int64, ``slots`` on the device.
        positions: (R,) int64, the index that the token will have in its request. token_ids: (num_slots + 1, max_len)
        int32, each slot's history. -> (R,) int64: the token, or TOKEN_NOT_FINITE where the row's logits hold a NaN or
        +inf, or TOKEN_ALL_MASKED where they are all -inf after masks and biases.
        """
        assert logits.shape == (len(slots), self._vocab_size), (logits.shape, len(slots), self._vocab_size)
        assert logits.dtype in (torch.float32, torch.float64), logits.dtype
        if not slots:
            return torch.empty(0, dtype=torch.int64, device=logits.device)
        batch = self._batch
        if batch is None or batch.slots is not slots:
            batch = self._batch = self._make_batch(slots, slot_ids)
        best = logits.amax(dim=1)
        is_finite = best < torch.inf  # false for NaN
        if batch.edits is not None or batch.penalties is not None:
            logits = logits.clone()
            if batch.edits is not None:
                batch.edits.apply_(logits, slot_ids, positions, token_ids)
            if batch.penalties is not None:
                self._penalise_(logits, batch.penalties)
            best = logits.amax(dim=1)
        if batch.draw is None:
            tokens = logits.argmax(dim=1)
        elif batch.draw.rows is None:
            tokens = self._draw(logits, positions, batch.draw)
        else:
            tokens = logits.argmax(dim=1)
            rows = batch.draw.rows
            tokens[rows] = self._draw(logits[rows], positions[rows], batch.draw)
        tokens = torch.where(best > -torch.inf, tokens, TOKEN_ALL_MASKED)
        tokens = torch.where(is_finite, tokens, TOKEN_NOT_FINITE)
        if batch.penalties is not None:
            assert self._output_counts is not None
            new = tokens[batch.penalties.rows]
            index = (batch.penalties.slots, new.clamp(min=0))
            self._output_counts.index_put_(index, (new >= 0).to(torch.int32), accumulate=True)
        return tokens

    @staticmethod
    def _draw(logits: Tensor, positions: Tensor, draw: _Draw) -> Tensor:
        keys = sampling.row_keys(draw.seed_keys, positions)
        return sampling.draw(logits, keys, draw.temperature, draw.min_p, draw.top_k, draw.top_p, draw.max_top_k)

    def _penalise_(self, logits: Tensor, penalties: _Penalties) -> None:
        assert self._output_counts is not None and self._prompt_mask is not None
        rows = logits[penalties.rows]
        sampling.apply_penalties_(
            rows,
            self._output_counts[penalties.slots],
            penalties.frequency,
            penalties.presence,
            penalties.repetition,
            None if penalties.repetition is None else self._prompt_mask[penalties.slots],
        )
        logits[penalties.rows] = rows

    def _make_batch(self, slots: tuple[int, ...], slot_ids: Tensor) -> _Batch:
        params = [self._params[slot] for slot in slots]
        penalised = [row for row, one in enumerate(params) if one.has_penalties]
        edits = {row: self._edits[slot] for row, slot in enumerate(slots) if slot in self._edits}
        return _Batch(
            slots=slots,
            draw=self._make_draw(params, slot_ids),
            penalties=self._make_penalties(penalised, params, slot_ids) if penalised else None,
            edits=LogitEdits(edits, self._device) if edits else None,
            reports=self._group_reports(params),
        )

    def _make_draw(self, params: list[SamplingParams], slot_ids: Tensor) -> _Draw | None:
        drawn = [row for row, one in enumerate(params) if not one.is_greedy]
        if not drawn:
            return None
        rows = None
        if len(drawn) < len(params):
            rows = self._index(drawn)
            slot_ids = slot_ids[rows]
            params = [params[row] for row in drawn]
        max_top_k = max(map(self._top_k_of, params))
        return _Draw(
            rows=rows,
            seed_keys=self._seed_keys[slot_ids],
            temperature=self._temperature[slot_ids],
            min_p=self._min_p[slot_ids] if any(one.min_p > 0.0 for one in params) else None,
            top_k=self._top_k[slot_ids] if max_top_k else None,
            top_p=self._top_p[slot_ids] if any(one.top_p < 1.0 for one in params) else None,
            max_top_k=max_top_k,
        )

    def _make_penalties(self, penalised: list[int], params: list[SamplingParams], slot_ids: Tensor) -> _Penalties:
        rows = self._index(penalised)
        slots = slot_ids[rows]
        has_repetition = any(params[row].repetition_penalty != 1.0 for row in penalised)
        return _Penalties(
            rows=rows,
            slots=slots,
            frequency=self._frequency[slots],
            presence=self._presence[slots],
            repetition=self._repetition[slots] if has_repetition else None,
        )

    def _index(self, rows: list[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._device)

    # ---- log-probabilities

    def logprobs(self, logits: Tensor, slots: tuple[int, ...], sampled: Tensor) -> dict[int, TokenLogprobs]:
        """Raw log-probabilities of the rows whose requests ask for them and that got a token.

        They come from the logits as the model made them; ``sample`` does not change these, so the order of the two
        calls is free. Waits for the device, if any row asks. logits: (R, V) fp32 or fp64. sampled: (R,) int64.
        """
        batch = self._batch
        if batch is not None and batch.slots is slots:
            reports = batch.reports
        else:
            reports = self._group_reports([self._params[slot] for slot in slots])
        if not reports:
            return {}
        tokens = sampled.tolist()
        found: dict[int, TokenLogprobs] = {}
        for what, asking in reports.items():
            good = [row for row in asking if tokens[row] >= 0]
            rows = self._index(good)
            found.update(zip(good, self._report(logits[rows], sampled[rows], what), strict=True))
        return found

    @staticmethod
    def _group_reports(params: list[SamplingParams]) -> dict[_Report, list[int]]:
        reports: dict[_Report, list[int]] = {}
        for row, one in enumerate(params):
            if one.logprob_token_ids:
                reports.setdefault(tuple(one.logprob_token_ids), []).append(row)
            elif one.has_logprobs:
                reports.setdefault(one.logprobs or 0, []).append(row)
        return reports

    def prompt_logprobs(self, logits: Tensor, targets: Tensor, slot: int) -> list[TokenLogprobs]:
        """Raw log-probabilities of consecutive prompt tokens of one slot.

        logits: (C, V) fp32 or fp64. targets: (C,) int64, the prompt token that each row of logits predicts.
        """
        count = self._params[slot].prompt_logprobs
        assert count is not None, slot
        return self._report(logits, targets, count)

    def _report(self, logits: Tensor, chosen: Tensor, what: _Report) -> list[TokenLogprobs]:
        """The chosen tokens first; then the ``what`` best ones (-1: all), or exactly those of the tuple ``what``.

        Ranks are vLLM's: 1 to k for the best ones, and for the others the number of tokens at least as likely.
        logits: (R, V); chosen: (R,) int64.
        """
        if not len(logits):
            return []
        values = logits.log_softmax(dim=1)
        ids = chosen.unsqueeze(1)
        if isinstance(what, tuple):
            ids = torch.cat([ids, self._index(list(what)).expand(len(logits), -1)], dim=1)
            best = ids[:, :0]
        else:
            count = self._vocab_size if what == -1 else min(what, self._vocab_size)
            best = sampling.top_tokens(values, count) if count else ids[:, :0]
        named = values.gather(1, ids)
        ranks = sampling.num_at_least(values, named)
        top_ranks = list(range(1, best.shape[1] + 1))
        ids = torch.cat([ids, best], dim=1)
        return [
            TokenLogprobs(token_ids=row_ids, logprobs=row_values, ranks=row_ranks + top_ranks)
            for row_ids, row_values, row_ranks in zip(
                ids.tolist(), values.gather(1, ids).tolist(), ranks.tolist(), strict=True
            )
        ]
