"""Decides what each step computes, and takes in what came out of it.

Owns the request lists, the slots and, through the KV manager, the pages. Knows no tensors and no text.

There are no phases: a request has ``len(token_ids)`` known tokens and a count of computed ones, and a step spends a
budget of tokens on closing the gap, running requests first. A running request is *prefilling* while more than one token
is missing and then *decodes*, one token in every step. What the running requests need in which step is noted ahead (see
``running``), so a step in which nothing is due repeats the plan of the step before, and costs one append per request, done in C.

Steps may be scheduled before earlier ones are committed (overlap): the schedule depends on counts alone. What a later
step computed for a request that turned out to have finished is dropped in ``commit``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nemo_engine.outputs import FinishReason
from nemo_engine.scheduler.ends import ERRORS, Committed, commit_each, is_finite, restart
from nemo_engine.scheduler.kv_manager import KVManager
from nemo_engine.scheduler.planned_step import PlannedStep
from nemo_engine.scheduler.preemption import grow_in_turn, restart_readers
from nemo_engine.scheduler.prompts import plan_prompts
from nemo_engine.scheduler.request import Request, RequestStatus
from nemo_engine.scheduler.running import RunningSet
from nemo_engine.scheduler.waiting import WaitingQueue
from nemo_engine.step import TOKEN_NOT_FINITE, StepPlan, StepResult


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

    @classmethod
    def of(cls, num_running: int, num_waiting: int, total_preemptions: int, kv: KVManager) -> SchedulerStats:
        """Put together from the scheduler's own counts and those of its KV manager."""
        return cls(
            num_running=num_running,
            num_waiting=num_waiting,
            num_pages=kv.pool.num_pages,
            num_free_pages=kv.pool.num_free,
            num_cached_pages=kv.pool.num_cached,
            peak_used_pages=kv.pool.peak_used,
            total_preemptions=total_preemptions,
            total_prefix_queried_tokens=kv.num_queried_tokens,
            total_prefix_hit_tokens=kv.num_hit_tokens,
        )


class Scheduler:
    """Continuous batching over ``num_pages`` pages and ``max_num_seqs`` slots.

    As ``max_num_batched_tokens >= max_num_seqs``, every decoding request takes part in every step. Waiting requests enter in
    order, when a slot and pages for all their known tokens are free, and prompts are computed in that order too. A decoding request that
    finds no free page preempts the least urgent, newest one, which is computed anew later.

    Requests are known by their ``request_id``, which whoever makes them must not take from a user.
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
        self.max_num_batched_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._waiting = WaitingQueue()
        self._running = RunningSet(max_num_seqs, page_size)
        self._launched: deque[PlannedStep] = deque()
        self._step_id = self._num_arrivals = self._num_preemptions = 0

    def max_total_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """The largest length (prompt and output) that a request may reach; ``ValueError`` if it could never finish."""
        return self.kv.max_total_tokens(num_prompt_tokens, max_tokens, self.max_model_len)

    def add(self, request: Request) -> None:
        """Queue a new request. Raises ``ValueError`` if its id is in use or it could never finish."""
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

    def num_computed_tokens(self, request: Request) -> int:
        """Tokens of ``request`` whose keys and values the launched steps compute."""
        if self._running.is_decoding(request):
            return self._step_id + request.decode_offset + 1
        return request.num_computed_tokens

    def num_waiting_of(self, client: str) -> int:
        """Requests of ``client`` that wait and have not run yet. From any thread."""
        return self._waiting.count_of(client)

    def stats(self) -> SchedulerStats:
        """Counts as of now."""
        return SchedulerStats.of(len(self._running), len(self._waiting), self._num_preemptions, self.kv)

    def schedule(self) -> StepPlan | None:
        """Plan the next step, or None if nothing can be computed before a launched step is committed."""
        step = self._plan_step()
        return None if step is None else step.plan()

    def _plan_step(self) -> PlannedStep | None:
        running = self._running
        step_id = self._step_id + 1
        num_departures = running.num_departures
        oldest = self._launched[0].step_id if self._launched else step_id
        ready = running.constrained.ready(oldest) if running.constrained.requests else []
        new_pages = self._grow(step_id, ready)
        decodes = running.decode_set
        last = running.take_last_due(step_id)
        if ready:
            ready = [one for one in ready if one.status is RequestStatus.RUNNING]  # the others were just preempted
            decodes = running.constrained.join(decodes, ready)
            last += running.launch_constrained(ready, step_id)
        left = self.max_num_batched_tokens - len(decodes.requests)
        step = PlannedStep(step_id, decodes, last, running.num_departures, left, ready[:], new_pages)
        nobody_left = running.num_departures == num_departures  # by preemption
        plan_prompts(step, self.kv, self._running, self._waiting, self._clock, may_admit=nobody_left)
        if not decodes.requests and not step.prefills:
            return None
        self._step_id = step_id
        self._launched.append(step)
        return step

    def _grow(self, step_id: int, ready: list[Request]) -> list[tuple[int, int, int]]:
        """Give a page to every decoding request, those of ``ready`` among them, that starts one in this step, the most urgent first."""
        due = self._running.take_page_due(step_id, ready)
        if not due:
            return []
        self.kv.cache_all_pages(due)
        pages = self.kv.append_pages(due)
        if pages is None:
            due, pages = grow_in_turn(due, self.kv, self._running, self._preempt)
        self._running.note_next_pages(due, step_id)
        return [(request.slot, len(request.pages) - 1, page) for request, page in zip(due, pages)]

    def _num_known_tokens(self, request: Request) -> int:
        return len(request.token_ids)

    def commit(self, result: StepResult) -> Committed:
        """Take in the results of the oldest launched step: append tokens, end requests, free what they held."""
        step = self._launched.popleft()
        assert step.step_id == result.step_id, (step.step_id, result.step_id)
        samplers = [request for request, row in step.prefills if row.samples]
        requests = step.decodes.requests + samplers if samplers else step.decodes.requests
        token_ids = result.token_ids
        assert len(token_ids) == len(requests), (len(token_ids), len(requests))
        committed, bad = Committed(), set[int]()
        for index, entries in result.prompt_logprobs.items():  # before anybody ends by a token
            request, row = step.prefills[index]
            if not step.counts_for(request):
                continue
            if is_finite(entries):
                committed.prompt_logprobs.append((request, row.start + 1, entries))
            else:
                request.error = ERRORS[TOKEN_NOT_FINITE]
                bad.update(self._discard(request))
                self._end(request, "error")
                committed.finished.append(request)
        committed.prefilled = [request for request in samplers if step.counts_for(request)]
        is_plain = (
            step.num_departures == self._running.num_departures
            and not step.constrained
            and self._running.num_watched == 0
            and self._running.stop_token_ids.isdisjoint(token_ids)
            and (not token_ids or min(token_ids) >= 0)
        )
        if is_plain:
            lists = step.decodes.token_lists
            token_lists = lists + [request.token_ids for request in samplers] if samplers else lists
            deque(map(list.append, token_lists, token_ids), maxlen=0)
            for request in samplers:
                request.is_sound = True
            committed.requests, committed.token_ids = requests, token_ids
            committed.logprobs = dict(result.logprobs)
        else:
            bad |= commit_each(step, requests, result, committed, self._end, self._discard)
            if bad:
                restart_readers(bad, self.kv, self._running, self._preempt)
        for request in step.last:
            if step.counts_for(request):
                self._end(request, "length")
                committed.finished.append(request)
        return committed

    def _discard(self, request: Request) -> list[int]:
        return self.kv.discard(request, self._num_good_tokens(request))

    def fail_running(self, message: str, or_first: bool = False) -> Committed:
        """A step broke, or a change of the books was cut short, wherever it was: end every running request with an error.

        What waits goes on waiting. Launched steps are forgotten, and so is all that was noted of pages and slots: it may be half done, and
        the step may have written anywhere. May be called again if it is cut short itself. ``or_first``: if nobody runs, the first of those
        that wait ends instead.
        """
        waiting, failed = restart(self._requests.values(), message, or_first)
        self._launched.clear()
        self.kv.reset()
        self._running = RunningSet(self._max_num_seqs, self.kv.page_size)
        self._requests, self._waiting = {request.request_id: request for request in waiting.requests()}, waiting
        return Committed(finished=failed, failure=message)

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        self._num_preemptions += 1
        request.num_preemptions += 1
        request.num_computed_tokens = 0
        request.status = RequestStatus.WAITING
        self._waiting.push(request)

    def _end(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        if request.status is RequestStatus.RUNNING:
            self._leave(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason, request.stop_reason = reason, stop_reason
        del self._requests[request.request_id]

    def _num_good_tokens(self, request: Request) -> int:
        """Leading tokens of ``request`` whose keys and values are known to be good: those that its last token came out of."""
        return self._num_known_tokens(request) - 1 if request.is_sound else 0

    def _leave(self, request: Request) -> None:
        """Give back pages and slot. Steps in flight may still write to them: later steps run after those."""
        if request.pages:
            num_good = self._num_good_tokens(request)
            self.kv.cache_pages(request, num_good)
            self.kv.free(request, num_good)
        self._running.leave(request)
