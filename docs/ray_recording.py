"""Records what OpenAI's client sees when one of two replicas is killed: ``python docs/ray_recording.py
docs/screenshots/ray-kill.svg``.

A line is an event with its second. Needs the extra ``ray``, and openai.
"""

from __future__ import annotations

import html
import os
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_raylet_start_wait_time_s", "180")

import openai  # noqa: E402
import ray  # noqa: E402
from ray import serve  # noqa: E402

from nemo_engine.ray import build_app  # noqa: E402

ENGINE = {"device": "cpu", "num_kv_pages": 400, "max_num_seqs": 8, "max_model_len": 1024}
CLIENTS = 4
lines: list[str] = []
began = 0.0


def note(text: str) -> None:
    """One more line."""
    lines.append(f"{time.monotonic() - began:6.1f} s  {text}")
    print(lines[-1], flush=True)


def stream(client: int, is_over: threading.Event, ends: Counter[str]) -> None:
    """Streams, one after the other; what is out of the ordinary is noted."""
    openai_client = openai.OpenAI(base_url="http://127.0.0.1:8127/v1", api_key="none", max_retries=0, timeout=60)
    number = 0
    failed = False
    while not is_over.is_set():
        number += 1
        chunks = 0
        try:
            for _ in openai_client.completions.create(
                model="nemo-tiny", prompt=f"def number_{client}(x):", max_tokens=120, stream=True,
                extra_headers={"x-session-id": f"client-{client}"}, extra_body={"ignore_eos": True},
            ):  # fmt: skip
                chunks += 1
            ends["whole"] += 1
            if number == 1 or failed:
                note(f"client {client}: answer {number} is whole, {chunks} chunks")
            failed = False
        except openai.APIError as error:
            ends["failed"] += 1
            failed = True
            note(
                f"client {client}: answer {number} broke off after {chunks} chunks: {type(error).__name__}: {error}"[
                    :110
                ]
            )
            time.sleep(0.2)


def replicas() -> dict[int, int]:
    """The processes of the replicas, and how many Serve counts as running."""
    states = serve.status().applications["nemo"].deployments["nemo-engine"].replica_states
    running = {str(state): count for state, count in states.items()}.get("RUNNING", 0)
    processes = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if (path / "cmdline").read_bytes().startswith(b"ray::ServeReplica:nemo"):
                processes[int(path.name)] = running
        except OSError:
            continue
    return processes


def main() -> None:
    """Serve, load, kill, wait until all is well, and draw."""
    global began
    ray.init(num_cpus=4, include_dashboard=False, logging_level="error", log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": 8127})
    app = build_app({"model": "nemo-tiny", "engine": ENGINE, "num_replicas": 2, "session_affinity": True})
    serve.run(app, name="nemo", route_prefix="/")
    began = time.monotonic()
    note(f"2 replicas of nemo-tiny, {CLIENTS} clients that stream, a session each")
    is_over, ends = threading.Event(), Counter[str]()
    threads = [threading.Thread(target=stream, args=(client, is_over, ends)) for client in range(CLIENTS)]
    for thread in threads:
        thread.start()
    while ends["whole"] < 3 * CLIENTS:
        time.sleep(0.1)
    before = set(replicas())
    note(f"{ends['whole']} answers are whole, {ends['failed']} failed; kill -9 of replica {min(before)}")
    os.kill(min(before), signal.SIGKILL)
    while not (set(replicas()) - before and max(replicas().values()) == 2):
        time.sleep(0.2)
    note("Serve has started another: 2 replicas run")
    whole = ends["whole"]
    while ends["whole"] < whole + 2 * CLIENTS:
        time.sleep(0.1)
    is_over.set()
    for thread in threads:
        thread.join(60)
    note(f"{ends['whole']} answers are whole, {ends['failed']} failed, no client hangs")
    serve.shutdown()
    ray.shutdown()
    text = "".join(
        f'<text x="12" y="{28 + 20 * place}" xml:space="preserve">{html.escape(line)}</text>\n'
        for place, line in enumerate(lines)
    )
    Path(sys.argv[1]).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="960" height="{30 + 20 * len(lines)}" font-family="monospace" '
        f'font-size="13" fill="#ddd"><rect width="100%" height="100%" rx="6" fill="#1b1b1f"/>\n{text}</svg>\n'
    )


if __name__ == "__main__":
    main()
