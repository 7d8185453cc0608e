"""Decides what each step computes, and takes in what came out of it. Knows no tensors and no text.

There are no phases: a request has ``len(token_ids)`` known tokens and a count of computed ones, and a step spends a
budget of tokens on closing the gap. A running request is *prefilling* while more than one token is missing, and then
*decodes*, one token in every step. Steps go first to the requests that decode, then to prompts, the most urgent first.

Steps may be scheduled before earlier ones are committed (overlap), so a schedule depends on counts alone, and
``num_computed_tokens`` counts what launched steps will have computed. What a step computes for a request that has left
its slot in the meantime is dropped in ``commit``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nemo_engine.outputs import FinishReason
from nemo_engine.scheduler.kv_manager import KVManager
from nemo_engine.scheduler.request import URGENCY, Request, RequestStatus
from nemo_engine.scheduler.running import RunningRequests
from nemo_engine.scheduler.scheduled_step import Committed, ScheduledStep
from nemo_engine.scheduler.token_rules import ERRORS, end_of, failure_of, is_finite
from nemo_engine.scheduler.waiting import WaitingQueue
from nemo_engine.step import TOKEN_NOT_FINITE, PrefillRow, StepPlan, StepResult


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


class Scheduler:
    """Continuous batching over ``num_pages`` pages and ``max_num_seqs`` slots.

    As ``max_num_batched_tokens >= max_num_seqs``, every decoding request takes part in every step. Waiting requests
    enter in order, when a slot and pages for all their known tokens are free. A decoding request that finds no free
    page preempts the least urgent, newest one, which is computed anew later.
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
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._waiting = WaitingQueue()
        self.num_preemptions = self._step_id = self._num_arrivals = 0
        self._running = RunningRequests(max_num_seqs)
        self._in_flight: deque[ScheduledStep] = deque()

    # ---- requests

    def max_total_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """The largest length (prompt and output) that a request may reach; ``ValueError`` if it could never finish."""
        return self.kv.max_total_tokens(num_prompt_tokens, max_tokens, self.max_model_len)

    def add(self, request: Request) -> None:
        """Queue a new request, whose id is no user's. ``ValueError`` if it is in use or it could never finish."""
        if request.request_id in self._requests:
            raise ValueError(f"request_id {request.request_id!r} is in use by an unfinished request")
        request.max_total_tokens = self.max_total_tokens(request.num_prompt_tokens, request.params.max_tokens)
        request.arrival = self._num_arrivals = self._num_arrivals + 1
        self._requests[request.request_id] = request
        self._waiting.push(request)

    def finish(self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None) -> Request | None:
        """End a request from outside (abort, stop string) between steps; None if it is not known or has finished."""
        request = self._requests.get(request_id)
        if request is not None:
            if request.status is RequestStatus.WAITING:
                self._waiting.remove(request)
            self._end(request, reason, stop_reason)
        return request

    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._requests)

    def unfinished(self) -> list[Request]:
        """All requests that wait or run."""
        return list(self._requests.values())

    def running(self) -> list[Request]:
        """All requests that hold a slot, those that prefill last."""
        return self._running.all()

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return self.max_num_seqs - len(self._running.free_slots)

    @property
    def num_waiting(self) -> int:
        """Requests that wait, for the first time or again."""
        return len(self._waiting)

    def num_waiting_of(self, client: str) -> int:
        """Requests of ``client`` that wait and have not run yet. From any thread."""
        return self._waiting.count_of(client)

    def stats(self) -> SchedulerStats:
        """Counts as of now."""
        pool = self.kv.pool
        return SchedulerStats(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_pages=pool.num_pages,
            num_free_pages=pool.num_free,
            num_cached_pages=pool.num_cached,
            peak_used_pages=pool.peak_used,
            total_preemptions=self.num_preemptions,
            total_prefix_queried_tokens=self.kv.num_queried_tokens,
            total_prefix_hit_tokens=self.kv.num_hit_tokens,
        )

    # ---- planning a step

    def schedule(self) -> StepPlan | None:
        """Plan the next step, or None if nothing can be computed before a launched step is committed."""
        decodes = self._running.ready_to_decode(self._in_flight)
        new_pages, num_preemptions = [], self.num_preemptions
        at_limit = [request for request in decodes if request.num_computed_tokens == request.compute_limit]
        if at_limit:
            new_pages = self._grow([request for request in at_limit if request.has_steps_left])
            decodes = [request for request in decodes if request.num_computed_tokens < request.compute_limit]
        for request in decodes:
            request.num_computed_tokens += 1
        step = ScheduledStep(self._step_id + 1, decodes, new_pages)
        self._schedule_prompts(step, may_admit=self.num_preemptions == num_preemptions)
        if not decodes and not step.prefills:
            return None
        plan = step.plan()
        self._step_id = step.step_id
        self._in_flight.append(step)
        return plan

    def _grow(self, full: list[Request]) -> list[tuple[int, int, int]]:
        """Give a page to each of ``full``, whose pages are full, preempting others if need be.

        Returns (slot, index, page) for those that got one.
        """
        full.sort(key=URGENCY)
        for request in full:
            self.kv.cache_pages(request, min(request.num_computed_tokens, len(request.token_ids)))
        if self.kv.append_pages(full) is None:
            for request in full:
                while request.status is RequestStatus.RUNNING and self.kv.append_pages([request]) is None:
                    self.preempt(self._running.least_urgent())
            full = [request for request in full if request.status is RequestStatus.RUNNING]
        return [(request.slot, len(request.pages) - 1, request.pages[-1]) for request in full]

    def _schedule_prompts(self, step: ScheduledStep, may_admit: bool) -> None:
        """Spend what is left of the budget on prompts by urgency, whether they are under way or have yet to enter."""
        budget = self.max_num_batched_tokens - len(step.decodes)
        under_way = deque(self._running.prefilling)
        while budget > 0:
            first = self._waiting.first() if may_admit and self._waiting and self._running.free_slots else None
            if first is not None and (not under_way or first.urgency < under_way[0].urgency):
                may_admit = self.kv.admit(first)
                if may_admit:
                    self._enter(first, step)
                    budget -= self._prefill(first, step, budget)
            elif under_way:
                budget -= self._prefill(under_way.popleft(), step, budget)
            else:
                break

    def _enter(self, request: Request, step: ScheduledStep) -> None:
        """Give a slot to ``request``, the first that waits, which has its pages."""
        self._waiting.pop()
        if request.scheduled_ts is None:
            request.scheduled_ts = self._clock()
            request.num_cached_tokens = request.num_computed_tokens
        self._running.enter(request)
        step.fill_slot(request)

    def _prefill(self, request: Request, step: ScheduledStep, budget: int) -> int:
        """Schedule the next chunk of ``request``, of at most ``budget`` tokens; returns its tokens."""
        start = request.num_computed_tokens
        count = min(budget, len(request.token_ids) - start)
        request.num_computed_tokens += count
        # Other rows may read the pages in this very step: keys and values are written before any row attends.
        self.kv.cache_pages(request, request.num_computed_tokens)
        samples = request.num_computed_tokens == len(request.token_ids)
        step.prefills.append((request, PrefillRow(request.slot, start, count, samples)))
        if samples:
            self._running.end_prefill(request)
        return count

    # ---- taking in a step

    def commit(self, result: StepResult) -> Committed:
        """Take in the results of the oldest launched step: append tokens, end requests, free what they held."""
        step = self._in_flight.popleft()
        requests, token_ids, departed = step.sampling, result.token_ids, step.departed
        assert (result.step_id, len(token_ids)) == (step.step_id, len(requests)), (result, step.step_id, len(requests))
        committed = Committed()
        self._commit_prompts(step, result, committed)
        if departed:
            departed.intersection_update(requests)  # the others had no token to come from this step
        at_limit: list[Request] = []
        for request, token_id in zip(requests, token_ids):
            if departed and request in departed:
                continue  # what the step computed for it is dropped
            if token_id < 0 or request.is_watched or token_id in request.stop_token_ids:
                self._take(request, token_id, step, committed)
                if request.status is RequestStatus.FINISHED:
                    continue
            else:
                request.token_ids.append(token_id)
            if len(request.token_ids) == request.max_total_tokens:
                at_limit.append(request)
        self._restart_readers(step.bad_pages)
        for request in at_limit:
            self._end(request, "length")
            committed.finished.append(request)
        committed.add_tokens(requests, result, departed)
        return committed

    def _commit_prompts(self, step: ScheduledStep, result: StepResult, committed: Committed) -> None:
        """Take in what ``result`` says of prompts; the tokens that follow them are yet to come."""
        for index, entries in result.prompt_logprobs.items():
            request, row = step.prefills[index]
            if request not in step.departed:
                if is_finite(entries):
                    committed.prompt_logprobs.append((request, row.start + 1, entries))
                else:
                    self._fail(request, ERRORS[TOKEN_NOT_FINITE], step, committed, is_damaged=True)
        token_ids = iter(result.token_ids[len(step.decodes) :])
        for request, row in step.prefills:
            if row.samples:
                token_id = next(token_ids)
                if request not in step.departed:
                    committed.prefilled.append(request)
                    request.is_sound = token_id >= 0

    def _take(self, request: Request, token_id: int, step: ScheduledStep, committed: Committed) -> None:
        """Take in a token that may be a failure, or may end its request."""
        error = failure_of(request, token_id)
        if error is not None:
            self._fail(request, error, step, committed, is_damaged=token_id == TOKEN_NOT_FINITE)
            return
        request.token_ids.append(token_id)
        reasons = end_of(request)
        if reasons is not None:
            self._end(request, *reasons)
            committed.finished.append(request)

    def _fail(self, request: Request, error: str, step: ScheduledStep, committed: Committed, is_damaged: bool) -> None:
        """End ``request`` with ``error``. ``is_damaged``: its logits were not finite, so its pages may be bad."""
        if is_damaged:
            step.bad_pages.update(self.kv.discard(request, request.num_good_tokens))
        self._end(request, "error", error=error)
        step.departed.add(request)
        committed.finished.append(request)

    def _restart_readers(self, bad_pages: set[int]) -> None:
        """Preempt who has ``bad_pages`` and no token to show for them: what it computed from them is as bad."""
        while readers := [r for r in self.running() if not (r.is_sound or bad_pages.isdisjoint(r.pages))]:
            for request in readers:
                bad_pages.update(self.kv.discard(request))
                self.preempt(request)

    def fail_running(self, message: str, or_first: bool = False) -> Committed:
        """End every running request with an error: a step broke, or a change of the books was cut short.

        What waits goes on waiting. Launched steps are forgotten, and so are pages and slots: their books may be half
        written, and the step may have written anywhere. May be called again if it is cut short itself. ``or_first``: if
        nobody runs, the first of those that wait ends instead.
        """
        waiting, ended = WaitingQueue(), list[Request]()
        for request in self._requests.values():
            self.kv.forget_request(request)
            if request.status is RequestStatus.WAITING:
                waiting.push(request)
            else:
                ended.append(request)
        if or_first and not ended and waiting:
            ended.append(waiting.first())
            waiting.pop()
        for request in ended:
            if request.status is not RequestStatus.FINISHED:  # otherwise it had its end, and nobody was told
                request.end("error", error=message)
        self.kv.reset()
        self._running = RunningRequests(self.max_num_seqs)
        self._in_flight.clear()
        self._requests = {name: r for name, r in self._requests.items() if r.status is RequestStatus.WAITING}
        self._waiting = waiting
        return Committed(finished=ended, failure=message)

    # ---- leaving

    def preempt(self, request: Request) -> None:
        """Take slot and pages from a running request, which waits again and is computed anew."""
        self._leave(request)
        self.num_preemptions += 1
        request.num_preemptions += 1
        request.num_computed_tokens = 0
        request.status = RequestStatus.WAITING
        self._waiting.push(request)

    def _end(
        self, request: Request, reason: FinishReason, stop_reason: int | str | None = None, error: str | None = None
    ) -> None:
        if request.status is RequestStatus.RUNNING:
            self._leave(request)
        request.end(reason, stop_reason, error)
        del self._requests[request.request_id]

    def _leave(self, request: Request) -> None:
        """Give back pages and slot. Steps in flight may still write to them: later steps run after those."""
        if request.pages:
            self.kv.cache_pages(request, request.num_good_tokens)
            self.kv.free(request, request.num_good_tokens)
        self._running.leave(request)
        for step in self._in_flight:
            step.departed.add(request)
