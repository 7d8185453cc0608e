"""``nemo-engine bench throughput``: whole workloads offline, ours and every peer in turns: tokens per second, ratios, equal outputs.

Each engine runs in a process of its own and stays loaded; in every round each computes the same workload once, in an order that changes from round
to round. The first round warms up. Token counts must be those asked for. Greedy outputs are compared token by token; in bf16 two right engines
part ways at near-ties, so the share of equal tokens before the first difference is told, and nothing is concluded from it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from nemo_engine.benchmarks.common import (
    Progress,
    add_common_arguments,
    add_workload_arguments,
    peer_setups,
    resolve_model,
    workload_of,
)
from nemo_engine.benchmarks.peers import PeerError, PeerProcess, why_missing
from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.benchmarks.results import Ratio, Record, Spread
from nemo_engine.workload import Item, prompt_token_ids


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    add_common_arguments(parser)
    add_workload_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds that count; one more warms up")


def run(args: argparse.Namespace) -> int:
    """Measure, print and store; 1 if a peer failed."""
    model, vocab_size = resolve_model(args.model)
    items = workload_of(args)
    prompts, max_tokens = _as_ids(items, vocab_size)
    total = sum(max_tokens)
    print(
        f"{len(prompts)} prompts of {sum(map(len, prompts))} tokens together, {total} new tokens, {args.rounds} rounds"
    )
    running: dict[str, PeerProcess] = {}
    failed: dict[str, str] = {}
    seconds: dict[str, list[float]] = {}
    outputs: dict[str, list[list[int]]] = {}
    try:
        for setup in peer_setups(args):
            missing = why_missing(setup.name, setup.python)
            if missing:
                failed[setup.name] = missing
                print(f"{setup.name}: left out, {missing}")
                continue
            try:
                running[setup.name] = PeerProcess(setup.name, str(model), setup.options, setup.python, args.log)
            except PeerError as error:
                failed[setup.name] = str(error)
                print(f"{setup.name}: FAILED to start, {error}", file=sys.stderr)
        with Progress(args.rounds + 1, "rounds") as progress:
            for number in range(args.rounds + 1):
                names = [*running]
                for name in names[number % max(1, len(names)) :] + names[: number % max(1, len(names))]:
                    _round(running, name, prompts, max_tokens, number, seconds, outputs, failed)
                progress.step()
    finally:
        for peer in running.values():
            peer.close()
    records = _records(args, items, running, seconds, outputs, failed, total)
    _print(records)
    for record in records:
        append_record(args.json, record)
    return 1 if any(record["status"] == "failed" for record in records) else 0


def _as_ids(items: Sequence[Item], vocab_size: int) -> tuple[list[list[int]], list[int]]:
    for item in items:
        if len(item.turns) > 1:
            raise ValueError(
                f"workload: request {item.request_id!r} has {len(item.turns)} turns: throughput takes single ones"
            )
    prompts = [[1, *prompt_token_ids(item, 0, vocab_size)[1:]] for item in items]
    return prompts, [item.turns[0].output_tokens for item in items]


def _round(
    running: dict[str, PeerProcess],
    name: str,
    prompts: list[list[int]],
    max_tokens: list[int],
    number: int,
    seconds: dict[str, list[float]],
    outputs: dict[str, list[list[int]]],
    failed: dict[str, str],
) -> None:
    try:
        took, tokens = running[name].generate(prompts, max_tokens)
        counts = [len(ids) for ids in tokens]
        if counts != max_tokens:
            wrong = next(i for i, (got, asked) in enumerate(zip(counts, max_tokens)) if got != asked)
            raise PeerError(f"request {wrong} has {counts[wrong]} new tokens, and {max_tokens[wrong]} were asked for")
    except PeerError as error:
        failed[name] = str(error)
        print(f"{name}: FAILED, {error}", file=sys.stderr)
        running.pop(name).close()
        seconds.pop(name, None)
        return
    outputs[name] = tokens
    if number:
        seconds.setdefault(name, []).append(took)


def _records(
    args: argparse.Namespace,
    items: Sequence[Item],
    running: dict[str, PeerProcess],
    seconds: dict[str, list[float]],
    outputs: dict[str, list[list[int]]],
    failed: dict[str, str],
    total: int,
) -> list[Record]:
    ours = seconds.get("nemo_engine")
    facts = provenance("nemo-engine", "torch")
    common: Record = {
        "benchmark": "throughput",
        "model": args.model,
        "workload": {"source": str(args.workload or args.generate), "requests": len(items), "new_tokens": total},
        "rounds": args.rounds,
    }
    records = []
    for name in [*seconds, *failed]:
        record: Record = {**common, "engine": name, "options": args.options.get(name, {})}
        if name in failed:
            missing = "is not installed" in failed[name] or "cannot be run" in failed[name]
            record |= {"status": "missing" if missing else "failed", "error": failed[name], **facts}
        else:
            rates = [total / one for one in seconds[name]]
            record |= {
                "status": "ok",
                "tokens_per_second": rates,
                "versions": running[name].versions,
                "start": {k: v for k, v in running[name].started.items() if k.endswith("_seconds")},
                **facts,
            }
            if ours is not None and name != "nemo_engine":
                ratio = Ratio.paired(seconds[name], ours)
                record["nemo_engine_faster_by"] = {"median": ratio.median, "interval": [ratio.low, ratio.high]}
                record["equal_before_first_difference"] = _agreement(outputs["nemo_engine"], outputs[name])
        records.append(record)
    return records


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of tokens that stand before the first difference of their request."""
    equal = total = 0
    for a, b in zip(ours, theirs):
        same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))
        equal, total = equal + same, total + len(a)
    return equal / max(1, total)


def _print(records: list[dict[str, Any]]) -> None:
    for record in records:
        if record["status"] != "ok":
            print(f"{record['engine']:24} {record['status']}: {record['error']}")
            continue
        line = f"{record['engine']:24} {Spread.of(record['tokens_per_second'])} tokens/s"
        if "nemo_engine_faster_by" in record:
            faster = record["nemo_engine_faster_by"]
            low, high = faster["interval"]
            line += f"   nemo_engine is {faster['median']:.2f}x ({low:.2f} to {high:.2f})"
            line += f"   {record['equal_before_first_difference']:.0%} of tokens equal before the first difference"
        print(line)
