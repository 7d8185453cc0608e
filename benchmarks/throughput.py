"""``nemo-engine bench throughput``: whole workloads offline, ours and every peer in turns: tokens per second, ratios,
equal outputs.

Each engine runs in a process of its own and stays loaded; in every round each computes the same workload once, in an
order that changes from round to round, while the others rest. The first rounds warm up. --concurrency limits how many
requests run at once, for every engine alike; of several values each is measured for itself. Prefix caches are on where
an engine has one, and emptied after every round. Conversations run turn after turn: all first turns, then all second
ones after the engine's own answers; times to think are left out.

Token counts must be those asked for. Greedy outputs are compared token by token; in bf16 two right engines part ways at
near-ties, so the share of equal tokens before the first difference is told, and nothing is concluded from it. An engine
that fails is reported with its error, and the others go on.

    nemo-engine bench throughput nemo-tiny --peers transformers vllm=/opt/vllm/bin/python --concurrency 1 16 64 \\
        --synthetic requests=64,input=uniform:16:256,output=128 --option vllm.enforce_eager=true --json throughput.jsonl
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from nemo_engine.benchmarks.common import (
    PeerSetup,
    Progress,
    add_common_arguments,
    add_workload_arguments,
    peer_setups,
    workload_facts,
    workload_of,
)
from nemo_engine.benchmarks.gpu_meter import GpuMeter
from nemo_engine.benchmarks.models import BenchModel, open_model
from nemo_engine.benchmarks.peers import PEERS, PeerError, PeerProcess, why_missing
from nemo_engine.benchmarks.prompts import TokenPrompts
from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.benchmarks.report.results import Ratio, Record, Spread
from nemo_engine.cli.files import check_writable
from nemo_engine.cli.values import add_list, seconds
from nemo_engine.workload import Item

if TYPE_CHECKING:
    from nemo_engine.config import EngineConfig
    from nemo_engine.planner.roofline import Roofline

OURS = "nemo_engine"
Tokens = list[list[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    add_common_arguments(parser)
    add_workload_arguments(parser)
    add_list(
        parser,
        "--concurrency",
        int,
        "whole numbers",
        metavar="N",
        help="requests that run at once, in every engine; several are measured one after another [each engine's own "
        "limit]",
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds that count [5]")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="rounds before them, not counted [1]")
    parser.add_argument(
        "--timeout", type=seconds, default=1800.0, metavar="TIME", help="for an engine to start, or for a round [1800s]"
    )


@dataclass(slots=True)
class Work:
    """What every engine computes in a round: turn after turn of all items."""

    items: Sequence[Item]
    prompts: TokenPrompts

    @property
    def new_tokens(self) -> int:
        """Output tokens of a round."""
        return sum(item.output_tokens for item in self.items)

    def run(self, peer: PeerProcess) -> tuple[float, Tokens]:
        """(seconds, all answers of each item, joined). ``PeerError`` for a wrong number of tokens."""
        answers: list[Tokens] = [[] for _ in self.items]
        seconds, num_turns = 0.0, max(len(item.turns) for item in self.items)
        for turn in range(num_turns):
            who = [index for index, item in enumerate(self.items) if len(item.turns) > turn]
            max_tokens = [self.items[index].turns[turn].output_tokens for index in who]
            prompts = [self.prompts.prompt(self.items[index], turn, answers[index]) for index in who]
            took, outputs = peer.generate(prompts, max_tokens, keep=turn + 1 < num_turns)
            if len(outputs) != len(max_tokens):
                raise PeerError(f"{len(outputs)} answers came to {len(max_tokens)} prompts")
            for index, count, tokens in zip(who, max_tokens, outputs):
                if len(tokens) != count:
                    name = self.items[index].request_id
                    raise PeerError(f"request {name!r} has {len(tokens)} new tokens, and {count} were asked for")
                answers[index].append(tokens)
            seconds += took
        return seconds, [[token for one in turns for token in one] for turns in answers]


@dataclass(slots=True)
class Measured:
    """An engine of one point: its process while it works, then its rounds, or why there are none."""

    setup: PeerSetup
    peer: PeerProcess | None = None
    seconds: list[float] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    outputs: Tokens = field(default_factory=list)
    status: str = "ok"
    error: str = ""
    started: Record = field(default_factory=dict)

    def fail(self, status: str, error: str) -> None:
        """No number of it counts any more."""
        self.status, self.error = status, error
        self.seconds.clear()
        print(f"{self.setup.name}: {'FAILED' if status == 'failed' else status}, {error}", file=sys.stderr)
        self.close()

    def close(self) -> None:
        """End its process."""
        if self.peer is not None:
            self.peer.close()
        self.peer = None


def run(args: argparse.Namespace) -> int:
    """Measure, print and store; 1 if an engine failed."""
    _check(args)
    model = open_model(args.model)
    setups = peer_setups(args)
    work = Work(workload_of(args), TokenPrompts(model.path, model.vocab_size))
    work.prompts.check(work.items)
    points = args.concurrency or [None]
    config = _own_config(setups[0], points)
    roofline, facts = _roofline(model, config)
    print(f"{len(work.items)} requests, {work.new_tokens} new tokens, {args.rounds} rounds")
    has_failed = False
    with Progress(len(points) * (args.rounds + args.warmup), "rounds") as progress:
        for concurrency in points:
            outputs = _point(args, model, setups, work, concurrency, progress)
            num_turns = concurrency or config.max_num_seqs
            for record in _records(
                args, work, outputs, concurrency, ideal_seconds(roofline, work.items, num_turns), facts
            ):
                has_failed |= record["status"] == "failed"
                print(format_record(record), flush=True)
                append_record(args.json, record)
    return int(has_failed)


def _check(args: argparse.Namespace) -> None:
    for name, least in (("concurrency", 1), ("rounds", 1), ("warmup", 0)):
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
    check_writable("--log", args.log)


def _own_config(ours: PeerSetup, points: Sequence[int | None]) -> EngineConfig:
    """Our options, checked before anything is started."""
    from nemo_engine.config import EngineConfig

    try:
        configs = [EngineConfig(**_options(ours, point)) for point in points]
    except TypeError as error:
        raise ValueError(f"--option {OURS}: {str(error).partition(') ')[2] or error}") from None
    return configs[0]


def _options(setup: PeerSetup, concurrency: int | None) -> Record:
    """An engine's options with its limit of requests at once."""
    if concurrency is None:
        return setup.options
    name = PEERS[setup.name].concurrency
    if name in setup.options:
        raise ValueError(f"--option {setup.name}.{name} and --concurrency say the same: give one of them")
    return {**setup.options, name: concurrency}


def _roofline(model: BenchModel, config: EngineConfig) -> tuple[Roofline, Record]:
    """The least times on this device, and its ceilings, measured before any engine takes memory."""
    import torch

    from nemo_engine.benchmarks import rooflines
    from nemo_engine.benchmarks.timing import measure_ceilings, timer_for
    from nemo_engine.checkpoint.checkpoint import open_checkpoint

    is_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if is_cuda else "cpu")
    ceilings = measure_ceilings(timer_for(device), device)
    if is_cuda:
        torch.cuda.empty_cache()
    shape = open_checkpoint(model.path, needs="config").model_config
    roofline = rooflines.measured_roofline(model.path, shape, config, ceilings)
    return roofline, {"device": device.type, "ceilings": asdict(ceilings)}


def _point(
    args: argparse.Namespace,
    model: BenchModel,
    setups: Sequence[PeerSetup],
    work: Work,
    concurrency: int | None,
    progress: Progress,
) -> list[Measured]:
    """All engines at one concurrency, in turns."""
    measured = [
        Measured(PeerSetup(peer_run.name, peer_run.python, _options(peer_run, concurrency))) for peer_run in setups
    ]
    meter = GpuMeter()
    with ExitStack() as stack:
        for peer_run in measured:
            stack.callback(peer_run.close)
            _start(peer_run, model, args)
        for number in range(args.warmup + args.rounds):
            running = [peer_run for peer_run in measured if peer_run.peer is not None]
            first = number % max(1, len(running))
            for peer_run in running[first:] + running[:first]:
                assert peer_run.peer is not None
                before = meter.joules()
                try:
                    seconds, outputs = work.run(peer_run.peer)
                except PeerError as error:
                    peer_run.fail("failed", str(error))
                    continue
                after = meter.joules()
                peer_run.outputs = outputs
                if number >= args.warmup:
                    peer_run.seconds.append(seconds)
                    if before is not None and after is not None:
                        peer_run.joules.append(after - before)
            progress.step()
    return measured


def _start(peer_run: Measured, model: BenchModel, args: argparse.Namespace) -> None:
    missing = why_missing(peer_run.setup.name, peer_run.setup.python)
    if missing is not None:
        peer_run.fail("missing", missing)
        return
    try:
        peer_run.peer = PeerProcess(
            peer_run.setup.name, str(model.path), peer_run.setup.options, peer_run.setup.python, args.log, args.timeout
        )
    except PeerError as error:
        peer_run.fail("failed", str(error))
        return
    peer_run.started = {name: value for name, value in peer_run.peer.started.items() if name != "ok"}


def _records(
    args: argparse.Namespace,
    work: Work,
    measured: Sequence[Measured],
    concurrency: int | None,
    ideal: float,
    facts: Record,
) -> list[Record]:
    """A result of each engine; those of others with how they compare with ours."""
    ours = measured[0]
    common: Record = {
        "benchmark": "throughput",
        "model": args.model,
        "workload": workload_facts(args, work.items),
        "concurrency": concurrency,
        "rounds": args.rounds,
        "warmup": args.warmup,
    }
    records = []
    for peer_run in measured:
        record: Record = {
            **common,
            "engine": peer_run.setup.name,
            "options": peer_run.setup.options,
            "status": peer_run.status,
        }
        if peer_run.status != "ok":
            record["error"] = peer_run.error
        else:
            record["tokens_per_second"] = [work.new_tokens / seconds for seconds in peer_run.seconds]
            if peer_run.joules:
                record["joules_per_token"] = [joules / work.new_tokens for joules in peer_run.joules]
        if peer_run.started:
            record["versions"] = peer_run.started["versions"]
            record["start"] = {name: value for name, value in peer_run.started.items() if name.endswith("_seconds")}
        if peer_run is ours and peer_run.seconds:
            record["roofline_seconds"] = ideal
            record["roofline_fraction"] = ideal / statistics.median(peer_run.seconds)
        elif peer_run.seconds and ours.seconds:
            ratio = Ratio.paired(peer_run.seconds, ours.seconds)
            record["nemo_engine_faster_by"] = {"median": ratio.median, "interval": [ratio.low, ratio.high]}
            record["equal_before_first_difference"] = agreement(ours.outputs, peer_run.outputs)
        records.append(record | facts | provenance("nemo-engine", "torch"))
    return records


def ideal_seconds(roofline: Roofline, items: Sequence[Item], concurrency: int) -> float:
    """The least time of a round: every step at the roofline, prefixes and earlier turns computed once, a place filled
    as soon as it is free.
    """
    total, seen = 0.0, set[str]()
    known = [0] * len(items)  # tokens of each conversation whose keys and values are there
    for turn in range(max(len(item.turns) for item in items)):
        waiting: list[tuple[int, int, int]] = []  # tokens that are known, tokens to compute, tokens to come
        for index, item in enumerate(items):
            if len(item.turns) <= turn:
                continue
            one, new = item.turns[turn], item.turns[turn].num_tokens or 0
            if not turn and item.prefix is not None:
                known[index] = item.prefix_tokens if item.prefix in seen else 0
                new += item.prefix_tokens - known[index]
                seen.add(item.prefix)
            waiting.append((known[index], new, one.output_tokens))
            known[index] += new + one.output_tokens
        total += _ideal_wave(roofline, waiting[::-1], concurrency)
    return total


def _ideal_wave(roofline: Roofline, waiting: list[tuple[int, int, int]], concurrency: int) -> float:
    running: list[list[int]] = []  # [context, tokens to come] of each
    seconds = 0.0
    while waiting or running:
        new = [waiting.pop() for _ in range(min(concurrency - len(running), len(waiting)))]
        context = sum(state[0] for state in running) + len(running)
        seconds += roofline.step_seconds(len(running), context, [(start, count) for start, count, _ in new])
        running = [[known + 1, left - 1] for known, left in running if left > 1]
        running += [[start + count, out - 1] for start, count, out in new if out > 1]
    return seconds


def agreement(ours: Tokens, theirs: Tokens) -> float:
    """The share of tokens that stand before the first difference of their request."""
    equal = total = 0
    for a, b in zip(ours, theirs, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))
        equal, total = equal + same, total + len(a)
    return equal / max(1, total)


def format_record(record: Record) -> str:
    """A line for people."""
    head = f"{record['engine']:22}"
    if record["concurrency"] is not None:
        head += f" {record['concurrency']:4} at once"
    if record["status"] != "ok":
        return f"{head}  {record['status']}: {record['error']}"
    line = f"{head}  {Spread.of(record['tokens_per_second'])} tokens/s"
    if "roofline_fraction" in record:
        line += f"   {record['roofline_fraction']:.1%} of the roofline"
    if "joules_per_token" in record:
        line += f"   {statistics.median(record['joules_per_token']):.3g} J/token"
    if "nemo_engine_faster_by" in record:
        faster = record["nemo_engine_faster_by"]
        low, high = faster["interval"]
        line += f"   nemo_engine is {faster['median']:.2f}x ({low:.2f} to {high:.2f})"
        line += f"   {record['equal_before_first_difference']:.0%} of tokens equal before the first difference"
    return line
