"""``bench startup``: its stages add up, cold starts are cold or left out, and peers are measured beside ours."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nemo_engine.benchmarks import startup
from nemo_engine.benchmarks.models import BenchModel
from nemo_engine.benchmarks.peers import PeerError
from nemo_engine.benchmarks.startup import TOTAL, prepare, resident_part
from nemo_engine.cli import main


def bench(path: Path, *options: object) -> tuple[int, list[dict[str, Any]]]:
    code = main(["bench", "startup", *map(str, options), "--json", str(path), "--option", "device=cpu"])
    return code, [json.loads(line) for line in path.read_text().splitlines()]


def test_the_stages_of_a_start_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, (row,) = bench(tmp_path / "r", "tiny", "--rounds", 1, "--warmup", 0, "--prompt-len", 3)
    assert code == 0 and row["status"] == "ok" and row["kind"] == "warm"  # of a shape there is nothing to read
    stages = {name: seconds for name, (seconds,) in row["stages"].items()}
    assert {
        "start the interpreter",
        "import torch",
        "import nemo_engine",
        "make dummy weights",
        "first answer",
    } <= stages.keys()
    assert all(seconds >= 0 for seconds in stages.values())
    parts = sum(seconds for name, seconds in stages.items() if name not in (TOTAL, "second answer"))
    assert parts == pytest.approx(stages[TOTAL], rel=1e-3) and row["total_s"] == [stages[TOTAL]]
    assert "import torch" in capsys.readouterr().out


def test_the_page_cache_is_filled_and_emptied(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(os.urandom(1 << 22))
    model = BenchModel("own", tmp_path, 10, False)
    assert prepare(model, "warm") == 1.0 == resident_part([file])
    assert prepare(model, "cold") < 1.0
    (tmp_path / "empty.safetensors").touch()
    assert prepare(model, "warm") == 1.0 and resident_part([]) == 0.0


class Starter:
    """Starts that cost nothing, ours and peers'."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def ours(self, setup: Any, model: Any, prompt: Any, log: Any) -> dict[str, float]:
        self.order.append("ours")
        return {"first answer": 0.5, TOTAL: 2.0, "second answer": 0.1}

    def peer(self, name: str, model: str, options: Any, python: str, log: Any) -> Any:
        self.order.append(name)
        if name == "sglang":
            raise PeerError("no such device")
        return Peer()


class Peer:
    versions = {"vllm": "9"}
    started = {"import_seconds": 0.0, "load_seconds": 0.0}

    def generate(self, prompts: Any, max_tokens: Any) -> tuple[float, list[list[int]]]:
        return 0.0, [[1]]

    def close(self) -> None:
        pass


def test_peers_and_cold_starts_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    starter, resident = Starter(), iter([0.0, 0.9, 0.02])
    monkeypatch.setattr(startup, "start_ours", starter.ours)
    monkeypatch.setattr(startup, "PeerProcess", starter.peer)
    monkeypatch.setattr(startup, "why_missing", lambda name, python: "gone" if name == "llama.cpp" else None)
    monkeypatch.setattr(startup, "prepare", lambda model, kind: 1.0 if kind == "warm" else next(resident))
    code, rows = bench(tmp_path / "r", "nemo-tiny", "--rounds", 2, "--peers", "vllm", "sglang", "llama.cpp")
    assert code == 1
    by_key = {(row["engine"], row["kind"]): row for row in rows}
    assert by_key["nemo_engine", "cold"]["checkpoint_in_page_cache"] == [
        0.02
    ]  # the first warms up, the second was not cold
    assert by_key["nemo_engine", "warm"]["total_s"] == [2.0, 2.0]
    assert by_key["sglang", "warm"]["status"] == "failed" and by_key["llama.cpp", "warm"]["status"] == "missing"
    vllm = by_key["vllm", "warm"]
    assert vllm["versions"] == {"vllm": "9"} and len(vllm["total_s"]) == 2
    assert vllm["nemo_engine_faster_by"]["median"] == pytest.approx(sum(vllm["total_s"]) / 4, rel=0.9)
    assert starter.order.count("vllm") == 3 and starter.order.count("sglang") == 1 and "llama.cpp" not in starter.order


def test_where_the_kernel_keeps_its_pages_there_is_no_cold_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(startup, "start_ours", Starter().ours)
    monkeypatch.setattr(startup, "prepare", lambda model, kind: 1.0)
    code, (warm, cold) = bench(tmp_path / "r", "nemo-tiny", "--rounds", 1)
    assert code == 0 and warm["status"] == "ok"
    assert cold["status"] == "missing" and "kept the checkpoint in its page cache" in cold["error"]


def test_a_start_that_fails_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, (row,) = bench(tmp_path / "r", "tiny", "--rounds", 1, "--warmup", 0, "--option", "max_model_len=99999")
    assert code == 1 and row["status"] == "failed"
    assert "max_model_len must be at most the checkpoint's max_position_embeddings (4096), got 99999" in row["error"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--prompt-len", "0"], "--prompt-len must be at least 1, got 0"),
        (["--option", "page_size=5"], "page_size must be from 16 to 256, got 5"),
        (["--option", "no_such=5"], "--option names 'no_such', which nemo_engine does not have: it has dtype,"),
    ],
)
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "startup", "tiny", *options]) == 2
    assert message in capsys.readouterr().err
