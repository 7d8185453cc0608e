"""Replicas of the bundled model on a real local cluster: ``make test-ray``.

Not part of the suite, whose installation has no Ray.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import ray
import yaml
from ray import serve

from nemo_engine.ray import build_app, scale_by_load

ENGINE = {"device": "cpu", "dtype": "float32", "num_kv_pages": 400, "max_num_seqs": 8, "max_model_len": 1024}
ARGS: dict[str, Any] = {
    "model": "nemo-tiny",
    "engine": ENGINE,
    "server": {"drain_timeout": 20.0, "log_requests": False},
}
URL = "http://127.0.0.1:8123"
WEATHER = {
    "type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type":
    "string"}}, "required": ["city"]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=6, include_dashboard=False, logging_level="warning")
    serve.start(http_options={"host": "127.0.0.1", "port": 8123})
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def client(cluster: None) -> openai.OpenAI:
    serve.run(build_app(ARGS | {"num_replicas": 2, "session_affinity": True}), name="nemo", route_prefix="/")
    return openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, timeout=60)


def ask(client: openai.OpenAI, index: int = 0, session: str | None = None, **options: Any) -> Any:
    headers = {"x-session-id": session} if session else {}
    messages: list[Any] = [{"role": "user", "content": f"Hello, number {index}"}]
    return client.chat.completions.create(
        model="nemo-tiny", messages=messages, extra_headers=headers, **{"max_tokens": 8, "seed": 1} | options
    )


def pids() -> set[int]:
    """The processes of the replicas, of which each has a name, among those that this process has started."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name = (path / "cmdline").read_bytes()
            pid = int(path.name)
            if name.startswith(b"ray::ServeReplica") and os.getpid() in ancestors(pid):
                found.add(pid)
        except (OSError, ValueError):
            continue
    return found


def ancestors(pid: int) -> list[int]:
    chain = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        chain.append(pid)
    return chain


def num_running() -> int:
    """Replicas that Serve sends requests to, if there are no others."""
    states = {
        str(state): count
        for state, count in serve.status().applications["nemo"].deployments["nemo-engine"].replica_states.items()
    }
    return sum(states.values()) if set(states) == {"RUNNING"} else -1


def until(condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_openais_client_through_the_proxy(client: openai.OpenAI) -> None:
    whole = ask(client).choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True) if chunk.choices) == whole
    call = ask(client, tools=[WEATHER], tool_choice="required", max_tokens=60).choices[0].message.tool_calls[0]
    assert call.function.name == "weather" and "city" in json.loads(call.function.arguments)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert isinstance(json.loads(ask(client, response_format=form, max_tokens=60).choices[0].message.content)["a"], int)
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    assert httpx.get(f"{URL}/health").status_code == 200
    assert "nemo_engine" in httpx.get(f"{URL}/metrics").text


def test_a_session_stays_where_its_prefix_is(client: openai.OpenAI) -> None:
    def hits(with_session: bool) -> float:
        cached = total = 0
        for chat in range(6):
            text = f"Chat {with_session} {chat}: " + "the quick brown fox jumps over the lazy dog. " * 12
            messages: list[Any] = [{"role": "user", "content": text}]
            for _ in range(4):
                headers = {"x-session-id": f"chat-{chat}"} if with_session else {}
                answer = client.chat.completions.create(
                    model="nemo-tiny", messages=messages, max_tokens=4, seed=1, extra_headers=headers
                )
                cached += answer.usage.prompt_tokens_details.cached_tokens
                total += answer.usage.prompt_tokens
                messages += [
                    {"role": "assistant", "content": answer.choices[0].message.content or "x"},
                    {"role": "user", "content": "go on"},
                ]
        return cached / total

    without, with_sessions = hits(False), hits(True)
    print(f"prefix hits of prompt tokens: {without:.3f} without sessions, {with_sessions:.3f} with")
    assert with_sessions > without


def test_a_replica_that_dies_under_load(client: openai.OpenAI) -> None:
    ends: Counter[str] = Counter()
    is_over = threading.Event()

    def load(index: int) -> None:
        while not is_over.is_set():
            try:
                for _ in ask(client, index, stream=True, max_tokens=100, extra_body={"ignore_eos": True}):
                    pass
                ends["whole"] += 1
            except (openai.APIError, httpx.HTTPError) as error:
                ends[type(error).__name__] += 1

    threads = [threading.Thread(target=load, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: ends["whole"] >= 6)
    before = pids()
    assert len(before) == 2
    os.kill(min(before), signal.SIGKILL)
    until(lambda: num_running() == 2 and len(pids() - before) == 1)
    at = ends["whole"]
    until(lambda: ends["whole"] >= at + 6)
    is_over.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a request hangs"
    print(f"requests under the kill of a replica: {dict(ends)}")
    assert ask(client).choices[0].message.content is not None


def test_scaled_up_and_down_under_load_nothing_is_lost(client: openai.OpenAI) -> None:
    failures: list[BaseException] = []
    done: Counter[str] = Counter()
    is_over = threading.Event()

    def load(index: int) -> None:
        while not is_over.is_set():
            try:
                for _ in ask(client, index, stream=True, max_tokens=30):
                    pass
                done["whole"] += 1
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=load, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for count, options in (
        (3, {}),
        (1, {}),
        (2, {"server": ARGS["server"] | {"max_completions": 7}}),
    ):  # the last updates all replicas
        app = build_app(ARGS | {"num_replicas": count, "session_affinity": True} | options)
        serve.run(app, name="nemo", route_prefix="/")
        until(lambda count=count: num_running() == count)  # type: ignore[misc]
        at = done["whole"]
        until(lambda at=at: done["whole"] >= at + 4)  # type: ignore[misc]
    is_over.set()
    for thread in threads:
        thread.join(60)
    print(f"requests while replicas came and went: {done['whole']} whole, {len(failures)} failed: {failures[:3]}")
    assert not failures
    with pytest.raises(openai.BadRequestError, match="at most 7"):
        ask(client, n=8, temperature=1.0)


def test_the_yaml_and_the_example(cluster: None) -> None:
    root = Path(__file__).parent.parent.parent / "examples"
    (application,) = yaml.safe_load((root / "ray_serve.yaml").read_text())["applications"]
    assert application["import_path"] == "nemo_engine.ray:build_app"
    build_app(application["args"])
    build_app({"model": "nemo-tiny", "num_replicas": "2", "session_affinity": "true"})  # as `serve run` has them
    assert "build_app" in (root / "ray_replicas.py").read_text()


@pytest.mark.parametrize(
    ("now", "loads", "wanted"),
    [
        (1, [(8, 3, 0.5)], 2), (1, [(8, 0, 0.95)], 2), (1, [(8, 0, 0.5)], 1), (1, [(0, 0, 0.0)], 1), (3, [(8, 99, 1.0)] * 3, 9),
        (2, [(1, 0, 0.1), (2, 0, 0.1)], 1), (2, [(4, 0, 0.1), (2, 0, 0.1)], 2), (2, [], 1), (1, [(8, 30, 0.5)], 6), (2, [(3, 1, 0.95), (3, 5, 0.5)], 4),
    ],
)  # fmt: skip
def test_how_many_replicas_a_load_wants(now: int, loads: list[tuple[float, ...]], wanted: int) -> None:
    names = ("running", "waiting", "kv_use")
    metrics: dict[str, Any] = {
        name: {replica: [SimpleNamespace(value=load[at])] for replica, load in enumerate(loads)}
        for at, name in enumerate(names)
    }
    metrics["slots"] = {replica: [SimpleNamespace(value=8)] for replica in range(len(loads))}
    context: Any = SimpleNamespace(
        current_num_replicas=now, raw_metrics=metrics, capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=9
    )  # fmt: skip
    assert scale_by_load(context)[0] == wanted


def test_a_replica_comes_while_requests_wait(client: openai.OpenAI) -> None:
    serve.delete("nemo")  # from two replicas Serve would go to one ten minutes later
    args = ARGS | {"engine": ENGINE | {"max_num_seqs": 1, "num_kv_pages": 200}, "min_replicas": 1, "max_replicas": 2}
    serve.run(build_app(args), name="nemo", route_prefix="/")
    until(lambda: num_running() == 1)
    is_over = threading.Event()

    def load(index: int) -> None:
        while not is_over.is_set():
            ask(client, index, max_tokens=60)

    threads = [threading.Thread(target=load, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: num_running() == 2, 240)
    finally:
        is_over.set()
    for thread in threads:
        thread.join(60)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({}, "model must be"),
        ({"model": "nemo-tiny", "replicas": 2}, "replicas"),
        ({"model": "nemo-tiny", "engine": {"max_seqs": 2}}, "max_seqs"),
        ({"model": "nemo-tiny", "server": {"port": 80}}, "Serve's proxy listens"),
        ({"model": "nemo-tiny", "server": {"batch_dir": "."}}, "batch_dir"),
        ({"model": "nemo-tiny", "min_replicas": 1}, "go together"),
        ({"model": "nemo-tiny", "num_replicas": "two"}, "num_replicas must be an integer"),
        ({"model": "nemo-tiny", "num_replicas": 0}, "num_replicas must be at least 1"),
        ({"model": "nemo-tiny", "session_affinity": "maybe"}, "session_affinity must be"),
        ({"model": "nemo-tiny", "min_replicas": 1, "max_replicas": 2, "num_replicas": 1}, "does not go with"),
    ],
)
def test_what_is_refused_before_anything_is_placed(args: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        build_app(args)


def test_affinity_behind_haproxy_is_haproxys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would refuse the router, at the end of a deployment."""
    args = {"model": "nemo-tiny", "num_replicas": 2, "session_affinity": True}
    assert build_app(args)._bound_deployment._deployment_config.request_router_config.request_router_class
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(ValueError, match="RAY_SERVE_HAPROXY_BALANCE_ALGORITHM='hdr.x-session-id.'.* got None"):
        build_app(args)
    build_app(args | {"session_affinity": False})
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BALANCE_ALGORITHM", "hdr(x-session-id)")
    config = build_app(args)._bound_deployment._deployment_config.request_router_config
    assert "ConsistentHash" not in str(config.request_router_class)
