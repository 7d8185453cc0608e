"""Many clients at once: no token is lost, doubled or crossed, whatever the others do; and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from nemo_engine import AsyncEngine, Engine, SamplingParams
from tests.scheduler.invariants import check
from tests.server.live import LiveServer

# In fp64 a request's tokens are the same in any batch.
OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float64", "page_size": 16, "num_kv_pages": 56, "max_num_seqs": 48,
    "max_num_batched_tokens": 512, "max_model_len": 256,
}  # fmt: skip
ROOT = Path(__file__).parents[2]
REQUESTS, CONCURRENCY, KINDS = 1000, 128, 40


def shape(index: int) -> dict[str, Any]:
    """One of ``KINDS`` different requests."""
    kind = index % KINDS
    ids = [1, *[1000 + (kind * 37 + i * 11) % 4000 for i in range(5 + kind % 23)]]
    return {"prompt": ids, "temperature": 0.9, "seed": kind, "max_tokens": 4 + kind % 13, "ignore_eos": True}


def one_alone(engine: Engine, kind: int) -> tuple[str, list[int]]:
    """(text, ids) that a kind of request gives by itself."""
    body = shape(kind)
    params = SamplingParams(temperature=0.9, seed=body["seed"], max_tokens=body["max_tokens"], ignore_eos=True)
    (output,) = engine.generate({"prompt_token_ids": body["prompt"]}, params)
    return output.outputs[0].text, output.outputs[0].token_ids


@pytest.fixture(scope="module")
def expected() -> list[tuple[str, list[int]]]:
    """What each kind of request gives by itself."""
    with Engine("nemo-tiny", **OPTIONS) as engine:
        return [one_alone(engine, kind) for kind in range(KINDS)]


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    with AsyncEngine("nemo-tiny", **OPTIONS) as engine, LiveServer(engine, max_queue=2000, page=False) as server:
        yield server


async def ask(client: httpx.AsyncClient, index: int, expected: list[tuple[str, list[int]]]) -> str:
    """One request of the load; says what became of it."""
    body = shape(index) | {"return_token_ids": True}
    text, ids = expected[index % KINDS]
    way = ("whole", "stream", "stream", "leave", "abort")[index % 5]
    if way == "whole":
        answer = (await client.post("/v1/completions", json=body)).json()
        assert (answer["choices"][0]["text"], answer["choices"][0]["token_ids"]) == (text, ids)
        assert answer["usage"]["completion_tokens"] == len(ids)
        return way
    if way != "stream":
        body |= {"max_tokens": 150, "request_id": f"load-{index}"}
    got_text, got_ids, reason = "", [], None
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            got_text, got_ids = got_text + choice["text"], got_ids + choice["token_ids"]
            reason = choice["finish_reason"] or reason
            if way == "leave" and len(got_ids) >= 3:
                break
            if way == "abort" and len(got_ids) >= 3 and reason is None:
                await client.post("/abort", json={"request_id": f"load-{index}"})
                way = "aborted"
    if way == "stream":
        assert (got_text, got_ids, reason) == (text, ids, "length")
    else:  # what came before the end is right all the same
        assert got_ids[: len(ids)] == ids[: len(got_ids)]
        assert reason == {"leave": None, "aborted": "abort", "abort": "length"}[way] or way == "aborted"
    return way


async def load(url: str, count: int, expected: list[tuple[str, list[int]]]) -> list[str]:
    gate = asyncio.Semaphore(CONCURRENCY)
    limits = httpx.Limits(max_connections=CONCURRENCY * 2)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def one(index: int) -> str:
            async with gate:
                return await ask(client, index, expected)

        return await asyncio.gather(*[one(index) for index in range(count)])


async def at_rest(server: LiveServer) -> None:
    engine = server.service.engine
    for _ in range(1000):
        if engine.num_unfinished == 0:
            break
        await asyncio.sleep(0.02)
    await engine.call(lambda loop: check(loop._core.scheduler))
    stats = await engine.call(lambda loop: loop.stats())
    assert (stats.num_running, stats.num_waiting, stats.num_free_pages) == (0, 0, stats.num_pages)


def test_a_thousand_requests_of_all_kinds(server: LiveServer, expected: list[tuple[str, list[int]]]) -> None:
    async def run() -> list[str]:
        ways = await load(server.url, REQUESTS, expected)
        await at_rest(server)
        return ways

    ways = asyncio.run(run())
    assert len(ways) == REQUESTS and {"whole", "stream", "leave", "aborted"} <= set(ways)
    assert server.service.engine.stats().total_preemptions > 0  # the cache is small: this was part of the load


def rounds_of_load(count: int) -> list[float]:
    """MiB that this process holds after each of ``count`` rounds."""
    with Engine("nemo-tiny", **OPTIONS) as alone:
        kinds = [one_alone(alone, kind) for kind in range(KINDS)]
    process, sizes = psutil.Process(os.getpid()), []
    with AsyncEngine("nemo-tiny", **OPTIONS) as engine, LiveServer(engine, max_queue=2000, page=False) as server:
        for _ in range(count):
            asyncio.run(load(server.url, 150, kinds))
            asyncio.run(at_rest(server))
            gc.collect()
            sizes.append(process.memory_info().rss / 2**20)
    return sizes


def test_memory_stays_flat() -> None:
    """In a process of its own: what other tests left behind comes and goes. Allocators grow in leaps; a leak grows in every round."""
    code = "from tests.server.test_load import rounds_of_load; print(*rounds_of_load(8))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    sizes = [float(size) for size in run.stdout.split()]
    growth = [after - before for before, after in itertools.pairwise(sizes[1:])]
    assert len(growth) == 6 and statistics.median(growth) < 1, f"MiB after each round: {sizes}"
