"""What a run on a GPU measures of the device half alone: decode steps at any mix of lengths, prompts, steps of both,
and their kernels.

No scheduler and no prompts: plans are made here, and the cache is filled with small random numbers, so a point costs
its timed steps.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import torch

from nemo_engine.benchmarks import rooflines
from nemo_engine.benchmarks.driver import summary
from nemo_engine.benchmarks.gpu_meter import GpuMeter
from nemo_engine.benchmarks.models import open_model
from nemo_engine.config import EngineConfig
from nemo_engine.runner.startup import start_device_half
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.startup_log import StartupLog
from nemo_engine.step import PrefillRow, SlotFill, StepPlan

DEPTH = 2  # steps in flight, as in the engine
SETTLE = 5  # steps before the timed ones
_CACHE_SPREAD = 0.3  # of the random keys and values
_PAGES_AT_ONCE = 64


class Half:
    """A device half with random weights and a cache of small random numbers, driven by plans that are made here."""

    def __init__(self, model: str, device: torch.device, engine: Mapping[str, Any]) -> None:
        self.model = open_model(model)
        options = {"load_format": "dummy", "device": device.type, **engine}
        self.config = EngineConfig(**options)
        self.options = {name: value for name, value in options.items() if name != "device"}
        startup_log = StartupLog()
        start = time.monotonic()
        self.half = start_device_half(self.model.path, self.config, startup_log)
        self.started = {
            "seconds": time.monotonic() - start,
            "stages": {row.name: row.seconds for row in startup_log.rows},
        }
        self.runner = self.half.runner
        self.length = self.half.max_model_len
        self._steps = count()
        self._fill_cache(device)

    def _fill_cache(self, device: torch.device) -> None:
        for cache in (cache for kv in self.runner._kv_cache.layers for cache in kv.caches):
            noise = (torch.randn(_PAGES_AT_ONCE, *cache.shape[1:], device=device) * _CACHE_SPREAD).to(cache.dtype)
            for pages in cache.view(torch.uint8).split(_PAGES_AT_ONCE):
                pages.copy_(noise.view(torch.uint8)[: len(pages)])

    def fill(self, contexts: Sequence[int], computed: Callable[[int], int], room: int) -> tuple[SlotFill, ...]:
        """Requests of so many known tokens in slots 1, 2, ... with pages for ``room`` more, in random order."""
        size = self.config.page_size
        counts = [-(-(context + room) // size) for context in contexts]
        if sum(counts) > self.half.num_pages:
            raise RuntimeError(f"{sum(counts)} pages are needed, the cache has {self.half.num_pages}")
        generator = torch.Generator().manual_seed(0)
        pages = iter((torch.randperm(self.half.num_pages, generator=generator) + 1).tolist())
        vocab = self.half.model_config.vocab_size
        fills = []
        for slot, (context, num_pages) in enumerate(zip(contexts, counts, strict=True), 1):
            ids = torch.randint(3, vocab, (context,), generator=generator).tolist()
            row_pages = tuple(next(pages) for _ in range(num_pages))
            greedy = SamplingParams(temperature=0.0, max_tokens=room)
            fills.append(SlotFill(slot, ids, context, computed(context), row_pages, greedy, seed=slot))
        return tuple(fills)

    def step(self, slots: tuple[int, ...], prefills: tuple[PrefillRow, ...] = (), fills: Any = ()) -> Any:
        """Launch; the handle."""
        return self.runner.launch(StepPlan(next(self._steps), slots, prefills, fills))

    def decode(self, contexts: Sequence[int], steps: int, observer: Callable[[], Any] | None = None) -> list[float]:
        """Seconds of each of ``steps`` steps, two in flight as in the engine; ``observer`` makes a context around
        them.
        """
        slots = tuple(range(1, len(contexts) + 1))
        fills = self.fill(contexts, lambda context: context - 1, SETTLE + steps + DEPTH + 2)
        flight = deque([self.step(slots, fills=fills)])
        seconds: list[float] = []

        def advance() -> None:
            flight.append(self.step(slots))
            if len(flight) > DEPTH:
                check(flight.popleft().result().token_ids)

        for _ in range(SETTLE):
            advance()
        if observer is None:
            for _ in range(steps):
                start = time.perf_counter()
                advance()
                seconds.append(time.perf_counter() - start)
        else:
            with observer():
                for _ in range(steps):
                    advance()
        while flight:
            check(flight.popleft().result().token_ids)
        return seconds

    def prefill(self, tokens: int) -> float:
        """Seconds from nothing to the first token of a prompt, in chunks as the scheduler makes them."""
        fills = self.fill([tokens], lambda context: 0, 1)
        chunk = self.half.max_num_batched_tokens
        start = time.perf_counter()
        flight: deque[Any] = deque()
        for begin in range(0, tokens, chunk):
            rows = min(chunk, tokens - begin)
            row = PrefillRow(1, begin, rows, begin + rows == tokens)
            flight.append(self.step((), (row,), fills if begin == 0 else ()))
            if len(flight) > DEPTH:
                flight.popleft().result()
        while flight:
            tokens_out = flight.popleft().result().token_ids
        check(tokens_out)
        return time.perf_counter() - start

    def mixed(self, contexts: Sequence[int], chunk: int, rounds: int) -> list[float]:
        """Seconds of steps in which all ``contexts`` decode beside ``chunk`` tokens of another prompt."""
        slots = tuple(range(1, len(contexts) + 1))
        fills = self.fill([*contexts, chunk * (rounds + 1)], lambda context: context - 1, rounds + 2)
        prompt = fills[-1]
        fresh = SlotFill(prompt.slot, prompt.token_ids, prompt.num_prompt_tokens, 0, prompt.pages, prompt.params, 1)
        check(self.step(slots, (PrefillRow(fresh.slot, 0, chunk, False),), (*fills[:-1], fresh)).result().token_ids)
        seconds = []
        for number in range(1, rounds + 1):
            start = time.perf_counter()
            row = PrefillRow(fresh.slot, number * chunk, chunk, False)
            check(self.step(slots, (row,)).result().token_ids)
            seconds.append(time.perf_counter() - start)
        return seconds


def check(tokens: Sequence[int]) -> None:
    """``RuntimeError`` if a row failed: its time would mean nothing."""
    if min(tokens, default=0) < 0:
        raise RuntimeError(
            f"{sum(token < 0 for token in tokens)} of {len(tokens)} rows have logits that are not finite"
        )


def decode_point(half: Half, roofline: Any, point: dict[str, Any]) -> dict[str, Any]:
    """Equal contexts are a line as ``bench latency`` writes it; others have a name of their own."""
    contexts, steps = point["contexts"], point.get("steps", 50)
    contexts = [min(context, half.length - steps - SETTLE - DEPTH - 4) for context in contexts]
    seconds = half.decode(contexts, steps)
    batch, mean = len(contexts), statistics.fmean(contexts) + SETTLE + steps / 2
    median = statistics.median(seconds) * 1e3
    least = rooflines.decode_seconds(roofline, batch, mean) * 1e3
    is_even = len(set(contexts)) == 1
    return {
        "benchmark": "latency" if is_even else "gpu", "what": "decode" if is_even else "decode mixed lengths", "batch":
        batch, "context": contexts[0] if is_even else None, "longest": max(contexts), "mean_context": mean, "steps":
        steps, "ms_per_step": median, "step_s": summary([seconds]), "tokens_per_s": batch * steps / sum(seconds),
        "gb_per_step": rooflines.decode_bytes(roofline, batch, mean) / 1e9, "roofline_ms": least, "fraction": least /
        median, "gpu_state": GpuMeter().state(),
    }  # fmt: skip


def prefill_point(half: Half, roofline: Any, point: dict[str, Any]) -> dict[str, Any]:
    """One prompt, several times."""
    tokens = min(point["tokens"], half.length - 2)
    if point["rounds"] > 1:
        half.prefill(tokens)
    seconds = [half.prefill(tokens) for _ in range(point["rounds"])]
    least = rooflines.prefill_seconds(roofline, 1, tokens)
    return {
        "benchmark": "gpu", "what": "prefill", "batch": 1, "input": tokens, "output": 1,
        "ttft_s": summary([[value] for value in seconds]), "tokens_per_s": tokens / statistics.median(seconds),
        "prefill_roofline_s": least, "prefill_fraction": least / statistics.median(seconds),
    }  # fmt: skip


def mixed_point(half: Half, roofline: Any, point: dict[str, Any]) -> dict[str, Any]:
    """A step of decodes and a chunk of a prompt: what a stream feels when another's prompt comes."""
    contexts, chunk = point["contexts"], point["chunk"]
    seconds = half.mixed(contexts, chunk, point["rounds"])
    least = roofline.step_seconds(len(contexts), sum(contexts), [(chunk, chunk)])
    return {
        "benchmark": "gpu", "what": "mixed step", "batch": len(contexts), "context": contexts[0], "chunk": chunk,
        "ms_per_step": statistics.median(seconds) * 1e3, "step_s": summary([seconds]), "roofline_ms": least * 1e3,
        "fraction": least / statistics.median(seconds),
    }  # fmt: skip


def profile_point(half: Half, roofline: Any, point: dict[str, Any]) -> dict[str, Any]:
    """Kernels of a decode step, or of a step with a chunk, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    is_cuda = half.config.device == "cuda"
    profiler = profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU])
    steps = point["steps"]
    if point.get("chunk"):
        with profiler:
            half.mixed(point["contexts"], point["chunk"], steps - 1)
    else:
        half.decode(point["contexts"], steps, lambda: profiler)
    name = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    rows = [
        {"stage": event.key[:120], "us_per_step": getattr(event, name) / steps, "calls_per_step": event.count / steps}
        for event in profiler.key_averages()
        if getattr(event, name) > 0
    ]
    rows.sort(key=lambda row: -float(row["us_per_step"]))
    return {
        "benchmark": "gpu", "what": "profile", "batch": len(point["contexts"]), "context": point["contexts"][0],
        "chunk": point.get("chunk", 0), "kernels_us_per_step": sum(float(row["us_per_step"]) for row in rows),
        "profile": rows[:60],
    }  # fmt: skip


POINTS: dict[str, Callable[[Half, Any, dict[str, Any]], dict[str, Any]]] = {
    "decode": decode_point, "prefill": prefill_point, "mixed": mixed_point, "profile": profile_point,
}  # fmt: skip
