"""``nemo-engine bench scheduler``: host cost of a decode step: microseconds of ``schedule()`` plus ``commit()`` with n
running requests, without a model.

Every request has a prompt of --prompt-len tokens, an end-of-sequence id, a stop token id and prefix caching; each step
gives one token to each. Only the two calls are timed, over steps in which all n decode; page boundaries fall where they
fall. With --vllm, vLLM's own scheduler and KV cache manager do the same under that Python, prefix caching on, in the
same rounds in turns.

    nemo-engine bench scheduler --vllm /path/to/python --json scheduler.jsonl
    nemo-engine bench scheduler --num-seqs 256 --profile
"""

from __future__ import annotations

import argparse
import gc
import inspect
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from nemo_engine.benchmarks.common import Progress
from nemo_engine.benchmarks.models import open_model
from nemo_engine.benchmarks.peers import PeerError, WorkerProcess, why_missing
from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.benchmarks.report.results import Ratio, Record, percentiles
from nemo_engine.benchmarks.stage_times import StageTimes, format_rows
from nemo_engine.cli.values import add_list
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.scheduler import Request, Scheduler
from nemo_engine.step import StepResult

GOALS = {256: 150.0, 1024: 600.0}  # microseconds, median
_BUDGET = 8192  # tokens a step may compute
# Whose methods a profile times.
_MODULES = ("scheduler", "running", "kv_manager", "page_pool", "waiting", "scheduled_step", "token_rules")
_ADAPTER = "vllm_scheduler.py"
Rounds = list[list[float]]  # microseconds of each step, by round


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    add_list(
        parser,
        "--num-seqs",
        int,
        "whole numbers",
        default=[1, 64, 256, 1024],
        metavar="N",
        help="running requests [1 64 256 1024]",
    )
    add_list(parser, "--page-sizes", int, "whole numbers", default=[64, 16], metavar="N", help="ours [64 16]")
    parser.add_argument("--prompt-len", type=int, default=1024, metavar="N", help="tokens of each prompt [1024]")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="timed steps of a round [60]")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds, in turns with vLLM's [5]")
    parser.add_argument(
        "--vllm", metavar="PYTHON", help="the Python that has vLLM, to measure its scheduler beside ours"
    )
    parser.add_argument("--vllm-block", type=int, default=16, metavar="N", help="tokens of vLLM's blocks [16]")
    parser.add_argument("--profile", action="store_true", help="also where the time of a step of ours goes, as a table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to FILE, a line each")
    parser.add_argument("--log", type=Path, metavar="FILE", help="what vLLM prints goes to FILE")


class DecodeLoop:
    """n requests of ours that decode. ``num_steps`` of them at most."""

    def __init__(self, num_seqs: int, prompt_len: int, page_size: int, num_steps: int) -> None:
        self._rng = random.Random(0)
        self._num_seqs = num_seqs
        max_tokens = longest_output(num_seqs, prompt_len, num_steps)
        self.scheduler = Scheduler(
            num_pages=num_seqs * ((prompt_len + max_tokens) // page_size + 2),
            page_size=page_size,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=_BUDGET,
            max_model_len=prompt_len + max_tokens,
        )
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, stop_token_ids=[3])
        for index in range(num_seqs):
            prompt = [self._rng.randrange(4, 16000) for _ in range(prompt_len)]
            self.scheduler.add(Request(f"r{index}", prompt, params, eos_token_ids=frozenset([2])))
        while not self._step()[1]:
            pass

    def steps(self, count: int) -> list[float]:
        """Microseconds of each of ``count`` steps in which all decode."""
        times: list[float] = []
        gc.collect()
        gc.freeze()
        while len(times) < count:
            microseconds, is_decode = self._step()
            if is_decode:
                times.append(microseconds)
        gc.unfreeze()
        return times

    def _step(self) -> tuple[float, bool]:
        start = time.perf_counter()
        plan = self.scheduler.schedule()
        planned = time.perf_counter()
        assert plan is not None
        count = len(plan.decode_slots) + sum(row.samples for row in plan.prefills)
        result = StepResult(plan.step_id, [self._rng.randrange(4, 16000) for _ in range(count)])
        resumed = time.perf_counter()
        self.scheduler.commit(result)
        end = time.perf_counter()
        return (planned - start + end - resumed) * 1e6, len(plan.decode_slots) == self._num_seqs


def longest_output(num_seqs: int, prompt_len: int, num_steps: int) -> int:
    """Tokens after which no request has ended when ``num_steps`` steps in which all decode are done: the first decode
    while the last prompts come.
    """
    return num_steps + 2 * (num_seqs * prompt_len // _BUDGET + num_seqs // _BUDGET + 1) + 8


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, store; 1 if vLLM's failed."""
    for name in ("num_seqs", "page_sizes", "prompt_len", "steps", "rounds", "vllm_block"):
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.vllm and (missing := why_missing("vllm", args.vllm)):
        raise ValueError(f"--vllm {args.vllm!r}: {missing}")
    facts = provenance("nemo-engine")
    has_failed = False
    with ExitStack() as stack:
        vllm = None
        if args.vllm:
            vllm = WorkerProcess("vllm", args.vllm, _ADAPTER, log=args.log)
            stack.callback(vllm.close)
        print("engine       requests  page  median us (rounds)              p90 us    p99 us  us/request   goal")
        progress = stack.enter_context(Progress(len(args.num_seqs) * args.rounds, "rounds"))
        for num_seqs in args.num_seqs:
            for record in measure(args, num_seqs, vllm, progress):
                has_failed |= record["status"] == "failed"
                print(format_record(record), flush=True)
                append_record(args.json, record | facts)
    return int(has_failed)


def measure(
    args: argparse.Namespace, num_seqs: int, vllm: WorkerProcess | None, progress: Progress
) -> Iterator[Record]:
    """A record for each page size of ours, then one of vLLM's."""
    total = args.steps * (args.rounds + 1)
    loops = {page: DecodeLoop(num_seqs, args.prompt_len, page, total) for page in args.page_sizes}
    ours: dict[int, Rounds] = {page: [] for page in loops}
    theirs: dict[str, Rounds] = {"schedule_us": [], "update_us": []}
    error, versions = None, {}
    common: Record = {
        "benchmark": "scheduler",
        "num_seqs": num_seqs,
        "prompt_len": args.prompt_len,
        "steps": args.steps,
        "rounds": args.rounds,
    }
    try:
        if vllm is not None:
            setup = {"model": str(open_model("nemo-tiny").path), "num_seqs": num_seqs, "prompt_len": args.prompt_len}
            max_tokens = longest_output(num_seqs, args.prompt_len, total)
            versions = vllm.ask(do="setup", **setup, block_size=args.vllm_block, max_tokens=max_tokens)["versions"]
    except PeerError as failure:
        error = str(failure)
    for number in range(args.rounds + 1):  # the first warms up
        try:
            if vllm is not None and error is None:
                answer = vllm.ask(do="steps", count=args.steps)
                for key, rounds in theirs.items():
                    rounds += [answer[key]] if number else []
        except PeerError as failure:
            error = str(failure)
        for page, loop in loops.items():
            taken = loop.steps(args.steps)
            ours[page] += [taken] if number else []
        progress.step(bool(number))
    for page, rounds in ours.items():
        record = {**common, "engine": "nemo_engine", "status": "ok", "page_size": page, **_times(rounds)}
        if num_seqs in GOALS:
            record["goal_us"] = GOALS[num_seqs]
        yield record | (profile(num_seqs, args.prompt_len, page, args.steps) if args.profile else {})
    if vllm is not None:
        yield {
            **common,
            "engine": "vllm",
            "page_size": args.vllm_block,
            "versions": versions,
            **_vllm_record(ours, theirs, error),
        }


def _vllm_record(ours: dict[int, Rounds], theirs: dict[str, Rounds], error: str | None) -> Record:
    """vLLM's times, and how many times faster ours are at each page size, round by round."""
    if error is not None:
        return {"status": "failed", "error": error}
    sums = [[a + b for a, b in zip(*both)] for both in zip(theirs["schedule_us"], theirs["update_us"])]
    faster = []
    for page, rounds in ours.items():
        ratio = Ratio.paired(
            [statistics.median(values) for values in sums], [statistics.median(values) for values in rounds]
        )
        faster.append({"page_size": page, "median": ratio.median, "interval": [ratio.low, ratio.high]})
    parts = {key: statistics.median([value for values in rounds for value in values]) for key, rounds in theirs.items()}
    return {"status": "ok", **_times(sums), **parts, "nemo_engine_faster_by": faster}


def _times(rounds: Rounds) -> Record:
    quantiles = percentiles([value for values in rounds for value in values], (50, 90, 99))
    medians = [statistics.median(values) for values in rounds]
    return {
        "median_us": quantiles["p50"],
        "p90_us": quantiles["p90"],
        "p99_us": quantiles["p99"],
        "round_medians_us": medians,
    }


@contextmanager
def timed_scheduler(stages: StageTimes) -> Iterator[None]:
    """While it lasts, every method of the scheduler's classes has a timer; properties and functions count as their
    callers'.
    """
    patched: list[tuple[type, str, Any]] = []
    for module in (import_module(f"nemo_engine.scheduler.{name}") for name in _MODULES):
        for cls in (
            member for _, member in inspect.getmembers(module, inspect.isclass) if member.__module__ == module.__name__
        ):
            for name, function in list(vars(cls).items()):
                if inspect.isfunction(function) and not name.startswith("__"):
                    patched.append((cls, name, function))
                    setattr(cls, name, stages.wrap(f"{cls.__name__}.{name}", function))
    try:
        yield
    finally:
        for cls, name, function in patched:
            setattr(cls, name, function)


def profile(num_seqs: int, prompt_len: int, page_size: int, count: int) -> Record:
    """{"profile": rows, "profiled_us_per_step": the mean step with timers, "unprofiled_us_per_step": without}."""
    loop, stages = DecodeLoop(num_seqs, prompt_len, page_size, 2 * count), StageTimes()
    plain = loop.steps(count)
    with timed_scheduler(stages):
        timed = loop.steps(count)
    rows = stages.rows(count, sum(timed) / 1e6)
    return {
        "profile": rows, "profiled_us_per_step": statistics.fmean(timed), "unprofiled_us_per_step":
        statistics.fmean(plain),
    }  # fmt: skip


def format_record(record: Record) -> str:
    """A line of the table; several with a profile."""
    head = f"{record['engine']:12} {record['num_seqs']:8d} {record['page_size']:5d}"
    if record["status"] != "ok":
        return f"{head}  {record['status']}: {record['error']}"
    medians = record["round_medians_us"]
    spread = f"{record['median_us']:.1f} ({min(medians):.1f} to {max(medians):.1f})"
    goal = f"{record['goal_us']:.0f}" if "goal_us" in record else "-"
    text = (
        f"{head}  {spread:<28} {record['p90_us']:9.1f} {record['p99_us']:9.1f} "
        f"{record['median_us'] / record['num_seqs']:11.3f} {goal:>6}"
    )
    for faster in record.get("nemo_engine_faster_by", []):
        low, high = faster["interval"]
        text += (
            f"\n  nemo_engine with pages of {faster['page_size']} is {faster['median']:.1f}x as fast ({low:.1f} to "
            f"{high:.1f})"
        )
    if "profile" in record:
        text += (
            f"\na step takes {record['unprofiled_us_per_step']:.1f} us in the mean, with timers "
            f"{record['profiled_us_per_step']:.1f}\n"
        )
        text += format_rows(record["profile"])
    return text
