"""Checkpoints as people publish them: other names of tensors, padded rows, mixed dtypes; and what is refused, with what
to do instead.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_engine.checkpoint.checkpoint import open_checkpoint
from nemo_engine.checkpoint.inventory import take_inventory
from nemo_engine.checkpoint.loader import load_weights
from nemo_engine.model.weights import NemoWeights
from tests.helpers.checkpoints import StateDict, hf_config, random_state_dict, tiny_config, write_hf, write_mistral
from tests.helpers.fp8_checkpoints import write_fp8

CONFIG = tiny_config()
STATE = random_state_dict(CONFIG)


def load(path: Path, dtype: torch.dtype = torch.float32) -> NemoWeights:
    checkpoint = open_checkpoint(path)
    return load_weights(checkpoint, checkpoint.model_config, dtype=dtype, progress=False)


def assert_same(found: NemoWeights, expected: NemoWeights) -> None:
    assert found.num_bytes == expected.num_bytes
    assert torch.equal(found.embed_tokens, expected.embed_tokens)
    assert torch.equal(found.lm_head.weight, expected.lm_head.weight)
    assert torch.equal(found.norm, expected.norm)
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        for name in ("qkv", "o", "gate_up", "down"):
            assert torch.equal(getattr(mine, name).weight, getattr(theirs, name).weight)
        assert torch.equal(mine.input_layernorm, theirs.input_layernorm)


def renamed(state: StateDict, prefix: str, head: str) -> StateDict:
    return {
        (head + name if name.startswith("lm_head") else prefix + name.removeprefix("model.")): tensor
        for name, tensor in state.items()
    }


# (in front of "layers", in front of "lm_head")
NAMES = [
    ("", ""),
    ("language_model.model.", "language_model."),
    ("language_model.", ""),
    ("language_model.", "language_model."),
    ("model.language_model.", ""),
    ("base.model.", "base."),
]


@pytest.mark.parametrize(("prefix", "head"), NAMES)
@pytest.mark.parametrize("shards", [1, 2])
def test_names_after_another_prefix(prefix: str, head: str, shards: int, tmp_path: Path) -> None:
    other = write_hf(tmp_path / "other", CONFIG, renamed(STATE, prefix, head), shards=shards)
    assert_same(load(other), load(write_hf(tmp_path / "plain", CONFIG, STATE)))
    assert f"named {prefix}..." in open_checkpoint(other).describe()


def test_names_after_another_prefix_in_mistrals_layout(tmp_path: Path) -> None:
    write_mistral(tmp_path, CONFIG, STATE)
    expected = load(tmp_path)
    file = tmp_path / "consolidated.safetensors"
    from safetensors.torch import load_file, save_file

    state = {f"language_model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(state, file)
    assert_same(load(tmp_path), expected)


@pytest.mark.parametrize(("prefix", "head"), NAMES[:3])
def test_quantised_tensors_after_another_prefix(prefix: str, head: str, tmp_path: Path) -> None:
    config = tiny_config(num_heads=2, num_kv_heads=2, head_dim=64, hidden_size=128, intermediate_size=128)
    write_fp8(tmp_path / "plain", config, random_state_dict(config), "compressed-tensors static", kv="tensor")
    expected = open_checkpoint(tmp_path / "plain")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "plain" / "model.safetensors")
    data = json.loads((tmp_path / "plain" / "config.json").read_text())
    # The list of what is left out goes by the names of the files, or by those of the model.
    for ignored in ([f"{head}lm_head"], ["lm_head"]):
        data["quantization_config"]["ignore"] = ignored
        other = write_hf(tmp_path / "other", config, renamed(stored, prefix, head), **data)
        found = open_checkpoint(other)
        inventories = [take_inventory(each, config) for each in (found, expected)]
        assert inventories[0].kinds == inventories[1].kinds
        assert len(inventories[0].kv_scales) == config.num_layers
    data["quantization_config"]["ignore"] = ["model.layers.0.self_attn.o_proj", "lm_head"]
    write_hf(other, config, renamed(stored, prefix, head), **data)
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn.o_proj.weight: found float8.*the configuration leaves it out"
    ):
        take_inventory(open_checkpoint(other), config)


def test_names_that_leave_a_choice_are_refused(tmp_path: Path) -> None:
    state = STATE | {"draft.embed_tokens.weight": STATE["model.embed_tokens.weight"].clone()}
    with pytest.raises(
        ValueError, match=r"several embed_tokens.*: draft.embed_tokens.weight, model.embed_tokens.weight"
    ):
        open_checkpoint(write_hf(tmp_path, CONFIG, state))


def test_llama_of_the_same_mathematics(tmp_path: Path) -> None:
    config = tiny_config(num_kv_heads=4)
    state = random_state_dict(config)
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "pretraining_tp": 1, "mlp_bias": False}
    write_hf(tmp_path, config, state, **llama)
    # What LlamaConfig writes down is left out by old files; the tensors tell head_dim.
    data = json.loads((tmp_path / "config.json").read_text())
    for name in ("head_dim", "num_key_value_heads", "rope_theta", "sliding_window"):
        del data[name]
    (tmp_path / "config.json").write_text(json.dumps(data))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.model_config == config
    assert_same(load(tmp_path), load(write_hf(tmp_path / "mistral", config, state)))


@pytest.mark.parametrize("write", [write_hf, write_mistral])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(("embeddings", "head"), [(7, 7), (7, 0), (0, 31), (1, 200)])
def test_padded_rows(
    write: Any, is_tied: bool, embeddings: int, head: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(tie_word_embeddings=is_tied)
    state = random_state_dict(config)
    plain = load(write(tmp_path / "plain", config, state))
    padded = state | {"lm_head.weight": state.get("lm_head.weight", state["model.embed_tokens.weight"]).clone()}
    for name, rows in (("model.embed_tokens.weight", embeddings), ("lm_head.weight", head)):
        padded[name] = torch.cat([padded[name], torch.full((rows, config.hidden_size), float("nan"))])
    with caplog.at_level(logging.WARNING, "nemo_engine"):
        found = load(write(tmp_path / "padded", config, padded))
    assert_same(found, plain)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (embeddings > 0) + (head > 0)
    assert all(f"has {97 + rows} rows, and vocab_size is 97: the last {rows} are padding" in " ".join(lines)
               for rows in (embeddings, head) if rows)  # fmt: skip


def test_a_padded_head_in_fp8(tmp_path: Path) -> None:
    config = tiny_config(num_heads=2, num_kv_heads=2, head_dim=64, hidden_size=128, intermediate_size=128)
    plain = tiny_config(
        **{
            name: getattr(config, name)
            for name in ("num_heads", "num_kv_heads", "head_dim", "hidden_size", "intermediate_size")
        },
        vocab_size=130,
    )
    state = random_state_dict(plain)
    for flavour in ("compressed-tensors dynamic", "compressed-tensors block"):
        folder = tmp_path / flavour.replace(" ", "-")
        write_fp8(folder, plain, state, flavour)
        data = json.loads((folder / "config.json").read_text())
        data["quantization_config"]["ignore"] = []
        from safetensors.torch import load_file, save_file

        stored = load_file(folder / "model.safetensors")
        by_block = flavour.endswith("block")
        stored["lm_head.weight"] = stored["lm_head.weight"].to(torch.float8_e4m3fn)
        stored["lm_head.weight_scale"] = torch.ones(2, 1) if by_block else torch.ones(130, 1)
        save_file(stored, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(data | {"vocab_size": 97}))
        head = load(folder).lm_head
        assert head.weight.shape == (97, 128)
        expected = stored["lm_head.weight"][:97]
        assert torch.equal(head.weight.view(torch.uint8), expected.view(torch.uint8))


def test_fewer_rows_than_the_vocabulary_are_refused(tmp_path: Path) -> None:
    state = STATE | {"lm_head.weight": STATE["lm_head.weight"][:96].clone()}
    checkpoint = open_checkpoint(write_hf(tmp_path, CONFIG, state))
    with pytest.raises(ValueError, match=r"lm_head.weight: expected \[97, 24\], found \[96, 24\].*vocab_size"):
        take_inventory(checkpoint, CONFIG)


def test_norms_in_fp32_beside_bf16(tmp_path: Path) -> None:
    config = tiny_config(dtype="bfloat16")
    state = random_state_dict(config, dtype=torch.bfloat16)
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in state.items()}
    write_hf(tmp_path / "mixed", config, mixed)
    assert_same(load(tmp_path / "mixed", torch.bfloat16), load(write_hf(tmp_path / "p", config, state), torch.bfloat16))


def test_a_checkpoint_without_a_head_says_why(tmp_path: Path) -> None:
    state = renamed({name: tensor for name, tensor in STATE.items() if name != "lm_head.weight"}, "", "")
    path = write_hf(tmp_path, CONFIG, state, architectures=["MistralModel"])
    with pytest.raises(
        ValueError, match=r"lm_head.weight: .*not found .*tie_word_embeddings; MistralModel is saved without"
    ):
        load(path)
    tied = write_hf(tmp_path, CONFIG, state, architectures=["MistralModel"], tie_word_embeddings=True)
    assert load(tied).lm_head.weight.shape == (97, 24)


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "Qwen has biases or norms in its "
                                                                         "attention.*vLLM"),
        ({"architectures": ["MixtralForCausalLM"]}, "Mixtral is a mixture of experts, and this engine .*vLLM"),
        ({"architectures": ["SomethingNew"]}, r"got \['SomethingNew'\]: this engine computes Mistral NeMo's .*vLLM"),
        ({"model_type": "gemma2"}, "model_type must be mistral, got 'gemma2': Gemma has .*vLLM"),
        ({"architectures": ["LlavaForConditionalGeneration"]}, "images beside text, and this .*vLLM"),
        ({"sliding_window": 4096}, "sliding_window is not supported.*got 4096: serve a model with a window with vLLM"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "type 'llama3' is not supported: .*serve it with "
                                                                   "vLLM"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "type 'yarn' is not supported: .*serve it with vLLM"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "'awq' .INT4., 4-bit integers by AWQ; take the "
                                                                      "unq"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq' .INT4., integers .* by GPTQ; take the "
                                                                       "unq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "made by bitsandbytes .*; "
                                                                                          "take"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quant_method 'hqq'; take the unquantised checkpoint"),
    ],
)  # fmt: skip
def test_configurations(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        open_checkpoint(write_hf(tmp_path, CONFIG, STATE, **change))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.self_attn.q_proj.qweight", "is of AWQ or GPTQ .*; take the unquantised"),
        ("model.layers.0.self_attn.q_proj.weight.absmax", "is of bitsandbytes, .*; take the unquantised"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "is of bitsandbytes"),
    ],
)
def test_tensors_without_a_word_in_the_configuration(name: str, words: str, tmp_path: Path) -> None:
    path = write_hf(tmp_path, CONFIG, STATE | {name: torch.zeros(3, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=f"tensor {re.escape(name)} {words}"):
        open_checkpoint(path)


def test_a_gguf_file_and_the_conversion_of_a_pickle(tmp_path: Path) -> None:
    file = tmp_path / "nemo.Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"Q4_K_M.gguf' is a GGUF file, .*llama.cpp.*safetensors.*quantization='fp8'"):
        open_checkpoint(file)
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(CONFIG)))
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK")
    with pytest.raises(FileNotFoundError, match="pickle") as caught:
        open_checkpoint(folder)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 3 and str(folder) in lines[1]
    for code in ("\n".join(lines), " ".join(lines)):  # as it is, and as the command line prints it
        compile(code, "conversion", "exec")
