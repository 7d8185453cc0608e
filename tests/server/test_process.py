"""``nemo-engine serve`` as a process: how it starts, drains, is stopped, and fails."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from nemo_engine.server.options import ServerOptions
from nemo_engine.server.run import serve
from tests.helpers.patience import insistent

OPTIONS = ["--device=cpu", "--max-model-len=1024", "--num-kv-pages=400", "--page-size=16"]
LONG = {"prompt": [1, 2000, 2001], "max_tokens": 600, "ignore_eos": True}


@contextmanager
def serving(
    *options: str, script: str | None = None, env: dict[str, str] | None = None
) -> Iterator[tuple[Any, str, list[str]]]:
    """The process, its address, and the lines of its stderr as they come."""
    what = ["-m", "nemo_engine", "serve", "nemo-tiny"] if script is None else ["-c", script, "serve", "nemo-tiny"]
    command = [sys.executable, *what, "--port=0", *OPTIONS, *options]
    import os

    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
    lines: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=lambda: lines.extend(iter(process.stderr.readline, "")), daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + 1200
        while not (found := re.search(r"at (https?://\S+)", "".join(lines))):
            assert process.poll() is None and time.monotonic() < deadline, "".join(lines)
            time.sleep(0.02)
        while True:
            try:
                httpx.get(found[1] + "/health", verify=False)
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield process, found[1], lines
    finally:
        process.kill()
        process.wait()
        reader.join(5)


def ask_in_thread(url: str, body: dict[str, Any]) -> tuple[threading.Thread, list[httpx.Response]]:
    found: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: found.append(httpx.post(url + "/v1/completions", json=body, timeout=600)))
    thread.start()
    return thread, found


def wait_for_running(url: str, count: int) -> None:
    deadline = time.monotonic() + 120
    while httpx.get(url + "/load").json()["num_running"] < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_line(lines: list[str], text: str) -> None:
    deadline = time.monotonic() + 120
    while not any(text in line for line in lines):
        assert time.monotonic() < deadline, lines
        time.sleep(0.01)


@insistent
def test_sigterm_under_load_drains() -> None:
    with serving() as (process, url, lines):
        whole, whole_answer = ask_in_thread(url, LONG)
        streamed, streamed_answer = ask_in_thread(url, LONG | {"stream": True})
        wait_for_running(url, 2)
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 120
        while httpx.get(url + "/v1/health/ready").status_code != 503:
            assert time.monotonic() < deadline
        assert httpx.get(url + "/v1/health/live").status_code == 200
        refused = httpx.post(url + "/v1/completions", json=LONG | {"max_tokens": 1})
        assert refused.status_code == 503 and "retry-after" in refused.headers
        for thread in (whole, streamed):
            thread.join(60)
        assert whole_answer[0].json()["usage"]["completion_tokens"] == 600
        assert streamed_answer[0].text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in streamed_answer[0].text
        assert process.wait(120) == 0
        assert any("SIGTERM: 2 requests may finish" in line for line in lines)


@insistent
def test_the_deadline_of_the_drain_ends_what_is_left() -> None:
    with serving("--drain-timeout=0.3") as (process, url, _):
        thread, answer = ask_in_thread(url, LONG | {"max_tokens": 1000})
        streamed, streamed_answer = ask_in_thread(url, LONG | {"max_tokens": 1000, "stream": True})
        wait_for_running(url, 2)
        process.send_signal(signal.SIGTERM)
        thread.join(120)
        streamed.join(120)
        assert answer[0].json()["choices"][0]["finish_reason"] == "abort"
        assert '"finish_reason":"abort"' in streamed_answer[0].text
        assert process.wait(120) == 0


@insistent
def test_a_second_signal_ends_at_once() -> None:
    with serving("--drain-timeout=300") as (process, url, lines):
        for stream in (False, True):
            threading.Thread(target=_swallow, args=(url, stream), daemon=True).start()
        silent = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        silent.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
        wait_for_running(url, 2)
        process.send_signal(signal.SIGINT)
        wait_for_line(lines, "SIGINT: 2 requests may finish")
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
    assert not any("Traceback" in line or "Error" in line for line in lines), lines


def _swallow(url: str, stream: bool) -> None:
    try:
        httpx.post(
            url + "/v1/completions", json=LONG | {"max_tokens": 1000, "timeout": 100, "stream": stream}, timeout=600
        )
    except httpx.TransportError:
        pass


def test_an_engine_that_dies_makes_the_process_fail() -> None:
    script = """
import sys, threading, time
from nemo_engine.engine.async_engine import AsyncEngine
start = AsyncEngine.__init__
def init(self, *args, **options):
    start(self, *args, **options)
    def kill():
        while not self.num_unfinished:
            time.sleep(0.01)
        def die():
            raise SystemExit("planted")
        self._steps.post(die)
    threading.Thread(target=kill, daemon=True).start()
AsyncEngine.__init__ = init
from nemo_engine.cli import main
sys.exit(main(sys.argv[1:]))
"""
    with serving(script=script) as (process, url, lines):
        answer = httpx.post(url + "/v1/completions", json=LONG, timeout=600)
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "engine_dead"
        assert process.wait(30) == 1
    assert any("has ended by an error" in line for line in lines)


def test_logs_are_json_with_ids_and_without_prompts() -> None:
    body = {"prompt": "a secret prompt", "max_tokens": 2, "ignore_eos": True}
    with serving(env={"NEMO_ENGINE_API_KEY": "k"}) as (process, url, lines):
        assert httpx.post(url + "/v1/completions", json=body).status_code == 401
        headers = {"Authorization": "Bearer k", "X-Request-Id": "mine"}
        answer = httpx.post(url + "/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    entries = [json.loads(line[line.index("{") :]) for line in lines if '"path"' in line]
    assert [entry["status"] for entry in entries] == [401, 200]
    assert entries[1]["id"] == answer.headers["x-request-id"] == "cmpl-mine" and entries[1]["output_tokens"] == 2
    assert entries[1]["finish_reasons"] == ["length"] and entries[1]["seconds"] >= 0
    assert "secret" not in "".join(lines)


def test_prompts_are_logged_only_if_asked_for() -> None:
    with serving("--log-prompts") as (process, url, lines):
        httpx.post(url + "/v1/completions", json={"prompt": "a secret prompt", "max_tokens": 2})
        chat = {"messages": [{"role": "user", "content": "another secret"}], "max_tokens": 2}
        httpx.post(url + "/v1/chat/completions", json=chat)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    assert "a secret prompt" in "".join(lines) and "another secret" in "".join(lines)


def test_tls(tmp_path: Path) -> None:
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")],
        check=True, capture_output=True,
    )  # fmt: skip
    options = [f"--ssl-certfile={tmp_path / 'cert.pem'}", f"--ssl-keyfile={tmp_path / 'key.pem'}"]
    with serving(*options) as (_, url, _lines):
        assert url.startswith("https://")
        assert httpx.get(url + "/v1/models", verify=False).json()["data"][0]["id"] == "nemo-tiny"


def test_keys_are_read_again_on_sighup(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("eve:old\n")
    with serving(f"--api-key-file={path}") as (process, url, lines):
        for text, accepted in (("eve:new\n", "new"), ("", "new"), ("frank:franks\n", "franks")):
            path.write_text(text)
            count = sum("SIGHUP" in line for line in lines)
            process.send_signal(signal.SIGHUP)
            deadline = time.monotonic() + 120
            while sum("SIGHUP" in line for line in lines) == count:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            for key in ("old", "new", "franks"):
                status = httpx.get(url + "/v1/models", headers={"X-API-Key": key}).status_code
                assert status == (200 if key == accepted else 401), (text, key)


def test_hosts_and_names_of_a_server_without_keys() -> None:
    with serving("--served-model-name", "a", "b") as (_, url, lines):
        models = httpx.get(url + "/v1/models").json()["data"]
        assert [(model["id"], model["root"]) for model in models] == [("a", "nemo-tiny"), ("b", "nemo-tiny")]
        assert httpx.get(url + "/v1/models", headers={"Host": "evil.example"}).status_code == 403
        assert httpx.get(url + "/v1/models", headers={"Host": "localhost"}).status_code == 200
        assert not any("no API keys" in line for line in lines)
    with serving("--host=0.0.0.0") as (_, url, lines):
        assert any("0.0.0.0" in line and "no API keys" in line for line in lines)
        assert httpx.get(url + "/health", headers={"Host": "any.example"}).status_code == 200


def test_bad_tls_files_are_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    for name in ("a", "b"):
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
             "-keyout", str(tmp_path / f"{name}.key"), "-out", str(tmp_path / f"{name}.pem")],
            check=True, capture_output=True,
        )  # fmt: skip
    (tmp_path / "empty").write_text("")
    for certificate, key, named in (
        ("empty", "a.key", "ssl_certfile"), ("a.key", "a.key", "ssl_certfile"), ("a.pem", "empty", "ssl_keyfile"),
        ("a.pem", "b.key", "ssl_keyfile"), ("a.pem", "a.pem", "ssl_keyfile"),
    ):  # fmt: skip
        options = ServerOptions(
            ssl_certfile=str(tmp_path / certificate), ssl_keyfile=str(tmp_path / key), log_requests=False
        )
        with pytest.raises(ValueError, match=f"^{named} "):
            serve("no such model", options, {})
    good = ServerOptions(ssl_certfile=str(tmp_path / "a.pem"), ssl_keyfile=str(tmp_path / "a.key"), port=0)
    with pytest.raises((ValueError, FileNotFoundError), match="no such model"):
        serve("no such model", good, {})


def refused(*options: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "nemo_engine", "serve", "nemo-tiny", *options],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("nemo-engine: error: ") and run.stderr.count("\n") == 1, run.stderr
    return run.stderr


def test_bad_options_are_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "cannot be listened on" in refused(f"--port={taken.getsockname()[1]}")
    assert "port must be an integer in [0, 65535]" in refused("--port=99999")
    assert "host 'no such host' is no address" in refused("--host=no such host")
    assert "max_model_len" in refused("--port=0", "--max-model-len=0", "--device=cpu")


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_named(missing: str) -> None:
    script = (
        f"import sys; sys.modules[{missing!r}] = None; from nemo_engine.cli import main; sys.exit(main(['serve', "
        "'nemo-tiny']))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert run.returncode == 2 and "nemo-engine[server]" in run.stderr and missing in run.stderr
