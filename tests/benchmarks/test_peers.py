"""Engines in processes of their own: what they answer, how they fail, and that nothing of them is left."""

from __future__ import annotations

import importlib
import random
import sys
import time
from pathlib import Path
from typing import Any

import fake_llama_cpp
import psutil
import pytest

from nemo_engine.benchmarks.models import open_model
from nemo_engine.benchmarks.peers import PEERS, PeerError, PeerProcess, make_gguf, why_missing

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
        peer.generate(PROMPTS, COUNTS, keep=True)
        generate = f"generate {PROMPTS}"
        called = ["start one 4", "prepare 2", generate, "forget", "prepare 2", generate]
        assert calls(tmp_path) == called
        for _ in range(5):  # a busy machine may take longer now and then
            if seconds < 0.35:
                break
            seconds = peer.generate(PROMPTS, COUNTS)[0]
        assert 0.2 <= seconds < 0.35  # prepare takes as long, and is not in it
    assert calls(tmp_path)[-1] == "close"


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
    with PeerProcess("fake", "m", {"fails": "hang"}, timeout=600.0) as peer:
        peer._timeout = 0.3
        began = time.monotonic()
        with pytest.raises(PeerError, match=r"it gave no answer to 'generate' within 0\.3 s"):
            peer.generate(PROMPTS, COUNTS)
        assert time.monotonic() - began < 120


@pytest.mark.usefixtures("fake_peers")
def test_what_a_peer_started_ends_with_it(tmp_path: Path) -> None:
    with start(tmp_path, fails="child"):
        child = psutil.Process(int(calls(tmp_path)[1].split()[1]))
        assert child.is_running()
    deadline = time.monotonic() + 120
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


def toy_answer(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(sum(tokens) % fake_llama_cpp.VOCAB)
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("n_seq", "n_batch"), [(None, 2048), (1, 2048), (3, 2048), (4, 8)])
def test_llama_cpp_is_stepped_in_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_seq: int | None, n_batch: int
) -> None:
    """Against a toy in the library's place: prompts in parts, places filled anew, every sequence as if it were
    alone.
    """
    monkeypatch.setitem(sys.modules, "llama_cpp", fake_llama_cpp)
    monkeypatch.delitem(sys.modules, "nemo_engine.benchmarks.peers.llama_cpp_python", raising=False)
    adapter = importlib.import_module("nemo_engine.benchmarks.peers.llama_cpp_python")
    (tmp_path / "one.gguf").touch()
    rng = random.Random(0)
    prompts = [rng.choices(range(fake_llama_cpp.VOCAB), k=rng.randrange(1, 20)) for _ in range(9)]
    counts = [rng.randrange(1, 12) for _ in prompts]
    peer = adapter.Peer(str(tmp_path), n_seq=n_seq, n_batch=n_batch)
    for _ in range(2):  # the second time in the same context
        peer.prepare(prompts, counts)
        fake_llama_cpp.decoded.clear()
        assert peer.generate(prompts, counts) == [toy_answer(p, n) for p, n in zip(prompts, counts)]
        at_once = max(len({sequence for sequence, _ in step}) for step in fake_llama_cpp.decoded)
        assert at_once <= (n_seq or 9) and max(map(len, fake_llama_cpp.decoded)) <= n_batch
    if n_batch == 2048:  # prompts are whole, so all places are in use at some time
        assert at_once == (n_seq or 9)
    peer.close()
    with pytest.raises(FileNotFoundError, match=r"there is no file /no\.gguf"):
        adapter.Peer(str(tmp_path), gguf="/no.gguf")
    (tmp_path / "two.gguf").touch()
    with pytest.raises(FileNotFoundError, match=r"holds 2 \.gguf files, and llama\.cpp\.gguf names none"):
        adapter.Peer(str(tmp_path))


def test_the_checkpoint_that_becomes_a_gguf_has_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    from nemo_engine.text import load_tokenizer

    model = open_model("nemo-tiny").path
    make_gguf.with_tokenizer(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == (model / "model.safetensors").stat().st_size
    own = load_tokenizer(model)
    assert own is not None
    text = "def f(x):\n    return x + 1"
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text) == own.encode(text, bos=False)
    monkeypatch.setattr(sys, "argv", ["make_gguf.py", "nemo-tiny", str(tmp_path / "x.gguf"), "--llama-cpp", "/no"])
    with pytest.raises(SystemExit):
        make_gguf.main()
    assert "--llama-cpp must be a directory with convert_hf_to_gguf.py, got /no" in capsys.readouterr().err
