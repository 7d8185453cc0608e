"""The settings of huggingface_hub against a Hub on this machine: each works, and what fails says which may help."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.checkpoints import (
    random_adapter,
    random_state_dict,
    tiny_config,
    write_adapter,
    write_hf,
)
from tests.local_hub import serve

ROOT = Path(__file__).parent.parent.parent
CONFIG = tiny_config(vocab_size=20_000)  # weights of more than what is read for a header
OPEN = "from nemo_engine.model.checkpoint import open_checkpoint; print(open_checkpoint({!r}).describe())"


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hub")
    state = random_state_dict(CONFIG)
    adapter = write_adapter(folder / "adapter", random_adapter(CONFIG))
    pickled = write_hf(folder / "pickled", CONFIG, state)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    return {
        "org/whole": write_hf(folder / "whole", CONFIG, state),
        "org/shards": write_hf(folder / "shards", CONFIG, state, shards=2),
        "org/broken": write_hf(folder / "broken", CONFIG, state | {"model.norm.weight": torch.ones(25)}),
        "org/adapter": adapter,
        "org/pickled": pickled,
    }


def run(code: str, cwd: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a process of its own: huggingface_hub reads its settings when it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
    environment = kept | {"HF_HOME": str(cwd / "home"), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"} | settings
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def info(model: str, *more: str) -> str:
    return f"import sys; from nemo_engine.cli import main; sys.exit(main({['info', model, *more]!r}))"


def test_what_is_downloaded_to_answer(repos: dict[str, Path], tmp_path: Path) -> None:
    with serve(repos) as hub:
        for repo in ("org/whole", "org/shards"):
            done = run(info(repo, "--lora", "org/adapter"), tmp_path, HF_ENDPOINT=hub.url)
            assert done.returncode == 0, done.stderr
            assert re.search(r"^runs +yes$", done.stdout, re.MULTILINE) and "(by the file headers)" in done.stdout
            assert "LoRA of rank 4" in done.stdout
        done = run(info("org/broken"), tmp_path, HF_ENDPOINT=hub.url)
        assert done.returncode == 1 and "model.norm.weight: expected [24], found [25]" in done.stdout
        done = run(info("org/pickled"), tmp_path, HF_ENDPOINT=hub.url)
        assert done.returncode == 1 and "it holds pickles (.bin); load it with transformers" in done.stdout
        done = run(info("org/adapter"), tmp_path, HF_ENDPOINT=hub.url)
        assert done.returncode == 1 and "it is an adapter; give the model" in done.stdout
    weights = [sent for _, path, sent in hub.asked if re.search(r"resolve/.*/model.*\.safetensors$", path)]
    assert 0 < max(weights) <= 100_001 < (repos["org/whole"] / "model.safetensors").stat().st_size
    assert not list((tmp_path / "home").rglob("model*.safetensors"))


def test_where_files_go_and_offline(repos: dict[str, Path], tmp_path: Path) -> None:
    code = OPEN.format("org/whole")
    with serve(repos) as hub:
        done = run(code, tmp_path, HF_ENDPOINT=hub.url, HF_HUB_CACHE=str(tmp_path / "elsewhere"))
        assert str(tmp_path / "elsewhere") in done.stdout, done.stderr
        assert not (tmp_path / "home" / "hub").exists()
        assert run(code, tmp_path, HF_ENDPOINT=hub.url).stdout.startswith(str(tmp_path / "home"))
        asked = len(hub.asked)
        offline = run(code, tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
        assert offline.stdout.startswith(str(tmp_path / "home")) and len(hub.asked) == asked
        absent = run(OPEN.format("org/shards"), tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
        assert "HF_HUB_OFFLINE is set: unset it, or let HF_HOME or HF_HUB_CACHE name" in absent.stderr
        assert len(hub.asked) == asked


def test_a_token(repos: dict[str, Path], tmp_path: Path) -> None:
    code = OPEN.format("org/whole")
    with serve(repos, token="secret") as hub:
        denied = run(code, tmp_path, HF_ENDPOINT=hub.url)
        assert "gated or private needs HF_TOKEN of an account that may read it\n" in denied.stderr
        wrong = run(code, tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN="other")
        assert "and the one that is set may not" in wrong.stderr and "other" not in wrong.stderr.split("HF_TOKEN")[-1]
        assert run(code, tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN="secret").returncode == 0


def test_a_hub_that_does_not_have_it(repos: dict[str, Path], tmp_path: Path) -> None:
    with serve(repos) as hub:
        done = run(OPEN.format("org/nothing"), tmp_path, HF_ENDPOINT=hub.url)
        assert "'org/nothing' is no local directory" in done.stderr
        assert "is the id right, and the revision? A private repository needs HF_TOKEN" in done.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        done = run(OPEN.format("org/whole"), tmp_path, HF_ENDPOINT=url)
    assert f"asked was {url}: HF_ENDPOINT may name a mirror, HF_HOME or HF_HUB_CACHE a cache" in done.stderr
