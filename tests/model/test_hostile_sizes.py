"""Numbers in a checkpoint's files that are wrong or malicious: refused by file and field, before anything of their size
is made.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from nemo_engine import Engine
from nemo_engine.cli import main
from nemo_engine.text import load_tokenizer
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf, write_mistral

TINY = Path(__file__).parents[2] / "nemo_engine" / "assets" / "nemo-tiny" / "tekken.json"
SIZES = ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "num_attention_heads",
         "num_key_value_heads", "head_dim"]  # fmt: skip
NUMBERS = [200_000, 3000, 10**30, 0, -1, 2.0, 1e400, float("nan"), "2", True, [2], {}]
MOST_BYTES = 8 << 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hf(tmp_path_factory.mktemp("sizes"), tiny_config(), random_state_dict(tiny_config()))


def load(path: Path, **options: Any) -> None:
    Engine(path, device="cpu", num_kv_pages=4, max_model_len=64, max_num_seqs=2, **options).close()


def assert_refused(path: Path, *names: str, **options: Any) -> None:
    """``load`` raises ``ValueError`` that holds ``names``, and no more than a little memory was taken on the way."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:
            load(path, **options)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert all(name in str(caught.value) for name in names), caught.value


@pytest.mark.parametrize("field", [*SIZES, "max_position_embeddings", "rms_norm_eps", "rope_theta", "eos_token_id"])
def test_configuration(checkpoint: Path, field: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = checkpoint / "config.json"
    text = file.read_text()
    wrong = NUMBERS
    if field == "max_position_embeddings":  # a claim; what is served has a limit of its own
        wrong = [0, -1, 2.0, float("nan"), "2", True, [2]]
    elif field in ("rms_norm_eps", "rope_theta"):
        wrong = [10**400, 0, -1, 1e400, float("nan"), "2", True, [2]]
    elif field == "eos_token_id":
        wrong = [200_000, 10**30, -1, 2.0, 1e400, float("nan"), "2", True, [[2]], {}]
    try:
        load(checkpoint)  # or else each refusal would prove nothing
        for value in wrong:
            file.write_text(json.dumps(json.loads(text) | {field: value}))
            # Numbers of heads that contradict each other name both.
            name = "num_kv_heads" if field == "num_key_value_heads" and value in (3000, 200_000) else field
            assert_refused(checkpoint, str(checkpoint), "config.json", name)
            if field in SIZES and value not in (3000, 200_000):  # sizes that made-up weights may have
                assert_refused(checkpoint, "config.json", field, load_format="dummy")
                for command in (["info"], ["plan", "--gpu", "h100"]):
                    assert main([*command, str(checkpoint)]) != 0
                    said = capsys.readouterr()  # `info` answers that it will not run; for `plan` it is an error
                    assert field in said.out + said.err
    finally:
        file.write_text(text)


def test_more_layers_than_the_files_can_hold(tmp_path: Path) -> None:
    config = tiny_config()
    write_hf(tmp_path / "hf", config, random_state_dict(config), num_hidden_layers=4000)
    assert_refused(
        tmp_path / "hf", "config.json: num_hidden_layers is 4000, and all weight files together hold 21 tensors"
    )
    write_mistral(tmp_path / "mistral", config, random_state_dict(config), n_layers=4000)
    assert_refused(tmp_path / "mistral", "params.json: n_layers is 4000")


@pytest.mark.parametrize(
    ("file", "content", "names"),
    [
        ("generation_config.json", {"eos_token_id": 10**9}, ["generation_config.json: eos_token_id", "96"]),
        ("generation_config.json", {"eos_token_id": [2.0]}, ["generation_config.json: eos_token_id"]),
        ("generation_config.json", 5, ["generation_config.json"]),
        ("hf_quant_config.json", 5, ["hf_quant_config.json"]),
        ("hf_quant_config.json", {"quantization": 7}, ["hf_quant_config.json: quantization"]),
    ],
)
def test_other_files(checkpoint: Path, file: str, content: Any, names: list[str]) -> None:
    (checkpoint / file).write_text(json.dumps(content))
    try:
        assert_refused(checkpoint, *names)
    finally:
        (checkpoint / file).unlink()


@pytest.mark.parametrize(
    "block",
    [
        {"quant_method": "fp8", "weight_block_size": 128},
        {"quant_method": "fp8", "weight_block_size": [10**30, "a"]},
        {"quant_method": "fp8", "activation_scheme": {}},
        {"quant_method": "fp8", "ignored_layers": 5},
        {"quant_method": "modelopt", "quantization": 5},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": 5}}},
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "a": {"weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": 5}}
            },
        },
    ],
)  # fmt: skip
def test_quantization(checkpoint: Path, block: dict[str, Any]) -> None:
    file = checkpoint / "config.json"
    text = file.read_text()
    file.write_text(json.dumps(json.loads(text) | {"quantization_config": block}))
    try:
        assert_refused(checkpoint, str(checkpoint))
    finally:
        file.write_text(text)


@pytest.mark.parametrize(
    "change",
    [
        None,
        {"shape": [10**18, 10**18]},
        {"shape": [0, 10**30], "data_offsets": [0, 0]},
        {"shape": [-1, -1]},
        {"shape": [24.0]},
        {"data_offsets": [0, 10**300]},
        {"data_offsets": [96, 0]},
    ],
    ids=str,
)
def test_headers(checkpoint: Path, change: dict[str, Any] | None) -> None:
    file = checkpoint / "model.safetensors"
    raw = file.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    if change is None:
        start = struct.pack("<Q", 1 << 63)
    else:
        header = json.loads(raw[8:end])
        header["model.norm.weight"] |= change
        text = json.dumps(header).encode()
        start = struct.pack("<Q", len(text)) + text
    file.write_bytes(start + raw[end:])
    try:
        assert_refused(checkpoint, "model.safetensors")
    finally:
        file.write_bytes(raw)


@pytest.mark.parametrize("field", ["default_vocab_size", "default_num_special_tokens"])
@pytest.mark.parametrize("value", [200_000, 10**30, -5, 500, "6", 1.5, None])
def test_tokenizer(tmp_path: Path, field: str, value: Any) -> None:
    data = json.loads(TINY.read_bytes())
    if (field, value) == ("default_num_special_tokens", 500):
        value = 0  # 500 are fewer than its vocabulary needs only if the sizes contradict each other
    data["config"][field] = value
    (tmp_path / "tekken.json").write_text(json.dumps(data))
    data.clear()
    load_tokenizer(TINY)  # imports
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="tekken.json: config.default_"):
            load_tokenizer(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
