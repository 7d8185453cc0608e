"""Where checkpoints come from, and what is said of broken ones."""

from __future__ import annotations

import json
import logging
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_engine.checkpoint.checkpoint import open_checkpoint
from nemo_engine.checkpoint.loader import read_tensor
from nemo_engine.checkpoint.safetensors_files import read_header
from tests.helpers.checkpoints import hf_config, random_state_dict, tiny_config, write_hf, write_mistral

CONFIG = tiny_config()
STATE = random_state_dict(CONFIG, seed=3)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to connect fails the test, whatever catches the exception on the way."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# ---- local directories


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("write", [write_hf, write_mistral])
def test_both_layouts(tmp_path: Path, write: Callable[..., Path], shards: int) -> None:
    checkpoint = open_checkpoint(write(tmp_path, CONFIG, STATE, shards=shards))
    assert checkpoint.layout == ("hf" if write is write_hf else "mistral")
    assert checkpoint.path == tmp_path
    assert checkpoint.model_config == CONFIG  # params.json is silent about dtype: the tensors say it
    assert len({info.file for info in checkpoint.tensors.values()}) == shards
    assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in STATE.values())
    stored: dict[str, torch.Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        stored |= load_file(file)
    assert checkpoint.tensors.keys() == stored.keys()
    assert all(torch.equal(read_tensor(checkpoint.tensors[name]), tensor) for name, tensor in stored.items())


def test_a_directory_with_both_takes_one_and_says_which(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_mistral(write_hf(tmp_path, CONFIG, STATE), CONFIG, STATE, shards=2)
    with caplog.at_level(logging.INFO, "nemo_engine"):
        checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.layout == "hf"
    assert "Hugging Face layout" in checkpoint.describe()
    assert "not used: consolidated.safetensors.index.json, consolidated-00001" in checkpoint.describe()
    assert checkpoint.describe() in [record.getMessage() for record in caplog.records]


def test_the_set_that_has_its_configuration_is_taken(tmp_path: Path) -> None:
    write_mistral(write_hf(tmp_path, CONFIG, STATE), CONFIG, STATE)
    (tmp_path / "config.json").unlink()
    assert open_checkpoint(tmp_path).layout == "mistral"
    (tmp_path / "params.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("write", [write_hf, write_mistral])
def test_head_dim_is_read_from_the_tensors(tmp_path: Path, write: Callable[..., Path]) -> None:
    write(tmp_path, CONFIG, STATE, head_dim=None)
    assert open_checkpoint(tmp_path).model_config == CONFIG
    with pytest.raises(ValueError, match="has no head_dim"):
        open_checkpoint(tmp_path, needs="config")


def test_head_dim_that_tensors_disagree_about(tmp_path: Path) -> None:
    write_hf(tmp_path, CONFIG, STATE, head_dim=None, num_key_value_heads=4)
    with pytest.raises(
        ValueError, match=r"no head_dim.*q_proj.weight has 32 rows for 4 heads, .*k_proj.weight has 16 for 4"
    ):
        open_checkpoint(tmp_path)


def test_dtype_and_generation_config(tmp_path: Path) -> None:
    state = random_state_dict(CONFIG, dtype=torch.float16)
    write_hf(tmp_path, CONFIG, state, torch_dtype=None)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    config = open_checkpoint(tmp_path).model_config
    assert (config.dtype, config.eos_token_ids) == ("float16", (2, 9))


def test_configuration_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    checkpoint = open_checkpoint(tmp_path, needs="config")
    assert checkpoint.model_config == CONFIG and not checkpoint.tensors
    assert "configuration only" in checkpoint.describe()
    with pytest.raises(FileNotFoundError, match="it has no weights at all; needed is model.safetensors"):
        open_checkpoint(tmp_path)


def test_nemo_tiny() -> None:
    checkpoint = open_checkpoint("nemo-tiny")
    config = checkpoint.model_config
    assert config.q_size != config.hidden_size and config.num_kv_heads < config.num_heads
    assert checkpoint.num_bytes <= 16 * 2**20


# ---- what is not there

LOCAL_NAMES = [
    "/no/such/model",
    "./model",
    "../model",
    "~/no/such/model",
    "org/name/more",
    "model",
    Path("org/name"),
    "a b/c",
]


@pytest.mark.parametrize("model", LOCAL_NAMES)
def test_an_absent_path_never_touches_the_network(model: str | Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist; give a checkpoint directory") as caught:
        open_checkpoint(model)
    assert str(model) in str(caught.value)


def test_what_exists_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_hf(tmp_path / "org" / "name", CONFIG, STATE)
    assert open_checkpoint("org/name").model_config == CONFIG
    with pytest.raises(ValueError, match="revision is for Hub repositories, .*'main'"):
        open_checkpoint("org/name", revision="main")
    with pytest.raises(ValueError, match="is a file; give the directory"):
        open_checkpoint("org/name/config.json")


@pytest.mark.parametrize("model", ["", None, 7])
def test_no_model(model: Any) -> None:
    with pytest.raises(ValueError, match="model must be a directory"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["pytorch_model.bin"],
            r"holds its weights as a pickle .*convert it with\nfrom transformers import .*\n.*\n.*",
        ),
        (["nemo.Q4_K_M.gguf"], "holds a GGUF file, .*llama.cpp.* or give the safetensors checkpoint"),
        (["model-00001-of-00002.safetensors"], "shards of safetensors but not their index"),
        (["adapter_model.safetensors"], "it has adapter_model.safetensors, which cannot be read"),
    ],
)
def test_other_formats(tmp_path: Path, files: list[str], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    for file in files:
        (tmp_path / file).write_bytes(b"0123456789")
    with pytest.raises(FileNotFoundError, match=message):
        open_checkpoint(tmp_path)


# ---- broken files


def test_broken_json(tmp_path: Path) -> None:
    write_hf(tmp_path, CONFIG, STATE, shards=2)
    for name in ("config.json", "model.safetensors.index.json"):
        whole = (tmp_path / name).read_text()
        for broken in (whole[: len(whole) // 2], "", "\xff", "[" * 100_000, '{"a": 1, "a": 2}'):
            (tmp_path / name).write_text(broken, encoding="latin-1")
            with pytest.raises(ValueError, match=rf"{name} is not valid JSON \(half-written\?\): "):
                open_checkpoint(tmp_path)
        (tmp_path / name).write_text("[]")
        with pytest.raises(ValueError, match=f"{name} (must hold a JSON object|has no weight_map)"):
            open_checkpoint(tmp_path)
        (tmp_path / name).write_text(whole)
    (tmp_path / "config.json").write_text('{\n "hidden_size": 1,\n oops}')
    with pytest.raises(ValueError, match="line 3 column 2"):
        open_checkpoint(tmp_path)


def test_absent_shard(tmp_path: Path) -> None:
    write_hf(tmp_path, CONFIG, STATE, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names 3 files, and 1 of them are absent: model-00002-of-00003"):
        open_checkpoint(tmp_path)


def test_index_and_shards_that_disagree(tmp_path: Path) -> None:
    write_hf(tmp_path, CONFIG, STATE, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    name = next(iter(whole["weight_map"]))

    def with_entry(tensor: str, file: Any) -> None:
        index.write_text(json.dumps({"weight_map": whole["weight_map"] | {tensor: file}}))

    with_entry(name, "model-00002-of-00002.safetensors")
    with pytest.raises(
        ValueError, match=f"places tensor {name} in model-00002-of-00002.safetensors, which does not hold it"
    ):
        open_checkpoint(tmp_path)
    for file in ("../model.safetensors", "/etc/passwd", "", 7, None):
        with_entry(name, file)
        with pytest.raises(ValueError, match=f"tensor {name} must lie in a file of the same directory"):
            open_checkpoint(tmp_path)
    (tmp_path / "model-00003-of-00002.safetensors").write_bytes(
        (tmp_path / "model-00001-of-00002.safetensors").read_bytes()
    )
    with_entry("another", "model-00003-of-00002.safetensors")
    with pytest.raises(ValueError, match="places tensor another in"):
        open_checkpoint(tmp_path)
    whole["weight_map"][name] = "model-00003-of-00002.safetensors"
    with_entry(name, "model-00003-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"is in both .*00001-of.* and .*00003-of"):
        open_checkpoint(tmp_path)


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    write_hf(tmp_path, CONFIG, STATE)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for size in (
        0,
        1,
        7,
        8,
        9,
        8 + length // 2,
        8 + length - 1,
        8 + length,
        8 + length + 1,
        len(whole) // 2,
        len(whole) - 1,
    ):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model.safetensors is cut off: .* has \d+"):
            open_checkpoint(tmp_path)
    file.write_bytes(whole + b"\0")
    with pytest.raises(
        ValueError, match=rf"damaged: its tensors end at byte {len(whole)}, and the file has {len(whole) + 1}"
    ):
        open_checkpoint(tmp_path)


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{not json", "broken safetensors header"),
        (b"\xff\xfe{}", "broken safetensors header"),
        ([], "broken safetensors header: it is not an object"),
        ({"a": 7}, "tensor a is 7"),
        ({"a": entry(dtype="F4")}, "tensor a has dtype 'F4', which is not supported"),
        ({"a": entry(dtype=None)}, "tensor a has dtype None"),
        ({"a": entry(shape=(-2,))}, r"tensor a has shape \[-2\]"),
        ({"a": entry(shape="2")}, "tensor a has shape 2"),
        ({"a": entry(offsets=(8, 0))}, r"takes 8 bytes, and its offsets \[8, 0\] span -8"),
        ({"a": entry(offsets=(0, 4))}, r"takes 8 bytes, .* span 4"),
        ({"a": entry(offsets=(0,))}, r"offsets \[0\]"),
        ({"a": entry(shape=(2**40, 2**40))}, "span 8"),
        ({"a": entry(), "b": entry()}, "tensor b starts at byte .*, and the one before ends at"),
        ({"a": entry(offsets=(8, 16))}, "tensor a starts at byte"),
        (b'{"a": {}, "a": {}}', "'a' is there twice"),
    ],
)
def test_broken_headers(tmp_path: Path, header: Any, message: str) -> None:
    file = write_raw(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(ValueError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


def test_what_is_not_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="is a Git LFS pointer .*git lfs pull"):
        read_header(file)
    file.write_bytes(b"PK\x03\x04" + bytes(range(60, 100)))
    with pytest.raises(ValueError, match="is not a safetensors file: it claims a header of"):
        read_header(file)


# ---- the Hub


class FakeHub:
    """A repository with these files; ``downloads`` records what was asked for."""

    def __init__(self, source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.source, self.cache = source, cache
        self.downloads: list[tuple[str, str | None, list[str]]] = []
        self.is_reachable = True
        monkeypatch.setattr("huggingface_hub.list_repo_files", self.list_repo_files)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.snapshot_download)

    def list_repo_files(self, repo_id: str, *, revision: str | None = None) -> list[str]:
        if not self.is_reachable:
            raise ConnectionError("no route to the Hub")
        return sorted(file.name for file in self.source.iterdir()) + ["onnx/model.safetensors", "README.md"]

    def snapshot_download(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        allow_patterns: list[str] | None = None,
        local_files_only: bool = False,
    ) -> str:
        if local_files_only:
            if not self.cache.exists():
                raise FileNotFoundError("not in the cache")
            return str(self.cache)
        assert allow_patterns is not None
        self.downloads.append((repo_id, revision, sorted(allow_patterns)))
        self.cache.mkdir(exist_ok=True)
        for name in allow_patterns:
            (self.cache / name).write_bytes((self.source / name).read_bytes())
        return str(self.cache)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    (tmp_path / "repo").mkdir()
    for name in ("tekken.json", "tokenizer.json", "pytorch_model.bin", "other.safetensors"):
        (tmp_path / "repo" / name).write_text("{}")
    return FakeHub(tmp_path / "repo", tmp_path / "cache", monkeypatch)


def test_the_hub_gives_one_weight_set(hub: FakeHub) -> None:
    write_hf(hub.source, CONFIG, STATE, shards=2)
    write_mistral(hub.source, CONFIG, STATE)
    checkpoint = open_checkpoint("org/name", revision="v1")
    assert (checkpoint.layout, checkpoint.path, checkpoint.model_config) == ("hf", hub.cache, CONFIG)
    assert hub.downloads == [
        ("org/name", "v1", [
            "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
            "model.safetensors.index.json", "params.json", "tekken.json", "tokenizer.json",
        ])
    ]  # fmt: skip


def test_the_hub_with_consolidated_weights_only(hub: FakeHub) -> None:
    write_mistral(hub.source, CONFIG, STATE)
    (hub.source / "config.json").write_text("{}")
    assert open_checkpoint("org/name").layout == "mistral"
    assert [name for name in hub.downloads[0][2] if name.endswith(".safetensors")] == ["consolidated.safetensors"]


def test_the_hub_for_dummy_weights(hub: FakeHub) -> None:
    write_hf(hub.source, CONFIG, STATE)
    assert open_checkpoint("org/name", needs="config").model_config == CONFIG
    assert not [name for name in hub.downloads[0][2] if name.endswith(".safetensors")]


def test_the_hub_without_weights(hub: FakeHub) -> None:
    with pytest.raises(ValueError, match="'org/name' holds neither model.safetensors nor consolidated.safetensors"):
        open_checkpoint("org/name")
    assert hub.downloads == []


def test_an_unreachable_hub(hub: FakeHub) -> None:
    write_hf(hub.source, CONFIG, STATE)
    hub.is_reachable = False
    with pytest.raises(ValueError, match="'org/name' is no local directory, and the Hub .*ConnectionError: no route"):
        open_checkpoint("org/name")
    hub.is_reachable = True
    open_checkpoint("org/name")
    hub.is_reachable = False
    assert open_checkpoint("org/name").model_config == CONFIG  # from the cache
    assert len(hub.downloads) == 1
    (hub.cache / "model.safetensors").unlink()
    assert open_checkpoint("org/name", needs="config").model_config == CONFIG
    for needs in ("weights", "headers"):
        with pytest.raises(ValueError, match=r"the cache holds no weights of model 'org/name'.* no route.*HF_ENDPOINT"):
            open_checkpoint("org/name", needs=needs)
