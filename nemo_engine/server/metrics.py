"""``/metrics``: counts and times under vLLM's names, for Prometheus; and, where there is an NVIDIA GPU, its memory,
power and energy.

Times of requests are taken when they end; what happens in every step comes from the engine's record of its steps.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from starlette.responses import Response

from nemo_engine.engine.async_engine import AsyncEngine, EngineClosedError, EngineDeadError
from nemo_engine.outputs import RequestOutput, SchedulerStats
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.server.gpu import GpuReader
from nemo_engine.server.ui.history import History

FOLLOW_SECONDS = 0.5

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
         160.0, 640.0, 2560.0)  # fmt: skip
_PER_TOKEN = (
    0.001,
    0.0025,
    0.005,
    0.0075,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_REQUEST = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
            480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_TOKENS = tuple(base * 10**power for power in range(6) for base in (1, 2, 5))
_COMPLETIONS = (1, 2, 5, 10, 20)


class Histogram:
    """Counts of values by bucket; ``add`` takes one value any number of times."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Count ``value``, ``count`` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def family(self, name: str, text: str, labels: dict[str, str]) -> HistogramMetricFamily:
        """As Prometheus has it, cumulative."""
        total, buckets = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), total))
        family = HistogramMetricFamily(name, text, labels=list(labels))
        family.add_metric(list(labels.values()), buckets, self._sum)
        return family


class Metrics:
    """The numbers of one engine. Written by the event loop alone."""

    def __init__(self, engine: AsyncEngine, prefix: str, model_name: str) -> None:
        self._engine = engine
        self._prefix = prefix
        self._labels = {"model_name": model_name, "engine": "0"}
        self._last_step = 0
        self._last_time: float | None = None
        self._finished: Counter[str] = Counter()
        self._answered: Counter[tuple[str, int]] = Counter()
        self._key_prompt_tokens: Counter[str] = Counter()
        self._key_generation_tokens: Counter[str] = Counter()
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._updating = asyncio.Lock()
        self.history = History()
        self._gpu = GpuReader()
        self._histograms: dict[str, tuple[str, Histogram]] = {
            "time_to_first_token_seconds": ("Time to the first token.", Histogram(_TTFT)),
            "inter_token_latency_seconds": ("Time between the tokens of a request.", Histogram(_PER_TOKEN)),
            "request_time_per_output_token_seconds": ("A request's mean time per token.", Histogram(_PER_TOKEN)),
            "e2e_request_latency_seconds": ("Time from a request's arrival to its end.", Histogram(_REQUEST)),
            "request_queue_time_seconds": ("Time that a request waited.", Histogram(_REQUEST)),
            "request_prefill_time_seconds": ("Time from a request's start to its first token.", Histogram(_REQUEST)),
            "request_decode_time_seconds": ("Time from a request's first to its last token.", Histogram(_REQUEST)),
            "request_inference_time_seconds": ("Time from a request's start to its end.", Histogram(_REQUEST)),
            "request_prompt_tokens": ("Tokens of a request's prompt.", Histogram(_TOKENS)),
            "request_generation_tokens": ("Tokens that a request generated.", Histogram(_TOKENS)),
            "request_params_n": ("A request's n.", Histogram(_COMPLETIONS)),
            "request_params_max_tokens": ("A request's max_tokens.", Histogram(_TOKENS)),
            "iteration_tokens_total": ("Tokens that a step computed.", Histogram(_STEP_TOKENS)),
        }
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def key_answered(self, name: str, status: int) -> None:
        """An HTTP request of the key of that name was answered."""
        self._answered[name, status] += 1

    def request_done(self, output: RequestOutput, params: SamplingParams, key_name: str = "") -> None:
        """A request has ended; ``output`` is its last."""
        metrics = output.metrics
        if key_name:
            self._key_prompt_tokens[key_name] += len(output.prompt_token_ids)
            self._key_generation_tokens[key_name] += 0 if metrics is None else metrics.num_generation_tokens
        for completion in output.outputs:
            self._finished[completion.finish_reason or "abort"] += 1
        if metrics is None:
            return
        self._add("request_prompt_tokens", len(output.prompt_token_ids))
        self._add("request_generation_tokens", metrics.num_generation_tokens)
        self._add("request_params_n", params.n)
        if params.max_tokens is not None:
            self._add("request_params_max_tokens", params.max_tokens)
        arrival, scheduled, first, last = (
            metrics.arrival_time, metrics.scheduled_ts, metrics.first_token_ts, metrics.last_token_ts,
        )  # fmt: skip
        if scheduled is not None:
            self._add("request_queue_time_seconds", scheduled - arrival)
        if last is not None:
            self._add("e2e_request_latency_seconds", last - arrival)
        if first is not None and scheduled is not None and last is not None:
            self._add("time_to_first_token_seconds", first - arrival)
            self._add("request_prefill_time_seconds", first - scheduled)
            self._add("request_decode_time_seconds", last - first)
            self._add("request_inference_time_seconds", last - scheduled)
            each = metrics.num_generation_tokens / params.n
            if each > 1:
                self._add("request_time_per_output_token_seconds", (last - first) / (each - 1))
            self.history.request_done(first - arrival, last - arrival)

    def aborted(self, count: int) -> None:
        """So many completions were given up before their end."""
        self._finished["abort"] += count

    def _add(self, name: str, value: float, count: int = 1) -> None:
        self._histograms[name][1].add(value, count)

    async def update(self) -> None:
        """Take in the steps since the last time."""
        async with self._updating:
            since = self._last_step
            if self._engine.error is not None or self._engine.last_step_id == since:
                return
            for record in await self._engine.call(lambda engine: engine.steps_since(since)):
                self._add("iteration_tokens_total", record.num_decodes + record.num_prefill_tokens)
                if record.num_decodes and self._last_time is not None:
                    self._add("inter_token_latency_seconds", record.time - self._last_time, record.num_decodes)
                self._num_prompt_tokens += record.num_prompt_tokens
                self._num_generation_tokens += record.num_new_tokens
                self._last_step, self._last_time = record.step_id, record.time
                self.history.step_done(record)

    def name_engine(self, name: str) -> None:
        """What the label ``engine`` says: which of several replicas this is."""
        self._labels["engine"] = name

    async def follow(self) -> None:
        """Keep up with the engine until cancelled."""
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            try:
                await self.update()
            except (EngineClosedError, EngineDeadError):
                return

    async def response(self) -> Response:
        """The page that Prometheus reads."""
        await self.update()
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    def collect(self) -> Iterator[Metric]:
        """All metrics as of now, as prometheus_client asks for them."""
        stats = self._engine.stats()
        used = 1.0 - stats.num_free_pages / stats.num_pages
        for name, text, value in (
            ("num_requests_running", "Requests in the batch.", stats.num_running),
            ("num_requests_waiting", "Requests that wait.", max(stats.num_waiting, 0)),
            ("kv_cache_usage_perc", "Share of the KV pages in use; 1 is all.", used),
        ):
            yield self._one(GaugeMetricFamily, name, text, value)
        for name, text, value in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.total_prefix_queried_tokens),
            ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.total_prefix_hit_tokens),
            ("num_preemptions", "Requests that had to give up their pages.", stats.total_preemptions),
            ("prompt_tokens", "Tokens of prompts that were processed.", self._num_prompt_tokens),
            ("generation_tokens", "Tokens that were generated.", self._num_generation_tokens),
        ):
            yield self._one(CounterMetricFamily, name, text, value)
        yield from self._of_drafts(stats)
        success = CounterMetricFamily(
            f"{self._prefix}:request_success",
            "Completions that ended, by reason.",
            labels=[*self._labels, "finished_reason"],
        )
        for reason in ("stop", "length", "abort", "error", "repetition"):
            success.add_metric([*self._labels.values(), reason], self._finished[reason])
        yield success
        yield from self._of_keys()
        for name, (text, histogram) in self._histograms.items():
            yield histogram.family(f"{self._prefix}:{name}", text, self._labels)
        for name, text, is_counter, value in self._gpu.read(self._num_generation_tokens):
            yield self._one(CounterMetricFamily if is_counter else GaugeMetricFamily, name, text, value)

    def _of_drafts(self, stats: SchedulerStats) -> Iterator[Metric]:
        """What speculation did, where there is any."""
        by_place = stats.num_spec_accepted_tokens_per_pos
        if not by_place:
            return
        for name, text, value in (
            ("num_drafts", "Rows of steps that had drafts.", stats.num_spec_drafts),
            ("num_draft_tokens", "Tokens of drafts.", stats.num_spec_draft_tokens),
            ("num_accepted_tokens", "Tokens of drafts that were right.", sum(by_place)),
        ):
            yield self._one(CounterMetricFamily, f"spec_decode_{name}", text, value)
        family = CounterMetricFamily(
            f"{self._prefix}:spec_decode_num_accepted_tokens_per_pos",
            "Tokens of drafts that were right, by their place in the draft.",
            labels=[*self._labels, "position"],
        )
        for place, value in enumerate(by_place):
            family.add_metric([*self._labels.values(), str(place)], value)
        yield family

    def _of_keys(self) -> Iterator[Metric]:
        """What was done for each key, by its name."""
        labels = [*self._labels, "key"]
        if self._answered:
            family = CounterMetricFamily(
                f"{self._prefix}:key_requests", "HTTP requests, by key and status.", labels=[*labels, "status"]
            )
            for (name, status), count in self._answered.items():
                family.add_metric([*self._labels.values(), name, str(status)], count)
            yield family
        for metric, text, counts in (
            ("key_prompt_tokens", "Prompt tokens of requests that ended, by key.", self._key_prompt_tokens),
            ("key_generation_tokens", "Tokens generated for requests that ended, by key.", self._key_generation_tokens),
        ):
            if counts:
                family = CounterMetricFamily(f"{self._prefix}:{metric}", text, labels=labels)
                for name, count in counts.items():
                    family.add_metric([*self._labels.values(), name], count)
                yield family

    def _one(self, kind: type[Any], name: str, text: str, value: float) -> Metric:
        family = kind(f"{self._prefix}:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        metric: Metric = family
        return metric
