"""A process of ``benchmarks/gpu.py``: one stage's measurements, each a line of the results file the moment it is known.

    python -m nemo_engine.benchmarks.gpu_worker engine

It imports what it needs, then waits for one line of JSON on its standard input, and only then touches the device: so it can be started while
the stage before still measures. Decode points need no prompts: the cache is filled with small random numbers.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch

from nemo_engine.benchmarks import rooflines
from nemo_engine.benchmarks.driver import count_tokens, params, summary
from nemo_engine.benchmarks.gpu_meter import GpuMeter
from nemo_engine.benchmarks.models import open_model
from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.benchmarks.timing import Ceilings, describe, is_usable, measure_ceilings, timer_for
from nemo_engine.config import EngineConfig
from nemo_engine.ledger import Ledger
from nemo_engine.ops import ALL_OPS, SEMANTICS
from nemo_engine.ops.op import COMPOSED
from nemo_engine.runner.startup import start_device_half
from nemo_engine.sampling_params import RequestOutputKind, SamplingParams
from nemo_engine.step import PrefillRow, SlotFill, StepPlan

DEPTH = 2  # steps in flight, as in the engine
SETTLE = 5  # steps before the timed ones
_CACHE_SPREAD = 0.3  # of the random keys and values
_PAGES_AT_ONCE = 64
_OURS = ("cublas", "triton", "cuda")  # implementations for GPUs that need nothing else installed
_REPORT_S = 5.0  # between two lines of a workload that runs


@dataclass(slots=True)
class Task:
    """What the line on the standard input says, and where numbers go. ``ends``: on the monotonic clock."""

    stage: str
    results: Path
    ends: float
    options: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, line: str) -> Task:
        given = json.loads(line)
        ends = time.monotonic() + given.pop("seconds")
        task = cls(given.pop("stage"), Path(given.pop("results")), ends, given)
        task.facts = provenance("torch") | {"stage": task.stage, "device": task.device.type, **given.pop("facts", {})}
        if "engine" in given and task.stage != "smoke":
            how = given.pop("wants"), given.pop("failing"), given.pop("eager")
            given["engine"] = swapped(given["engine"], *how)
        if task.device.type == "cuda":
            task.facts |= {"gpu": torch.cuda.get_device_name(), "triton": __import__("triton").__version__}
        return task

    @property
    def device(self) -> torch.device:
        return torch.device(self.options["device"])

    @property
    def seconds_left(self) -> float:
        return self.ends - time.monotonic()

    def write(self, key: str, status: str = "ok", **record: Any) -> None:
        """Add a line. ``key`` names what is known by it."""
        line = {**record, "status": status, "key": key, **self.facts}
        append_record(self.results, line)
        shown = {name: value for name, value in record.items() if isinstance(value, int | float | str)}
        print(f"[{self.stage}] {key}: {status} {shown}", flush=True)

    def attempt(self, key: str, measure: Callable[[], dict[str, Any]]) -> bool:
        """Measure and write; a failure is written too. ``RuntimeError`` if nothing can run in this process any more."""
        try:
            self.write(key, **measure())
            return True
        except (RuntimeError, ValueError, MemoryError) as error:
            self.write(key, "failed", error=describe(error))
        gc.collect()
        if self.device.type == "cuda":
            if not is_usable(self.device):
                raise RuntimeError("the device is not usable any more in this process")
            torch.cuda.empty_cache()
        return False


def plant(what: str) -> dict[str, Any]:
    """A fault for the tests: how a stage that goes wrong looks from outside."""
    if what == "crash":
        import faulthandler

        faulthandler._sigsegv()  # type: ignore[attr-defined]
    elif what == "hang":
        time.sleep(3600)
    elif what == "oom":
        torch.empty(1 << 60, dtype=torch.uint8)
    raise ValueError(f"a fault must be crash, hang or oom, got {what!r}")


def swapped(engine: Mapping[str, Any], wants: str, failing: Mapping[str, Sequence[str]], eager: bool) -> dict[str, Any]:
    """The options of an engine that uses no implementation that is known to fail. failing: {operation: those of its implementations}.

    wants: the kernels that it would use, "triton" or "cuda". The other one takes the place, and where there is none the definition, which
    cannot be captured.
    """
    options = dict(engine)
    prefer = dict(options.get("prefer", {}))
    for op in ALL_OPS:
        names = [impl.name for impl in op.impls if impl.name in _OURS]
        names = [COMPOSED, *names] if op.composed is not None else names
        used = wants if wants == "cuda" and wants in names else next(iter(names), "")
        bad = failing.get(op.name, ())
        if used in bad:
            left = [name for name in names if name not in bad]
            prefer[op.name] = left[0] if left else SEMANTICS
            eager |= not left
    if prefer:
        options["prefer"] = prefer
    return options | ({"enforce_eager": True} if eager else {})


# ---- device


def measure_device(task: Task) -> None:
    """The ceilings, by the names under which the planner looks for them."""
    found: list[Ceilings] = []

    def ceilings() -> dict[str, Any]:
        found.append(measure_ceilings(timer_for(task.device, 10 if task.device.type == "cuda" else 1), task.device))
        state = GpuMeter().state()
        return {"benchmark": "gpu", "what": "ceilings", "ceilings": asdict(found[0]), "gpu_state": state}

    if not task.attempt("ceilings", ceilings):
        raise RuntimeError("no ceilings")
    values = found[0]
    for what, name, rate in (
        ("copy", "gb_per_s", values.bytes_per_s / 1e9),
        ("bf16 cublas", "tflop_per_s", values.bf16_flops_per_s / 1e12),
        ("fp8 tensorwise fast accumulation", "tflop_per_s", values.fp8_flops_per_s / 1e12),
    ):
        task.write(f"ceiling {what}", benchmark="gpu_ceilings", what=what, m=8192, n=8192, k=8192, **{name: rate})


# ---- smoke


def smoke(task: Task) -> None:
    """nemo-tiny, greedy, for a few tokens: that it starts, answers with finite numbers, and answers the same twice."""
    from nemo_engine import Engine

    options = {"kv_cache_gib": 0.25, "max_model_len": 256, "max_num_seqs": 8, "skip_tokenizer_init": True}

    def run() -> dict[str, Any]:
        start = time.monotonic()
        engine = Engine(open_model("nemo-tiny").path, device=task.device.type, **options, **task.options["engine"])
        try:
            started = time.monotonic() - start
            answers = []
            for _ in range(2):
                wanted = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
                prompts: Any = [{"prompt_token_ids": list(range(5, 5 + length))} for length in (1, 17, 100)]
                outputs = engine.generate(prompts, wanted)
                count_tokens(outputs)
                answers.append([list(output.outputs[0].token_ids) for output in outputs])
                engine.reset_prefix_cache()
        finally:
            engine.close()
        if answers[0] != answers[1]:
            raise RuntimeError("the same prompts had two answers")
        return {"benchmark": "gpu", "what": "smoke", "start_s": started, "tokens": answers[0]}

    if not task.attempt(task.options["key"], run):
        raise RuntimeError("the smoke test failed")


# ---- the device half of an engine, without a scheduler


class Half:
    """A device half with random weights and a cache of small random numbers, driven by plans that are made here."""

    def __init__(self, task: Task) -> None:
        self.model = open_model(task.options["model"])
        options = {"load_format": "dummy", "device": task.device.type, **task.options["engine"]}
        self.config = EngineConfig(**options)
        self.options = {name: value for name, value in options.items() if name != "device"}
        ledger = Ledger()
        start = time.monotonic()
        self.half = start_device_half(self.model.path, self.config, ledger)
        self.started = {"seconds": time.monotonic() - start, "stages": {row.name: row.seconds for row in ledger.rows}}
        self.runner = self.half.runner
        self.length = self.half.max_model_len
        self._steps = count()
        self._fill_cache(task.device)

    def _fill_cache(self, device: torch.device) -> None:
        for cache in (cache for layer in self.runner._kv_cache.layers for cache in layer):
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
            own = tuple(next(pages) for _ in range(num_pages))
            greedy = SamplingParams(temperature=0.0, max_tokens=room)
            fills.append(SlotFill(slot, ids, context, computed(context), own, greedy, seed=slot))
        return tuple(fills)

    def step(self, slots: tuple[int, ...], prefills: tuple[PrefillRow, ...] = (), fills: Any = ()) -> Any:
        """Launch; the handle."""
        return self.runner.launch(StepPlan(next(self._steps), slots, prefills, fills))

    def decode(self, contexts: Sequence[int], steps: int, observer: Callable[[], Any] | None = None) -> list[float]:
        """Seconds of each of ``steps`` steps, two in flight as in the engine; ``observer`` makes a context around them."""
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


def measure_engine(task: Task) -> None:
    """Start up once, then measure point after point."""
    half: Half | None = None

    def start() -> dict[str, Any]:
        nonlocal half
        half = Half(task)
        peak = torch.cuda.max_memory_reserved() if task.device.type == "cuda" else 0
        choices = {choice.op: choice.chosen for choice in half.runner._ops.choices}
        return {
            "benchmark": "gpu", "what": "start", "options": half.options, **half.started, "peak_bytes": peak,
            "num_pages": half.half.num_pages, "implementations": choices,
        }  # fmt: skip

    if not task.attempt(f"{task.stage} start", start):
        raise RuntimeError("no start")
    assert half is not None
    ceilings = Ceilings(**task.options["ceilings"])
    roofline = rooflines.measured_roofline(half.model.path, half.half.model_config, half.config, ceilings)
    task.facts |= {
        "model": half.model.name,
        "engine": "nemo_engine",
        "options": half.options,
        "ceilings": asdict(ceilings),
    }
    task.facts["warm_up"] = SETTLE
    failed = 0
    for point in task.options["points"]:
        key = f"{task.stage} {point['key']}"
        if task.seconds_left < point.get("seconds", 3):
            task.write(key, "skipped", error=f"{task.seconds_left:.0f} s are left")
            continue
        failed += not task.attempt(key, lambda point=point: POINTS[point["what"]](half, roofline, point))  # type: ignore[misc]
    if failed:
        raise RuntimeError(f"{failed} points failed")


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
        "benchmark": "latency" if is_even else "gpu", "what": "decode" if is_even else "decode mixed lengths", "batch": batch,
        "context": contexts[0] if is_even else None, "longest": max(contexts), "mean_context": mean, "steps": steps,
        "ms_per_step": median, "step_s": summary([seconds]), "tokens_per_s": batch * steps / sum(seconds),
        "gb_per_step": rooflines.decode_bytes(roofline, batch, mean) / 1e9, "roofline_ms": least,
        "fraction": least / median, "gpu_state": GpuMeter().state(),
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
        "ttft_s": summary([[one] for one in seconds]), "tokens_per_s": tokens / statistics.median(seconds),
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


# ---- a whole workload through the engine


def throughput(task: Task) -> None:
    """All requests at once through the whole engine. A line every few seconds, so a cut leaves the rate up to then."""
    from nemo_engine import Engine

    options = {"skip_tokenizer_init": True, "load_format": "dummy", **task.options["engine"]}
    model, work = open_model(task.options["model"]), task.options["work"]
    name = f"{task.stage} {work['requests']}x{work['input']}/{work['output']}"
    engine = Engine(model.path, device=task.device.type, **options)
    generator = torch.Generator().manual_seed(0)
    for index in range(work["requests"]):
        ids = torch.randint(3, model.vocab_size, (work["input"],), generator=generator).tolist()
        wanted = params(work["output"], RequestOutputKind.DELTA)
        engine.add_request(str(index), {"prompt_token_ids": ids}, wanted)
    start = last = time.perf_counter()
    new = 0
    source = ",".join(f"{key}={value}" for key, value in work.items())
    workload = {"source": source, "requests": work["requests"], "new_tokens": work["requests"] * work["output"]}
    common = {"benchmark": "throughput", "engine": "nemo_engine", "model": model.name, "options": options, "workload": workload,
              "rounds": 1, "warmup": 0, "what": "throughput"}  # fmt: skip

    def rates() -> dict[str, Any]:
        seconds = time.perf_counter() - start
        stats = engine.stats()
        return {**common, "seconds": seconds, "new_tokens": new, "output_tokens_per_s": new / seconds,
                "preemptions": stats.total_preemptions}  # fmt: skip

    while engine.has_unfinished_requests() and task.seconds_left > 2:
        new += count_tokens(engine.step())
        if time.perf_counter() - last > _REPORT_S:
            last = time.perf_counter()
            task.write(f"{name} so far", "partial", **rates())
    if engine.has_unfinished_requests():
        task.write(name, "partial", error="the stage's time ended", **rates())
    else:
        found = rates()
        task.write(name, tokens_per_second=[found["output_tokens_per_s"]], concurrency=None, **found)
    engine.close()


STAGES: dict[str, Callable[[Task], None]] = {
    "device": measure_device, "smoke": smoke, "engine": measure_engine, "throughput": throughput,
}  # fmt: skip


def lines() -> Iterator[str]:
    """The line that says what to do; none if nobody wants this process any more."""
    line = sys.stdin.readline()
    if line.strip():
        yield line


def main() -> int:
    """0 if all was measured, 1 if something failed."""
    work = STAGES[sys.argv[1]]
    for line in lines():
        task = Task.read(line)
        try:
            if (fault := task.options.get("plant")) and not task.attempt(f"{task.stage} planted", lambda: plant(fault)):
                raise RuntimeError("a planted fault")
            work(task)
        except (RuntimeError, ValueError, MemoryError) as error:
            print(f"[{task.stage}] {describe(error)}", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
