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
from pathlib import Path
from typing import Any

import httpx
import psutil

from nemo_engine import AsyncEngine, Engine, SamplingParams
from tests.scheduler.invariants import check
from tests.server.live import LiveServer

# In fp64 a request's tokens are the same in any batch.
OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float64", "page_size": 16, "num_kv_pages": 56, "max_num_seqs": 48,
    "max_num_batched_tokens": 512, "max_model_len": 256,
}  # fmt: skip
ROOT = Path(__file__).parents[2]
REQUESTS, CONCURRENCY, KINDS = 150, 128, 40  # requests of a round


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


def rounds_of_load(count: int) -> dict[str, Any]:
    """What became of the requests of ``count`` rounds, and the MiB that this process held after each."""
    with Engine("nemo-tiny", **OPTIONS) as alone:
        expected = [one_alone(alone, kind) for kind in range(KINDS)]
    process = psutil.Process(os.getpid())
    sizes: list[float] = []
    ways: list[str] = []
    with AsyncEngine("nemo-tiny", **OPTIONS) as engine, LiveServer(engine, max_queue=2000, page=False) as server:
        for _ in range(count):
            ways += asyncio.run(load(server.url, REQUESTS, expected))
            asyncio.run(at_rest(server))
            gc.collect()
            sizes.append(process.memory_info().rss / 2**20)
        return {"ways": ways, "sizes": sizes, "preemptions": engine.stats().total_preemptions}


def test_many_requests_of_all_kinds_leave_nothing_behind() -> None:
    """In a process of its own: what other tests left behind comes and goes.

    Allocators grow in leaps; a leak grows in every round.
    """
    code = "import json; from tests.server.test_load import rounds_of_load; print(json.dumps(rounds_of_load(6)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout)
    assert len(found["ways"]) == 6 * REQUESTS and {"whole", "stream", "leave", "aborted"} <= set(found["ways"])
    assert found["preemptions"] > 0  # the cache is small: this was part of the load
    growth = [after - before for before, after in itertools.pairwise(found["sizes"][1:])]
    assert statistics.mean(sorted(growth)[:3]) < 1, f"MiB after each round: {found['sizes']}"  # of the calmest rounds
