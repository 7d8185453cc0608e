"""Whom to preempt: who is least urgent where pages are missing, and who has read what turned out to be bad."""

from __future__ import annotations

from collections.abc import Callable

from nemo_engine.scheduler.kv_manager import KVManager
from nemo_engine.scheduler.request import Request, RequestStatus
from nemo_engine.scheduler.running import RunningSet

_Preempt = Callable[[Request], None]


def grow_in_turn(
    due: list[Request], kv: KVManager, running: RunningSet, preempt: _Preempt
) -> tuple[list[Request], list[int]]:
    """Where there are too few pages for all of ``due``. Returns those that got a page and are left, and the pages."""
    grown: dict[Request, int] = {}
    for request in due:
        if request.status is not RequestStatus.RUNNING:  # preempted a moment ago
            continue
        pages = kv.append_pages([request])
        while pages is None:
            victim = running.least_urgent()
            preempt(victim)
            grown.pop(victim, None)
            if victim is request:
                break
            pages = kv.append_pages([request])
        else:
            (grown[request],) = pages
    return list(grown), list(grown.values())


def restart_readers(bad: set[int], kv: KVManager, running: RunningSet, preempt: _Preempt) -> None:
    """Preempt who has pages of ``bad`` and nothing sound to show for it yet: what it computed from them is as bad."""
    is_spread = True
    while is_spread:
        is_spread = False
        for request in running.requests():
            if not request.is_sound and not bad.isdisjoint(request.pages):
                bad.update(kv.discard(request))
                preempt(request)
                is_spread = True
