"""One completion in the making, as the scheduler sees it: token ids, counts, pages. No text, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from enum import Enum
from functools import lru_cache
from operator import attrgetter
from typing import Protocol

from nemo_engine.outputs import CacheReport, FinishReason
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.scheduler.estimates import Acceptance


class RequestStatus(Enum):
    """WAITING holds no slot and no pages, RUNNING holds both, FINISHED holds neither and never runs again."""

    WAITING = 0
    RUNNING = 1
    FINISHED = 2


class Grammar(Protocol):
    """Says what a completion may go on with. Any of these may raise: the request then ends with an error."""

    def mask(self) -> bytes:
        """The tokens that may come next, see ``StepPlan.masks``."""

    def accept(self, token_id: int) -> None:
        """Take in the next token; raises if it may not come."""

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete: an end-of-sequence token has come, or nothing else may follow."""


_union = lru_cache(maxsize=256)(frozenset.union)  # one object for equal ids, as each step looks into it


@dataclass(eq=False, repr=False, slots=True)
class Request:
    """State of one completion. The scheduler and its KV manager write it; others read."""

    # Every step reads these of every request, so they lie side by side in memory:
    token_ids: list[int] = field(init=False)  # the prompt, then what has been generated
    stop_token_ids: frozenset[int] = field(init=False)  # they end the request; eos_token_ids are among them
    is_plain: bool = field(init=False)  # only its length or a stop id can end it: no grammar, no repetition rule
    # What launched steps compute counts as done, and of wide ones as if all drafts were right: see speculation.py.
    num_computed_tokens: int = field(init=False, default=0)
    compute_limit: int = field(init=False, default=0)  # tokens it may compute before it needs a page or ends
    slot: int = field(init=False, default=0)  # while it runs
    acceptance: Acceptance | None = field(init=False, default=None)  # None: wide steps have no drafts for it

    request_id: str
    prompt_token_ids: InitVar[Sequence[int]]
    params: SamplingParams
    seed: int = field(default=0, kw_only=True)
    eos_token_ids: frozenset[int] = field(default=frozenset(), kw_only=True)  # emptied if params.ignore_eos
    bad_words_token_ids: tuple[tuple[int, ...], ...] = field(default=(), kw_only=True)
    priority: int = field(default=0, kw_only=True)  # a larger number is less urgent
    client: str = field(default="", kw_only=True)  # clients take turns among waiting requests of equal priority
    cache_salt: bytes = field(default=b"", kw_only=True)  # prefixes match only between requests of equal salt
    grammar: Grammar | None = field(default=None, kw_only=True)  # its state is that after the last of token_ids

    num_prompt_tokens: int = field(init=False)
    max_total_tokens: int = field(init=False, default=0)  # limit of prompt and output together; set by Scheduler.add
    arrival: int = field(init=False, default=0)  # 1 for the first request that the scheduler got
    status: RequestStatus = field(init=False, default=RequestStatus.WAITING)
    finish_reason: FinishReason | None = field(init=False, default=None)
    stop_reason: int | str | None = field(init=False, default=None)  # None if an end-of-sequence token ended it
    error: str | None = field(init=False, default=None)  # text beside the finish reason "error"
    scheduled_ts: float | None = field(init=False, default=None)  # of the first admission
    num_cached_tokens: int = field(init=False, default=0)  # that the first admission found in the prefix cache
    cache_report: CacheReport | None = field(init=False, default=None)
    num_preemptions: int = field(init=False, default=0)
    mask_error: str | None = field(init=False, default=None)  # why its grammar gave no mask for the step in flight
    is_sound: bool = field(init=False, default=False)  # a token came out of its pages, so what they hold is good

    # Of the KV manager:
    pages: list[int] = field(init=False, default_factory=list)
    page_hashes: list[bytes] = field(init=False, default_factory=list)  # of full pages, as far as they were needed
    num_hashed_pages: int = field(init=False, default=0)  # leading pages that were offered to the prefix cache
    pages_wanted: int = field(init=False, default=0)  # new pages that the last failed admission lacked
    hash_wanted: bytes | None = field(init=False, default=None)  # the first page that it did not find in the cache

    def __post_init__(self, prompt_token_ids: Sequence[int]) -> None:
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        if self.params.ignore_eos:
            self.eos_token_ids = frozenset()
        self.is_plain = self.grammar is None and self.params.repetition_detection is None
        self.stop_token_ids = _union(self.eos_token_ids, tuple(self.params.stop_token_ids or ()))

    @property
    def has_steps_left(self) -> bool:
        """Whether a token may follow those that launched steps choose."""
        # The last token is sampled from the position before it, and its own position is never computed.
        return self.num_computed_tokens + 1 < self.max_total_tokens

    @property
    def num_good_tokens(self) -> int:
        """Leading tokens whose keys and values are known to be good: those that the last token came out of."""
        return len(self.token_ids) - 1 if self.is_sound else 0

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    def end(self, reason: FinishReason, stop_reason: int | str | None = None, error: str | None = None) -> None:
        """Mark the request as finished."""
        self.status = RequestStatus.FINISHED
        self.finish_reason, self.stop_reason, self.error = reason, stop_reason, error

    def __repr__(self) -> str:
        return f"Request({self.request_id!r}, {self.status.name}, {len(self.token_ids)} tokens, slot {self.slot})"


by_urgency = attrgetter("priority", "arrival")  # a key to sort requests by; the smallest is the most urgent
