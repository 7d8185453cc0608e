"""What must hold of a scheduler between steps; for tests."""

from __future__ import annotations

from nemo_engine.scheduler.scheduler import Scheduler


def check(scheduler: Scheduler) -> None:
    """Assert the invariants of pages, slots and lists. O(everything)."""
    running = scheduler._running.requests()
    scheduler._running.check()
    scheduler.kv.pool.check(request.pages for request in running)
    for request in running:
        assert len(request.pages) * scheduler.kv.page_size >= scheduler.num_computed_tokens(request)
        assert len(request.token_ids) <= request.max_total_tokens
    assert len(scheduler._requests) == len(running) + len(scheduler._waiting)
