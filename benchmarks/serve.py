"""``nemo-engine bench serve``: OpenAI-compatible servers under load, as their clients see them: TTFT, ITL, TPOT, end to
end, goodput.

Arrivals are open loop (Poisson, gamma, constant, or the workload's own times: requests come whether or not others have
ended) or closed loop (so many at a time). Of several values of --concurrency or --rate each is a point. Every request
is streamed. Several servers are measured in turns, round by round, with the same requests; the first rounds warm up.
Prompts that are made up are new in every round and run, so no prefix cache knows more of them than their shared
prefixes.

TTFT: from sending (a new connection each) to the first event with text or tokens. ITL: between such events, as other
clients count it; a server that joins tokens has fewer of them, so TPOT, which counts tokens, stands beside it. Goodput:
requests a second that kept every limit of the SLO. A request that fails counts in no latency and no rate; its server's
result is failed, and stands in no ratio.

Servers are given by address, and --start starts one by its command and ends it afterwards:

    nemo-engine bench serve ours=http://127.0.0.1:8000 vllm=http://127.0.0.1:8001 \\
        --concurrency 1 16 64 --slo-ttft 1s --slo-itl 30ms \\
        --start ours='nemo-engine serve nemo-tiny --port 8000' \\
        --start vllm='/opt/vllm/bin/python -m vllm.entrypoints.openai.api_server --model DIR --port 8001' \\
        --synthetic requests=64,input=uniform:16:256,output=128 --json serve.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from nemo_engine.benchmarks.common import Progress, add_workload_arguments, workload_facts, workload_of
from nemo_engine.benchmarks.http_stream import HttpError
from nemo_engine.benchmarks.load import Asking, Server, Trip, load
from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.benchmarks.report.results import Ratio, Record, Spread, percentiles
from nemo_engine.benchmarks.started import StartedServer
from nemo_engine.cli.files import check_writable
from nemo_engine.cli.values import add_list, seconds
from nemo_engine.workload import Arrivals, Item, Limits

Rounds = list[list[Trip]]
_LATENCIES: dict[str, Callable[[Trip], list[float | None]]] = {
    "ttft_s": lambda trip: [trip.ttft],
    "itl_s": lambda trip: list(trip.gaps),
    "tpot_s": lambda trip: [trip.tpot],
    "e2e_s": lambda trip: [trip.end - trip.sent],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("url", nargs="+", metavar="[NAME=]URL", help="servers, such as ours=http://127.0.0.1:8000")
    add_workload_arguments(parser)
    parser.add_argument(
        "--start", action="append", default=[], metavar="NAME=COMMAND", help="start this server for the benchmark"
    )
    parser.add_argument("--start-timeout", type=seconds, default=300.0, metavar="TIME", help="for that [300s]")
    parser.add_argument("--model", metavar="NAME", help="the model's name in requests [the first of /v1/models]")
    parser.add_argument("--api-key", metavar="KEY")
    parser.add_argument("--route", choices=("completions", "chat"), default="completions")
    parser.add_argument(
        "--prompts", choices=("ids", "text"), default="ids", help="of completions that are made up [ids]"
    )
    parser.add_argument("--vocab-size", type=int, default=6144, metavar="N", help="ids are below it [%(default)s]")
    parser.add_argument(
        "--ignore-eos", action=argparse.BooleanOptionalAction, default=True,
        help="answers as long as the workload says, checked; without it they end where the model ends them",
    )  # fmt: skip
    add_list(parser, "--concurrency", int, "whole numbers", metavar="N", help="closed loop: so many at a time")
    add_list(parser, "--rate", float, "numbers", metavar="X", help="open loop: requests a second")
    parser.add_argument(
        "--arrivals", choices=("poisson", "gamma", "constant", "file"),
        help="open loop: poisson, if there is a --rate; file are the workload's own times",
    )  # fmt: skip
    parser.add_argument(
        "--burstiness", type=float, default=1.0, metavar="X", help="of gamma arrivals; below 1: in bursts [1]"
    )
    parser.add_argument("--slo-ttft", type=seconds, metavar="TIME", help="such as 1s: the time to the first token")
    parser.add_argument("--slo-itl", type=seconds, metavar="TIME", help="such as 30ms: a request's mean time per token")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds that count [3]")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="rounds before them, not counted [1]")
    parser.add_argument(
        "--pause", type=float, default=2.0, metavar="SECONDS",
        help="between servers, for the one before to come to rest [2]",
    )  # fmt: skip
    parser.add_argument("--timeout", type=seconds, default=600.0, metavar="TIME", help="of a request [600s]")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the arrivals")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to FILE, a line each")
    parser.add_argument("--log", type=Path, metavar="FILE", help="what started servers print goes to FILE")


def arrivals_of(args: argparse.Namespace, items: Sequence[Item]) -> list[Arrivals]:
    """A point each. ``ValueError`` for options that contradict one another or say nothing."""
    if args.concurrency is not None:
        if args.rate is not None or args.arrivals is not None:
            raise ValueError("--concurrency is a closed loop: --rate and --arrivals are for an open one")
        return [Arrivals("closed", concurrency=concurrency) for concurrency in args.concurrency]
    kind = args.arrivals or ("poisson" if args.rate is not None else "file")
    if kind == "file":
        timeless = next((item for item in items if item.arrival_s is None), None)
        if timeless is not None:
            raise ValueError(
                f"request {timeless.request_id!r} has no arrival_s: give --concurrency N for a closed loop, or --rate "
                "X for an open one"
            )
    return [Arrivals(kind, rate_per_s=rate, burstiness=args.burstiness, seed=args.seed) for rate in args.rate or [None]]


def servers_of(args: argparse.Namespace) -> list[Server]:
    """The addresses by name. ``ValueError`` for what is none, and for names that are not unique."""
    servers: dict[str, Server] = {}
    for text in args.url:
        name, equals, url = text.partition("=")
        if not equals or "://" in name:
            name = url = text
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"a server must be [NAME=]http://... or https://..., got {text!r}")
        if name in servers:
            raise ValueError(f"server {name!r} is named twice: give each a NAME=")
        servers[name] = Server(name, url.rstrip("/").removesuffix("/v1"), args.model, args.api_key)
    return list(servers.values())


def commands_of(args: argparse.Namespace, servers: Sequence[Server]) -> dict[str, str]:
    """What starts each server, by name."""
    known = {server.name for server in servers}
    commands: dict[str, str] = {}
    for text in args.start:
        name, equals, command = text.partition("=")
        if not (equals and command.strip()):
            raise ValueError(f"--start must be NAME=COMMAND, got {text!r}")
        if name not in known or name in commands:
            raise ValueError(
                f"--start must name a server of this command, once: {', '.join(sorted(known))}; got {name!r}"
            )
        commands[name] = command
    return commands


def run(args: argparse.Namespace) -> int:
    """Measure, print and store; 1 if a request failed."""
    for name, least in (("rounds", 1), ("warmup", 0), ("pause", 0), ("vocab_size", 2)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    items = workload_of(args)
    points = arrivals_of(args, items)
    servers = servers_of(args)
    commands = commands_of(args, servers)
    asking = Asking(args.route, args.prompts, args.vocab_size, args.ignore_eos, args.timeout)
    asking.check(items)
    check_writable("--log", args.log)
    if any(not isinstance(turn.prompt, int) for item in items for turn in item.turns):
        print("prompts with contents of their own are the same in every round: a prefix cache knows them")
    has_failed = False
    total = len(points) * len(servers) * (args.rounds + args.warmup)
    with ExitStack() as stack, Progress(total, "rounds") as progress:
        for server in servers:
            _ready(stack, server, commands.get(server.name), args)
        for index, arrivals in enumerate(points):
            records = _point(args, servers, items, arrivals, asking, progress, f"{time.time_ns():x} {index}")
            for record in _records(args, servers, items, arrivals, records):
                has_failed |= record["status"] == "failed"
                print(format_record(record), flush=True)
                append_record(args.json, record)
    return int(has_failed)


def _ready(stack: ExitStack, server: Server, command: str | None, args: argparse.Namespace) -> None:
    """Start the server if there is a command, and learn its model's name; what does not start is marked as dead."""
    if command is not None:
        try:
            stack.enter_context(StartedServer(server, command, args.log)).wait(args.start_timeout)
        except (OSError, RuntimeError, ValueError) as error:
            server.dead = f"it did not start: {error}"
            print(f"{server.name}: FAILED, {server.dead}", file=sys.stderr)
            return
    if server.model is None:
        try:
            server.model = asyncio.run(asyncio.wait_for(server.first_model(), 30))
        except (HttpError, OSError, TimeoutError) as error:
            print(f"{server.name}: its model's name is not known, and none is sent: {error}", file=sys.stderr)


def _point(
    args: argparse.Namespace,
    servers: Sequence[Server],
    items: Sequence[Item],
    arrivals: Arrivals,
    asking: Asking,
    progress: Progress,
    salt: str,
) -> list[Rounds]:
    """The rounds that count of every server, in turns."""
    rounds: list[Rounds] = [[] for _ in servers]
    for number in range(args.warmup + args.rounds):
        for place in range(len(servers)):
            which = (place + number) % len(servers)
            trips = asyncio.run(load(servers[which], items, arrivals, asking, f"{salt} {number} "))
            if number >= args.warmup:
                rounds[which].append(trips)
            if len(servers) > 1:
                time.sleep(args.pause)
            progress.step()
    return rounds


def _records(
    args: argparse.Namespace,
    servers: Sequence[Server],
    items: Sequence[Item],
    arrivals: Arrivals,
    rounds_by_server: list[Rounds],
) -> list[Record]:
    """A result of each server; those after the first with how the first compares with them."""
    limits = Limits(args.slo_ttft, args.slo_itl)
    records = []
    for server, rounds in zip(servers, rounds_by_server):
        records.append(
            {
                "benchmark": "serve", "server": server.name, "url": server.url, "model": server.model,
                "workload": workload_facts(args, items),
                "arrivals": {
                    "concurrency": arrivals.concurrency, "rate": arrivals.rate_per_s, "arrivals": arrivals.kind,
                    "burstiness": arrivals.burstiness, "seed": arrivals.seed,
                },
                "route": args.route, "prompts": args.prompts, "ignore_eos": args.ignore_eos, "rounds": args.rounds,
                "warmup": args.warmup, **measures(rounds, limits), **provenance("nemo-engine"),
            }
        )  # fmt: skip
    first = records[0]
    for record, rounds in zip(records[1:], rounds_by_server[1:]):
        if record["status"] == first["status"] == "ok":
            record["first_against_this"] = {"first": first["server"], **_ratios(rounds_by_server[0], rounds)}
    return records


def measures(rounds: Rounds, limits: Limits) -> Record:
    """What the trips of all rounds say. Rates are a round each; latencies are of all requests that did not fail."""
    good = [trip for trips in rounds for trip in trips if trip.error is None]
    errors = [trip.error for trips in rounds for trip in trips if trip.error is not None]
    record: Record = {"status": "failed" if errors or not good else "ok"}
    if errors:
        record["error"] = errors[0]
    record |= {
        "output_tokens_per_second": [_rate(trips, lambda trip: trip.num_tokens) for trips in rounds],
        "requests_per_second": [_rate(trips, lambda trip: 1) for trips in rounds],
    }
    for name, values in _LATENCIES.items():
        record[name] = percentiles([value for trip in good for value in values(trip) if value is not None])
    return record | {
        "late_s": percentiles([trip.late for trip in good]),
        "slo": {"ttft_s": limits.ttft_s, "itl_s": limits.itl_s},
        "goodput_requests_per_second": [
            _rate(trips, lambda trip: limits.are_kept(trip.ttft or 0.0, trip.tpot or 0.0)) for trips in rounds
        ],
        "prompt_tokens": sum(trip.num_prompt_tokens for trip in good),
        "new_tokens": sum(trip.num_tokens for trip in good),
        "errors": len(errors),
        "first_errors": list(dict.fromkeys(errors))[:3],
    }


def _rate(trips: Sequence[Trip], count: Callable[[Trip], float]) -> float:
    """What the requests that did not fail count, a second, from the first request sent to the last end of any."""
    if not trips:
        return 0.0
    span = max(trip.end for trip in trips) - min(trip.sent for trip in trips)
    return sum(count(trip) for trip in trips if trip.error is None) / span if span > 0 else 0.0


def _ratios(first: Rounds, other: Rounds) -> Record:
    """The first over the other, round by round: rates, and medians of latencies."""
    pairs = {
        "output_tokens_per_second": [[_rate(trips, lambda trip: trip.num_tokens) for trips in of] for of in (first,
        other)]
    }  # fmt: skip
    for name, values in _LATENCIES.items():
        medians = [
            [percentiles([v for trip in trips for v in values(trip) if v is not None], (50,)).get("p50") for trips in
            of] for of in (first, other)
        ]  # fmt: skip
        if all(value for of in medians for value in of):
            pairs[f"{name}_p50"] = [[value or 0.0 for value in of] for of in medians]
    ratios: Record = {}
    for name, (ours, theirs) in pairs.items():
        ratio = Ratio.paired(ours, theirs)
        ratios[name] = {"median": ratio.median, "interval": [ratio.low, ratio.high]}
    return ratios


def format_record(record: Record) -> str:
    """Some lines for people."""
    arrivals = record["arrivals"]
    head = f"{record['server']}, {arrivals['arrivals']}"
    if arrivals["concurrency"] is not None:
        head += f" {arrivals['concurrency']}"
    elif arrivals["rate"] is not None:
        head += f" {arrivals['rate']:g}/s"
    lines = [f"{head}: {Spread.of(record['output_tokens_per_second'])} output tokens/s, {record['errors']} failed"]
    for name, title in (("ttft_s", "TTFT"), ("itl_s", "ITL"), ("tpot_s", "TPOT"), ("e2e_s", "end to end")):
        if record[name]:
            lines.append(
                f"  {title:10} ms: " + " ".join(f"{key} {value * 1e3:.1f}" for key, value in record[name].items())
            )
    if any(record["slo"].values()):
        slo = ", ".join(f"{name[:-2].upper()} {value:g} s" for name, value in record["slo"].items() if value)
        lines.append(f"  goodput: {Spread.of(record['goodput_requests_per_second'])} requests/s within {slo}")
    if "first_against_this" in record:
        ratios = dict(record["first_against_this"])
        first = ratios.pop("first")
        parts = [
            f"{name} {of['median']:.2f}x ({of['interval'][0]:.2f} to {of['interval'][1]:.2f})"
            for name, of in ratios.items()
        ]
        lines.append(f"  {first} has of this: {', '.join(parts)}")
    return "\n".join(lines + [f"  failed: {error}" for error in record["first_errors"]])
