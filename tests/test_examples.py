"""The examples run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str) -> str:
    done = subprocess.run([sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_asyncio() -> None:
    *texts, last = run("in_asyncio.py").splitlines()
    assert len(texts) == 3 and all(len(text) > 4 for text in texts) and last == "unfinished: 0"


def test_worker_threads() -> None:
    lines = run("in_a_thread.py").splitlines()
    assert len(lines) == 4 and len(set(lines)) == 4


def test_notebook() -> None:
    output = run("notebook.py")
    assert "num_running=0" in output.splitlines()[-1]


def test_steps() -> None:
    assert run("step_loop.py")


@pytest.mark.parametrize("path", ["/story", "/openai/v1/completions"])
def test_fastapi(path: str) -> None:
    """The application in a server of its own, as uvicorn runs it."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--port", str(port), "--app-dir", str(EXAMPLES), "in_fastapi:app"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        while "running on" not in (line := server.stderr.readline()):
            assert line, "it did not start"
        url = f"http://127.0.0.1:{port}{path}"
        if path == "/story":
            assert len(httpx.get(url, params={"about": "heaps"}, timeout=60).text) > 20
        else:
            answer = httpx.post(url, json={"prompt": "The os module", "max_tokens": 3}, timeout=60).json()
            assert answer["usage"]["completion_tokens"] == 3
    finally:
        server.terminate()
        assert server.wait(20) in (0, -15)
