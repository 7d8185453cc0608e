"""What must hold of a scheduler and its pages between steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nemo_engine.scheduler import RequestStatus, Scheduler
from nemo_engine.scheduler.page_pool import PagePool


def check(scheduler: Scheduler) -> None:
    """Assert the invariants of pages, slots and lists. O(everything)."""
    running = scheduler.running.all()
    check_pages(scheduler.kv.pool, [request.pages for request in running])
    slots = [request.slot for request in running]
    assert sorted(slots + scheduler.running.free_slots) == list(range(1, scheduler.max_num_seqs + 1))
    for request in running:
        assert request.status is RequestStatus.RUNNING
        num_computed = min(request.num_computed_tokens, request.max_total_tokens - 1)  # without drafts past its end
        assert len(request.pages) * scheduler.kv.page_size >= request.compute_limit >= num_computed
        assert len(request.token_ids) <= request.max_total_tokens
    assert len(scheduler.requests) == len(running) + len(scheduler.waiting)


def check_pages(pool: PagePool, page_lists: Iterable[Sequence[int]]) -> None:
    """Assert that the books of ``pool`` balance, given the pages of every running request. O(pages)."""
    users = [0] * (pool.num_pages + 1)
    for pages in page_lists:
        assert len(set(pages)) == len(pages), "a request holds a page twice"
        for page in pages:
            assert 1 <= page <= pool.num_pages, page
            users[page] += 1
    assert users == pool._num_users, "user counts differ from the page tables"
    assert sorted(pool._free) == [page for page in range(1, pool.num_pages + 1) if users[page] == 0], "free pages"
    assert all(users[page] or not pool._in_doubt[page] for page in pool._page_of.values()), (
        "free, findable, and in doubt"
    )
    blank = [pool._hash_of[page] is None for page in pool._free]
    assert blank == sorted(blank, reverse=True), "a page with content would be handed out before one without"
    assert all(pool._hash_of[page] == page_hash for page_hash, page in pool._page_of.items()), "hash map"
    assert len(pool._page_of) == sum(page_hash is not None for page_hash in pool._hash_of), "hash map size"
