"""The wire between the two halves of the engine: ``StepPlan`` goes down, ``StepResult`` comes back.

The host half (``scheduler``) decides *what* a step computes and never sees a tensor; the device half (``runner``)
computes it and never sees a request. Both dataclasses are values of plain Python data: a plan can be sent to other
ranks, replayed by a scripted runner in a test, or timed by a simulator.

Conventions shared by both sides:

* A *slot* is a row of the device's request table. Slot 0 and page 0 are reserved for padding and never named in a plan.
* Position ``p`` of a request is *computed* when its key and value are in the request's pages. Computing position ``p``
  yields the logits of the token at ``p + 1``.
* A decode row computes position ``num_computed`` of its slot, a counter that the device keeps and advances by itself;
  so a plan whose decode rows are those of the step before carries nothing for them.
* Within one layer, the keys and values of all rows of a step are written before any row attends. A row may therefore
  read pages that another row of the same step fills.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nemo_engine.sampling_params import SamplingParams

TOKEN_NOT_FINITE = -1  # in StepResult.token_ids: the row's logits hold a NaN or +inf
TOKEN_ALL_MASKED = -2  # in StepResult.token_ids: masks and biases leave no token to choose from
TOKEN_NOT_TAKEN = -3  # in StepResult.token_ids of a wide step: a draft before it was wrong
TOKEN_NOT_DRAFTED = -4  # in StepResult.token_ids of a wide step: no draft led there


@dataclass(frozen=True, slots=True)
class SlotFill:
    """A request enters a slot: at its first admission, and again after each preemption.

    ``token_ids`` is everything known of the request (prompt, then tokens generated before a preemption).
    ``num_computed_tokens`` counts the leading tokens whose keys and values already lie in ``pages``.
    ``pages`` covers all of ``token_ids``. ``seed`` is the resolved 64-bit noise key of the request.
    """

    slot: int
    token_ids: Sequence[int]
    num_prompt_tokens: int
    num_computed_tokens: int
    pages: Sequence[int]
    params: SamplingParams
    seed: int
    stop_token_ids: frozenset[int] = frozenset()  # masked on the device until ``params.min_tokens`` tokens are out
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()  # ``params.bad_words`` as token ids
    draft_until: int = 0  # the length that a request with drafts may reach; 0: it has none in wide steps either


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """Compute positions ``start .. start + num_tokens - 1`` of ``slot``, whose tokens are all known.

    ``samples`` is true when the row ends at the request's last token, so that its last logits choose the next one.
    """

    slot: int
    start: int
    num_tokens: int
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. ``fills`` and ``new_pages`` are applied before anything is computed.

    ``new_pages`` holds ``(slot, index in the slot's page table, page)``.
    ``masks`` holds ``(slot, allowed tokens)`` for sampling rows that may not choose freely: bit i of the little-endian
    32-bit words is token i. Bytes of another length than the vocabulary's words allow nothing.
    ``width``: 1, or in a wide step 2, 4 or 8: each decode row then computes as many tokens, the known one and drafts
    that the device makes itself; its pages hold all of them, as far as its ``draft_until`` lets them be sampled.
    Row order everywhere: decode rows, then prefill rows.
    """

    step_id: int
    decode_slots: tuple[int, ...]
    prefills: tuple[PrefillRow, ...] = ()
    fills: tuple[SlotFill, ...] = ()
    new_pages: tuple[tuple[int, int, int], ...] = ()
    masks: tuple[tuple[int, bytes], ...] = ()
    width: int = 1

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return len(self.decode_slots) * self.width + sum(row.num_tokens for row in self.prefills)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Raw log-probabilities at one position: the chosen (or prompt) token first, then the best ones, best first.

    ``ranks[i]`` is the 1-based rank of ``token_ids[i]`` in the whole vocabulary.
    """

    token_ids: list[int]
    logprobs: list[float]
    ranks: list[int]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came out of one step.

    ``token_ids[i]`` belongs to the i-th *sampling* row: the decode rows, with ``width`` entries each, then the prefill
    rows that sample. A negative value is one of the ``TOKEN_*`` codes above and means that this row alone failed, or in
    a wide step that the entry is none of its row's tokens: those are the first ones, at least one.
    ``logprobs`` maps an index into ``token_ids`` to its log-probabilities, for the rows that asked for them.
    ``prompt_logprobs`` maps an index into ``StepPlan.prefills`` to one entry per position ``start + 1 ..
    start + num_tokens`` that is still a prompt token (so the last chunk has one entry fewer than tokens).
    """

    step_id: int
    token_ids: list[int]
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, list[TokenLogprobs]] = field(default_factory=dict)
