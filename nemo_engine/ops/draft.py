"""Speculation without a draft model: what a request's next tokens may be, and how many of them were right.

A step may be *wide*: a decode row then is a *run* of 2, 4 or 8 rows of one token, all of one slot, that compute the
last known token and the drafts that follow it. Rows for which there is no draft repeat the last one that has. Run i has
rows ``i * width .. (i + 1) * width - 1``; the slot of its first row is its own, and that of the others as well or 0,
where the run may have no drafts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_engine.ops.op import Case, Impl, Op, cpu_counts_run, triton_runs
from nemo_engine.step import TOKEN_NOT_DRAFTED, TOKEN_NOT_TAKEN

LONGEST_MATCH, SHORTEST_MATCH = 4, 2  # tokens


def draft_(
    token_ids: Tensor, num_computed: Tensor, draft_until: Tensor, slots: Tensor, width: int, max_drafts: int
) -> Tensor:
    """Write drafts behind the last known token of each run's slot: what followed the latest earlier place at which its
    last 4 tokens occurred, or else its last 3, or else its last 2. A text that repeats itself is continued as often as
    is asked for.

    token_ids: (S, L) int32, modified: ``num_computed[slot]`` is the place of the last known token. num_computed: (S,)
    int64. draft_until: (S,) int64, the length that tokens sampled in this step must not exceed; 0 where no drafts are
    wanted. slots: (R,) int64, in runs of ``width``, which 1 <= max_drafts < width limits further. Slots other than 0,
    which is padding, have one run at most. Returns (R,) int64: how many places after the last known token each row
    computes, which in a run of 2 drafts and width 4 is 0, 1, 2, 2.
    """
    runs = slots[::width]
    last = num_computed[runs].unsqueeze(1)
    ids = token_ids[runs]
    places = torch.arange(ids.shape[1], device=slots.device)
    goes_on = places < last
    matched = torch.zeros_like(goes_on, dtype=torch.int64)
    for back in range(LONGEST_MATCH):
        key = ids.gather(1, (last - back).clamp(min=0))
        goes_on = goes_on & (places >= back) & (ids[:, (places - back).clamp(min=0)] == key)
        matched += goes_on
    score = torch.where(matched >= SHORTEST_MATCH, matched * len(places) + places, -1).amax(1, keepdim=True)
    count = (draft_until[runs].unsqueeze(1) - 2 - last).clamp(max=max_drafts) * (score >= 0)
    end = score.clamp(min=0) % len(places)
    steps = torch.arange(1, width, device=slots.device)
    is_draft = steps <= count
    source = (end + 1 + (steps - 1) % (last - end).clamp(min=1)) * is_draft
    # What is no draft is written to slot 0's first entry, which is token 0.
    token_ids[runs.unsqueeze(1) * is_draft, (last + steps) * is_draft] = ids.gather(1, source) * is_draft
    return torch.arange(width, device=slots.device).minimum(count.clamp(min=0)).flatten()


def accept_(
    token_ids: Tensor, num_computed: Tensor, slots: Tensor, seq_lens: Tensor, tokens: Tensor, width: int
) -> None:
    """Take of each run the tokens that follow from nothing but taken ones: the first, and each whose draft before it is
    the token that was chosen there. They enter the table, as ``advance_`` enters those of other steps.

    token_ids: (S, L) int32, with the drafts that ``draft_`` wrote, and num_computed: (S,) int64, both modified. slots:
    (R,) int64, as ``draft_`` took them; seq_lens: (R,) int64, each row's length when the step is done. tokens: (R,)
    int64, modified: chosen behind each row; those that are not taken become TOKEN_NOT_TAKEN, or TOKEN_NOT_DRAFTED in
    rows that only repeat another. A failure (negative) is entered as 0, and nothing follows it.
    """
    runs, chosen = slots[::width], tokens.view(-1, width)
    last = num_computed[runs].unsqueeze(1)
    count = (seq_lens.view(-1, width)[:, -1:] - 1 - last).clamp(min=0)  # drafts; a last row of slot 0 has a length of 1
    steps = torch.arange(1, width, device=slots.device)
    is_draft = steps <= count
    drafts = token_ids[runs.unsqueeze(1) * is_draft, (last + steps) * is_draft]
    num_taken = 1 + (is_draft & (drafts == chosen[:, :-1])).cumprod(1).sum(1, keepdim=True)
    is_real = (runs > 0).unsqueeze(1)
    newest = chosen.gather(1, num_taken - 1).clamp(min=0)
    length = (last + num_taken) * is_real
    token_ids[runs.unsqueeze(1), length] = (newest * is_real).to(torch.int32)
    num_computed[runs] = length.squeeze(1)
    places = torch.arange(width, device=slots.device)
    code = torch.where(places <= count, TOKEN_NOT_TAKEN, TOKEN_NOT_DRAFTED)
    tokens.copy_(torch.where(places < num_taken, chosen, code).flatten())


_MAX_LEN = 5000


def draft_inputs(num_runs: int, width: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A table of texts of few words, so that much repeats: token_ids, num_computed, draft_until, and slots of runs."""
    generator = torch.Generator().manual_seed(seed)
    num_slots = num_runs + 3
    token_ids = torch.randint(0, 3 + seed % 5, (num_slots, _MAX_LEN), generator=generator, dtype=torch.int32)
    num_computed = torch.randint(0, _MAX_LEN - 10, (num_slots,), generator=generator)
    num_computed[1::3] %= 12
    token_ids[1, : int(num_computed[1]) + 1] = 5  # one word again and again
    token_ids[2, : int(num_computed[2]) + 1] = torch.arange(int(num_computed[2]) + 1)  # nothing repeats
    room = torch.randint(1, 12, (num_slots,), generator=generator)
    draft_until = torch.where(room > 10, 0, num_computed + room)
    token_ids[0, 0] = num_computed[0] = draft_until[0] = 0
    runs = (1 + torch.randperm(num_slots - 1, generator=generator))[:num_runs]
    if num_runs > 4:
        runs[1] = runs[3] = 0
    slots = runs.repeat_interleave(width)
    slots.view(-1, width)[draft_until[runs] == 0, 1:] = 0
    return token_ids, num_computed, draft_until, slots


def _draft_cases() -> Iterator[Case]:
    for num_runs, width, max_drafts in ((0, 2, 1), (1, 2, 1), (7, 4, 3), (9, 8, 5), (60, 4, 3), (33, 8, 7)):

        def make(
            dtype: torch.dtype, num_runs: int = num_runs, width: int = width, max_drafts: int = max_drafts
        ) -> tuple[Any, ...]:
            return *draft_inputs(num_runs, width, num_runs + width), width, max_drafts

        yield Case(f"{num_runs} runs of {width}, at most {max_drafts} drafts", make)


def _accept_cases() -> Iterator[Case]:
    for num_runs, width in ((0, 4), (1, 2), (7, 4), (9, 8), (128, 2)):

        def make(dtype: torch.dtype, num_runs: int = num_runs, width: int = width) -> tuple[Any, ...]:
            token_ids, num_computed, draft_until, slots = draft_inputs(num_runs, width, num_runs + width)
            ahead = draft_(token_ids, num_computed, draft_until, slots, width, width - 1)
            first = num_computed[slots]
            generator = torch.Generator().manual_seed(num_runs)
            wrong = torch.randint(-2, 8, slots.shape, generator=generator)
            right = token_ids[slots, first + ahead + 1].long()
            tokens = torch.where(torch.rand(slots.shape, generator=generator) < 0.7, right, wrong)
            return token_ids, num_computed, slots, first + ahead + 1, tokens, width

        yield Case(f"{num_runs} runs of {width}", make)


def _draft_cost(
    token_ids: Tensor, num_computed: Tensor, draft_until: Tensor, slots: Tensor, *_: int
) -> tuple[int, int]:
    read = int(num_computed[slots].sum()) // max(1, _[0])
    return 4 * read + 16 * len(slots), 8 * read


def _accept_cost(token_ids: Tensor, num_computed: Tensor, slots: Tensor, *_: Any) -> tuple[int, int]:
    return 32 * len(slots), 4 * len(slots)


DRAFT = Op(
    "draft_",
    draft_,
    (
        Impl("triton", "nemo_engine.kernels.draft:draft_", triton_runs),
        Impl("cpu", "nemo_engine.ops.cpu.compiled:draft_", cpu_counts_run),
    ),
    _draft_cases,
    _draft_cost,
)
ACCEPT = Op(
    "accept_",
    accept_,
    (
        Impl("triton", "nemo_engine.kernels.draft:accept_", triton_runs),
        Impl("cpu", "nemo_engine.ops.cpu.compiled:accept_", cpu_counts_run),
    ),
    _accept_cases,
    _accept_cost,
)
