"""The results of a simulation: counted in bounded memory while it runs, then as numbers and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_engine.simulator.fleet import Fleet
from nemo_engine.simulator.scheduler import SimulatedRequest
from nemo_engine.simulator.statistics import Sketch
from nemo_engine.workload import Limits


class Tally:
    """Counts requests as they end."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.num_finished = 0
        self.num_good = 0
        self.num_refused = 0
        self.first_refusal: str | None = None
        self.num_output_tokens = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.good_output_tokens = 0
        self.first_arrival_s = float("inf")
        self.last_arrival_s = 0.0
        self.last_end_s = 0.0
        self.ttft, self.tpot, self.e2e, self.queue = Sketch(), Sketch(), Sketch(), Sketch()

    def refuse(self, request_id: str, reason: str) -> None:
        """Count a request that can never run."""
        self.num_refused += 1
        if self.first_refusal is None:
            self.first_refusal = f"request {request_id!r}: {reason}"

    def finish(self, request: SimulatedRequest, now: float) -> None:
        """Count a request that has ended."""
        assert request.first_token_s is not None and request.scheduled_ts is not None
        num_out = request.max_total_tokens - request.num_prompt_tokens
        ttft = request.first_token_s - request.arrived_s
        tpot = (now - request.first_token_s) / (num_out - 1) if num_out > 1 else 0.0
        self.num_finished += 1
        self.num_output_tokens += num_out
        self.num_prompt_tokens += request.num_prompt_tokens
        self.num_cached_tokens += request.num_cached_tokens
        self.first_arrival_s = min(self.first_arrival_s, request.arrived_s)
        self.last_arrival_s = max(self.last_arrival_s, request.arrived_s)
        self.last_end_s = max(self.last_end_s, now)
        self.ttft.add(ttft)
        if num_out > 1:
            self.tpot.add(tpot)
        self.e2e.add(now - request.arrived_s)
        self.queue.add(max(0.0, request.scheduled_ts - request.arrived_s))
        if self.limits.are_kept(ttft, tpot):
            self.num_good += 1
            self.good_output_tokens += num_out


@dataclass(frozen=True, slots=True)
class Results:
    """The numbers of one run. Seconds are virtual, except ``wall_s``. A request is counted when it ends; one that was
    lost with its replica, when it has ended on another.
    """

    num_items: int
    num_finished: int
    num_refused: int
    first_refusal: str | None
    duration_s: float  # from the first arrival to the last end
    arrival_span_s: float  # from the first arrival to the last
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    good_requests_per_s: float
    good_fraction: float
    ttft: Sketch
    itl: Sketch  # between any two tokens of a request
    tpot: Sketch  # mean of each request
    e2e: Sketch
    queue: Sketch
    prefix_hit_rate: float  # of prompt tokens
    num_preemptions: int
    recomputed_tokens: int  # computed again after preemptions
    peak_kv_used: float  # part of the pages, on the fullest replica
    mean_kv_used: float  # these means are over all replicas and all of ``duration_s``
    mean_running: float
    mean_decode_rows: float
    busy_fraction: float
    most_busy: float  # the busiest replica, as a multiple of the mean
    replica_s: float  # seconds from the first arrival to the last end, those of all replicas that took requests
    num_lost_replicas: int
    num_lost_requests: int
    num_steps: int
    num_draft_tokens: int
    num_accepted_tokens: int  # of drafts
    wall_s: float
    series: dict[str, list[tuple[float, float]]]  # of the first replica

    @classmethod
    def of(cls, tally: Tally, fleet: Fleet, num_items: int, wall_s: float) -> Results:
        """The results of one run, put together."""
        replicas = fleet.replicas
        itl = Sketch()
        for replica in replicas:
            itl.merge(replica.itl)
        duration = max(tally.last_end_s - tally.first_arrival_s, 0.0) if tally.num_finished else 0.0
        per_s = 1 / duration if duration else 0.0
        replica_s = fleet.replica_seconds(tally.first_arrival_s, tally.last_end_s) if duration else 0.0
        busy = [replica.busy_s for replica in replicas]

        def mean(name: str) -> float:
            return sum(replica.timeline.total(name) for replica in replicas) / replica_s if duration else 0.0

        pools = [replica.scheduler.kv.pool for replica in replicas]
        drafts = [replica.scheduler.speculation for replica in replicas]
        return cls(
            num_items=num_items,
            num_finished=tally.num_finished,
            num_refused=tally.num_refused,
            first_refusal=tally.first_refusal,
            duration_s=duration,
            arrival_span_s=max(tally.last_arrival_s - tally.first_arrival_s, 0.0) if tally.num_finished else 0.0,
            requests_per_s=tally.num_finished * per_s,
            output_tokens_per_s=tally.num_output_tokens * per_s,
            prompt_tokens_per_s=tally.num_prompt_tokens * per_s,
            good_requests_per_s=tally.num_good * per_s,
            good_fraction=tally.num_good / tally.num_finished if tally.num_finished else 0.0,
            ttft=tally.ttft,
            itl=itl,
            tpot=tally.tpot,
            e2e=tally.e2e,
            queue=tally.queue,
            prefix_hit_rate=tally.num_cached_tokens / tally.num_prompt_tokens if tally.num_prompt_tokens else 0.0,
            num_preemptions=sum(replica.scheduler.num_preemptions for replica in replicas),
            recomputed_tokens=sum(replica.scheduler.num_recomputed_tokens for replica in replicas),
            peak_kv_used=max(pool.peak_used / pool.num_pages for pool in pools),
            mean_kv_used=mean("kv_used"),
            mean_running=mean("running"),
            mean_decode_rows=mean("decode_rows"),
            busy_fraction=sum(busy) / replica_s if duration else 0.0,
            most_busy=max(busy) * len(busy) / sum(busy) if sum(busy) else 1.0,
            replica_s=replica_s,
            num_lost_replicas=fleet.num_lost_replicas,
            num_lost_requests=fleet.num_lost_requests,
            num_steps=sum(replica.num_steps for replica in replicas),
            num_draft_tokens=sum(one.num_drafts for one in drafts),
            num_accepted_tokens=sum(sum(one.num_accepted) for one in drafts),
            wall_s=wall_s,
            series={name: replicas[0].timeline.series(name) for name in replicas[0].timeline.names}
            | {"replicas": [(when, float(count)) for when, count in fleet.counts]},
        )

    def as_json(self) -> dict[str, Any]:
        """Plain data; times in seconds."""
        data: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            data[f"{name}_s" if isinstance(value, Sketch) else name] = (
                value.summary() if isinstance(value, Sketch) else value
            )
        return data | {"steps_per_wall_s": self.num_steps / self.wall_s if self.wall_s else None}
