"""What a user gets back: ``RequestOutput`` and what it is made of, with vLLM's field names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from nemo_engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error", "repetition"]
NO_TOKEN_LEFT = (  # error of a completion whose own parameters contradict each other
    "structured_outputs, allowed_token_ids, bad_words, min_tokens and logit_bias together leave no token to choose"
)
GRAMMAR_TOO_COMPLEX = (  # error of a completion whose grammar outgrew its limits on the way
    "the grammar of structured_outputs became too complex: following it needs more states than a request may have"
)
CacheMiss = Literal["not_seen", "evicted", "prompt_logprobs", "disabled"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token at one position, before any sampling parameter is applied.

    ``rank`` is 1-based over the whole vocabulary; ``decoded_token`` is None without a tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One of the ``n`` completions of a request.

    ``finish_reason`` is None while it runs. ``stop_reason`` is the stop string or stop token id that ended it, None for
    the end-of-sequence token. ``logprobs`` holds one ``{token_id: Logprob}`` per generated token. ``tool_calls_start``
    is the number of characters in front of the first ``[TOOL_CALLS]`` token, counted from the start of the whole text
    also where ``text`` is a delta; None if there is none (yet), or no text.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    tool_calls_start: int | None = None

    def finished(self) -> bool:
        """Whether this completion has ended, for whatever reason."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds of the monotonic clock ``time.monotonic()``; None until the event has happened."""

    arrival_time: float
    queued_ts: float | None = None
    scheduled_ts: float | None = None
    first_token_ts: float | None = None
    last_token_ts: float | None = None
    num_generation_tokens: int = 0
    num_preemptions: int = 0

    @property
    def first_token_latency(self) -> float | None:
        """TTFT: seconds from arrival to the first token."""
        return None if self.first_token_ts is None else self.first_token_ts - self.arrival_time


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What the prefix cache had of a prompt: ``num_cached_pages`` of the ``num_full_pages`` that it can have (the last
    token of a prompt is always computed), and why not the next one.

    ``reason`` None: all were there. "not_seen": no earlier prompt went on like this one. "evicted": one did, and its
    page had to make room. "prompt_logprobs", "disabled": the cache was not asked.
    """

    page_size: int
    num_full_pages: int
    num_cached_pages: int
    reason: CacheMiss | None


@dataclass(slots=True)
class RequestOutput:
    """The state of one request: with ``generate`` its end, with ``stream`` and ``step`` what is new or so far.

    ``num_cached_tokens`` counts the prompt tokens whose keys and values came from the prefix cache.
    ``sampling_params`` are the effective ones, after the defaults of the call have been filled in.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    cache_report: CacheReport | None = None
    metrics: RequestMetrics | None = None
    sampling_params: SamplingParams | None = field(default=None, repr=False)


class StepRecord(NamedTuple):
    """What one committed step did. ``time`` is that of the commit, in seconds of ``time.monotonic()``."""

    step_id: int
    time: float
    num_decodes: int  # rows that decode: one token each, or as many as the step is wide
    num_prefills: int  # other rows
    num_prefill_tokens: int  # that these computed
    num_new_tokens: int  # that requests were given
    num_prompt_tokens: int  # of the requests that were given their first token


class RequestView(NamedTuple):
    """An unfinished completion, for those who watch the engine. ``age`` in seconds since its arrival.

    ``num_computed_tokens`` counts those of prompt and output whose keys and values launched steps compute, cached ones
    among them.
    """

    request_id: str
    state: Literal["waiting", "prefill", "decode"]
    age: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_computed_tokens: int
    num_output_tokens: int
    num_pages: int
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counts at one moment; pages and tokens are totals since the start where the name says so."""

    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    num_cached_pages: int
    peak_used_pages: int
    total_preemptions: int
    total_prefix_queried_tokens: int
    total_prefix_hit_tokens: int
    num_spec_drafts: int = 0  # rows of wide steps that had drafts: vLLM's spec_decode_num_drafts
    num_spec_draft_tokens: int = 0
    num_spec_accepted_tokens_per_pos: tuple[int, ...] = ()  # by place behind the known token; none without speculation
