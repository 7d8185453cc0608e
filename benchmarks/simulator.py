"""How fast the simulator is: steps, requests and tokens a second of one core, by how many requests run at once and how
long answers are.

A step is counted when it is committed, whether it was planned or passed over because nothing but decoding and new pages
is due; the cost of each is evaluated. The workload is made before the clock starts, which is the process's own time, so
that other programs do not count. One replica: with several the steps of all are added up. Mistral NeMo in FP8 on an
H200 by its roofline.

python benchmarks/simulator.py --json benchmarks/results/NAME.jsonl
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.config import EngineConfig
from nemo_engine.memory_plan import plan_kv_cache
from nemo_engine.planner.efficiency import Efficiencies
from nemo_engine.planner.gpus import find_gpu
from nemo_engine.planner.models import BUILT_IN, PlannedModel, formats_of
from nemo_engine.planner.roofline import Roofline
from nemo_engine.simulator import EngineShape, Results, Setting, simulate
from nemo_engine.workload import Arrivals, WorkloadSpec, generate

WORKLOADS = {
    "100 tokens out": "input=500,output=uniform:80:120",
    "400 tokens out": "input=500,output=uniform:320:480",
    "2000 tokens out": "input=128,output=uniform:1000:3000",
}
GOAL = 50_000  # steps a second


def measure(text: str, requests: int, concurrency: int) -> tuple[Results, float]:
    """One run in a closed loop, and its CPU seconds."""
    config = EngineConfig(quantization="fp8", kv_cache_dtype="fp8", max_num_seqs=max(256, concurrency))
    model, gpu = PlannedModel("nemo", BUILT_IN["nemo"]), find_gpu("h200")
    formats = formats_of(model, config)
    num_pages, max_model_len, _ = plan_kv_cache(model.config, config, formats.sizes, gpu.free_bytes)
    shape = EngineShape(
        num_pages, config.page_size, config.max_num_seqs, config.tokens_per_step, max_model_len, True, 2
    )
    setting = Setting(shape, Roofline.of(model.config, formats, gpu, Efficiencies()))
    items = list(generate(WorkloadSpec.parse_text(f"requests={requests},{text}", "workload")))
    started = time.process_time()
    results = simulate(items, Arrivals("closed", concurrency=concurrency), setting)
    return results, time.process_time() - started


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table; ``--json`` appends a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 16, 64, 256])
    parser.add_argument("--requests", type=int, default=4000, help="of each run")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median counts")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    facts = provenance()
    print(
        f"{'workload':<18} {'at once':>8} {'steps':>9} {'steps/s':>10} {'requests/s':>11} {'tokens/s':>11} {'MiB':>5}"
    )
    for name, text in WORKLOADS.items():
        for concurrency in args.concurrency:
            runs = [measure(text, args.requests, concurrency) for _ in range(args.repeats)]
            results, cpu = runs[0][0], statistics.median(seconds for _, seconds in runs)
            mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            steps, requests = results.num_steps / cpu, results.num_finished / cpu
            tokens = results.output_tokens_per_s * results.duration_s / cpu
            mark = "" if steps >= GOAL else f"  below {GOAL:,}"
            print(
                f"{name:<18} {concurrency:>8} {results.num_steps:>9} {steps:>10,.0f} {requests:>11,.0f} "
                f"{tokens:>11,.0f} {mib:>5.0f}{mark}"
            )
            record = {
                "benchmark": "simulator", "workload": text, "concurrency": concurrency, "requests": args.requests,
                "steps": results.num_steps, "cpu_s": cpu, "cpu_s_of_runs": [seconds for _, seconds in runs],
                "steps_per_s": steps, "requests_per_s": requests, "tokens_per_s": tokens, "goal_steps_per_s": GOAL,
                "peak_mib": mib, **facts,
            }  # fmt: skip
            append_record(args.json, record)


if __name__ == "__main__":
    main()
