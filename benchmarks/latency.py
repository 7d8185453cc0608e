"""``nemo-engine bench latency``: how long a user waits: time to first token, between tokens, and for the whole answer,
over a grid.

Two kinds of point. A request point, of --batch x --input x --output: so many requests arrive at once; in each of
--rounds rounds every token is timed. A decode point, of --batch x --context: milliseconds of a step in which so many
requests decode at that context. Beside each stands the least time by the planner's roofline over ceilings that are
measured in the same run; on a CPU, weights that lie in a cache may pass it.

With --peers each of them computes the same prompts in the same rounds, in turns: up to the first token, and to the end.
Those two calls are timed of this engine too ("calls" in its results), and ratios compare calls. A point that fails is
reported with its error, and the others go on.

    nemo-engine bench latency nemo-tiny --batch 1 8 --input 128 --output 64 --json latency.jsonl
    nemo-engine bench latency nemo --batch 1 64 --context 1024 32768 --option kv_cache_dtype=fp8
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

from nemo_engine.benchmarks import rooflines
from nemo_engine.benchmarks.common import Progress, add_common_arguments, engine_config, peer_setups
from nemo_engine.benchmarks.driver import BatchTimes, Driver, summary
from nemo_engine.benchmarks.gpu_meter import EnergySpan, GpuMeter
from nemo_engine.benchmarks.models import BenchModel, open_model
from nemo_engine.benchmarks.peers import PeerError, PeerProcess, why_missing
from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.benchmarks.report.results import Ratio, Record
from nemo_engine.benchmarks.stage_times import format_rows
from nemo_engine.cli.values import add_list
from nemo_engine.planner.roofline import Roofline

OURS = "nemo_engine"
Calls = dict[
    str, list[tuple[float, float]]
]  # by engine, a pair for each round: seconds to the first token of all, and to the end


@dataclass(frozen=True, slots=True)
class Point:
    """What is measured together: ``batch`` requests of ``input`` and ``output`` tokens, or decoding at ``context``
    tokens.
    """

    batch: int
    input: int = 0
    output: int = 0
    context: int = 0

    def facts(self) -> Record:
        """Its fields of a record."""
        if self.context:
            return {"what": "decode", "batch": self.batch, "context": self.context}
        return {"what": "request", "batch": self.batch, "input": self.input, "output": self.output}

    def __str__(self) -> str:
        if self.context:
            return f"batch {self.batch:<4} decode at {self.context}"
        return f"batch {self.batch:<4} in {self.input:<6} out {self.output:<5}"


@dataclass(slots=True)
class Session:
    """An engine of ours, peers that run, and what every record of this run has."""

    driver: Driver
    roofline: Roofline
    facts: Record
    peers: dict[str, PeerProcess] = field(default_factory=dict)
    options: Mapping[str, Record] = field(default_factory=dict)
    meter: GpuMeter = field(default_factory=GpuMeter)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    add_common_arguments(parser)
    add_list(parser, "--batch", int, "whole numbers", default=[1], metavar="N", help="requests at once [1]")
    add_list(parser, "--input", int, "whole numbers", metavar="N", help="tokens of each prompt [128]")
    add_list(parser, "--output", int, "whole numbers", metavar="N", help="new tokens of each request [128]")
    add_list(parser, "--context", int, "whole numbers", metavar="N", help="decode at these contexts instead, or too")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="timed steps of a decode point [50]")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of a request point [5]")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="rounds before them, not counted [1]")
    parser.add_argument("--profile", action="store_true", help="also where the time of a decode step goes, as a table")


def grid_of(args: argparse.Namespace) -> list[Point]:
    """All points. ``ValueError`` naming an option that is out of range."""
    for name in ("batch", "input", "output", "context", "steps", "rounds", "warmup"):
        given = getattr(args, name)
        least = 0 if name == "warmup" else 1
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, got {value}")
    points = []
    if args.input or args.output or not args.context:
        lengths = [(i, o) for i in args.input or [128] for o in args.output or [128]]
        points += [Point(batch, i, o) for i, o in lengths for batch in args.batch]
    points += [Point(batch, context=context) for context in args.context or [] for batch in args.batch]
    if args.peers and not any(point.output for point in points):
        raise ValueError("--peers compares whole requests, and --context alone has none: give --input and --output")
    return points


def run(args: argparse.Namespace) -> int:
    """Measure, print and store; 1 if a point or a peer failed."""
    points = grid_of(args)
    model = open_model(args.model)
    setups = peer_setups(args)
    has_failed = False
    with ExitStack() as stack:
        session = _start(stack, args, model)
        for setup in setups[1:]:
            has_failed |= not _start_peer(stack, session, args, model, setup.name, setup.python)
        repeats = args.rounds + args.warmup
        total = sum(repeats if point.output else 1 for point in points)
        with Progress(total, "rounds") as progress:
            for point in points:
                for record in _measure(session, point, args, progress):
                    has_failed |= record["status"] == "failed"
                    print(format_record(record), flush=True)
                    append_record(args.json, record)
    return int(has_failed)


def _start(stack: ExitStack, args: argparse.Namespace, model: BenchModel) -> Session:
    """Ceilings first: an engine takes for its KV cache what is free."""
    import torch

    from nemo_engine import Engine
    from nemo_engine.benchmarks.timing import measure_ceilings, timer_for

    options = {"skip_tokenizer_init": True, "max_num_seqs": max(args.batch), **args.options[OURS]}
    config = engine_config(options)  # what is wrong with them is told before anything is measured
    is_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if is_cuda else "cpu")
    ceilings = measure_ceilings(timer_for(device), device)
    if is_cuda:
        torch.cuda.empty_cache()
    engine = stack.enter_context(Engine(model.path, **options))
    print(engine.startup_log.format())
    print(f"copy {ceilings.bytes_per_s / 1e9:.1f} GB/s, bf16 products {ceilings.bf16_flops_per_s / 1e12:.3f} TFLOP/s")
    facts = provenance("nemo-engine", "torch")
    facts |= {
        "model": model.name,
        "ceilings": asdict(ceilings),
        "device": device.type,
        "threads": torch.get_num_threads(),
    }
    if is_cuda:
        facts["gpu"] = torch.cuda.get_device_name()
    roofline = rooflines.measured_roofline(engine.model_path, engine.model_config, config, ceilings)
    return Session(Driver(engine), roofline, facts, options={**args.options, OURS: options})


def _start_peer(
    stack: ExitStack, session: Session, args: argparse.Namespace, model: BenchModel, name: str, python: str
) -> bool:
    """Whether it runs or is not there; False if it is there and failed. Either way a record says so."""
    missing = why_missing(name, python)
    record = {"benchmark": "latency", "what": "start", "engine": name, "options": session.options[name]}
    try:
        if missing is None:
            peer = PeerProcess(name, str(model.path), dict(session.options[name]), python, args.log)
            stack.callback(peer.close)
            session.peers[name] = peer
            return True
        record |= {"status": "missing", "error": missing}
    except PeerError as error:
        record |= {"status": "failed", "error": str(error)}
    print(f"{name}: {record['status']}, {record['error']}", file=sys.stderr)
    append_record(args.json, record | session.facts)
    return record["status"] == "missing"


def _measure(session: Session, point: Point, args: argparse.Namespace, progress: Progress) -> Iterator[Record]:
    """A record of ours, then one of each peer."""
    common = {"benchmark": "latency", **point.facts()}
    ours = {**common, "engine": OURS, "options": session.options[OURS]}
    energy = EnergySpan(session.meter)
    rounds: list[BatchTimes] = []
    calls: Calls = {}
    failed: dict[str, str] = {}
    try:
        if point.context:
            record = decode_record(session, point, args.steps)
            progress.step()
        else:
            session.driver.check_fits(point.batch, point.input, point.output)
            with energy:
                for number in range(args.warmup + args.rounds):
                    taken = _round(session, point, number, calls if number >= args.warmup else {}, failed)
                    rounds += [taken] if number >= args.warmup else []
                    progress.step()
            record = request_record(session, point, rounds)
            record["rounds"], record["warmup"] = args.rounds, args.warmup
            if OURS in calls:
                record["calls"] = call_times(point, calls[OURS])
            if not calls and not failed:  # no peer used the GPU meanwhile
                record |= energy.facts(point.batch * point.output * (args.rounds + args.warmup))
        if args.profile:
            record |= _profile(session, point, args.steps)
        yield {**ours, "status": "ok", **record, **session.facts}
    except (RuntimeError, ValueError) as error:
        yield {**ours, "status": "failed", "error": str(error).splitlines()[0], **session.facts}
    for name in [*calls, *failed]:
        if name != OURS:
            versions = {"versions": session.peers[name].versions} if name in session.peers else {}
            yield {
                **common,
                "engine": name,
                "options": session.options[name],
                **peer_record(point, name, calls, failed),
                **session.facts,
                **versions,
            }


def _round(session: Session, point: Point, number: int, calls: Calls, failed: dict[str, str]) -> BatchTimes:
    """Ours token by token; then, if there are peers, two calls of every engine in an order that changes from round to
    round.
    """
    prompts = session.driver.prompts(point.batch, point.input)
    times = session.driver.run(prompts, point.output)
    names = [OURS, *session.peers] if session.peers else []
    turn = number % max(1, len(names))
    for name in names[turn:] + names[:turn]:
        generate = session.driver.generate if name == OURS else session.peers[name].generate
        try:
            taken = []
            for count in (1, point.output):
                seconds, outputs = generate(prompts, [count] * point.batch)
                if [len(ids) for ids in outputs] != [count] * point.batch:
                    raise PeerError(
                        f"{count} new tokens were asked for, it gave {sorted({len(ids) for ids in outputs})}"
                    )
                taken.append(seconds)
            calls.setdefault(name, []).append((taken[0], taken[1]))
        except PeerError as error:
            failed[name] = str(error)
            calls.pop(name, None)
            session.peers.pop(name).close()
    return times


def request_record(session: Session, point: Point, rounds: list[BatchTimes]) -> Record:
    """Times of ours in seconds, and how near the prompts and the steps after them come to the least there is."""
    prefills = [max(times.first) for times in rounds]
    rates = [point.batch * point.output / max(times.last) for times in rounds]
    least = rooflines.prefill_seconds(session.roofline, point.batch, point.input)
    record = {
        "ttft_s": summary([times.first for times in rounds]), "e2e_s": summary([times.last for times in rounds]),
        "tokens_per_s": summary([[rate] for rate in rates]), "prefill_roofline_s": least,
        "prefill_fraction": least / statistics.median(prefills),
    }  # fmt: skip
    if point.output > 1:
        record |= {"itl_s": summary([t.gaps for t in rounds]), "tpot_s": summary([t.per_token for t in rounds])}
        least = rooflines.decode_seconds(session.roofline, point.batch, point.input + point.output / 2)
        record |= {"decode_roofline_s": least, "fraction": least / record["itl_s"]["median"]}
    return record


def decode_record(session: Session, point: Point, steps: int) -> Record:
    """Milliseconds of a step, and the fraction of the roofline."""
    energy = EnergySpan(session.meter)
    measured = session.driver.decode(point.batch, point.context, steps, energy)
    milliseconds = [seconds * 1e3 for seconds in measured.seconds]
    median = statistics.median(milliseconds)
    least = rooflines.decode_seconds(session.roofline, point.batch, measured.context) * 1e3
    return {
        "context": point.context, "mean_context": measured.context, "steps": steps, "ms_per_step": median,
        "step_s": summary([measured.seconds]), "tokens_per_s": point.batch * steps / sum(measured.seconds),
        "gb_per_step": rooflines.decode_bytes(session.roofline, point.batch, measured.context) / 1e9,
        "roofline_ms": least, "fraction": least / median, **energy.facts(point.batch * steps),
    }  # fmt: skip


def call_times(point: Point, taken: Sequence[tuple[float, float]]) -> Record:
    """Summaries of an engine's two calls: seconds to the first token of all, to the end, and for each token between;
    output tokens per second.
    """
    record: Record = {
        "ttft_s": summary([[first] for first, _ in taken]), "e2e_s": summary([[end] for _, end in taken]),
        "tokens_per_s": summary([[point.batch * point.output / end] for _, end in taken]),
    }  # fmt: skip
    if point.output > 1:
        record["tpot_s"] = summary([[(end - first) / (point.output - 1)] for first, end in taken])
    return record


def peer_record(point: Point, name: str, calls: Calls, failed: Mapping[str, str]) -> Record:
    """A peer's two calls, and how many times faster ours are."""
    if name in failed:
        return {"status": "failed", "error": failed[name]}
    theirs, ours = calls[name], calls.get(OURS, [])
    record: Record = {"status": "ok", **call_times(point, theirs)}
    if len(ours) == len(theirs):
        for key, place in (("ttft", 0), ("e2e", 1)):
            ratio = Ratio.paired([pair[place] for pair in theirs], [pair[place] for pair in ours])
            record[f"nemo_engine_{key}_faster_by"] = {"median": ratio.median, "interval": [ratio.low, ratio.high]}
    return record


def _profile(session: Session, point: Point, steps: int) -> Record:
    from nemo_engine.benchmarks.decode_profile import profile_decode

    context = point.context or point.input + point.output // 2
    return profile_decode(session.driver, point.batch, context, steps)


def format_record(record: Record) -> str:
    """A line, or several with a profile."""
    point = Point(record["batch"], record.get("input", 0), record.get("output", 0), record.get("context", 0))
    head = f"{point}  {record['engine']:<22}"
    if record["status"] != "ok":
        return f"{head} {record['status']}: {record['error']}"
    if record["what"] == "decode":
        text = (
            f" {record['ms_per_step']:.3f} ms a step (p99 {record['step_s']['p99'] * 1e3:.3f})  "
            f"{record['tokens_per_s']:.0f} tokens/s"
        )
        text += f"  {record['fraction']:.1%} of the roofline"
    else:
        names = [name for name in ("ttft", "itl", "tpot", "e2e") if f"{name}_s" in record]
        text = "".join(f" {name} {_milliseconds(record[f'{name}_s'])}" for name in names)
        text += f"  {record['tokens_per_s']['median']:.0f} tokens/s"
        if "prefill_fraction" in record:
            text += f"  roofline: prompts {record['prefill_fraction']:.1%}"
            text += f", steps {record['fraction']:.1%}" if "fraction" in record else ""
        for key in ("ttft", "e2e"):
            if faster := record.get(f"nemo_engine_{key}_faster_by"):
                low, high = faster["interval"]
                text += f"  {key}: nemo_engine {faster['median']:.2f}x ({low:.2f} to {high:.2f})"
    if "profile" in record:
        text += f"\na profiled step takes {record['profiled_us_per_step']:.0f} us\n{format_rows(record['profile'])}"
    return head + text


def _milliseconds(record: Record) -> str:
    return (
        f"{record['median'] * 1e3:.2f} ms ({record['low'] * 1e3:.2f} to {record['high'] * 1e3:.2f}, p99 "
        f"{record['p99'] * 1e3:.2f})"
    )
