"""From the logits of a batch to its tokens, by the parameters of each row's slot; and the log-probabilities of the
best.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_engine.ops import sampling
from nemo_engine.ops.op import Case, Impl, Op, cpu_runs, cuda_runs, triton_runs
from nemo_engine.step import TOKEN_ALL_MASKED, TOKEN_NOT_FINITE

_INTEGERS = (2, 4)  # the fields of ``SlotParams``, of one number a slot, that are int64


@dataclass(frozen=True, slots=True, eq=False)
class SlotParams:
    """What each slot wants of its logits: rows of all slots at fixed addresses, (S + 1,) each. Row 0 is padding, which
    is greedy.
    """

    temperature: Tensor  # fp64; 0 is greedy
    min_p: Tensor  # fp64; 0 is off
    top_k: Tensor  # int64; V is off
    top_p: Tensor  # fp64; 1 is off
    seed_keys: Tensor  # int64
    frequency: Tensor  # fp64; 0 is off
    presence: Tensor  # fp64; 0 is off
    repetition: Tensor  # fp64; 1 is off
    output_counts: Tensor  # (S + 1, V) int32: tokens in the output; means nothing in rows without penalties
    prompt_mask: Tensor  # (S + 1, V) bool: tokens in the prompt; likewise

    @classmethod
    def off(cls, num_slots: int, vocab_size: int, device: torch.device, words: Tensor | None = None) -> SlotParams:
        """Every slot greedy and without penalties.

        words: (8, S + 1) int64, zeros, of which the eight tensors of one number a slot are rows, in the order of the
        fields; None for memory of their own.
        """
        words = torch.zeros(8, num_slots + 1, dtype=torch.int64, device=device) if words is None else words
        shape = (num_slots + 1, vocab_size)
        rows = [row if index in _INTEGERS else row.view(torch.float64) for index, row in enumerate(words)]
        rows.append(torch.empty(shape, dtype=torch.int32, device=device))  # on the CPU, taken as it is written
        rows.append(torch.empty(shape, dtype=torch.bool, device=device))
        params = cls(*rows)
        params.top_k.fill_(vocab_size)
        params.top_p.fill_(1.0)
        params.repetition.fill_(1.0)
        return params


@dataclass(frozen=True, slots=True, eq=False)
class SampleFacts:
    """What the host knows of a batch, so that a CPU does only what some row needs. Kernels for GPUs look at each row
    themselves.
    """

    drawn: Tensor | None  # (N,) int64: the rows that are not greedy; None for all
    num_drawn: int
    has_min_p: bool
    max_top_k: int  # the highest below V, 0 if none
    has_top_p: bool
    penalised: Tensor  # (P,) int64: the rows with penalties
    has_repetition: bool

    @classmethod
    def of(cls, slot_ids: Tensor, params: SlotParams, vocab_size: int) -> SampleFacts:
        """The facts, read from the parameters."""
        top_k = params.top_k[slot_ids]
        cut = top_k[top_k < vocab_size]
        repetition = params.repetition[slot_ids] != 1.0
        penalised = repetition | (params.frequency[slot_ids] != 0.0) | (params.presence[slot_ids] != 0.0)
        drawn = (params.temperature[slot_ids] > 0.0).nonzero().squeeze(1)
        return cls(
            drawn=drawn,
            num_drawn=len(drawn),
            has_min_p=bool((params.min_p[slot_ids] > 0.0).any()),
            max_top_k=int(cut.max()) if len(cut) else 0,
            has_top_p=bool((params.top_p[slot_ids] < 1.0).any()),
            penalised=penalised.nonzero().squeeze(1),
            has_repetition=bool(repetition.any()),
        )


def sample_(
    logits: Tensor, slot_ids: Tensor, positions: Tensor, params: SlotParams, facts: SampleFacts | None = None
) -> Tensor:
    """Choose the token of each row: penalties, then the likeliest, or ``sampling.draw`` where the slot has a
    temperature.

    logits: (R, V) bf16, fp16, fp32 or fp64, not changed, widened to fp32. slot_ids: (R,) int64; several rows may be
    padding (slot 0). positions: (R,) int64, the index that the token will have in its request. Returns (R,) int64: the
    token, or TOKEN_NOT_FINITE where the row's logits hold NaN or +inf, or TOKEN_ALL_MASKED where all are -inf. Counts
    the token in ``params.output_counts`` of rows with penalties.
    """
    facts = SampleFacts.of(slot_ids, params, logits.shape[1]) if facts is None else facts
    wide = logits if logits.dtype == torch.float64 else logits.float()
    best = wide.amax(dim=1)
    is_finite = best < torch.inf  # false for NaN
    slots = None
    if len(facts.penalised):
        wide, slots = penalised(wide, slot_ids, params, facts)
    if facts.drawn is None:
        tokens = _draw(wide, slot_ids, positions, params, facts)
    else:
        tokens = wide.argmax(dim=1)
        if facts.num_drawn:
            drawn = facts.drawn
            tokens[drawn] = _draw(wide[drawn], slot_ids[drawn], positions[drawn], params, facts)
    tokens = torch.where(best > -torch.inf, tokens, TOKEN_ALL_MASKED)
    tokens = torch.where(is_finite, tokens, TOKEN_NOT_FINITE)
    if slots is not None:
        count_(tokens, slots, params, facts)
    return tokens


def penalised(wide: Tensor, slot_ids: Tensor, params: SlotParams, facts: SampleFacts) -> tuple[Tensor, Tensor]:
    """A copy of ``wide``, (R, V) fp32 or fp64, with the penalties of its rows, and the slots that have some, (P,)."""
    slots = slot_ids[facts.penalised]
    rows = wide[facts.penalised]
    sampling.apply_penalties_(
        rows,
        params.output_counts[slots],
        params.frequency[slots],
        params.presence[slots],
        params.repetition[slots] if facts.has_repetition else None,
        params.prompt_mask[slots] if facts.has_repetition else None,
    )
    return wide.index_copy(0, facts.penalised, rows), slots


def count_(tokens: Tensor, slots: Tensor, params: SlotParams, facts: SampleFacts) -> None:
    """Count the tokens, (R,) int64, of the rows with penalties, which are of ``slots``."""
    new = tokens[facts.penalised]
    index = (slots, new.clamp(min=0))
    params.output_counts.index_put_(index, (new >= 0).to(torch.int32), accumulate=True)


def _draw(logits: Tensor, slots: Tensor, positions: Tensor, params: SlotParams, facts: SampleFacts) -> Tensor:
    return sampling.draw(
        logits,
        sampling.row_keys(params.seed_keys[slots], positions),
        params.temperature[slots],
        params.min_p[slots] if facts.has_min_p else None,
        params.top_k[slots] if facts.max_top_k else None,
        params.top_p[slots] if facts.has_top_p else None,
        facts.max_top_k,
    )


def top_logprobs(logits: Tensor, chosen: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the chosen token and of the k likeliest ones, likeliest first, of equal ones the lower id
    first.

    logits: (R, V) of any floating dtype, widened to fp32. chosen: (R,) int64, a failed row's (negative) being read as
    0. Returns (R, 1 + k) each: ids int64; log-probabilities fp32 (fp64 for fp64); ranks int64, of the chosen token the
    number of tokens at least as likely, then 1 .. k.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    ids = chosen.clamp(min=0).unsqueeze(1)
    rank = sampling.num_at_least(wide, wide.gather(1, ids))
    if k:
        ids = torch.cat([ids, sampling.top_tokens(wide, k)], dim=1)
    ranks = torch.cat([rank, torch.arange(1, k + 1, device=logits.device).expand(len(logits), -1)], dim=1)
    return ids, wide.log_softmax(dim=1).gather(1, ids), ranks


def _sample_cases() -> Iterator[Case]:
    for rows, vocab_size in ((1, 1), (3, 7), (6, 1001), (16, 6144), (3, 131072)):
        for name in ("greedy", "plain", "min_p", "top_k", "top_p", "all", "penalties"):

            def make(
                dtype: torch.dtype, rows: int = rows, vocab_size: int = vocab_size, name: str = name
            ) -> tuple[Any, ...]:
                return sample_inputs(rows, vocab_size, name, dtype)

            yield Case(f"{rows}x{vocab_size} {name}", make)


def sample_inputs(rows: int, vocab_size: int, name: str, dtype: torch.dtype, seed: int = 0) -> tuple[Any, ...]:
    """Arguments of ``sample_`` where rows do what ``name`` says; every fourth row is greedy, and the last one padding
    if there are several.
    """
    generator = torch.Generator().manual_seed(1000 * rows + vocab_size + seed)
    logits = (torch.randn(rows, vocab_size, generator=generator) * 3).to(dtype)
    params = SlotParams.off(rows + 2, vocab_size, torch.device("cpu"))
    params.output_counts.fill_(1 << 20)  # what means nothing must not be read
    slots = 1 + torch.randperm(rows + 2, generator=generator)[:rows]
    if rows > 1:
        slots[-1] = 0
    active = slots[slots > 0]
    if name != "greedy":
        params.temperature[active] = torch.linspace(0.3, 1.5, len(active), dtype=torch.float64)
        params.temperature[active[3::4]] = 0.0
    params.seed_keys[active] = torch.tensor([sampling.seed_key(seed + int(slot)) for slot in active])
    if name in ("min_p", "all"):
        params.min_p[active] = 0.02
    if name in ("top_k", "all"):
        params.top_k[active] = min(50, vocab_size)
    if name in ("top_p", "all"):
        params.top_p[active] = 0.9
    if name in ("penalties", "all"):
        params.frequency[active[::2]], params.presence[active[::2]] = 0.3, -0.2
        params.repetition[active[1::2]] = 1.3
        shape = (len(active), vocab_size)
        params.output_counts[active] = torch.randint(0, 3, shape, generator=generator, dtype=torch.int32)
        params.prompt_mask[active] = torch.rand(shape, generator=generator) < 0.3
    return logits, slots, torch.randint(0, 131072, (rows,), generator=generator), params


def _logprob_cases() -> Iterator[Case]:
    for rows, vocab_size, k in ((1, 1, 1), (3, 7, 7), (5, 1001, 0), (4, 6144, 20), (2, 131072, 5)):

        def make(dtype: torch.dtype, rows: int = rows, vocab_size: int = vocab_size, k: int = k) -> tuple[Any, ...]:
            generator = torch.Generator().manual_seed(vocab_size)
            logits = (torch.randn(rows, vocab_size, generator=generator) * 3).to(dtype)
            return logits, torch.randint(0, vocab_size, (rows,), generator=generator), k

        yield Case(f"{rows}x{vocab_size} top {k}", make)


def _sample_cost(
    logits: Tensor, slot_ids: Tensor, positions: Tensor, params: SlotParams, facts: SampleFacts | None = None
) -> tuple[int, int]:
    """One read of the logits; some 40 integer and float operations of noise per token."""
    return logits.nbytes, 40 * logits.numel()


def _logprob_cost(logits: Tensor, chosen: Tensor, k: int) -> tuple[int, int]:
    return logits.nbytes, 4 * logits.numel()


SAMPLE = Op(
    "sample_",
    sample_,
    (
        Impl("triton", "nemo_engine.kernels.sampling:sample_", triton_runs),
        Impl("cuda", "nemo_engine.ops.cuda.sampling:sample_", cuda_runs),
        Impl("cpu", "nemo_engine.ops.cpu.compiled:sample_", cpu_runs),
    ),
    _sample_cases,
    _sample_cost,
)
TOP_LOGPROBS = Op(
    "top_logprobs",
    top_logprobs,
    (Impl("triton", "nemo_engine.kernels.logprobs:top_logprobs", triton_runs),),
    _logprob_cases,
    _logprob_cost,
)
