"""The part of a step that computes prompts: who is let in, and how many tokens of each prompt the budget pays for."""

from __future__ import annotations

from collections.abc import Callable

from nemo_engine.scheduler.kv_manager import KVManager
from nemo_engine.scheduler.planned_step import PlannedStep
from nemo_engine.scheduler.request import Request
from nemo_engine.scheduler.running import URGENCY, RunningSet
from nemo_engine.scheduler.waiting import WaitingQueue
from nemo_engine.step import PrefillRow


def plan_prompts(
    step: PlannedStep,
    kv: KVManager,
    running: RunningSet,
    waiting: WaitingQueue,
    clock: Callable[[], float],
    may_admit: bool,
) -> None:
    """Spend the budget on prompts, the most urgent first, whether they are under way or yet to be let in."""
    for request in running.prefilling[:]:
        if may_admit and waiting:
            may_admit = _admit(step, kv, running, waiting, clock, URGENCY(request))
        if step.budget > 0:
            _prefill(request, step, kv, running)
    if may_admit and waiting:
        _admit(step, kv, running, waiting, clock, None)


def _admit(
    step: PlannedStep,
    kv: KVManager,
    running: RunningSet,
    waiting: WaitingQueue,
    clock: Callable[[], float],
    before: tuple[int, int] | None,
) -> bool:
    """Let waiting requests in, in order, as long as slots, pages and budget last: all, or those more urgent than ``before``.

    Returns whether the first of those that are left may be tried again in this step.
    """
    while waiting and running.has_free_slot and step.budget > 0:
        request = waiting.first()
        if before is not None and URGENCY(request) > before:
            return True
        if not kv.admit(request):
            return False
        waiting.pop()
        if request.scheduled_ts is None:
            request.scheduled_ts = clock()
            request.num_cached_tokens = request.num_computed_tokens
        running.enter(request, step.step_id)
        step.admitted.append((request, request.num_computed_tokens))
        _prefill(request, step, kv, running)
    return False


def _prefill(request: Request, step: PlannedStep, kv: KVManager, running: RunningSet) -> None:
    """Plan the next chunk of ``request``, as far as the budget goes."""
    start = request.num_computed_tokens
    count = min(step.budget, len(request.token_ids) - start)
    end = request.num_computed_tokens = start + count
    step.budget -= count
    kv.cache_pages(request, end)
    is_complete = end == len(request.token_ids)
    step.prefills.append((request, PrefillRow(request.slot, start, count, is_complete)))
    if is_complete:
        if request.grammar is not None:
            step.constrained.append(request)
        if running.end_prefill(request, step.step_id):
            step.last.append(request)
