"""Engines in processes of their own: what they answer, how they fail, and that nothing of them is left."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemo_engine.benchmarks.peers import PEERS, PeerError, PeerProcess, why_missing

PROMPTS, COUNTS = [[5, 6], [7]], [3, 1]


def start(tmp_path: Path, **options: Any) -> PeerProcess:
    return PeerProcess("fake", "/models/one", {"calls": str(tmp_path / "calls"), **options})


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


@pytest.mark.usefixtures("fake_peers")
def test_calls_in_their_order_and_the_clock_around_one_of_them(tmp_path: Path) -> None:
    with start(tmp_path, slow_s=0.2, most=4) as peer:
        assert peer.versions == {"fake": "1.2"}
        seconds, outputs = peer.generate(PROMPTS, COUNTS)
        assert outputs == [[6, 6, 6], [7]]
        assert 0.2 <= seconds < 0.35  # prepare takes as long, and is not in it
        peer.generate(PROMPTS, COUNTS, keep=True)
    generate = f"generate {PROMPTS}"
    assert calls(tmp_path) == [
        "start one 4", "prepare 2", generate, "forget", "prepare 2", generate, "close",
    ]  # fmt: skip


@pytest.mark.usefixtures("fake_peers")
@pytest.mark.parametrize(
    ("fails", "error"),
    [
        ("error", "RuntimeError: out of memory"),
        ("die", r"its process ended with status 7, after \.\.\..*something terrible"),
    ],
)
def test_a_call_that_fails_says_why(tmp_path: Path, fails: str, error: str) -> None:
    with start(tmp_path, fails=fails) as peer, pytest.raises(PeerError, match=error):
        peer.generate(PROMPTS, COUNTS)


@pytest.mark.usefixtures("fake_peers")
def test_a_start_that_fails_leaves_no_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(PeerError, match="^ValueError: this one does not start$"):
        PeerProcess("fake", "m", {"fails": "start"}, log=log)
    assert "==== fake" in log.read_text() and "Traceback" in log.read_text()
    with pytest.raises(PeerError, match="TypeError: .*unexpected keyword argument 'nonsense'"):
        PeerProcess("fake", "m", {"nonsense": 1})


@pytest.mark.usefixtures("fake_peers")
def test_what_does_not_answer_in_time_is_ended() -> None:
    with PeerProcess("fake", "m", {"fails": "hang"}, timeout=10.0) as peer:
        peer._timeout = 0.3
        began = time.monotonic()
        with pytest.raises(PeerError, match=r"it gave no answer to 'generate' within 0\.3 s"):
            peer.generate(PROMPTS, COUNTS)
        assert time.monotonic() - began < 5


@pytest.mark.usefixtures("fake_peers")
def test_what_a_peer_started_ends_with_it(tmp_path: Path) -> None:
    with start(tmp_path, fails="child"):
        child = psutil.Process(int(calls(tmp_path)[1].split()[1]))
        assert child.is_running()
    deadline = time.monotonic() + 5
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("fake_peers")
def test_why_an_engine_is_missing() -> None:
    assert why_missing("fake", sys.executable) is None
    assert why_missing("absent", sys.executable) == f"no_such_package is not installed under {sys.executable}"
    assert why_missing("fake", "/no/python") == "/no/python cannot be run: No such file or directory"


def test_every_peer_names_its_limit_of_requests_at_once() -> None:
    """The option is one that its adapter takes by name, or hands on to the engine."""
    for kind in PEERS.values():
        text = (Path(sys.modules[PeerProcess.__module__].__file__ or "").parent / f"{kind.module}.py").read_text()
        assert f"{kind.concurrency}: int | None = None" in text or "**options" in text
