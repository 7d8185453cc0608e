"""The real scheduler on a virtual clock. It decides as ever; what is added here is what a simulation wants to know.

``SteadyRun`` passes over steps in which requests decode and start pages and nothing else happens: it leaves requests
and pages as the scheduler would have left them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from nemo_engine.scheduler import Request, Scheduler
from nemo_engine.scheduler.kv_manager import KVManager
from nemo_engine.step import StepPlan

ANSWER = 0  # the id of every generated token


class QuickKVManager(KVManager):
    """Knows pages by Python's hash of their tokens in place of a cryptographic one."""

    def page_hash(self, request: Request, index: int) -> Any:
        """As there. Many pages are one token over and over, which then stands for all."""
        parent = request.page_hashes[index - 1] if index else 0
        if index * self.page_size >= request.num_prompt_tokens:
            return hash((parent, ANSWER))
        page = request.token_ids[index * self.page_size : (index + 1) * self.page_size]
        return hash((parent, page[0]) if page.count(page[0]) == self.page_size else (parent, *page))


@dataclass(eq=False, repr=False, slots=True)
class SimulatedRequest(Request):
    """A request with the times at which things happened to it, in seconds of the virtual clock."""

    arrived_s: float = field(default=0.0, kw_only=True)
    origin: Any = field(default=None, kw_only=True)  # what it was made from, for whoever made it
    first_token_s: float | None = field(init=False, default=None)
    last_token_s: float | None = field(init=False, default=None)  # set where it is preempted or ends
    num_computed_before: int = field(init=False, default=0)  # the most that it had computed when it was preempted
    num_passed_over: int = field(init=False, default=0)  # steps of the present ``SteadyRun`` that it has taken


class VirtualScheduler(Scheduler):
    """A scheduler of ``SimulatedRequest``, which end by their ``max_tokens`` only."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.kv = QuickKVManager(options["num_pages"], options["page_size"], options["enable_prefix_caching"])
        self.step_context = 0  # keys to which the decode rows of the last plan attend
        self.num_recomputed_tokens = 0  # in prefills, of what had been computed before a preemption
        self.last_commit_s = 0.0  # set by whoever keeps the clock

    def schedule(self) -> StepPlan | None:
        """As there."""
        plan = super().schedule()
        if plan is None:
            return None
        slots = set(plan.decode_slots)
        self.step_context = sum([request.num_computed_tokens for request in self.running() if request.slot in slots])
        if self.num_preemptions and plan.prefills:
            requests = {request.slot: request for request in self.running()}
            for row in plan.prefills:
                request = requests[row.slot]
                assert isinstance(request, SimulatedRequest)
                end = min(row.start + row.num_tokens, request.num_computed_before)
                self.num_recomputed_tokens += max(0, end - row.start)
        return plan

    def preempt(self, request: Request) -> None:
        """As there."""
        assert isinstance(request, SimulatedRequest)
        request.num_computed_before = max(request.num_computed_before, request.num_computed_tokens)
        if request.is_sound:  # it has had a token since it was let in, the last one when all had theirs
            request.last_token_s = self.last_commit_s
        super().preempt(request)


class SteadyRun:
    """The coming steps in which the requests that run decode, start pages, and do nothing else.

    ``max_steps``: 0 if the next step is none of these. Steps are numbered from 0.
    """

    def __init__(self, scheduler: VirtualScheduler) -> None:
        self.requests: list[Any] = scheduler.running()  # SimulatedRequest; those that prefill come last
        self.max_steps = 0
        self._kv = scheduler.kv
        self._due: dict[int, list[Any]] = {}  # the requests that start a page, by step
        self._grown: list[Any] = []  # those that have started one
        if not self.requests or not self.requests[-1].is_sound or not all([r.is_sound for r in self.requests]):
            return  # a prompt is not computed yet, or its first token not committed
        # The last token of a request comes in none of these steps.
        self.max_steps = max(0, min([r.max_total_tokens - r.num_computed_tokens for r in self.requests]) - 2)
        if self.max_steps:
            steps = [request.compute_limit - request.num_computed_tokens for request in self.requests]
            for step, request in zip(steps, self.requests):
                if step < self.max_steps:
                    self._due.setdefault(step, []).append(request)

    @property
    def context(self) -> int:
        """Keys to which the rows of step 0 attend."""
        computed: list[int] = [request.num_computed_tokens for request in self.requests]
        return sum(computed) + len(computed)

    def starts_pages(self, step: int) -> bool:
        """Whether a request starts a page in ``step``."""
        return step in self._due

    def grow(self, step: int) -> bool:
        """Give pages to those that start one in ``step``; False, and nothing is done, if there are too few."""
        requests = self._due[step]
        if len(requests) > self._kv.pool.num_free:
            return False
        requests.sort(key=attrgetter("urgency"))
        self._decode(requests, step)
        for request in requests:
            request.num_passed_over = step
            self._kv.cache_pages(request, request.num_computed_tokens)
        self._kv.append_pages(requests)
        self._grown += requests
        for request in requests:
            self._due.setdefault(step + request.compute_limit - request.num_computed_tokens, []).append(request)
        return True

    def end(self, num_steps: int) -> None:
        """Leave the requests as ``num_steps`` steps would have left them."""
        self._decode(self.requests, num_steps)
        for request in self._grown:
            request.num_passed_over = 0

    @staticmethod
    def _decode(requests: list[Any], num_steps: int) -> None:
        """Bring ``requests`` to where they are after ``num_steps`` of these steps."""
        answers = [ANSWER] * num_steps
        for request in requests:
            count = num_steps
            if request.num_passed_over:
                count -= request.num_passed_over
            request.num_computed_tokens += count
            request.token_ids += answers if count == num_steps else answers[:count]
