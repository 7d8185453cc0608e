"""Host cost of a decode step: microseconds of ``schedule()`` plus ``commit()`` with n running requests, without a model.

Every request has a prompt of 1024 tokens, an end-of-sequence id, a stop token id and prefix caching; each step gives one token to
each. Only the two calls are timed, over steps in which all n decode; page boundaries fall where they fall.

    python benchmarks/scheduler.py --json benchmarks/results/NAME.jsonl
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.scheduler import Request, Scheduler
from nemo_engine.step import StepResult

GOALS = {256: 150.0, 1024: 600.0}  # microseconds, median


def measure(num_seqs: int, prompt_len: int, page_size: int, steps: int) -> list[float]:
    """Microseconds of each of ``steps`` decode steps."""
    rng = random.Random(0)
    scheduler = Scheduler(
        num_pages=num_seqs * ((prompt_len + 2 * steps) // page_size + 2),
        page_size=page_size,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=8192,
        max_model_len=131072,
    )
    params = SamplingParams(temperature=0.0, max_tokens=2 * steps, stop_token_ids=[3])
    for index in range(num_seqs):
        prompt = [rng.randrange(4, 16000) for _ in range(prompt_len)]
        scheduler.add(Request(f"r{index}", prompt, params, eos_token_ids=frozenset([2])))
    times: list[float] = []
    gc.collect()
    gc.freeze()
    while len(times) < steps:
        start = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        assert plan is not None
        count = len(plan.decode_slots) + sum(row.samples for row in plan.prefills)
        result = StepResult(plan.step_id, [rng.randrange(4, 16000) for _ in range(count)])
        resumed = time.perf_counter()
        scheduler.commit(result)
        end = time.perf_counter()
        if len(plan.decode_slots) == num_seqs:
            times.append((planned - start + end - resumed) * 1e6)
    gc.unfreeze()
    return times


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table; ``--json`` appends one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seqs", type=int, nargs="*", default=[1, 64, 256, 1024])
    parser.add_argument("--page-sizes", type=int, nargs="*", default=[64, 16])
    parser.add_argument("--prompt-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    facts = provenance()
    print("requests  page  median us  p90 us  p99 us  us per request  goal")
    for page_size in args.page_sizes:
        for num_seqs in args.num_seqs:
            times = sorted(measure(num_seqs, args.prompt_len, page_size, args.steps))
            median, p90, p99 = statistics.median(times), times[len(times) * 9 // 10], times[len(times) * 99 // 100]
            goal = f"{GOALS[num_seqs]:.0f}" if num_seqs in GOALS else "-"
            print(
                f"{num_seqs:8d} {page_size:5d} {median:10.1f} {p90:7.1f} {p99:7.1f} {median / num_seqs:15.3f} {goal:>5s}"
            )
            record = {
                "benchmark": "scheduler", "num_seqs": num_seqs, "page_size": page_size, "prompt_len": args.prompt_len,
                "steps": args.steps, "median_us": median, "p90_us": p90, "p99_us": p99, **facts,
            }  # fmt: skip
            append_record(args.json, record)


if __name__ == "__main__":
    main()
