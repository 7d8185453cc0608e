"""Two hosts with a replica each, in network namespaces of their own: the link between them is cut for ten seconds, and
one is lost under streaming load. ``make test-hosts``; needs iproute2 and the right to make namespaces.

The test's second half, which ``main`` is, runs as a process inside the head's namespace.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HEAD, WORKER = f"nemo-head-{os.getpid()}", f"nemo-worker-{os.getpid()}"
ADDRESSES = {"head": "10.77.0.1", "worker": "10.77.0.2"}
ENGINE = {"device": "cpu", "dtype": "float32", "num_kv_pages": 400, "max_num_seqs": 8, "max_model_len": 1024}
SETTINGS = {
    "RAY_AUTH_MODE": "disabled",  # whatever token this machine's user has for other clusters
    "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",  # else the head's proxy sends nothing to the worker
    "RAY_raylet_start_wait_time_s": "60",  # before it is started again
    "RAY_worker_niceness": "0",
}
PORTS = [
    *("--dashboard-agent-grpc-port=7001", "--dashboard-agent-listen-port=7002"),
    *("--runtime-env-agent-port=7003", "--metrics-export-port=7004"),
]
CUT_S = 10
HANGS_S = 120.0  # a request that has not ended so long after its host was lost


def ip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


def inside(namespace: str, *words: str, **options: Any) -> subprocess.Popen[Any]:
    return subprocess.Popen(["ip", "netns", "exec", namespace, *words], env=os.environ | SETTINGS, **options)


def start_node(namespace: str, where: str, folder: Path) -> None:
    """A node of the cluster, whose processes end with those of the namespace.

    As a supervisor would, start it again where it does not come up. A raylet waits fifteen seconds for the ports that
    its agents choose, which is too short on a busy machine: here they are given.
    """
    joins = ["--head", "--port=6379", "--include-dashboard=false", f"--temp-dir={folder}"]
    if where == "worker":
        joins = [f"--address={ADDRESSES['head']}:6379"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--disable-usage-stats",
               f"--node-ip-address={ADDRESSES[where]}", "--object-store-memory=100000000", *PORTS, *joins]  # fmt: skip
    with (folder.parent / f"{where}.log").open("ab") as log:
        again = ["sh", "-c", 'until "$@"; do sleep 1; done', "sh", *command]
        inside(namespace, *again, stdout=log, stderr=log, start_new_session=True)


def kill_all(namespace: str) -> None:
    """Every process in ``namespace``, at once."""
    for _ in range(50):
        pids = [int(pid) for pid in ip("netns", "pids", namespace).stdout.split()]
        if not pids:
            return
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.1)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Path]:
    """The namespaces, a cable between them, and a folder with a short name: the paths of sockets are limited."""
    if shutil.which("ip") is None:
        pytest.skip("two hosts need iproute2: there is no `ip`")
    made = ip("netns", "add", HEAD)
    if made.returncode:
        pytest.skip(f"two hosts need network namespaces: {made.stderr.strip()}")
    folder = Path("/tmp") / f"nemo-{os.getpid()}"
    folder.mkdir()
    try:
        ip("netns", "add", WORKER)
        cable = ip("link", "add", "nemo-a", "netns", HEAD, "type", "veth", "peer", "name", "nemo-b", "netns", WORKER)
        if cable.returncode:
            pytest.skip(f"two hosts need a pair of virtual cards: {cable.stderr.strip()}")
        for namespace, card, where in ((HEAD, "nemo-a", "head"), (WORKER, "nemo-b", "worker")):
            ip("-n", namespace, "address", "add", f"{ADDRESSES[where]}/24", "dev", card)
            for device in (card, "lo"):
                assert ip("-n", namespace, "link", "set", device, "up").returncode == 0
        yield folder
    finally:
        for namespace in (WORKER, HEAD):
            kill_all(namespace)
            ip("netns", "delete", namespace)
        shutil.rmtree(folder, ignore_errors=True)


def test_a_link_that_is_cut_and_a_host_that_is_lost(hosts: Path) -> None:
    (hosts / "ray").mkdir()
    start_node(HEAD, "head", hosts / "ray")
    part = inside(HEAD, sys.executable, "-u", __file__, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert part.stdin is not None and part.stdout is not None
    found: dict[str, Any] = {}
    try:
        for line in part.stdout:
            print(line, end="", flush=True)
            event, _, rest = line.partition(" ")
            if event == "cut":
                assert ip("-n", WORKER, "link", "set", "nemo-b", "down").returncode == 0
                time.sleep(CUT_S)
                assert ip("-n", WORKER, "link", "set", "nemo-b", "up").returncode == 0
            elif (
                event == "lose"
            ):  # as when the power fails: nothing more comes from there, no end of a connection either
                assert ip("-n", WORKER, "link", "set", "nemo-b", "down").returncode == 0
                kill_all(WORKER)
            elif event in ("join", "bring"):
                assert ip("-n", WORKER, "link", "set", "nemo-b", "up").returncode == 0
                start_node(WORKER, "worker", hosts / "ray")
            elif event == "found":
                found = json.loads(rest)
            else:
                continue
            part.stdin.write("done\n")
            part.stdin.flush()
        assert part.wait(60) == 0
    finally:
        part.kill()
    cut, lost, healed = found["cut"], found["lost"], found["healed"]
    # A stream that the cut falls into waits and goes on; those of the other host do not notice.
    assert cut["ends"] == {"whole": cut["num_streams"]} and cut["longest_wait_s"] > CUT_S / 2, cut
    # Those of the host that is lost end with an error once it counts as lost; the others, and all later ones, are whole.
    errors = {"APIError", "APIConnectionError", "InternalServerError"}  # in the stream, for it, and in its place
    assert lost["ends"]["whole"] > 0 and set(lost["ends"]) <= {"whole", *errors}, lost
    assert sum(lost["ends"].values()) == lost["num_streams"] and lost["longest_s"] < HANGS_S, lost
    assert lost["num_failed"] <= found["at_once"], "a request that came after the loss failed"
    assert healed["replicas"] == 2 and set(healed["ends"]) == {"whole"} and healed["hosts"] == 2, healed


# ---- inside the head's namespace


class Streams:
    """Streams of OpenAI's client, ``at_once`` at a time, and how each ended."""

    def __init__(self, at_once: int) -> None:
        self.ends: list[tuple[float, float, float, str]] = []  # (start, end, longest wait for a chunk, how)
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(index,), daemon=True) for index in range(at_once)]
        for thread in self._threads:
            thread.start()

    def _run(self, index: int) -> None:
        import openai

        client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", max_retries=0, timeout=HANGS_S)
        while not self._is_over.is_set():
            start = last = time.monotonic()
            longest, how = 0.0, "whole"
            try:
                for _ in client.completions.create(
                    model="nemo-tiny", prompt=f"Number {index}:", max_tokens=200, stream=True,
                    extra_body={"ignore_eos": True},
                ):  # fmt: skip
                    now = time.monotonic()
                    longest, last = max(longest, now - last), now
            except Exception as error:
                how = type(error).__name__
                time.sleep(0.2)
            self.ends.append((start, time.monotonic(), longest, how))

    def until(self, condition: Any, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, Counter(how for *_, how in self.ends)
            time.sleep(0.2)

    def stop(self) -> dict[str, Any]:
        self._is_over.set()
        for thread in self._threads:
            thread.join(2 * HANGS_S)
        return {
            "num_streams": len(self.ends),
            "ends": Counter(how for *_, how in self.ends),
            "longest_s": max(end - start for start, end, _, _ in self.ends),
            "longest_wait_s": max(wait for *_, wait, _ in self.ends),
        }


def tell(event: str, **facts: Any) -> None:
    print(event, json.dumps(facts), flush=True)
    if event != "note":
        sys.stdin.readline()


def num_running() -> int:
    from ray import serve

    states = serve.status().applications["nemo"].deployments["nemo-engine"].replica_states
    return {str(state): count for state, count in states.items()}.get("RUNNING", 0)


def main() -> None:
    """Serve, load, have the link cut and the host lost, and print what the client saw."""
    import ray
    from ray import serve

    from nemo_engine.ray import build_app

    began = time.monotonic()
    while True:  # until the head is up
        try:
            ray.init(address=f"{ADDRESSES['head']}:6379", logging_level="error", log_to_driver=False)
            break
        except ConnectionError:
            assert time.monotonic() < began + 400
            time.sleep(1)
    serve.start(http_options={"host": "127.0.0.1", "port": 8000})  # its controller is on the head
    tell("join")
    while len([node for node in ray.nodes() if node["Alive"]]) < 2:
        assert time.monotonic() < began + 600, "the worker does not join"
        time.sleep(0.5)
    app = build_app({"model": "nemo-tiny", "engine": ENGINE, "num_replicas": 2, "server": {"log_requests": False}})
    serve.run(app, name="nemo", route_prefix="/")
    at_once, found = 6, {}
    tell("note", up_after_s=time.monotonic() - began, replicas=num_running())
    streams = Streams(at_once)
    streams.until(lambda: len(streams.ends) >= 2 * at_once, 120)
    began = time.monotonic()
    tell("cut")
    tell("note", cut_s=time.monotonic() - began)
    after = len(streams.ends) + 4 * at_once
    streams.until(
        lambda: len(streams.ends) >= after and all(end[1] > began + CUT_S for end in streams.ends[-at_once:]), 120
    )
    found["cut"] = streams.stop()
    tell("note", **found["cut"])
    streams = Streams(at_once)
    streams.until(lambda: len(streams.ends) >= 2 * at_once, 120)
    began = time.monotonic()
    tell("lose")
    streams.until(lambda: sum(1 for node in ray.nodes() if node["Alive"]) == 1, HANGS_S)
    tell("note", noticed_after_s=time.monotonic() - began)
    after = len(streams.ends) + 3 * at_once
    streams.until(lambda: len(streams.ends) >= after, HANGS_S)
    found["lost"] = streams.stop()
    failed = [end - began for _, end, _, how in streams.ends if how != "whole"]
    found["lost"] |= {"num_failed": len(failed), "failed_after_s": failed}
    tell("note", **found["lost"])
    streams = Streams(1)  # few: both hosts share this machine's cores, and one of them starts
    began = time.monotonic()
    tell("bring")
    streams.until(lambda: num_running() == 2, 900)  # its start may fail once: see start_node
    tell("note", healed_after_s=time.monotonic() - began)
    after = len(streams.ends) + at_once
    streams.until(lambda: len(streams.ends) >= after, 120)
    alive = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
    found["healed"] = streams.stop() | {"replicas": num_running(), "hosts": len(set(alive))}
    tell("found", at_once=at_once, **found)


if __name__ == "__main__":
    main()
