"""How fast the simulator is: steps and requests a second of one core, by how many requests run at once; Mistral NeMo in FP8 on an H200 by its roofline.

python benchmarks/simulator.py --json benchmarks/results/NAME.jsonl
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.config import EngineConfig
from nemo_engine.planner.efficiency import Efficiencies
from nemo_engine.planner.gpus import find_gpu
from nemo_engine.planner.memory import plan_kv_cache
from nemo_engine.planner.models import BUILT_IN, PlannedModel, formats_of
from nemo_engine.planner.roofline import Roofline
from nemo_engine.simulator import EngineShape, Results, Setting, simulate
from nemo_engine.workload import Arrivals, WorkloadSpec, generate

WORKLOADS = {
    "500 in, 500 out": "input=500,output=500",
    "mixed lengths": "input=lognormal:800:0.8:16:8000,output=lognormal:250:0.6:8:2000",
    "short prompts, long answers": "input=128,output=uniform:1000:3000",
}


def measure(text: str, requests: int, concurrency: int) -> Results:
    """One run in a closed loop."""
    config = EngineConfig(quantization="fp8", kv_cache_dtype="fp8", max_num_seqs=max(256, concurrency))
    model, gpu = PlannedModel("nemo", BUILT_IN["nemo"]), find_gpu("h200")
    formats = formats_of(model, config)
    num_pages, max_model_len, _ = plan_kv_cache(model.config, config, formats.sizes, gpu.free_bytes)
    shape = EngineShape(
        num_pages, config.page_size, config.max_num_seqs, config.max_num_batched_tokens, max_model_len, True, 2
    )
    cost = Roofline.of(model.config, formats, gpu, Efficiencies())
    spec = WorkloadSpec.parse_text(f"requests={requests},{text}", "workload")
    return simulate(generate(spec), Arrivals("closed", concurrency=concurrency), Setting(shape, cost))


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table; ``--json`` appends a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 8, 32, 64, 256])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    facts = provenance()
    print(f"{'workload':<30} {'at once':>8} {'steps':>9} {'steps/s':>9} {'requests/s':>10} {'MiB':>6}")
    for name, text in WORKLOADS.items():
        for concurrency in args.concurrency:
            cpu = time.process_time()
            found = measure(text, args.requests, concurrency)
            cpu = time.process_time() - cpu  # one thread, so this is the wall's time on a quiet machine
            mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            steps_per_s, requests_per_s = found.num_steps / cpu, found.num_finished / cpu
            print(
                f"{name:<30} {concurrency:>8} {found.num_steps:>9} {steps_per_s:>9.0f} {requests_per_s:>10.0f} {mib:>6.0f}"
            )
            record = {
                "benchmark": "simulator", "workload": text, "concurrency": concurrency, "requests": args.requests,
                "steps": found.num_steps, "wall_s": found.wall_s, "cpu_s": cpu, "steps_per_s": steps_per_s, "requests_per_s": requests_per_s,
                "peak_mib": mib, **facts,
            }  # fmt: skip
            append_record(args.json, record)


if __name__ == "__main__":
    main()
