"""One simulated engine: the core's loop, with a cost model in the runner's place, and its measurements."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nemo_engine.planner.drafts import NO_DRAFTS, Acceptance
from nemo_engine.planner.roofline import StepCost
from nemo_engine.scheduler import Request, Speculation
from nemo_engine.simulator.scheduler import ANSWER, SimulatedRequest, SteadyRun, VirtualScheduler
from nemo_engine.simulator.statistics import Sketch, Timeline
from nemo_engine.step import TOKEN_NOT_DRAFTED, TOKEN_NOT_TAKEN, StepPlan, StepResult

_BELOW = 1 - 1e-6  # of a sum of costs, for its rounding
_TIMELINE = ("running", "waiting", "kv_used", "decode_rows")


@dataclass(frozen=True, slots=True)
class EngineShape:
    """The shape of a simulated engine: the scheduler's options, its pages, and the number of steps in flight; the
    ``widths`` of its wide steps, with ``num_drafts`` at most, of which as many are right as ``acceptance`` says.
    """

    num_pages: int
    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    enable_prefix_caching: bool
    pipeline_depth: int
    widths: tuple[int, ...] = ()
    num_drafts: int = 0
    acceptance: Acceptance = NO_DRAFTS

    def __post_init__(self) -> None:
        for name in ("num_pages", "page_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens must be at least max_num_seqs ({self.max_num_seqs}), got "
                f"{self.max_num_batched_tokens}"
            )
        if not 0 <= self.num_drafts < max((1, *self.widths)):
            raise ValueError(f"num_drafts must be from 0 to below the widest of {self.widths}, got {self.num_drafts}")
        if self.pipeline_depth not in (1, 2):
            raise ValueError(f"pipeline_depth must be 1 or 2, got {self.pipeline_depth}")


class Replica:
    """A scheduler and a clock. ``now`` is the time at which its host can plan next, and never goes back.

    ``interval``: seconds that a point of its timeline stands for. No skip of steps goes past the end of one, so long
    intervals cost less.
    """

    def __init__(
        self,
        shape: EngineShape,
        cost: StepCost,
        on_finish: Callable[[SimulatedRequest, float], None],
        interval: float = 1e-3,
    ) -> None:
        self.now = 0.0
        self.scheduler = VirtualScheduler(
            has_overlap=shape.pipeline_depth > 1,
            num_pages=shape.num_pages,
            page_size=shape.page_size,
            max_num_seqs=shape.max_num_seqs,
            max_num_batched_tokens=shape.max_num_batched_tokens,
            max_model_len=shape.max_model_len,
            enable_prefix_caching=shape.enable_prefix_caching,
            speculation=Speculation(shape.widths, shape.num_drafts),
            clock=lambda: self.now,
        )
        self._rng = random.Random(0)  # of drafts
        self.num_unfinished = 0
        self.num_steps = 0
        self.num_decode_tokens = 0
        self.num_prefill_tokens = 0
        self.busy_s = 0.0
        self.itl = Sketch()
        self.timeline = Timeline(_TIMELINE, interval)
        self._shape = shape
        self._cost = cost
        self._on_finish = on_finish
        self._device_free = 0.0
        self._in_flight: deque[tuple[float, StepPlan]] = deque()  # with the time at which it is done
        self._lines: dict[int, tuple[float, float, float]] = {}
        self._is_blocked = False  # the first waiting request found no room, and nothing has been freed since
        # Behind the scheduler's own queue, so that a long queue costs no token lists: (priority, order, makes the
        # request).
        self._held: list[tuple[int, int, Callable[[], SimulatedRequest]]] = []
        self._num_submitted = self._num_finished = 0
        self._urgency_inside = (-(1 << 62), 0)  # no request in the scheduler's queue is less urgent than this
        self._room = shape.max_num_seqs + 8  # as many as one step could admit

    def submit(self, arrived_s: float, priority: int, make: Callable[[], SimulatedRequest]) -> None:
        """Queue a request; ``make`` builds it when the scheduler gets to it."""
        if not self.num_unfinished and arrived_s > self.now:
            since = self.scheduler.last_commit_s
            self.timeline.add(since, arrived_s - since, (0, 0, 0, 0))
            self.now = self.scheduler.last_commit_s = arrived_s
        self.num_unfinished += 1
        self._num_submitted += 1
        key = (priority, self._num_submitted)
        if key > self._urgency_inside and (self._held or len(self.scheduler.waiting) >= self._room):
            heapq.heappush(self._held, (*key, make))
        else:
            self._enter(key, make)

    def _enter(self, key: tuple[int, int], make: Callable[[], SimulatedRequest]) -> None:
        self._urgency_inside = max(self._urgency_inside, key)
        self.scheduler.add(make())
        self._is_blocked = False

    def run_until(self, limit: float, max_ends: float = float("inf")) -> None:
        """Plan and commit steps while ``now`` is before ``limit``, until no request is left or ``max_ends`` requests
        have ended.
        """
        scheduler, in_flight, depth = self.scheduler, self._in_flight, self._shape.pipeline_depth
        stop = self._num_finished + max_ends
        while self.now < limit and self.num_unfinished and self._num_finished < stop:
            while self._held and len(scheduler.waiting) < self._room:
                priority, order, make = heapq.heappop(self._held)
                self._enter((priority, order), make)
            if (self._is_blocked or not scheduler.waiting) and self._jump(limit):
                continue
            if self._launch() and len(in_flight) < depth:
                continue
            assert in_flight, "requests wait, and nothing runs"
            self._commit(*in_flight.popleft())

    def _line(self, num_decodes: int) -> tuple[float, float, float]:
        """The cost of a step of decode rows: seconds, seconds per token of context, seconds of the host."""
        line = self._lines.get(num_decodes)
        if line is None:
            line = self._lines[num_decodes] = (
                *self._cost.decode_line(num_decodes), self._cost.host_seconds(num_decodes)
            )  # fmt: skip
        return line

    def _launch(self) -> bool:
        """Plan a step and note when it will end; False if there is nothing to plan."""
        scheduler = self.scheduler
        num_preemptions = scheduler.num_preemptions
        plan = scheduler.schedule()
        if plan is None:
            return False
        num_decodes = len(plan.decode_slots)
        if plan.prefills or plan.width > 1:
            chunks = [(row.start, row.num_tokens) for row in plan.prefills]
            seconds = self._cost.step_seconds(num_decodes, scheduler.step_context, chunks, plan.width)
            host = self._cost.host_seconds(num_decodes + len(chunks))
            self.num_prefill_tokens += sum([count for _, count in chunks])
            self._is_blocked = False
        else:
            base, slope, host = self._line(num_decodes)
            seconds = base + slope * scheduler.step_context
            self._is_blocked = len(scheduler.waiting) > 0 and scheduler.num_preemptions == num_preemptions
        self.now += host
        start = max(self._device_free, self.now)
        self._device_free = start + seconds
        self.busy_s += seconds
        self._in_flight.append((self._device_free, plan))
        return True

    def _commit(self, end: float, plan: StepPlan) -> None:
        """Commit a step, which ended at ``end``."""
        scheduler = self.scheduler
        now = max(self.now, end)
        before = scheduler.last_commit_s
        numbers = self._numbers()  # before requests leave: they hold for the time until now
        self.now = now
        tokens = _decoded(scheduler, plan, self._shape, self._rng) + [ANSWER] * sum(
            [row.samples for row in plan.prefills]
        )
        committed = scheduler.commit(StepResult(plan.step_id, tokens))
        num_decodes = len({*committed.requests}) - len(committed.prefilled)
        if num_decodes:  # a row's tokens come at once: a stream sees one gap
            self.itl.add(now - before, num_decodes)
        self.num_steps += 1
        self.num_decode_tokens += len(committed.requests) - len(committed.prefilled)
        self.timeline.add(before, now - before, (*numbers, num_decodes))
        scheduler.last_commit_s = now
        for request in committed.prefilled:
            assert isinstance(request, SimulatedRequest)
            if request.first_token_s is None:
                request.first_token_s = now
            elif request.last_token_s is not None:
                self.itl.add(now - request.last_token_s)
        for request in committed.finished:
            self._finish(request, now)

    def _finish(self, request: Request, now: float) -> None:
        assert isinstance(request, SimulatedRequest)
        request.last_token_s = now
        self.num_unfinished -= 1
        self._num_finished += 1
        self._is_blocked = False
        self._on_finish(request, now)

    def _numbers(self) -> tuple[int, int, float]:
        """(requests that run, requests that wait, part of the pages in use)."""
        scheduler = self.scheduler
        waiting = len(scheduler.waiting) + len(self._held)
        return len(scheduler.running), waiting, self._num_used_pages() / self._shape.num_pages

    def _num_used_pages(self) -> int:
        return self._shape.num_pages - self.scheduler.kv.pool.num_free

    def _jump(self, limit: float) -> bool:
        """Go through the coming steps of a ``SteadyRun`` without planning any; False if there is none.

        It goes up to ``limit`` at most, to the end of an interval of the timeline, and until requests end.
        """
        scheduler, running = self.scheduler, self.scheduler.running
        may_differ = self._shape.widths or running.prefilling or any([plan.prefills for _, plan in self._in_flight])
        if may_differ or not running.decoding or len(self._in_flight) != self._shape.pipeline_depth - 1:
            return False
        # A request may wait for a page that these steps fill.
        may_grow = not scheduler.waiting or len(running) == self._shape.max_num_seqs
        run = SteadyRun(scheduler)
        start = scheduler.last_commit_s
        limit = min(limit, self.timeline.end_of_interval(start))
        if self.now >= limit or (run.next_due == 0 and not run.meet(0, may_grow)):
            return False
        now, before, free = self.now, start, self._device_free
        num_decodes, context = len(run.requests), run.context
        base, slope, host = self._line(num_decodes)
        pending = self._in_flight[0][0] if self._in_flight else None
        busy = used_s = 0.0
        used = self._num_used_pages()
        gaps: list[float] = []
        next_due = run.next_due
        while now < limit and not (run.ending and gaps):
            if len(gaps) == next_due:
                if not run.meet(next_due, may_grow):
                    break
                used = self._num_used_pages()
                next_due = run.next_due
            if run.ending and pending is not None:  # this step is already without them
                base, slope, host = self._line(num_decodes - len(run.ending))
                context -= sum([request.max_total_tokens for request in run.ending])
            now += host
            seconds = base + slope * context
            busy += seconds
            free = (free if free > now else now) + seconds
            context += num_decodes
            if pending is None:
                end = free
            else:
                end, pending = pending, free
            if end > now:
                now = end
            gap = now - before
            gaps.append(gap)
            used_s += gap * used
            before = now
        self.itl.add_all(gaps, num_decodes)
        running_now, waiting, _ = self._numbers()
        mean_used = used_s / (now - start) / self._shape.num_pages if now > start else 0.0
        self.timeline.add(start, now - start, (running_now, waiting, mean_used, num_decodes))
        if pending is not None:
            self._in_flight[0] = (pending, self._in_flight[0][1])
        self.now = scheduler.last_commit_s = now
        self._device_free = free
        self.busy_s += busy
        self.num_steps += len(gaps)
        self.num_decode_tokens += len(gaps) * num_decodes
        run.end(len(gaps))
        for request in run.ending:
            self._finish(request, now)
        return True

    def earliest_end(self) -> float:
        """A time before which none of the requests ends, as they are; infinity if there are none.

        A request ends with its last token, and gets at most as many in a step as that is wide. Until the first one
        ends, a step costs at least what it costs now, unless one that runs is preempted: then no less than a step of a
        single row.
        """
        if not self.num_unfinished:
            return float("inf")
        scheduler, running = self.scheduler, self.scheduler.running
        requests = running.all()
        if self._held or not requests:
            return self.now
        num_steps = min([request.max_total_tokens - len(request.token_ids) for request in requests]) - 1
        pages = len(requests) * (num_steps // self._shape.page_size + 2)
        if scheduler.waiting or running.prefilling or pages > scheduler.kv.pool.num_free:
            num_steps = min([num_steps, *[r.max_total_tokens - len(r.token_ids) - 1 for r in scheduler.waiting]])
            seconds = self._line(1)[0]
        else:
            base, slope, _ = self._line(len(requests))
            seconds = base + slope * sum([request.num_computed_tokens for request in requests])
        num_steps //= max((1, *self._shape.widths))
        return self.now + num_steps * seconds * _BELOW  # the first of them may be over in no time: it is in flight


def _decoded(scheduler: VirtualScheduler, plan: StepPlan, shape: EngineShape, rng: random.Random) -> list[int]:
    """What a device would have made of the decode rows of the step that is committed next."""
    if plan.width == 1:
        return [ANSWER] * len(plan.decode_slots)
    tokens: list[int] = []
    for request in scheduler.next_decodes():
        room = request.max_total_tokens - 1 - len(request.token_ids)
        num_drafts = max(0, min(shape.num_drafts, plan.width - 1, room))
        num_right = min(num_drafts, shape.acceptance.num_right(rng.random()))
        tokens += [ANSWER] * (1 + num_right) + [TOKEN_NOT_TAKEN] * (num_drafts - num_right)
        tokens += [TOKEN_NOT_DRAFTED] * (plan.width - 1 - num_drafts)
    return tokens
