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

from tests.helpers.checkpoints import (
    random_adapter,
    random_state_dict,
    tiny_config,
    write_adapter,
    write_hf,
)
from tests.helpers.local_hub import serve

ROOT = Path(__file__).parent.parent.parent
CONFIG = tiny_config(vocab_size=20_000)  # weights of more than what is read for a header
OPEN = "from nemo_engine.checkpoint.checkpoint import open_checkpoint; print(open_checkpoint({!r}).describe())"


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


def infos(*models: str) -> str:
    """``nemo-engine info`` of each, with its exit code behind it."""
    return f"from nemo_engine.cli import main\nfor model in {models}: print('exit', main(['info', *model.split()]))"


def test_what_is_downloaded_to_answer(repos: dict[str, Path], tmp_path: Path) -> None:
    whole, shards = ("org/whole --lora org/adapter", "org/shards")
    with serve(repos) as hub:
        done = run(
            infos(whole, shards, "org/broken", "org/pickled", "org/adapter", "org/nothing"),
            tmp_path,
            HF_ENDPOINT=hub.url,
        )
    answers = re.split(r"^exit (\d)$", done.stdout, flags=re.MULTILINE)
    assert answers[1::2] == list("001112"), done.stderr
    for answer in answers[0:3:2]:
        assert re.search(r"^runs +yes$", answer, re.MULTILINE) and "(by the file headers)" in answer
    assert "LoRA of rank 4" in answers[0]
    assert "model.norm.weight: expected [24], found [25]" in answers[4]
    assert "it holds pickles (.bin)" in answers[6] and "from_pretrained('org/pickled'" in answers[6]
    assert "it is an adapter; give the model" in answers[8]
    assert "'org/nothing' is no local directory" in done.stderr
    assert "is the id right, and the revision? A private repository needs HF_TOKEN" in done.stderr
    weights = [sent for _, path, sent in hub.asked if re.search(r"resolve/.*/model.*\.safetensors$", path)]
    assert 0 < max(weights) <= 100_001 < (repos["org/whole"] / "model.safetensors").stat().st_size
    assert not list((tmp_path / "home").rglob("model*.safetensors"))


def test_where_files_go_and_offline(repos: dict[str, Path], tmp_path: Path) -> None:
    cache = str(tmp_path / "elsewhere")
    with serve(repos) as hub:
        done = run(OPEN.format("org/whole"), tmp_path, HF_ENDPOINT=hub.url, HF_HUB_CACHE=cache)
        assert done.stdout.startswith(cache), done.stderr
        assert not (tmp_path / "home" / "hub").exists()
        code = f"{OPEN.format('org/whole')}; open_checkpoint('org/broken', needs='config')"
        assert run(code, tmp_path, HF_ENDPOINT=hub.url).stdout.startswith(str(tmp_path / "home"))
        asked = len(hub.asked)
        code = f"""
{OPEN.format("org/whole")}
for model in "org/shards", "org/broken":
    try:
        open_checkpoint(model)
    except ValueError as error:
        print(error)
"""
        offline = run(code, tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
        assert len(hub.asked) == asked
    whole, shards, broken = offline.stdout.splitlines()
    assert whole.startswith(str(tmp_path / "home"))
    for message in (shards, broken):
        assert "HF_HUB_OFFLINE is set: unset it, or let HF_HOME or HF_HUB_CACHE name" in message


def test_a_token(repos: dict[str, Path], tmp_path: Path) -> None:
    code = f"""
import os
for os.environ["HF_TOKEN"] in ("", "other", "secret"):
    try:
        {OPEN.format("org/whole")}
    except ValueError as error:
        print(error)
"""
    with serve(repos, token="secret") as hub:
        done = run(code, tmp_path, HF_ENDPOINT=hub.url)
    denied, wrong, taken = done.stdout.splitlines()
    assert denied.endswith("gated or private needs HF_TOKEN of an account that may read it")
    assert wrong.endswith("HF_TOKEN of an account that may read it, and the one that is set may not")
    assert "21 tensors" in taken


def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        done = run(infos("org/whole"), tmp_path, HF_ENDPOINT=url)
    assert done.stdout == "exit 2\n" and done.stderr.count("\n") == 1
    assert f"asked was {url}: HF_ENDPOINT may name a mirror, HF_HOME or HF_HUB_CACHE a cache" in done.stderr
