"""The real scheduler on a virtual clock. Its decisions are the same; this adds what a simulation has to know.

``SteadyRun`` passes over steps in which requests decode and start pages and nothing else happens: it leaves requests
and pages as the scheduler would have left them. ``Calendar`` says how far it may go without a look at every request.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Any

from nemo_engine.scheduler import Request, RequestStatus, Scheduler, StepOutput
from nemo_engine.scheduler.kv_manager import KVManager
from nemo_engine.scheduler.request import by_urgency
from nemo_engine.step import StepPlan, StepResult

ANSWER = 0  # every generated token has this id


class QuickKVManager(KVManager):
    """A ``KVManager`` that identifies pages by Python's hash of their tokens in place of a cryptographic one."""

    def extend_hashes(self, request: Request, num_pages: int) -> None:
        """See ``KVManager``. Many pages hold one token over and over, so that it alone is hashed."""
        hashes: list[Any] = request.page_hashes
        size, tokens, num_prompt_tokens = self.page_size, request.token_ids, request.num_prompt_tokens
        for start in range(len(hashes) * size, num_pages * size, size):
            parent = hashes[-1] if hashes else 0
            if start >= num_prompt_tokens:
                hashes.append(hash((parent, ANSWER)))
                continue
            page = tokens[start : start + size]
            hashes.append(hash((parent, page[0]) if page.count(page[0]) == size else (parent, *page)))


@dataclass(eq=False, repr=False, slots=True)
class SimulatedRequest(Request):
    """A request with the times at which things happened to it, in seconds of the virtual clock."""

    arrived_s: float = field(default=0.0, kw_only=True)
    origin: Any = field(default=None, kw_only=True)  # the object that it was made from; not looked at here
    first_token_s: float | None = field(init=False, default=None)
    last_token_s: float | None = field(init=False, default=None)  # set where it is preempted or ends
    num_computed_before: int = field(init=False, default=0)  # the most that it had computed when it was preempted
    num_passed_over: int = field(init=False, default=0)  # steps of the present ``SteadyRun`` that it has taken


class Calendar:
    """The steps in which decoding requests are due: in such a step a request starts a page or ends.

    Steps are counted from the first. ``has_overlap``: a step stays in flight while the next one is planned. So a
    request is due to end in the step after its last one; without overlap, in its last one.
    """

    def __init__(self, has_overlap: bool) -> None:
        self.has_overlap = has_overlap
        self.num_steps = 0  # planned or passed over
        # (step, arrival, preemptions, request). An entry that is no longer true is dropped when it becomes the first.
        self._entries: list[tuple[int, int, int, SimulatedRequest]] = []

    def add(self, request: SimulatedRequest) -> None:
        """Enter ``request``, which decodes from now on or is due at another step than before."""
        heapq.heappush(self._entries, (self._due(request), request.arrival, request.num_preemptions, request))

    def next_due(self) -> int:
        """The first step at which a request is due; if there is none, a step that never comes."""
        while self._entries:
            step, _, num_preemptions, request = self._entries[0]
            decodes = request.status is RequestStatus.RUNNING and request.num_preemptions == num_preemptions
            if decodes and self._due(request) == step:
                return step
            heapq.heappop(self._entries)
            if decodes:  # it has started a page in a step that was planned
                self.add(request)
        return 1 << 62

    def take(self, step: int) -> list[SimulatedRequest]:
        """Take out the requests that are due at ``step``; those that stay are to be added again."""
        requests = []
        while self.next_due() == step:
            requests.append(heapq.heappop(self._entries)[-1])
        return requests

    def _due(self, request: SimulatedRequest) -> int:
        due = request.compute_limit - request.num_computed_tokens + request.num_passed_over + self.num_steps
        # The last token's key and value are never computed.
        return due if self.has_overlap or request.compute_limit < request.max_total_tokens - 1 else due - 1


class VirtualScheduler(Scheduler):
    """A scheduler of ``SimulatedRequest``s, which end at their ``max_tokens`` only.

    ``has_overlap``: whether a step stays in flight while the next one is planned.
    """

    def __init__(self, has_overlap: bool, **options: Any) -> None:
        super().__init__(**options | {"num_pages": 1})  # of a manager that gives way to this one
        self.kv = QuickKVManager(options["num_pages"], options["page_size"], options["enable_prefix_caching"])
        self.calendar = Calendar(has_overlap)
        self.step_context = 0  # keys to which the decode rows of the last plan attend
        self.num_recomputed_tokens = 0  # tokens of prefills that had been computed before a preemption
        self.last_commit_s = 0.0  # ``Replica`` sets it

    def schedule(self) -> StepPlan | None:
        """As there."""
        plan = super().schedule()
        if plan is None:
            return None
        self.calendar.num_steps += 1
        # Those that decode for the first time in the next step come last.
        decoding = self.running.decoding[: len(plan.decode_slots)]
        self.step_context = sum([request.num_computed_tokens for request in decoding])
        if self.num_preemptions and plan.prefills:
            requests = {request.slot: request for request in self.running.all()}
            for row in plan.prefills:
                request = requests[row.slot]
                assert isinstance(request, SimulatedRequest)
                end = min(row.start + row.num_tokens, request.num_computed_before)
                self.num_recomputed_tokens += max(0, end - row.start)
        return plan

    def next_decodes(self) -> list[Request]:
        """The requests that decode in the step that is committed next."""
        return self._in_flight[0].decodes

    def commit(self, result: StepResult) -> StepOutput:
        """As there."""
        committed = super().commit(result)
        for request in committed.prefilled:
            assert isinstance(request, SimulatedRequest)
            self.calendar.add(request)
        return committed

    def preempt(self, request: Request) -> None:
        """As there."""
        assert isinstance(request, SimulatedRequest)
        request.num_computed_before = max(request.num_computed_before, request.num_computed_tokens)
        if request.is_sound:  # it got a token since its admission, the last one in the last commit, as all did
            request.last_token_s = self.last_commit_s
        super().preempt(request)


class SteadyRun:
    """The coming steps in which the running requests decode and start pages, up to a step after which one ends.

    May be made once all of them have got a token since their admission. Steps are numbered from 0.
    """

    def __init__(self, scheduler: VirtualScheduler) -> None:
        self.requests: list[Any] = scheduler.running.decoding[:]  # SimulatedRequest
        self.ending: list[SimulatedRequest] = []  # after the last of these steps
        self._scheduler = scheduler
        self._calendar = scheduler.calendar
        self._first = scheduler.calendar.num_steps
        self._grown: list[SimulatedRequest] = []  # those that have started a page

    @property
    def context(self) -> int:
        """Keys to which the rows of step 0 attend."""
        computed: list[int] = [request.num_computed_tokens for request in self.requests]
        return sum(computed) + len(computed)

    @property
    def next_due(self) -> int:
        """The first step at which a request is due."""
        return self._calendar.next_due() - self._first

    def meet(self, step: int, may_grow: bool) -> bool:
        """Give pages to the requests that start one in ``step``, and set ``ending``.

        Returns False and does nothing if pages are needed and none is free or ``may_grow`` is false, or if no request
        is left.
        """
        due = self._calendar.take(self._first + step)
        growing = [r for r in due if r.compute_limit < r.max_total_tokens - 1]
        # Without overlap, a request may start a page in its last step.
        last = 1 if self._calendar.has_overlap else 2
        ending = [r for r in due if r.compute_limit >= r.max_total_tokens - last]
        kv = self._scheduler.kv
        if (growing and not may_grow) or len(growing) > kv.pool.num_free or len(ending) == len(self.requests):
            for request in due:
                self._calendar.add(request)
            return False
        growing.sort(key=by_urgency)
        self._decode(growing, step)
        for request in growing:
            request.num_passed_over = step
            kv.cache_pages(request, request.num_computed_tokens)
        kv.append_pages(growing)
        for request in growing:
            if request not in ending:
                self._calendar.add(request)
        self._grown += growing
        self.ending = sorted(ending, key=self.requests.index)
        return True

    def end(self, num_steps: int) -> None:
        """Leave everything as ``num_steps`` steps would have left it, all but the one in flight committed."""
        self._decode(self.requests, num_steps)
        self._calendar.num_steps += num_steps
        for request in self._grown:
            request.num_passed_over = 0
        for request in self.ending:
            self._scheduler.finish(request.request_id, "length")

    @staticmethod
    def _decode(requests: list[Any], num_steps: int) -> None:
        """Bring ``requests`` to their state after ``num_steps`` of these steps."""
        answers = [ANSWER] * num_steps
        for request in requests:
            if request.num_passed_over:
                count = num_steps - request.num_passed_over
                request.num_computed_tokens += count
                request.token_ids += answers[:count]
            else:
                request.num_computed_tokens += num_steps
                request.token_ids += answers
