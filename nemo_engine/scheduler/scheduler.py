"""Decides what each step computes, and takes in what came out of it.

Owns the request lists, the slots and, through the KV manager, the pages. Knows no tensors and no text.

There are no phases: a request has ``len(token_ids)`` known tokens and a count of computed ones, and a step spends a
budget of tokens on closing the gap, running requests first. A running request is *prefilling* while more than one token
is missing and then *decodes*, one token a step, in every step. So in a steady decode nothing about a request changes but
the step's number: what it computes is ``step_id + decode_offset``, and the steps in which it needs a page or
computes its last token are known when it starts to decode. They are noted in two calendars (step id -> requests), and a step in which
nothing is due repeats the plan of the step before. Its cost is one append per request, done in C.

Steps may be scheduled before earlier ones are committed (overlap): the schedule depends on counts alone. What a later
step computed for a request that turned out to have finished is dropped in ``commit``.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from nemo_engine.outputs import FinishReason
from nemo_engine.scheduler.kv_manager import KVManager
from nemo_engine.scheduler.repetition import ends_in_repetition
from nemo_engine.scheduler.request import Request, RequestStatus
from nemo_engine.step import (
    TOKEN_ALL_MASKED,
    TOKEN_NOT_FINITE,
    PrefillRow,
    SlotFill,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

_ERRORS = {
    TOKEN_NOT_FINITE: "the model's logits are not finite (NaN or infinity): the weights or the cache are damaged",
    TOKEN_ALL_MASKED: "allowed_token_ids, bad_words, min_tokens and logit_bias together leave no token to choose",
}


@dataclass(slots=True)
class Committed:
    """What one committed step changed. ``token_ids[i]`` was appended to ``requests[i]``.

    ``prefilled`` are those of ``requests`` whose prompt (or, after a preemption, all known tokens) this step completed.
    ``logprobs`` maps an index into ``requests``; ``prompt_logprobs`` holds ``(request, first position, entries)``.
    ``finished`` requests have their ``finish_reason``; those in ``requests`` too got their last token in this step.
    """

    requests: list[Request] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prefilled: list[Request] = field(default_factory=list)
    finished: list[Request] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: list[tuple[Request, int, list[TokenLogprobs]]] = field(default_factory=list)


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


@dataclass(frozen=True, slots=True)
class _DecodeSet:
    """The decoding requests in row order, and views of them that a step needs; replaced whole when one joins or leaves."""

    requests: list[Request]
    slots: tuple[int, ...]
    token_lists: list[list[int]]

    @classmethod
    def of(cls, requests: Iterable[Request]) -> _DecodeSet:
        members = list(requests)
        return cls(members, tuple([r.slot for r in members]), [r.token_ids for r in members])


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step that has been planned and not committed."""

    step_id: int
    decodes: _DecodeSet
    prefills: list[tuple[Request, PrefillRow]]
    last: list[Request]  # for these, the token of this step is the last that they may have
    num_departures: int  # Scheduler._num_departures when it was planned


class Scheduler:
    """Continuous batching over ``num_pages`` pages and ``max_num_seqs`` slots.

    ``max_num_batched_tokens`` is at least ``max_num_seqs``, so every decoding request takes part in every step.
    Waiting requests are admitted by priority, then arrival, when a slot and pages for all their known tokens are free. A
    decoding request that finds no free page preempts the least urgent, newest one: that one's pages are freed and it is
    computed anew later, ahead of newer requests.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs >= 1
        self.kv = KVManager(num_pages, page_size, enable_prefix_caching)
        self.max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._waiting: list[tuple[int, int, Request]] = []  # heap; finished requests are dropped when they surface
        self._num_waiting = 0
        self._prefilling: list[Request] = []
        self._decoding: dict[Request, None] = {}
        self._draining: set[Request] = set()  # running, last step launched
        self._decode_set = _DecodeSet.of(())
        self._is_decode_set_stale = False
        self._free_slots = list(range(max_num_seqs, 0, -1))
        self._launched: deque[_Launched] = deque()
        self._step_id = 0
        self._num_arrivals = 0
        self._num_departures = 0  # times a running request stopped running other than by its planned end
        self._num_preemptions = 0
        self._page_due: dict[int, list[tuple[Request, int]]] = {}  # step id -> (request, serial) that need a page then
        self._last_due: dict[int, list[tuple[Request, int]]] = {}  # step id -> those that compute their last token
        self._stop_ids: dict[int, int] = {}  # stop token id -> number of running requests that have it
        self._num_watched = 0  # running requests with repetition detection

    # ---- requests come and go

    def max_total_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """The largest length (prompt and output) that a request may reach.

        Raises ``ValueError`` with the arithmetic for what could never finish. The last token's key and value are never
        computed, so n pages hold a request of ``n * page_size + 1`` tokens.
        """
        page_size, num_pages = self.kv.page_size, self.kv.pool.num_pages
        limit = min(self.max_model_len, num_pages * page_size + 1)
        if max_tokens is None:
            total, asked = max(limit, num_prompt_tokens + 1), "at least 1 output token"
        else:
            total, asked = num_prompt_tokens + max_tokens, f"max_tokens {max_tokens}"
        text = f"a prompt of {num_prompt_tokens} tokens and {asked} make {total} tokens"
        if total > self.max_model_len:
            raise ValueError(f"{text}: more than max_model_len {self.max_model_len}")
        if total > limit:
            raise ValueError(
                f"{text} and need {self.kv.num_pages_for(total - 1)} KV pages of {page_size} tokens: the cache has "
                f"{num_pages} (at most {limit} tokens per request; raise kv_cache_gib or num_kv_pages)"
            )
        return total

    def add(self, request: Request) -> None:
        """Queue a new request. Raises ``ValueError`` if its id is in use or it could never finish."""
        if request.request_id in self._requests:
            raise ValueError(f"request_id {request.request_id!r} is in use by an unfinished request")
        request.max_total_tokens = self.max_total_tokens(request.num_prompt_tokens, request.params.max_tokens)
        self._num_arrivals += 1
        request.arrival = self._num_arrivals
        self._requests[request.request_id] = request
        self._enqueue(request)

    def finish(self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None) -> Request | None:
        """End a request from outside (abort, stop string) between steps; None if it is not known or has finished."""
        request = self._requests.get(request_id)
        if request is not None:
            if request.status is RequestStatus.WAITING:
                self._num_waiting -= 1
            self._end(request, reason, stop_reason)
        return request

    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    def has_launched(self) -> bool:
        """Whether a planned step has not been committed."""
        return bool(self._launched)

    def num_computed_tokens(self, request: Request) -> int:
        """Tokens of ``request`` whose keys and values the launched steps compute."""
        if request in self._decoding:
            return self._step_id + request.decode_offset + 1
        return request.num_computed_tokens

    def stats(self) -> SchedulerStats:
        """Counts as of now."""
        pool = self.kv.pool
        return SchedulerStats(
            num_running=self._num_running,
            num_waiting=self._num_waiting,
            num_pages=pool.num_pages,
            num_free_pages=pool.num_free,
            num_cached_pages=pool.num_cached,
            peak_used_pages=pool.peak_used,
            total_preemptions=self._num_preemptions,
            total_prefix_queried_tokens=self.kv.num_queried_tokens,
            total_prefix_hit_tokens=self.kv.num_hit_tokens,
        )

    # ---- a step is planned

    def schedule(self) -> StepPlan | None:
        """Plan the next step, or None if nothing can be computed before a launched step is committed."""
        step_id = self._step_id + 1
        num_preemptions = self._num_preemptions
        new_pages = self._grow(step_id) if step_id in self._page_due else ()
        if self._is_decode_set_stale:
            self._decode_set = _DecodeSet.of(self._decoding)
            self._is_decode_set_stale = False
        decodes = self._decode_set
        last: list[Request] = []
        if step_id in self._last_due:
            last = [r for r, serial in self._last_due.pop(step_id) if r.serial == serial]
            for request in last:
                self._drain(request, step_id + request.decode_offset + 1)
        prefills: list[tuple[Request, PrefillRow]] = []
        fills: list[SlotFill] = []
        budget = self._max_num_batched_tokens - len(decodes.slots)
        if self._prefilling:
            budget = self._continue_prefills(step_id, budget, prefills, last)
        if self._num_waiting and self._num_preemptions == num_preemptions:
            self._admit(step_id, budget, prefills, last, fills)
        if not decodes.slots and not prefills:
            return None
        self._step_id = step_id
        self._launched.append(_Launched(step_id, decodes, prefills, last, self._num_departures))
        return StepPlan(step_id, decodes.slots, tuple([row for _, row in prefills]), tuple(fills), tuple(new_pages))

    def _grow(self, step_id: int) -> list[tuple[int, int, int]]:
        """Give a page to every decoding request that starts one in this step, the most urgent first."""
        due = [r for r, serial in self._page_due.pop(step_id) if r.serial == serial]
        due.sort(key=lambda r: r.urgency)
        new_pages: list[tuple[int, int, int]] = []
        for request in due:
            if request not in self._decoding:  # preempted a moment ago
                continue
            self.kv.cache_pages(request, min(step_id + request.decode_offset, len(request.token_ids)))
            page = self.kv.append_page(request)
            while page is None:
                victim = max([*self._decoding, *self._prefilling], key=lambda r: r.urgency)
                self._preempt(victim)
                if victim is request:
                    break
                new_pages = [entry for entry in new_pages if entry[0] != victim.slot]
                page = self.kv.append_page(request)
            else:
                new_pages.append((request.slot, len(request.pages) - 1, page))
                self._note_next_page(request)
        return new_pages

    def _continue_prefills(
        self, step_id: int, budget: int, prefills: list[tuple[Request, PrefillRow]], last: list[Request]
    ) -> int:
        for request in list(self._prefilling):
            if budget == 0:
                break
            budget -= self._prefill(request, step_id, budget, prefills, last)
        return budget

    def _admit(
        self,
        step_id: int,
        budget: int,
        prefills: list[tuple[Request, PrefillRow]],
        last: list[Request],
        fills: list[SlotFill],
    ) -> None:
        while self._waiting and self._free_slots and budget > 0:
            request = self._waiting[0][2]
            if request.status is RequestStatus.FINISHED:
                heapq.heappop(self._waiting)
                continue
            if request.pages_wanted > self.kv.pool.num_free or not self.kv.admit(request):
                break
            heapq.heappop(self._waiting)
            self._num_waiting -= 1
            self._start(request, step_id)
            fills.append(
                SlotFill(
                    slot=request.slot,
                    token_ids=request.token_ids[:],
                    num_prompt_tokens=request.num_prompt_tokens,
                    num_computed_tokens=request.num_computed_tokens,
                    pages=tuple(request.pages),
                    params=request.params,
                    seed=request.seed,
                    stop_token_ids=request.stop_token_ids,
                    bad_words_token_ids=request.bad_words_token_ids,
                )
            )
            budget -= self._prefill(request, step_id, budget, prefills, last)

    def _start(self, request: Request, step_id: int) -> None:
        request.status = RequestStatus.RUNNING
        request.slot = self._free_slots.pop()
        request.admitted_step = step_id
        request.pages_wanted = 0
        if request.scheduled_ts is None:
            request.scheduled_ts = self._clock()
            request.num_cached_tokens = request.num_computed_tokens
        self._prefilling.append(request)
        for token_id in request.stop_token_ids:
            self._stop_ids[token_id] = self._stop_ids.get(token_id, 0) + 1
        self._num_watched += request.params.repetition_detection is not None

    def _prefill(
        self, request: Request, step_id: int, budget: int, prefills: list[tuple[Request, PrefillRow]], last: list[Request]
    ) -> int:
        """Plan the next chunk of ``request``; returns the number of tokens it takes."""
        start = request.num_computed_tokens
        count = min(budget, len(request.token_ids) - start)
        end = start + count
        request.num_computed_tokens = end
        self.kv.cache_pages(request, end)
        is_complete = end == len(request.token_ids)
        prefills.append((request, PrefillRow(request.slot, start, count, is_complete)))
        if is_complete:
            self._prefilling.remove(request)
            if end >= request.max_total_tokens - 1:
                last.append(request)
                self._draining.add(request)
            else:
                self._start_decoding(request, step_id)
        return count

    def _start_decoding(self, request: Request, step_id: int) -> None:
        request.decode_offset = request.num_computed_tokens - (step_id + 1)
        self._decoding[request] = None
        self._is_decode_set_stale = True
        # The last token is sampled from the position before the last, max_total_tokens - 2.
        due = request.max_total_tokens - 2 - request.decode_offset
        self._last_due.setdefault(due, []).append((request, request.serial))
        self._note_next_page(request)

    def _note_next_page(self, request: Request) -> None:
        position = len(request.pages) * self.kv.page_size
        if position <= request.max_total_tokens - 2:
            self._page_due.setdefault(position - request.decode_offset, []).append((request, request.serial))

    def _drain(self, request: Request, num_computed_tokens: int) -> None:
        """The last step of ``request`` is planned: it keeps slot and pages until that is committed."""
        del self._decoding[request]
        self._is_decode_set_stale = True
        request.num_computed_tokens = num_computed_tokens
        self._draining.add(request)

    # ---- a step comes back

    def commit(self, result: StepResult) -> Committed:
        """Take in the results of the oldest launched step: append tokens, end requests, free what they held."""
        step = self._launched.popleft()
        assert step.step_id == result.step_id, (step.step_id, result.step_id)
        samplers = [request for request, row in step.prefills if row.samples]
        requests = step.decodes.requests + samplers if samplers else step.decodes.requests
        token_ids = result.token_ids
        assert len(token_ids) == len(requests), (len(token_ids), len(requests))
        committed = Committed(prefilled=[request for request in samplers if self._is_current(request, step)])
        is_plain = (
            step.num_departures == self._num_departures
            and self._num_watched == 0
            and self._stop_ids.keys().isdisjoint(token_ids)
            and (not token_ids or min(token_ids) >= 0)
        )
        if is_plain:
            token_lists = step.decodes.token_lists
            if samplers:
                token_lists = token_lists + [request.token_ids for request in samplers]
            deque(map(list.append, token_lists, token_ids), maxlen=0)
            committed.requests, committed.token_ids = requests, token_ids
            committed.logprobs = dict(result.logprobs)
        else:
            self._commit_one_by_one(step, requests, result, committed)
        for index, entries in result.prompt_logprobs.items():
            request, row = step.prefills[index]
            if self._is_current(request, step):
                committed.prompt_logprobs.append((request, row.start + 1, entries))
        for request in step.last:
            if self._is_current(request, step):
                self._end(request, "length")
                committed.finished.append(request)
        return committed

    def _commit_one_by_one(
        self, step: _Launched, requests: list[Request], result: StepResult, committed: Committed
    ) -> None:
        for index, (request, token_id) in enumerate(zip(requests, result.token_ids)):
            if not self._is_current(request, step):
                continue
            if token_id < 0:
                request.error = _ERRORS[token_id]
                self._end(request, "error")
                committed.finished.append(request)
                continue
            request.token_ids.append(token_id)
            if index in result.logprobs:
                committed.logprobs[len(committed.requests)] = result.logprobs[index]
            committed.requests.append(request)
            committed.token_ids.append(token_id)
            rule = request.params.repetition_detection
            if token_id in request.stop_token_ids:
                self._end(request, "stop", None if token_id in request.eos_token_ids else token_id)
                committed.finished.append(request)
            elif rule is not None and ends_in_repetition(request.token_ids, request.num_output_tokens, rule):
                self._end(request, "repetition")
                committed.finished.append(request)

    @staticmethod
    def _is_current(request: Request, step: _Launched) -> bool:
        """Whether what ``step`` computed for ``request`` counts: it has neither finished nor been preempted since."""
        return request.status is RequestStatus.RUNNING and request.admitted_step <= step.step_id

    # ---- leaving the running ones

    @property
    def _num_running(self) -> int:
        return len(self._decoding) + len(self._prefilling) + len(self._draining)

    def _enqueue(self, request: Request) -> None:
        heapq.heappush(self._waiting, (request.priority, request.arrival, request))
        self._num_waiting += 1

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        self._num_preemptions += 1
        request.num_preemptions += 1
        request.num_computed_tokens = 0
        request.status = RequestStatus.WAITING
        self._enqueue(request)

    def _end(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        if request.status is RequestStatus.RUNNING:
            self._leave(request, is_failed=reason == "error")
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason
        del self._requests[request.request_id]

    def _leave(self, request: Request, is_failed: bool = False) -> None:
        """Give back slot and pages. Steps in flight may still write to them: later steps run after those."""
        if is_failed:
            self.kv.discard(request)
        else:
            # Known tokens only, without the last: nobody has computed its key and value.
            num_known = len(request.token_ids) - 1
            self.kv.cache_pages(request, min(self.num_computed_tokens(request), num_known))
            self.kv.free(request)
        if request in self._decoding:
            del self._decoding[request]
            self._is_decode_set_stale = True
        elif request in self._draining:
            self._draining.remove(request)
        else:
            self._prefilling.remove(request)
        request.serial += 1
        self._num_departures += 1
        self._free_slots.append(request.slot)
        for token_id in request.stop_token_ids:
            self._stop_ids[token_id] -= 1
            if self._stop_ids[token_id] == 0:
                del self._stop_ids[token_id]
        self._num_watched -= request.params.repetition_detection is not None

    def check(self) -> None:
        """Assert the invariants of pages, slots and lists. O(everything); for tests."""
        running = [*self._decoding, *self._prefilling, *self._draining]
        self.kv.pool.check(request.pages for request in running)
        slots = [request.slot for request in running]
        assert len(set(slots)) == len(slots) and not set(slots) & set(self._free_slots)
        assert len(slots) + len(self._free_slots) == self._max_num_seqs
        for request in running:
            assert request.status is RequestStatus.RUNNING
            assert len(request.pages) * self.kv.page_size >= self.num_computed_tokens(request)
            assert len(request.token_ids) <= request.max_total_tokens
        assert len(self._requests) == len(running) + self._num_waiting
        if not running:
            assert not self._stop_ids and self._num_watched == 0
