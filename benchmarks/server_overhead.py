"""What streaming through the HTTP server costs, against ``AsyncEngine`` in process: output tokens per second in one
run.

Both serve the same seeded requests, ``--concurrency`` at a time, every token streamed. In process the consumer is an
event loop beside the engine's thread. The server runs in a process of its own, and the client in this one reads the
events off plain sockets. They take turns, round by round; medians, and the ratio of each round, are reported. On a
machine of few cores the client's own share is charged to the server.

    python benchmarks/server_overhead.py --json benchmarks/results/NAME.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from nemo_engine import AsyncEngine, SamplingParams
from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.sampling_params import RequestOutputKind

ENGINE = {"device": "cpu", "max_num_seqs": 64, "num_kv_pages": 1024, "max_model_len": 1024}


def prompt_ids(index: int, length: int) -> list[int]:
    """A prompt that no other index shares a page with."""
    return [1, *[1000 + (index * 131 + i * 17) % 5000 for i in range(length - 1)]]


async def in_process(engine: AsyncEngine, count: int, concurrency: int, length: int, new_tokens: int) -> int:
    """Tokens that ``count`` requests streamed, ``concurrency`` at a time."""
    gate, total = asyncio.Semaphore(concurrency), 0

    async def one(index: int) -> None:
        nonlocal total
        params = SamplingParams(
            temperature=1.0, seed=index, max_tokens=new_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        async with gate:
            async for output in engine.generate({"prompt_token_ids": prompt_ids(index, length)}, params):
                total += len(output.outputs[0].token_ids)

    await asyncio.gather(*[one(index) for index in range(count)])
    return total


async def over_http(url: str, count: int, concurrency: int, length: int, new_tokens: int) -> int:
    """Tokens that the usage of ``count`` streamed requests reports, ``concurrency`` connections at a time."""
    gate, total = asyncio.Semaphore(concurrency), 0
    where = urlsplit(url)

    async def one(index: int) -> None:
        nonlocal total
        body = json.dumps(
            {
                "prompt": prompt_ids(index, length), "temperature": 1.0, "seed": index, "max_tokens": new_tokens,
                "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
            }
        ).encode()  # fmt: skip
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\nConnection: "
            "close\r\n"
        )
        async with gate:
            reader, writer = await asyncio.open_connection(where.hostname, where.port)
            writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            tail = b""
            while data := await reader.read(1 << 16):
                tail = (tail + data)[-2000:]
            writer.close()
        match = re.search(rb'"completion_tokens":(\d+)', tail)
        assert match and b"[DONE]" in tail, tail
        total += int(match[1])

    await asyncio.gather(*[one(index) for index in range(count)])
    return total


def start_server() -> tuple[subprocess.Popen[str], str]:
    """A server process, and its address."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]
    command = [sys.executable, "-m", "nemo_engine", "serve", "nemo-tiny", "--port=0", "--no-log-requests", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        match = re.search(r"at (http://\S+)", line)
        if match:
            return process, match[1]
    raise RuntimeError("the server did not start")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write a line if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    shape = (args.requests, args.concurrency, args.prompt_tokens, args.new_tokens)
    process, url = start_server()
    rates: dict[str, list[float]] = {"in process": [], "over HTTP": []}
    try:
        with AsyncEngine("nemo-tiny", **ENGINE) as engine, asyncio.Runner() as runner:
            for round_index in range(args.rounds + 1):
                for name in rates:
                    started = time.perf_counter()
                    if name == "in process":
                        total = runner.run(in_process(engine, *shape))
                        runner.run(engine.call(lambda loop: loop.reset_prefix_cache()))
                    else:
                        total = runner.run(over_http(url, *shape))
                    assert total == args.requests * args.new_tokens, total
                    if round_index:  # the first warms up
                        rates[name].append(total / (time.perf_counter() - started))
    finally:
        process.terminate()
        process.wait(30)
    ratios = [over / alone for over, alone in zip(rates["over HTTP"], rates["in process"])]
    for name, values in rates.items():
        print(f"{name:11} {statistics.median(values):8.0f} tokens/s ({min(values):.0f} to {max(values):.0f})")
    print(f"over HTTP / in process: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    record = {
        "benchmark": "server_overhead",
        "workload": {k: v for k, v in vars(args).items() if k != "json"},
        "tokens_per_second": rates,
        "ratio": ratios,
        **provenance("torch", "uvicorn", "uvloop", "fastapi"),
    }
    append_record(args.json, record)


if __name__ == "__main__":
    main()
