"""One completion in the making, as the scheduler sees it: token ids, counts, pages. No text, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from nemo_engine.outputs import CacheReport, FinishReason
from nemo_engine.sampling_params import SamplingParams


class RequestStatus(Enum):
    """WAITING holds no slot and no pages, RUNNING holds both, FINISHED neither, for good."""

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
        """Whether nothing may follow but an end-of-sequence token, or one has come."""


class Request:
    """State of one completion. Written by the scheduler and its KV manager only; others read.

    ``token_ids`` is the prompt followed by what has been generated. ``stop_token_ids`` end the request, the
    end-of-sequence tokens among them (``eos_token_ids``), which leave ``stop_reason`` None.
    ``cache_salt`` keeps pages apart: prefixes match only between requests of equal salt.
    A larger ``priority`` is less urgent; ``max_total_tokens`` (prompt and output) is set when the scheduler takes the request.
    """

    __slots__ = (
        "admitted_step",
        "arrival",
        "bad_words_token_ids",
        "cache_report",
        "cache_salt",
        "decode_offset",
        "eos_token_ids",
        "error",
        "finish_reason",
        "grammar",
        "hash_wanted",
        "is_sound",
        "last_due",
        "launched_step",
        "max_total_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_hashed_pages",
        "num_preemptions",
        "num_prompt_tokens",
        "page_due",
        "page_hashes",
        "pages",
        "pages_wanted",
        "params",
        "priority",
        "request_id",
        "scheduled_ts",
        "seed",
        "slot",
        "status",
        "stop_reason",
        "stop_token_ids",
        "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        seed: int = 0,
        eos_token_ids: frozenset[int] = frozenset(),
        bad_words_token_ids: tuple[tuple[int, ...], ...] = (),
        priority: int = 0,
        cache_salt: bytes = b"",
        grammar: Grammar | None = None,
    ) -> None:
        self.request_id = request_id
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.params = params
        self.seed = seed
        self.eos_token_ids = frozenset() if params.ignore_eos else eos_token_ids
        self.stop_token_ids = self.eos_token_ids.union(params.stop_token_ids or ())
        self.bad_words_token_ids = bad_words_token_ids
        self.priority = priority
        self.cache_salt = cache_salt
        self.grammar = grammar  # stands behind the last of token_ids, also while the request waits again
        self.max_total_tokens = 0
        self.arrival = 0
        self.status = RequestStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.scheduled_ts: float | None = None
        self.num_cached_tokens = 0
        self.cache_report: CacheReport | None = None
        self.num_preemptions = 0
        # While it runs:
        self.slot = 0
        self.is_sound = False  # a token has come out of what its pages hold, so all that was computed before is good
        self.admitted_step = 0
        self.num_computed_tokens = 0  # by launched steps; while it decodes, Scheduler.num_computed_tokens knows
        self.launched_step = 0  # the last one that takes it, if it has a grammar
        self.decode_offset = 0  # while it decodes: position computed in a step, less the step's id
        self.page_due = 0  # the step in which it next starts a page, while it decodes without a grammar
        self.last_due = 0  # the step of its last token, likewise
        # Owned by the KV manager:
        self.pages: list[int] = []
        self.page_hashes: list[bytes] = []  # chain over the full pages of token_ids, as far as it was needed
        self.num_hashed_pages = 0  # leading pages offered to the prefix cache
        self.pages_wanted = 0  # new pages that the last failed admission would have taken
        self.hash_wanted: bytes | None = None  # first page that it did not find in the cache

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens, as a new list."""
        return self.token_ids[self.num_prompt_tokens :]

    def __repr__(self) -> str:
        return f"Request({self.request_id!r}, {self.status.name}, {len(self.token_ids)} tokens, slot {self.slot})"
