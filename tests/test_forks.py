"""Engines and forks: what cannot work says so at once, what can work works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import asyncio, multiprocessing, os, signal, sys, threading
from nemo_engine import AsyncEngine, Engine, SamplingParams

OPTIONS = dict(device="cpu", num_kv_pages=16, max_model_len=512)
PARAMS = SamplingParams(max_tokens=2, ignore_eos=True)

def in_child(name, function):
    "Run function in a forked process and print what it returns or raises."
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            print(name, function(), flush=True)
        except BaseException as error:
            print(name, type(error).__name__, "spawn" in str(error), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(name, "HUNG", flush=True)

def count(engine):
    return len(engine.generate("The heapq", PARAMS)[0].outputs[0].token_ids)

def fresh():
    with Engine("nemo-tiny", **OPTIONS) as engine, Engine("nemo-tiny", **OPTIONS) as second:
        return count(engine) + count(second)

async def fresh_async():
    engine = AsyncEngine("nemo-tiny", **OPTIONS)
    outputs = [output async for output in engine.generate("The heapq", PARAMS)]
    engine.close()
    return len(outputs[-1].outputs[0].token_ids)

def spawned():
    print("spawned", count(Engine("nemo-tiny", **OPTIONS)), flush=True)

def leave(engine):
    with engine:
        return "left"

def main():
    in_child("before", fresh)
    engine = Engine("nemo-tiny", **OPTIONS)
    print("parent", count(engine))
    stream = engine.stream("The heapq", PARAMS)
    next(stream)
    with engine._lock:  # as if another thread had it, in the middle of a step
        in_child("generate", lambda: count(engine))
        in_child("stream", lambda: list(engine.stream("The heapq")))
        in_child("next", lambda: list(stream))
        in_child("add", lambda: engine.add_request("a", "The heapq"))
        in_child("step", engine.step)
        in_child("chat", lambda: engine.chat([{"role": "user", "content": "a"}]))
        in_child("abort", lambda: engine.abort("a"))
        in_child("stats", engine.stats)
        in_child("close", lambda: leave(engine))
    in_child("new", fresh)
    in_child("async-new", lambda: asyncio.run(fresh_async()))
    in_child("thread", lambda: in_thread(fresh))
    process = multiprocessing.get_context("spawn").Process(target=spawned)
    process.start(); process.join()
    print("parent", len(list(stream)), count(engine), engine.stats().num_running)

def in_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start(); thread.join()
    return found[0]

if __name__ == "__main__":
    main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells that a process was forked")
def test_a_forked_process_says_what_it_cannot_do(tmp_path: Path) -> None:
    script = tmp_path / "forks.py"
    script.write_text(_SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    refused = ["generate", "stream", "next", "add", "step", "chat", "abort", "stats"]
    assert lines == [
        "before 4", "parent 2", *[f"{name} RuntimeError True" for name in refused],
        "close left", "new RuntimeError True", "async-new RuntimeError True",
        "thread 4",  # which has no part in the parent's pool
        "spawned 2", "parent 1 2 0",
    ]  # fmt: skip
