"""``nemo-engine bench serve``: an OpenAI-compatible server under load, as its clients see it: TTFT, ITL, end to end, goodput.

Arrivals are open loop (Poisson, gamma, constant, or the workload's own times: requests come whether or not others have ended) or closed loop
(so many at a time). Every request is streamed. Several addresses are measured in turns, round by round, with the same requests.
TTFT: from sending to the first event with text or tokens. ITL: between such events, as other clients count it; a server that joins
tokens has fewer of them, so TPOT, which counts tokens, stands beside it. Goodput: requests a second that kept every limit of the SLO.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_engine.benchmarks.common import Progress, add_workload_arguments, workload_of
from nemo_engine.benchmarks.http_stream import HttpError, post_events
from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.benchmarks.results import Record, Spread, percentiles
from nemo_engine.workload import Arrivals, Item, prompt_messages, prompt_token_ids


@dataclass(slots=True)
class Trip:
    """One request as its client saw it. Seconds; ``error`` if it failed."""

    sent: float
    ttft: float | None = None
    end: float = 0.0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def tpot(self) -> float | None:
        """Mean time of a token after the first."""
        if self.ttft is None or self.num_tokens < 2:
            return None
        return (self.end - self.sent - self.ttft) / (self.num_tokens - 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("url", nargs="+", metavar="[NAME=]URL", help="servers, such as http://127.0.0.1:8000")
    add_workload_arguments(parser)
    parser.add_argument("--model", metavar="NAME", help="the model's name in requests; none is sent without it")
    parser.add_argument("--api-key", metavar="KEY")
    parser.add_argument("--route", choices=("completions", "chat"), default="completions")
    parser.add_argument("--vocab-size", type=int, default=6144, metavar="N", help="for prompts of ids [%(default)s]")
    parser.add_argument("--concurrency", type=int, metavar="N", help="closed loop: so many at a time")
    parser.add_argument("--rate", type=float, metavar="X", help="open loop: requests a second")
    parser.add_argument("--arrivals", choices=("poisson", "gamma", "constant", "file"), help="open loop [poisson]")
    parser.add_argument(
        "--burstiness", type=float, default=1.0, metavar="X", help="of gamma arrivals; below 1: in bursts"
    )
    parser.add_argument("--slo-ttft", type=float, metavar="SECONDS")
    parser.add_argument("--slo-itl", type=float, metavar="SECONDS", help="of a request's mean time per token")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds that count; one more warms up")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to FILE, a line each")


def arrivals_of(args: argparse.Namespace) -> Arrivals:
    """Closed loop if a concurrency is given, else open."""
    if args.concurrency is not None:
        if args.rate is not None or args.arrivals is not None:
            raise ValueError("--concurrency is a closed loop: --rate and --arrivals are for an open one")
        return Arrivals("closed", concurrency=args.concurrency)
    kind = args.arrivals or ("poisson" if args.rate is not None else "file")
    return Arrivals(kind, rate_per_s=args.rate, burstiness=args.burstiness, seed=args.seed)


def run(args: argparse.Namespace) -> int:
    """Measure, print and store; 1 if a request failed."""
    arrivals = arrivals_of(args)
    items = workload_of(args)
    servers = dict(text.split("=", 1) if "=" in text.split("://")[0] else (text, text) for text in args.url)
    rounds: dict[str, list[list[Trip]]] = {name: [] for name in servers}
    with Progress((args.rounds + 1) * len(servers), "rounds") as progress:
        for number in range(args.rounds + 1):
            names = [*servers]
            for name in names[number % len(names) :] + names[: number % len(names)]:
                # Every round has prompts of its own, or the second would find the first one's in the prefix cache.
                trips = asyncio.run(load(servers[name].rstrip("/"), items, arrivals, args, f"{number} "))
                if number:
                    rounds[name].append(trips)
                progress.step()
    records = [_record(args, name, servers[name], found) for name, found in rounds.items()]
    for record in records:
        _print(record)
    for record in records:
        append_record(args.json, record)
    return 1 if any(record["errors"] for record in records) else 0


async def load(url: str, items: Sequence[Item], arrivals: Arrivals, args: argparse.Namespace, salt: str) -> list[Trip]:
    """Send all items as ``arrivals`` says; a turn of a conversation follows the answer to the one before."""
    trips: list[Trip] = []
    gate = asyncio.Semaphore(arrivals.concurrency) if arrivals.kind == "closed" else None
    began = time.perf_counter()

    async def one(item: Item, due: float | None) -> None:
        if due is not None:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        if gate is None:
            trips.extend([trip async for trip in _converse(url, item, args, salt)])
        else:
            async with gate:
                trips.extend([trip async for trip in _converse(url, item, args, salt)])

    await asyncio.gather(*[one(item, due) for item, due in zip(items, _due(items, arrivals))])
    return trips


def _due(items: Sequence[Item], arrivals: Arrivals) -> Iterator[float | None]:
    if arrivals.kind == "closed":
        return iter([None] * len(items))
    if arrivals.kind == "file":
        return iter([item.arrival_s or 0.0 for item in items])
    return arrivals.times()


async def _converse(url: str, item: Item, args: argparse.Namespace, salt: str) -> Any:
    ids: list[list[int]] = []
    texts: list[str] = []
    for index, turn in enumerate(item.turns):
        if turn.think_s and index:
            await asyncio.sleep(turn.think_s)
        body: dict[str, Any] = {
            "max_tokens": turn.output_tokens, "temperature": 0.0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        if args.model:
            body["model"] = args.model
        if args.route == "chat":
            body["messages"] = prompt_messages(item, index, texts)
            trip, text = await _send(f"{url}/v1/chat/completions", body, args)
            texts.append(text)
        else:
            named = Item(salt + item.request_id, item.turns, None, item.prefix, item.prefix_tokens)
            prompt = [1, *prompt_token_ids(named, index, args.vocab_size, ids)[1:]]
            trip, _ = await _send(f"{url}/v1/completions", body | {"prompt": prompt}, args)
            ids.append([100] * trip.num_tokens)  # the answer's ids are not told by every server
        yield trip
        if trip.error:
            return


async def _send(url: str, body: dict[str, Any], args: argparse.Namespace) -> tuple[Trip, str]:
    headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
    trip, text, before = Trip(time.perf_counter()), "", None
    try:
        async for now, event in post_events(url, body, headers):
            if "error" in event:
                raise HttpError(str(event["error"].get("message", event["error"])))
            usage = event.get("usage")
            if usage:
                trip.num_tokens, trip.num_prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
            for choice in event.get("choices", ()):
                piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
                text += piece
                if not piece and not choice.get("finish_reason"):
                    continue
                if before is None:
                    trip.ttft = now - trip.sent
                else:
                    trip.gaps.append(now - before)
                before = trip.end = now
    except (HttpError, OSError, asyncio.IncompleteReadError, ValueError) as error:
        trip.error = f"{type(error).__name__}: {error}"
        trip.end = time.perf_counter()
    if trip.error is None and trip.num_tokens != body["max_tokens"]:
        trip.error = f"{trip.num_tokens} tokens came, and {body['max_tokens']} were asked for"
    return trip, text


def _record(args: argparse.Namespace, name: str, url: str, rounds: list[list[Trip]]) -> Record:
    per_round, goodput = [], []
    for trips in rounds:
        good = [trip for trip in trips if trip.error is None]
        span = max((t.end for t in trips), default=0.0) - min((t.sent for t in trips), default=0.0)
        per_round.append(sum(t.num_tokens for t in good) / span if span else 0.0)
        kept = [t for t in good if _keeps(t, args)]
        goodput.append(len(kept) / span if span else 0.0)
    trips = [trip for found in rounds for trip in found]
    good = [trip for trip in trips if trip.error is None]
    errors = [trip.error for trip in trips if trip.error is not None]
    return {
        "benchmark": "serve",
        "server": name,
        "url": url,
        "workload": {"source": str(args.workload or args.generate), "requests": len(rounds[0]) if rounds else 0},
        "arrivals": {k: getattr(args, k) for k in ("concurrency", "rate", "arrivals", "burstiness")},
        "route": args.route,
        "rounds": args.rounds,
        "output_tokens_per_second": per_round,
        "ttft_s": percentiles([t.ttft for t in good if t.ttft is not None]),
        "itl_s": percentiles([gap for t in good for gap in t.gaps]),
        "tpot_s": percentiles([t.tpot for t in good if t.tpot is not None]),
        "e2e_s": percentiles([t.end - t.sent for t in good]),
        "slo": {"ttft_s": args.slo_ttft, "itl_s": args.slo_itl},
        "goodput_requests_per_second": goodput,
        "errors": len(errors),
        "first_errors": errors[:3],
        **provenance("nemo-engine"),
    }


def _keeps(trip: Trip, args: argparse.Namespace) -> bool:
    ttft, tpot = trip.ttft or 0.0, trip.tpot or 0.0
    return (args.slo_ttft is None or ttft <= args.slo_ttft) and (args.slo_itl is None or tpot <= args.slo_itl)


def _print(record: Record) -> None:
    def ms(name: str) -> str:
        return " ".join(f"{key} {value * 1e3:.1f}" for key, value in record[name].items())

    print(
        f"{record['server']}: {Spread.of(record['output_tokens_per_second'])} output tokens/s, {record['errors']} errors"
    )
    for name, title in (("ttft_s", "TTFT"), ("itl_s", "ITL"), ("tpot_s", "TPOT"), ("e2e_s", "end to end")):
        print(f"  {title:10} ms: {ms(name)}")
    if any(record["slo"].values()):
        print(f"  goodput: {Spread.of(record['goodput_requests_per_second'])} requests/s within {record['slo']}")
    for error in record["first_errors"]:
        print(f"  failed: {error}")
