"""The real scheduler on a virtual clock: its decisions, page for page, without the tokens that nobody looks at.

``Scheduler`` decides; nothing of that is written again here. What differs is the bookkeeping around it, for speed:

* A decoding request is given its tokens when somebody will look at them (it is preempted), not in every step.
* The sum of all contexts is kept as requests come and go.
* Pages are known by a quicker hash, for which a page of equal tokens need not be looked at token by token.
* A step is kept as it was decided; no plan for a device is made of it.
* Steps in which requests decode and start pages, and nothing else is due, can be passed over: the pages are given as ever, by ``_grow``.

So this class reads and writes what ``Scheduler`` and ``RunningSet`` keep to themselves; a change there is noticed by
``tests/simulator/test_scheduler.py``, which holds every decision against the plain scheduler's.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from nemo_engine.outputs import CacheReport
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.scheduler import Request, Scheduler
from nemo_engine.scheduler.kv_manager import KVManager
from nemo_engine.scheduler.planned_step import PlannedStep

ANSWER = 0  # the id of every generated token
_NO_REPORT = CacheReport(1, 0, 0, None)
_NEVER = -(1 << 60)  # the offset of a request that does not decode


class _QuickKVManager(KVManager):
    """Knows pages by Python's hash of their tokens in place of a cryptographic one."""

    def _extend_hashes(self, request: Request, num_pages: int) -> None:
        assert isinstance(request, SimulatedRequest)
        hashes: list[Any] = request.page_hashes
        size, tokens, num_prompt = self.page_size, request.token_ids, request.num_prompt_tokens
        parent = hashes[-1] if hashes else 0
        for start in range(len(hashes) * size, num_pages * size, size):
            # Of a page of equal tokens, the token stands for all.
            if start >= num_prompt:
                parent = hash((parent, ANSWER))
            elif start >= request.num_varied and start + size <= num_prompt:
                parent = hash((parent, tokens[start]))
            else:
                page = tokens[start : start + size]
                page += [ANSWER] * (size - len(page))
                is_uniform = page.count(page[0]) == size
                parent = hash((parent, page[0]) if is_uniform else (parent, *page))
            hashes.append(parent)

    def cache_all_pages(self, requests: Sequence[Request]) -> None:
        # Only what was generated last may be unknown, so all that the pages hold is known, in or out of ``token_ids``.
        if not self.enable_prefix_caching:
            return
        pages, page_hashes = [], []
        for request in requests:
            first, known = request.num_hashed_pages, request.page_hashes
            end = len(request.pages)
            if len(known) == end - 1 and first * self.page_size >= request.num_prompt_tokens:
                known.append(hash((known[-1], ANSWER)))  # type: ignore[arg-type]
            elif len(known) < end:
                self._extend_hashes(request, end)
            pages += request.pages[first:]
            page_hashes += known[first:end]
            request.num_hashed_pages = end
        self.pool.remember(pages, page_hashes)
        self.pool.doubt(pages)

    def _report(self, request: Request, num_matched: int, reads_cache: bool) -> CacheReport:
        return _NO_REPORT  # nobody asks


class SimulatedRequest(Request):
    """A request with the times at which things happened to it, in seconds of the virtual clock.

    num_varied: leading tokens of the prompt that may differ; all that follow are equal. ``token_ids`` lacks generated tokens, all of
    which are ``ANSWER``.
    """

    __slots__ = ("arrived_s", "first_token_s", "last_token_s", "num_computed_before", "num_varied", "origin")

    def __init__(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        priority: int,
        arrived_s: float,
        num_varied: int | None = None,
    ) -> None:
        super().__init__(request_id, token_ids, params, priority=priority)
        self.decode_offset = _NEVER
        self.num_varied = self.num_prompt_tokens if num_varied is None else num_varied
        self.num_computed_before = 0  # the most that it had computed when it was preempted
        self.arrived_s = arrived_s
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.origin: object = None


class VirtualScheduler(Scheduler):
    """Requests end by their ``max_tokens`` only, and nothing but ``commit_oldest`` commits."""

    context = 0  # keys that the decoding requests attend to in the next step
    step_context = 0  # the same, of the step that was planned last
    committed_step = 0
    num_recomputed_tokens = 0  # in prefills, of what had been computed before a preemption
    last_commit_s = 0.0  # set by whoever keeps the clock

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.kv = _QuickKVManager(options["num_pages"], options["page_size"], options["enable_prefix_caching"])
        self._in_vain: dict[int, int] = {}  # decode rows of requests that were preempted since, by launched step

    @property
    def num_waiting(self) -> int:
        """Requests that wait here."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._running)

    @property
    def num_decoding(self) -> int:
        """Requests that take part in every step."""
        return len(self._running._decoding)

    @property
    def has_free_slot(self) -> bool:
        """Whether a request that waits could enter if there are pages for it."""
        return self._running.has_free_slot

    @property
    def num_used_pages(self) -> int:
        """Pages that requests hold."""
        return self.kv.pool.num_pages - self.kv.pool.num_free

    @property
    def num_preemptions(self) -> int:
        """So far."""
        return self._num_preemptions

    def plan_step(self) -> PlannedStep | None:
        """As ``schedule``, without the plan for the device half."""
        step = self._plan_step()
        if step is not None:
            self.step_context = self.context
            self.context += len(step.decodes.requests)
            for request in step.last:
                if request.decode_offset != _NEVER:
                    self.context -= request.num_computed_tokens + 1
            for request, row in step.prefills:
                if row.samples and request.decode_offset != _NEVER:
                    self.context += row.start + row.num_tokens + 1
                if request.num_preemptions:
                    assert isinstance(request, SimulatedRequest)
                    again = min(row.start + row.num_tokens, request.num_computed_before) - row.start
                    self.num_recomputed_tokens += max(0, again)
        return step

    def commit_oldest(self) -> tuple[list[Request], list[Request], int]:
        """The oldest launched step is done: (requests that it gave a token after a prefill, requests that it ended, decode rows in vain)."""
        step = self._launched.popleft()
        self.committed_step = step.step_id
        prefilled = []
        for request, row in step.prefills:
            if row.samples and step.counts_for(request):
                request.token_ids.append(ANSWER)
                request.is_sound = True
                prefilled.append(request)
        finished = [request for request in step.last if step.counts_for(request)]
        for request in finished:
            self._end(request, "length")
        return prefilled, finished, self._in_vain.pop(step.step_id, 0)

    @property
    def is_steady(self) -> bool:
        """Whether the next step repeats the one before unless something is due in it: nobody prefills, leaves or has just begun to decode."""
        running = self._running
        if running.prefilling or not running._decoding:
            return False
        return not any(step.prefills or step.last for step in self._launched)

    @property
    def next_step(self) -> int:
        """The number of the step that is planned next."""
        return self._step_id + 1

    @property
    def calendars(self) -> tuple[Container[int], Container[int]]:
        """The steps in which a request starts a page, and those that are the last of one."""
        return self._running._page_due, self._running._last_due

    def skip(self, count: int) -> None:
        """Plan and commit ``count`` steps in which nothing is due that is not done already; as many stay in flight as were."""
        self._step_id += count
        self.committed_step += count
        self.context += count * len(self._running._decoding)
        for step in self._launched:
            step.step_id += count

    def grow(self) -> bool:
        """Give a page to every request that starts one in the next step; False, and nothing is done, if there may be too few."""
        step_id = self._step_id + 1
        if len(self._running._page_due.get(step_id, ())) > self.kv.pool.num_free:
            return False
        self._grow(step_id, [])
        return True

    def _settle(self, request: Request) -> None:
        """Give ``request`` the tokens that committed decode steps made for it."""
        missing = self.committed_step + request.decode_offset + 2 - len(request.token_ids)
        if missing > 0:
            request.token_ids += [ANSWER] * missing

    def _num_known_tokens(self, request: Request) -> int:
        if request.decode_offset == _NEVER:
            return len(request.token_ids)
        known = self.committed_step + request.decode_offset + 2
        return known if known > len(request.token_ids) else len(request.token_ids)

    def _preempt(self, request: Request) -> None:
        assert isinstance(request, SimulatedRequest)
        request.num_computed_before = max(request.num_computed_before, self.num_computed_tokens(request))
        if self._running.is_decoding(request):
            self._settle(request)
            self.context -= self._step_id + request.decode_offset + 2
            for step in self._launched:
                if request in step.decodes.requests:
                    self._in_vain[step.step_id] = self._in_vain.get(step.step_id, 0) + 1
            is_prefill_out = all(request is not other for step in self._launched for other, _ in step.prefills)
            if is_prefill_out:
                request.last_token_s = self.last_commit_s
        super()._preempt(request)

    def _leave(self, request: Request) -> None:
        super()._leave(request)
        request.decode_offset = _NEVER
