"""``serve --config`` and ``--uds``: options of a file, and a server that listens at a path."""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from nemo_engine.cli import arguments, build_parser
from nemo_engine.cli.config_file import with_config


def merged(tmp_path: Path, text: str, *flags: str) -> argparse.Namespace:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    args = build_parser().parse_args(["serve", *flags, "--config", str(file)])
    return with_config(args, args.config)


def test_a_file_of_options_and_flags_that_win(tmp_path: Path) -> None:
    text = """
        model: nemo-tiny
        port: 8123
        max-model-len: 4096
        enable_prefix_caching: false
        kv_cache_gib: none
        served-model-name: [a, b]
        api_key: [k1, "k2,with-comma"]
        prefer: {rms_norm: torch}
        verbose: true
        host: 127.0.0.2
    """
    args = merged(tmp_path, text, "--port", "9000", "--api-key", "mine")
    assert args.model == "nemo-tiny" and args.verbose
    assert arguments.server_options(args) == {
        "port": 9000, "served_model_name": ["a", "b"], "api_key": ["mine"], "host": "127.0.0.2"
    }  # fmt: skip
    assert arguments.engine_options(args) == {
        "max_model_len": 4096, "enable_prefix_caching": False, "kv_cache_gib": None, "prefer": {"rms_norm": "torch"}
    }  # fmt: skip
    assert merged(tmp_path, "model: other", "nemo-tiny").model == "nemo-tiny"
    assert merged(tmp_path, "", "nemo-tiny", "-v").verbose
    assert arguments.server_options(merged(tmp_path, "api_key: ['k,1', k2]")) == {"api_key": ["k,1", "k2"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "there is no option 'prot': did you mean port?"),
        ("block_size: 16", "'block_size': use page_size"),
        ("temperature: 1", "there is no option 'temperature'"),
        ("config: x", "there is no option 'config'"),
        ("no-page: true", "there is no option 'no-page'"),
        ("port: x", "port: invalid int value: 'x'"),
        ("port: true", "port: true and false are for switches, got True"),
        ("page: 1", "page: must be true or false, got 1"),
        ("port: [[1]]", r"port: a text or a number is needed, got \[1\]"),
        ("max_model_len: 1\nmax-model-len: 2", "max-model-len and max_model_len are the same option"),
        ("port: 1\nport: 2", "'port' is given twice"),
        ("- port", "must hold options, as max-model-len: 8192, got list"),
        ("a: [", "is no YAML"),
        ("model: 3", "model must be a text, got 3"),
        ("!!python/object/apply:os.system [x]", "is no YAML"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        merged(tmp_path, text, "nemo-tiny")
    assert "serve.yaml" in str(error.value)


def test_the_model_must_be_somewhere(tmp_path: Path) -> None:
    from nemo_engine.cli import main

    with pytest.raises(SystemExit, match="2"):
        main(["serve"])
    assert main(["serve", "nemo-tiny", "--config", str(tmp_path / "none.yaml")]) == 2


def test_a_server_at_a_path(tmp_path: Path) -> None:
    """Started from a file, over a socket that a killed server left behind; a second one is refused; it leaves nothing."""
    path, file = tmp_path / "s", tmp_path / "serve.yaml"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    file.write_text(
        f"model: nemo-tiny\nuds: {path}\ndevice: cpu\nnum-kv-pages: 40\nmax-model-len: 256\npage-size: 16\n"
    )
    command = [sys.executable, "-m", "nemo_engine", "serve", "--config", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://any.host") as client:
            deadline = time.monotonic() + 120
            while True:
                try:
                    assert client.get("/health").status_code == 200
                    break
                except httpx.TransportError:
                    assert process.poll() is None and time.monotonic() < deadline
                    time.sleep(0.05)
            body = {"prompt": "A list is", "max_tokens": 3}
            assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] >= 1
            second = subprocess.run([*command, "--port", "0"], capture_output=True, text=True)
            assert second.returncode == 2 and "another process listens there" in second.stderr
            assert client.get("/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0 and not path.exists()
    finally:
        process.kill()
        assert process.stderr is not None
        assert f"at unix:{path}" in process.stderr.read()
    file.write_text("model: nemo-tiny\nuds: /no/such/folder/s\n")
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 2 and "uds '/no/such/folder/s' cannot be listened on" in failed.stderr
