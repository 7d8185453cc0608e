"""Does the simulator tell what the engine will do? Fits a cost model on a grid of latencies, and predicts workloads
that it has not seen.

The engine runs here and now: first batches of equal requests over a grid of sizes, and some that join while others
decode; a cost model is fitted to every step. Two workloads of mixed lengths are not in the fit: all requests at once
(throughput), and Poisson arrivals in real time (time to first token). Each is run by the engine and simulated with the
fitted model, and the two are compared. The grid is measured before, between and after the workloads, so that a machine
that slowly changes changes both; one on which other programs run is of no use.

    python benchmarks/validate_simulator.py --json benchmarks/results/NAME.jsonl \\
        --save-model cost-model.json --save-steps steps.ndjson

What is kept in ``results/``: the comparison, the model (``cost-model-*.json``, for ``nemo-engine simulate
--cost-model``) and the steps that it was fitted to (``steps-*.ndjson``: the fields of ``Measurement``, a step a line).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_engine import Engine
from nemo_engine.benchmarks.driver import count_tokens, params
from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.sampling_params import RequestOutputKind
from nemo_engine.simulator import CostModel, EngineShape, Measurement, Setting, simulate
from nemo_engine.step import StepPlan
from nemo_engine.workload import Arrivals, Item, WorkloadSpec, generate, prompt_token_ids

BATCHES = (1, 2, 4, 8, 16, 32, 64)
INPUTS = (16, 64, 256, 1024)
OUTPUT = 24
ENGINE = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "max_model_len": 4096, "num_kv_pages": 4096}
MOST_THROUGHPUT_ERROR, MOST_TTFT_ERROR = 0.15, 0.25
UNSEEN = "input=lognormal:200:0.9:8:1500,output=lognormal:60:0.6:4:300"


class Recorder:
    """Turns every step plan of an engine into the counts of a ``Measurement``."""

    def __init__(self, engine: Engine) -> None:
        self._computed: dict[int, int] = {}
        self.last: tuple[int, int, list[tuple[int, int]]] | None = None
        runner = engine._core.runner
        launch = runner.launch

        def recorded(plan: StepPlan) -> Any:
            self._take(plan)
            return launch(plan)

        runner.launch = recorded  # type: ignore[method-assign]

    def _take(self, plan: StepPlan) -> None:
        computed = self._computed
        for fill in plan.fills:
            computed[fill.slot] = fill.num_computed_tokens
        context = 0
        for slot in plan.decode_slots:
            computed[slot] += 1
            context += computed[slot]
        for row in plan.prefills:
            computed[row.slot] += row.num_tokens
        self.last = (len(plan.decode_slots), context, [(row.start, row.num_tokens) for row in plan.prefills])


class Driver:
    """Runs items on the engine at their arrivals, in real time, and measures every step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.recorder = Recorder(engine)
        self.measurements: list[Measurement] = []
        self._count = 0

    def run(self, timed: Sequence[tuple[float, Item]]) -> dict[str, Any]:
        """Seconds, tokens and times to first token of ``timed``, (arrival, item) by arrival."""
        engine, vocab = self.engine, self.engine.model_config.vocab_size
        engine.reset_prefix_cache()
        prompts = [prompt_token_ids(item, 0, vocab) for _, item in timed]
        waiting, arrived, firsts = 0, {}, {}
        tokens = 0
        start = time.perf_counter()
        while waiting < len(timed) or engine.has_unfinished_requests():
            begin = time.perf_counter()
            if not engine.has_unfinished_requests() and timed[waiting][0] > begin - start:
                time.sleep(timed[waiting][0] - (begin - start))
                begin = time.perf_counter()
            while waiting < len(timed) and timed[waiting][0] <= begin - start:
                when, item = timed[waiting]
                self._count += 1
                name = f"v{self._count}"
                arrived[name] = start + when
                engine.add_request(
                    name, {"prompt_token_ids": prompts[waiting]}, params(item.output_tokens, RequestOutputKind.DELTA)
                )
                waiting += 1
            self.recorder.last = None
            outputs = engine.step()
            end = time.perf_counter()
            if self.recorder.last is not None:
                self.measurements.append(Measurement.of(*self.recorder.last, end - begin))
            tokens += count_tokens(outputs)
            for output in outputs:
                firsts.setdefault(output.request_id, end - arrived[output.request_id])
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds,
                "median_ttft_s": statistics.median(firsts.values())}  # fmt: skip


def measure_grid(driver: Driver, batches: Sequence[int], inputs: Sequence[int], joining: int, seed: int) -> None:
    """Equal requests at once; then ``joining`` ones that join while others decode."""
    for batch in batches:
        for length in inputs:
            spec = WorkloadSpec.parse_text(f"requests={batch},input={length},output={OUTPUT}", "grid")
            driver.run([(0.0, item) for item in generate(spec)])
    for rate in (5.0, 20.0):
        choice = ":".join(map(str, inputs))
        spec = WorkloadSpec.parse_text(f"requests={joining},input=choice:{choice},output=48,seed={seed}", "grid")
        driver.run(list(zip(Arrivals("poisson", rate, seed=seed).times(), generate(spec))))


@dataclass(frozen=True)
class Unseen:
    """A workload that is not in the fit: what the engine made of it, in each run."""

    name: str
    items: list[Item]
    times: list[float]
    runs: list[dict[str, Any]]

    @classmethod
    def run(cls, driver: Driver, name: str, items: list[Item], arrivals: Arrivals | None, repeats: int) -> Unseen:
        """By the engine; its steps are not kept."""
        times = [0.0] * len(items) if arrivals is None else [when for when, _ in zip(arrivals.times(), items)]
        kept = driver.measurements[:]
        runs = [driver.run(list(zip(times, items))) for _ in range(repeats)]
        driver.measurements[:] = kept
        return cls(name, items, times, runs)

    @property
    def measured(self) -> dict[str, float]:
        """Medians of the runs."""
        return {key: statistics.median(run[key] for run in self.runs) for key in self.runs[0]}

    def compare(self, model: CostModel, shape: EngineShape) -> dict[str, Any]:
        """With what the simulator makes of it."""
        timed = [Item(item.request_id, item.turns, when) for when, item in zip(self.times, self.items)]
        simulated = simulate(timed, Arrivals("file"), Setting(shape, model))
        measured = self.measured
        predicted = {"tokens_per_s": simulated.output_tokens_per_s, "median_ttft_s": simulated.ttft.quantile(0.5)}
        return {
            "workload": self.name, "requests": len(self.items), "measured": measured, "runs": self.runs, "predicted":
            predicted, "throughput_error": predicted["tokens_per_s"] / measured["tokens_per_s"] - 1, "ttft_error":
            predicted["median_ttft_s"] / measured["median_ttft_s"] - 1,
        }  # fmt: skip


def measure(driver: Driver, args: argparse.Namespace) -> tuple[Unseen, Unseen]:
    """The grid and the workloads, in turns."""
    grid = (driver, args.batches, args.inputs, args.joining)
    measure_grid(driver, args.batches[:1], args.inputs[:1], 2, 0)  # warms up
    driver.measurements.clear()
    items = list(generate(WorkloadSpec.parse_text(f"requests={args.requests},{UNSEEN},seed=7", "unseen")))
    measure_grid(*grid, 1)
    everything = Unseen.run(driver, "all at once", items, None, args.repeats)
    measure_grid(*grid, 2)
    mean_out = statistics.fmean(item.output_tokens for item in items)
    rate = args.load * everything.measured["tokens_per_s"] / mean_out
    poisson = Unseen.run(
        driver, f"poisson, {rate:.2f} a second", items, Arrivals("poisson", rate, seed=7), args.repeats
    )
    measure_grid(*grid, 3)
    return everything, poisson


def main(argv: Sequence[str] | None = None) -> int:
    """Print and append one line; 1 if a prediction is further off than it may be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nemo-tiny")
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES))
    parser.add_argument("--inputs", type=int, nargs="*", default=list(INPUTS))
    parser.add_argument("--joining", type=int, default=40, help="requests of the grid's Poisson arrivals")
    parser.add_argument("--requests", type=int, default=150, help="of each unseen workload")
    parser.add_argument("--repeats", type=int, default=3, help="of each by the engine")
    parser.add_argument("--load", type=float, default=0.7, help="of the Poisson arrivals, as a part of the throughput")
    parser.add_argument(
        "--save-model", type=Path, help="the fitted cost model, for `nemo-engine simulate --cost-model`"
    )
    parser.add_argument("--save-steps", type=Path, help="every measured step, a JSON list a line")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with Engine(args.model, device="cpu", skip_tokenizer_init=True, **ENGINE) as engine:
        driver = Driver(engine)
        unseen = measure(driver, args)
        shape = EngineShape(
            engine.stats().num_pages, engine.config.page_size, engine.config.max_num_seqs,
            engine.config.tokens_per_step, engine.max_model_len, engine.config.enable_prefix_caching, 1,
        )  # fmt: skip
    if args.save_steps is not None:
        args.save_steps.write_text("".join(json.dumps(m) + "\n" for m in driver.measurements))
    model = CostModel.fit(driver.measurements, {"model": args.model, **ENGINE, **provenance("torch")})
    print({name: model.facts[name] for name in ("num_measurements", "median_error", "p90_error")})
    if args.save_model is not None:
        model.save(args.save_model)
    everything, poisson = [workload.compare(model, shape) for workload in unseen]
    is_good = (
        abs(everything["throughput_error"]) <= MOST_THROUGHPUT_ERROR
        and abs(poisson["throughput_error"]) <= MOST_THROUGHPUT_ERROR
        and abs(poisson["ttft_error"]) <= MOST_TTFT_ERROR
    )
    record = {
        "benchmark": "validate_simulator", "model": args.model, "is_within_limits": is_good, "most_throughput_error":
        MOST_THROUGHPUT_ERROR, "most_ttft_error": MOST_TTFT_ERROR, "workloads": [everything, poisson], "fit": {k:
        model.facts[k] for k in ("num_measurements", "median_error", "p90_error")}, "unseen": UNSEEN, "engine": ENGINE,
        **provenance("torch"),
    }  # fmt: skip
    for result in (everything, poisson):
        print(
            f"{result['workload']:<28} tokens/s {result['measured']['tokens_per_s']:8.0f}, predicted "
            f"{result['predicted']['tokens_per_s']:8.0f} ({result['throughput_error']:+.1%}); median TTFT "
            f"{result['measured']['median_ttft_s'] * 1e3:8.1f} ms, predicted "
            f"{result['predicted']['median_ttft_s'] * 1e3:8.1f} "
            f"({result['ttft_error']:+.1%})"
        )
    print("within the limits" if is_good else "NOT within the limits")
    append_record(args.json, record)
    return int(not is_good)


if __name__ == "__main__":
    sys.exit(main())
