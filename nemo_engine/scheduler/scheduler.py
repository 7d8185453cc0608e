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
from collections.abc import Callable, Iterable

from nemo_engine.outputs import FinishReason, SchedulerStats
from nemo_engine.scheduler.kv_manager import KVManager
from nemo_engine.scheduler.request import Request, RequestStatus, by_urgency
from nemo_engine.scheduler.running import RunningRequests
from nemo_engine.scheduler.scheduled_step import ScheduledStep, StepOutput
from nemo_engine.scheduler.speculation import Speculation, num_prompt_tokens
from nemo_engine.scheduler.token_rules import ERRORS, end_of, failure_of, is_finite
from nemo_engine.scheduler.waiting import WaitingQueue
from nemo_engine.step import TOKEN_NOT_FINITE, StepPlan, StepResult


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
        speculation: Speculation | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs >= 1
        self.kv = KVManager(num_pages, page_size, enable_prefix_caching)
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.speculation = speculation or Speculation((), 0)
        self._clock = clock
        self.requests: dict[str, Request] = {}  # all that wait or run, by id, in the order of their arrival
        self.num_preemptions = self._step_id = self._num_arrivals = 0
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.waiting = WaitingQueue()
        self.running = RunningRequests(self.max_num_seqs)
        self._in_flight = deque[ScheduledStep]()  # launched and not committed, the oldest first

    def max_total_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """The largest length (prompt and output) that a request may reach; ``ValueError`` if it could never finish."""
        return self.kv.max_total_tokens(num_prompt_tokens, max_tokens, self.max_model_len)

    def add(self, request: Request) -> None:
        """Queue a new request. ``ValueError`` if its id is in use, or if it could never finish."""
        if request.request_id in self.requests:
            raise ValueError(f"request_id {request.request_id!r} is in use by an unfinished request")
        request.max_total_tokens = self.max_total_tokens(request.num_prompt_tokens, request.params.max_tokens)
        self.speculation.enter(request)
        request.arrival = self._num_arrivals = self._num_arrivals + 1
        self.requests[request.request_id] = request
        self.waiting.push(request)

    def finish(self, request_id: str, reason: FinishReason, stop_reason: int | str | None = None) -> Request | None:
        """End a request from outside (abort, stop string) between steps; None if it is not known or has finished."""
        request = self.requests.get(request_id)
        if request is not None:
            if request.status is RequestStatus.WAITING:
                self.waiting.remove(request)
            self._end(request, reason, stop_reason)
        return request

    def has_unfinished(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.requests)

    def stats(self) -> SchedulerStats:
        """Counts as of now."""
        return SchedulerStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            total_preemptions=self.num_preemptions,
            **self.kv.counts(),
            **self.speculation.counts(),
        )

    # ---- planning a step

    def schedule(self) -> StepPlan | None:
        """Plan the next step, or None if nothing can be computed before a launched step is committed."""
        decodes = self.running.ready_to_decode(self._in_flight)
        new_pages, num_preemptions = [], self.num_preemptions
        prompt_tokens = num_prompt_tokens(self.running, self.waiting)
        width = self.speculation.width_for(decodes, self.max_num_batched_tokens, self.kv.pool.num_free, prompt_tokens)
        full = [request for request in decodes if request.num_computed_tokens + width > request.compute_limit]
        if full:
            new_pages = self._grow(full, width)
            decodes = self.running.ready_to_decode(self._in_flight)
        for request in decodes:
            request.num_computed_tokens += 1 if request.acceptance is None else width
        step = ScheduledStep(self._step_id + 1, decodes, new_pages, width, self._clock())
        self._schedule_prompts(step, may_admit=self.num_preemptions == num_preemptions)
        if not decodes and not step.prefills:
            return None
        plan = step.plan()
        self._step_id = step.step_id
        self._in_flight.append(step)
        return plan

    def _grow(self, full: list[Request], width: int) -> list[tuple[int, int, int]]:
        """Give those of ``full`` that lack one a page, preempting others if need be: (slot, index, page)."""
        growing = [r for r in full if r.has_steps_left and self.kv.lacks_page(r, r.num_computed_tokens + width)]
        growing.sort(key=by_urgency)
        for request in full:
            if not request.has_steps_left:
                self.running.end_decode(request)
        for request in growing:
            self.kv.cache_pages(request, min(request.num_computed_tokens, len(request.token_ids)))
        for request in growing:
            while request.status is RequestStatus.RUNNING and not self.kv.append_pages([request]):
                self.preempt(self.running.least_urgent())
        growing = [request for request in growing if request.status is RequestStatus.RUNNING]
        return [(request.slot, len(request.pages) - 1, request.pages[-1]) for request in growing]

    def _schedule_prompts(self, step: ScheduledStep, may_admit: bool) -> None:
        """Spend what is left of the budget on prompts by urgency, whether they are under way or have yet to enter."""
        budget = self.max_num_batched_tokens - len(step.decodes) * step.width
        under_way = deque(self.running.prefilling)
        while budget > 0:
            first = self.waiting.first() if may_admit and self.waiting and self.running.free_slots else None
            if first is not None and (not under_way or by_urgency(first) < by_urgency(under_way[0])):
                if not self.kv.admit(first):
                    may_admit = False
                    continue
                self.waiting.pop()
                self.running.enter(first, self._clock())
                step.fill_slot(first)
                request = first
            elif under_way:
                request = under_way.popleft()
            else:
                return
            row = step.prefill(request, budget)
            budget -= row.num_tokens
            # Other rows may read the pages in this very step: keys and values are written before any row attends.
            self.kv.cache_pages(request, request.num_computed_tokens)
            if row.samples:
                self.running.end_prefill(request)

    # ---- taking in a step

    def commit(self, result: StepResult) -> StepOutput:
        """Take in the results of the oldest launched step: append tokens, end requests, free what they held."""
        step = self._in_flight.popleft()
        step.check(result)
        requests, result = self.speculation.commit(step, result, self.running, self._clock())
        departed = step.departed
        self._commit_prompts(step, result)
        if departed:
            departed.intersection_update(requests)  # only these were to get a token from this step
        ended_by_length: list[Request] = []
        dropped: set[int] = set()
        for index, (request, token_id) in enumerate(zip(requests, result.token_ids)):
            if departed and request in departed:
                dropped.add(index)  # what the step computed for it is dropped
                continue
            token_ids = request.token_ids
            is_full = len(token_ids) >= request.compute_limit  # at the latest when this is the last token
            if is_full or token_id < 0 or token_id in request.stop_token_ids or not request.is_plain:
                if not self._take(request, token_id, step):
                    dropped.add(index)
                if len(token_ids) == request.max_total_tokens and request.status is RequestStatus.RUNNING:
                    ended_by_length.append(request)
            else:
                token_ids.append(token_id)
        if step.bad_pages:
            self._restart_readers(step.bad_pages)
        for request in ended_by_length:
            self._end(request, "length")
            step.committed.finished.append(request)
        step.committed.add_tokens(requests, result, dropped)
        return step.committed

    def _commit_prompts(self, step: ScheduledStep, result: StepResult) -> None:
        """Take in what ``result`` says of prompts; the tokens that follow them are yet to come."""
        for index, entries in result.prompt_logprobs.items():
            request, row = step.prefills[index]
            if request not in step.departed:
                if is_finite(entries):
                    step.committed.prompt_logprobs.append((request, row.start + 1, entries))
                else:
                    self._fail(request, ERRORS[TOKEN_NOT_FINITE], step, is_damaged=True)
        step.note_prefilled(result.token_ids)

    def _take(self, request: Request, token_id: int, step: ScheduledStep) -> bool:
        """Take in a token that may end its request; False if it is a failure, which does."""
        error = failure_of(request, token_id)
        if error is not None:
            self._fail(request, error, step, is_damaged=token_id == TOKEN_NOT_FINITE)
            return False
        request.token_ids.append(token_id)
        reasons = end_of(request)
        if reasons is not None:
            self._end(request, *reasons)
            step.departed.add(request)  # a wide step may have more for it
            step.committed.finished.append(request)
        return True

    def _fail(self, request: Request, error: str, step: ScheduledStep, is_damaged: bool) -> None:
        """End ``request`` with ``error``. ``is_damaged``: its logits were not finite, so its pages may be bad."""
        if is_damaged:
            step.bad_pages.update(self.kv.discard(request))
        self._end(request, "error", error=error)
        step.departed.add(request)
        step.committed.finished.append(request)

    def _restart_readers(self, bad_pages: set[int]) -> None:
        """Preempt each request that uses a bad page and has not got a token yet: its own pages may be as bad."""
        while readers := [r for r in self.running.all() if not (r.is_sound or bad_pages.isdisjoint(r.pages))]:
            for request in readers:
                bad_pages.update(self.kv.discard(request))
                self.preempt(request)

    def fail_running(self, message: str, or_first: bool = False) -> StepOutput:
        """End every running request with an error: a step broke, or a change of requests and pages was cut short.

        What waits goes on waiting. Launched steps, pages and slots are forgotten: a change of them may be half
        done, and the step may have written anywhere. It may be called again if it is cut short itself. ``or_first``: if
        nothing runs, the first request that waits ends instead.
        """
        self._begin_anew()
        self.kv.reset()
        ended = _ended(self.requests.values(), self.waiting, message, or_first)
        self.requests = {name: r for name, r in self.requests.items() if r.status is not RequestStatus.FINISHED}
        return StepOutput(finished=ended, failure=message)

    # ---- leaving

    def preempt(self, request: Request) -> None:
        """Take slot and pages from a running request, which waits again and is computed anew."""
        self._leave(request)
        self.num_preemptions += 1
        request.num_preemptions += 1
        request.num_computed_tokens = 0
        request.status = RequestStatus.WAITING
        self.waiting.push(request)

    def _end(
        self, request: Request, reason: FinishReason, stop_reason: int | str | None = None, error: str | None = None
    ) -> None:
        if request.status is RequestStatus.RUNNING:
            self._leave(request)
        request.end(reason, stop_reason, error)
        del self.requests[request.request_id]

    def _leave(self, request: Request) -> None:
        """Give back pages and slot. Steps in flight may still write to them: later steps run after those."""
        if request.pages:
            self.kv.free(request)
        self.running.leave(request)
        for step in self._in_flight:
            step.departed.add(request)


def _ended(requests: Iterable[Request], waiting: WaitingQueue, message: str, or_first: bool) -> list[Request]:
    """Put the ``requests`` that wait back into ``waiting``; returns the others, which end with ``message``."""
    ended = []
    for request in requests:
        request.pages = []
        if request.status is RequestStatus.WAITING:
            waiting.push(request)
        else:
            ended.append(request)
    if or_first and not ended and waiting:
        ended.append(waiting.first())
        waiting.remove(ended[0])
    for request in ended:
        if request.status is not RequestStatus.FINISHED:  # or it had ended when the change was cut short
            request.end("error", error=message)
    return ended
