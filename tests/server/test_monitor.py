"""The page's files and headers, and the picture of the engine that it draws.

Without a browser; with one: test_page.py.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import nemo_engine.server
from nemo_engine import AsyncEngine, Engine, SamplingParams
from nemo_engine.server.ui.monitor import MAX_CELLS, PAGE_STATES, Monitor, page_map, queue_places
from tests.server.live import ENGINE_OPTIONS, MODEL, LiveServer

PAGE = Path(nemo_engine.server.__file__).parent / "ui" / "page"
PATHS = [
    "/",
    *(f"/page/{path.name}" for path in sorted(PAGE.iterdir()) if path.name != "index.html"),
    "/monitor",
    "/monitor/stream",
]


def get(server: LiveServer, path: str, **headers: str) -> httpx.Response:
    """A response without its body, if that has no end."""
    with httpx.stream("GET", server.url + path, headers=headers, timeout=20) as response:
        if path != "/monitor/stream" or response.status_code != 200:
            response.read()
    return response


# ---- files


def test_all_that_the_page_needs_is_its_own() -> None:
    text = {path.name: path.read_text() for path in PAGE.iterdir()}
    asked = {
        *re.findall(r'(?:src|href)="([^"#][^"]*)"', text["index.html"]),
        *re.findall(r'from "\./([^"]*)"', " ".join(text.values())),
    }
    assert {name.removeprefix("page/") for name in asked} == set(text) - {"index.html"}
    for name, content in text.items():
        assert re.findall(r"https?://\S+", content.replace('xmlns="http://www.w3.org/2000/svg"', "")) == [], name
    assert (
        re.search(r"<script(?![^>]*src=)|<style| style=| on\w+=", text["index.html"]) is None
    )  # the policy forbids it
    assert re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", " ".join(text.values())) is None


@pytest.mark.parametrize("path", PATHS[:-2])
def test_files_come_with_strict_headers(live: LiveServer, path: str) -> None:
    response = get(live, path)
    kind = {"": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}[
        path.rpartition(".")[2].strip("/")
    ]
    assert response.status_code == 200 and response.headers["content-type"].partition(";")[0] == kind
    policy = response.headers["content-security-policy"]
    assert (
        "default-src 'none'" in policy
        and "unsafe" not in policy
        and "*" not in policy
        and "frame-ancestors 'none'" in policy
    )
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"
    again = get(live, path, **{"If-None-Match": f'"other", W/{response.headers["etag"]}'})
    assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == response.headers["etag"]
    assert get(live, path, **{"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize("path", PATHS)
def test_one_option_turns_it_off(engine: AsyncEngine, path: str) -> None:
    with LiveServer(engine, page=False) as server:
        assert get(server, path).status_code == 404
        assert httpx.post(server.url + "/monitor/pages", json={}).status_code == 404


def test_it_lies_behind_the_key(engine: AsyncEngine) -> None:
    key = base64.b64encode(b"anybody:secret").decode()
    with LiveServer(engine, api_key=["secret"]) as server:
        for path in PATHS:
            assert get(server, path).status_code == 401
            assert get(server, path, Authorization="Basic eDp5").status_code == 401
            assert get(server, path, Authorization=f"Basic {key}").status_code == 200
            # What another site makes a browser send does not count.
            assert (
                get(server, path, Authorization=f"Basic {key}", **{"Sec-Fetch-Site": "cross-site"}).status_code == 401
            )
        assert get(server, "/").headers["www-authenticate"].startswith("Basic realm=")


# ---- the picture


def snapshot(server: LiveServer) -> dict[str, Any]:
    return dict(httpx.get(server.url + "/monitor", timeout=20).raise_for_status().json())


@contextmanager
def running(engine: AsyncEngine, *params: SamplingParams, prompt: list[int]) -> Iterator[None]:
    """Requests that run until the end of the block, each of which has had tokens for all of its completions."""
    ids = [f"watched-{index}" for index in range(len(params))]
    started = {request_id: asyncio.Event() for request_id in ids}

    async def one(request_id: str, own: SamplingParams) -> None:
        async for output in engine.generate({"prompt_token_ids": prompt}, own, request_id):
            if all(completion.token_ids for completion in output.outputs):
                started[request_id].set()

    async def run() -> None:
        await asyncio.gather(*map(one, ids, params))

    async def wait() -> None:
        await asyncio.gather(*(event.wait() for event in started.values()))

    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        task = loop.create_task(run())
        loop.run_until_complete(wait())
        try:
            yield
        finally:
            engine.abort(ids)
            loop.run_until_complete(task)


def test_it_tells_what_runs(engine: AsyncEngine, live: LiveServer) -> None:
    long = SamplingParams(max_tokens=900, ignore_eos=True, seed=1, temperature=1.0)
    prompt = [1, *range(3000, 3050)]
    time.sleep(0.6)  # a picture younger than half a second is shared
    with running(engine, long, SamplingParams(max_tokens=900, ignore_eos=True, seed=2, n=2), prompt=prompt):
        picture = snapshot(live)
    assert picture["status"] == "ready" and picture["engine"]["model"] == "nemo-tiny"
    stats, pages = picture["stats"], picture["pages"]
    assert {one["queue_place"] for one in picture["requests"]} == {None}
    assert len(picture["requests"]) == stats["num_running"] + stats["num_waiting"] == 3
    for one in picture["requests"]:
        assert one["id"].startswith("watched-") and one["state"] == "decode" and one["age"] > 0
        assert one["prompt_tokens"] == len(prompt) and 0 <= one["cached_tokens"] < len(prompt)
        assert (
            one["pages"] * picture["engine"]["page_size"]
            >= one["computed_tokens"]
            >= one["prompt_tokens"] + one["output_tokens"] - 2
        )
    assert sum(pages["counts"].values()) == stats["num_pages"] >= pages["num_shown"] == pages["num_cells"]
    assert pages["counts"]["used"] + pages["counts"]["shared"] == stats["num_pages"] - stats["num_free_pages"] > 0
    assert pages["counts"]["shared"] >= len(prompt) // picture["engine"]["page_size"]  # the prompt is one for all
    steps = picture["steps"]
    assert len({len(column) for column in steps.values()}) == 1 and steps["id"] == sorted(steps["id"])
    assert steps["decodes"][-1] == 3 and all(ms > 0 for ms in steps["milliseconds"])
    history = picture["history"]
    assert len({len(column) for column in history.values()}) == 1 and sum(history["new_tokens"]) > 0
    time.sleep(0.6)
    after = snapshot(live)
    assert after["requests"] == [] and after["pages"]["counts"]["used"] == 0 < after["pages"]["counts"]["cached"]


def test_running_requests_come_first_and_the_list_ends() -> None:
    with Engine(MODEL, **ENGINE_OPTIONS) as engine:
        for index in range(40):  # 32 have slots
            engine.add_request(
                str(index), {"prompt_token_ids": [1, 2000]}, SamplingParams(max_tokens=9, ignore_eos=True)
            )
        engine.step()
        assert queue_places(engine.requests(100)) == [None] * 32 + list(range(1, 9))
        views = [(one.request_id, one.state) for one in engine.requests(100)]
        assert views == [(str(index), "decode" if index < 32 else "waiting") for index in range(40)]
        assert [(one.request_id, one.state) for one in engine.requests(35)] == views[:35]


@pytest.mark.parametrize("num_pages", [1, 7, MAX_CELLS, MAX_CELLS + 1, 100_003])
def test_the_map_of_any_cache_is_small(num_pages: int) -> None:
    states = bytes(page * page % 7 % 4 for page in range(num_pages - 1)) + b"\1"
    found = page_map(states)
    per_cell, count = found["pages_per_cell"], found["num_cells"]
    assert found["num_shown"] == num_pages  # all have been in use
    assert count <= MAX_CELLS and (count - 1) * per_cell < num_pages <= count * per_cell
    assert found["counts"] == {name: states.count(state) for state, name in enumerate(PAGE_STATES)}
    assert len(json.dumps(found)) < 18_000
    for state, name in enumerate(PAGE_STATES[1:], 1):
        shares = base64.b64decode(found["cells"][name])
        assert len(shares) == count
        for cell in (0, count // 2, count - 1):
            pages = states[cell * per_cell : (cell + 1) * per_cell]
            assert shares[cell] == pages.count(state) * 255 // len(pages)


@pytest.mark.parametrize(
    ("num_touched", "num_shown", "per_cell"),
    [(0, 256, 1), (257, 512, 1), (4096, 4096, 1), (5000, 8192, 2), (9000, 12_000, 3)],
)
def test_the_map_shows_the_pages_that_were_in_use(num_touched: int, num_shown: int, per_cell: int) -> None:
    found = page_map(b"\2" * num_touched + bytes(12_000 - num_touched))
    assert (found["num_shown"], found["pages_per_cell"]) == (num_shown, per_cell)
    assert found["counts"] == {"free": 12_000 - num_touched, "cached": 0, "used": num_touched, "shared": 0}
    used = base64.b64decode(found["cells"]["used"])
    assert len(used) == found["num_cells"] and sum(used) // 255 == num_touched // per_cell
    assert page_map(bytes(10))["num_shown"] == 10


def test_the_pages_of_a_conversation(live: LiveServer) -> None:
    def ask(**body: Any) -> httpx.Response:
        return httpx.post(f"{live.url}/monitor/pages", json=body, timeout=20)

    messages = [{"role": "user", "content": "Which pages hold this text of mine? " * 8}]
    assert ask(messages=messages).json()["runs"] == []
    before = snapshot(live)["stats"]["total_prefix_queried_tokens"]
    body = {"messages": messages, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=600).json()
    size, num_prompt_tokens = ENGINE_OPTIONS["page_size"], answer["usage"]["prompt_tokens"]
    found = ask(messages=messages).json()
    assert found["num_tokens"] == num_prompt_tokens and found["num_pages"] == (num_prompt_tokens - 1) // size > 2
    assert sum(count for _, count in found["runs"]) == found["num_pages"]
    pages = [first + i for first, count in found["runs"] for i in range(count)]
    assert len(set(pages)) == len(pages) and min(pages) >= 0
    time.sleep(0.6)
    picture = snapshot(live)
    cached = base64.b64decode(picture["pages"]["cells"]["cached"])  # a page a square
    assert all(cached[page] == 255 for page in pages)
    assert picture["stats"]["total_prefix_queried_tokens"] == before + num_prompt_tokens  # looking is no use
    more = [*messages, answer["choices"][0]["message"]]
    whole = ask(messages=more, add_generation_prompt=False).json()
    assert whole["num_pages"] >= found["num_pages"] and whole["num_tokens"] > found["num_tokens"]
    assert ask(messages=[]).status_code == 400 and ask(messages=[{"role": "no"}]).status_code == 400
    assert get(live, "/monitor/pages").status_code == 405


# ---- the stream


def test_a_picture_a_second_for_all_and_none_for_nobody(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []
    take = Monitor._take

    async def counted(self: Monitor) -> dict[str, Any]:
        taken.append(time.monotonic())
        return await take(self)

    monkeypatch.setattr(Monitor, "_take", counted)

    async def watch(count: int) -> list[dict[str, Any]]:
        pictures: list[dict[str, Any]] = []
        async with (
            httpx.AsyncClient(timeout=20) as client,
            client.stream("GET", f"{live.url}/monitor/stream") as response,
        ):
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    pictures.append(json.loads(line[6:]))
                if len(pictures) == count:
                    break
        return pictures

    async def watch_all() -> list[list[dict[str, Any]]]:
        return await asyncio.gather(*[watch(3) for _ in range(8)])

    time.sleep(0.6)
    started = time.monotonic()
    pictures = asyncio.run(watch_all())
    took = time.monotonic() - started
    assert took > 1.9
    assert all(len(own) == 3 and "stats" in own[-1] for own in pictures)
    assert len(taken) <= took + 3  # not 24
    for _ in range(10):  # the server may learn late that nobody looks on
        num_taken = len(taken)
        time.sleep(2.2)
        if len(taken) == num_taken:
            return
    raise AssertionError("it goes on")


def test_the_stream_ends_when_the_engine_has_been_drained() -> None:
    with AsyncEngine(MODEL, **ENGINE_OPTIONS) as engine, LiveServer(engine) as server:
        with httpx.stream("GET", f"{server.url}/monitor/stream", timeout=20) as response:
            states = []
            for line in response.iter_lines():
                if line.startswith("data: "):
                    states.append(json.loads(line[6:])["status"])
                if len(states) == 1:
                    asyncio.run(engine.drain())
        assert states[0] == "ready" and set(states[1:]) <= {"ready", "draining"} and len(states) <= 3
