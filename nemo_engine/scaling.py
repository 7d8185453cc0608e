"""How many replicas a load wants: a rule for Ray Serve's autoscaler and for the simulator. Must not know either."""

from __future__ import annotations

import math

_FULL = 0.9  # of a KV cache, from which on another replica is wanted
_BUSY = 0.8  # of the slots, which the replicas that come are to fill
_IDLE = 0.5  # of what a replica less would have to hold, below which one is given back


def replicas_wanted(now: int, running: float, waiting: float, kv_use: float, slots: float) -> int:
    """At least one more while requests wait or a KV cache is full, as many as all requests need; one less while the
    others could hold all.

    now: replicas that take requests; those that start up are not counted, so that a load that stays wants the same
    while they do. running, waiting: requests on all of them. kv_use: of the fullest. slots: of a replica.
    """
    if waiting > 0 or kv_use > _FULL:
        # Where memory is what is full, a replica holds as many as it does now.
        holds = _BUSY * slots if kv_use <= _FULL else max(1.0, running / now)
        return max(now + 1, math.ceil((running + waiting) / holds))
    return now - 1 if now > 1 and running < _IDLE * slots * (now - 1) else now
