"""A process of ``benchmarks/gpu.py``: one stage's measurements, each a line of the results file the moment it is known.

    python -m nemo_engine.benchmarks.gpu_worker engine

It imports what it needs, then waits for one line of JSON on its standard input, and only then touches the device: so it
can be started while the stage before still measures. Decode points need no prompts: the cache is filled with small
random numbers.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from nemo_engine.benchmarks import rooflines
from nemo_engine.benchmarks.driver import count_tokens, params
from nemo_engine.benchmarks.gpu_half import POINTS, SETTLE, Half
from nemo_engine.benchmarks.gpu_meter import GpuMeter
from nemo_engine.benchmarks.models import open_model
from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.benchmarks.timing import Ceilings, describe, is_usable, measure_ceilings, timer_for
from nemo_engine.ops import ALL_OPS, SEMANTICS
from nemo_engine.ops.op import COMPOSED
from nemo_engine.sampling_params import RequestOutputKind, SamplingParams

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


def check_built(engine: Mapping[str, Any]) -> None:
    """``RuntimeError`` if the CUDA kernels are to be measured and are not there: others would run in their place."""
    if "cuda" in engine.get("prefer", {}).values() and importlib.util.find_spec("nemo_engine._C") is None:
        raise RuntimeError("nemo_engine._C is not there")


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
    """The options of an engine that uses no implementation that is known to fail. failing: {operation: those of its
    implementations}.

    wants: the kernels that it would use, "triton" or "cuda". The other one takes the place, and where there is none the
    definition, which cannot be captured.
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
    measured: list[Ceilings] = []

    def ceilings() -> dict[str, Any]:
        measured.append(measure_ceilings(timer_for(task.device, 10 if task.device.type == "cuda" else 1), task.device))
        state = GpuMeter().state()
        return {"benchmark": "gpu", "what": "ceilings", "ceilings": asdict(measured[0]), "gpu_state": state}

    if not task.attempt("ceilings", ceilings):
        raise RuntimeError("no ceilings")
    values = measured[0]
    for what, name, rate in (
        ("copy", "gb_per_s", values.bytes_per_s / 1e9),
        ("bf16 cublas", "tflop_per_s", values.bf16_flops_per_s / 1e12),
        ("fp8 tensorwise fast accumulation", "tflop_per_s", values.fp8_flops_per_s / 1e12),
    ):
        task.write(f"ceiling {what}", benchmark="gpu_ceilings", what=what, m=8192, n=8192, k=8192, **{name: rate})

    if task.device.type == "cuda":
        task.attempt("ceiling fp8 rowwise precise accumulation", lambda: rowwise_product(task.device))


def rowwise_product(device: torch.device) -> dict[str, Any]:
    """The product that the planner takes for FP8's ceiling: a scale a row and a column, sums in fp32."""
    n = 8192
    a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    rows, columns = torch.ones(n, 1, device=device), torch.ones(1, n, device=device)

    def product() -> torch.Tensor:
        return torch._scaled_mm(a, b.t(), scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16, use_fast_accum=False)

    rate = 2 * n**3 / timer_for(device, 10)(product) * 1e3
    return {
        "benchmark": "gpu_ceilings", "what": "fp8 rowwise precise accumulation", "m": n, "n": n, "k": n, "tflop_per_s":
        rate / 1e12,
    }  # fmt: skip


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


# ---- the device half of an engine


def measure_engine(task: Task) -> None:
    """Start up once, then measure point after point."""
    half: Half | None = None

    def start() -> dict[str, Any]:
        nonlocal half
        half = Half(task.options["model"], task.device, task.options["engine"])
        peak = torch.cuda.max_memory_reserved() if task.device.type == "cuda" else 0
        choices = {choice.op: choice.chosen for choice in half.runner._step.ops.choices}
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
    common = {
        "benchmark": "throughput",
        "engine": "nemo_engine",
        "model": model.name,
        "options": options,
        "workload": workload,
        "rounds": 1,
        "warmup": 0,
        "what": "throughput",
    }

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
        measured = rates()
        task.write(name, tokens_per_second=[measured["output_tokens_per_s"]], concurrency=None, **measured)
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
            check_built(task.options.get("engine", {}))
            if (fault := task.options.get("plant")) and not task.attempt(f"{task.stage} planted", lambda: plant(fault)):
                raise RuntimeError("a planted fault")
            work(task)
        except (RuntimeError, ValueError, MemoryError) as error:
            print(f"[{task.stage}] {describe(error)}", flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
