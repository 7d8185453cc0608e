"""LoRA adapters: merged as PEFT merges them, before anything is quantised, and refused by name where something would be
left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_engine import Engine, SamplingParams
from nemo_engine.checkpoint.checkpoint import Checkpoint, open_checkpoint
from nemo_engine.checkpoint.inventory import take_inventory
from nemo_engine.checkpoint.loader import load_weights
from nemo_engine.checkpoint.quant_config import ONLINE
from nemo_engine.config import ModelConfig
from nemo_engine.model.linear import Fp8Linear
from nemo_engine.model.weights import NemoWeights
from nemo_engine.quantize import quantize_checkpoint
from tests.helpers.checkpoints import (
    SEVEN,
    StateDict,
    hf_config,
    merged,
    module_shapes,
    random_adapter,
    random_state_dict,
    tiny_config,
    write_adapter,
    write_hf,
    write_mistral,
)
from tests.helpers.fp8_checkpoints import write_fp8

CONFIG = tiny_config()
STATE = random_state_dict(CONFIG)
ADAPTER = random_adapter(CONFIG)
PREFIX = "base_model.model.model.layers.0."
Q0 = f"{PREFIX}self_attn.q_proj.lora_A.weight"


def tensors_of(weights: NemoWeights) -> list[Tensor]:
    found = [weights.embed_tokens, weights.norm]
    linears = [weights.lm_head]
    for layer in weights.layers:
        found += [layer.input_layernorm, layer.post_attention_layernorm]
        linears += [layer.qkv, layer.o, layer.gate_up, layer.down]
    for linear in linears:
        found.append(linear.weight.view(torch.uint8))
        found += [linear.scales] if isinstance(linear, Fp8Linear) else []
    return found


def load(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, **options: Any) -> NemoWeights:
    return load_weights(checkpoint, checkpoint.model_config, dtype=dtype, progress=False, **options)


def assert_same(found: NemoWeights, expected: NemoWeights) -> None:
    for mine, theirs in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert mine.shape == theirs.shape and torch.equal(mine, theirs)


# ---- equal to the merge


@pytest.mark.parametrize("write", [write_hf, write_mistral])
@pytest.mark.parametrize(
    ("fields", "scaling"),
    [({}, 2.0), ({"use_rslora": True}, 4.0), ({"lora_alpha": 3}, 0.75), ({"lora_alpha": 0}, 0.0)],
)
def test_all_seven_projections(
    write: Callable[..., Path], fields: dict[str, Any], scaling: float, tmp_path: Path
) -> None:
    base = write(tmp_path / "base", CONFIG, STATE)
    adapter = write_adapter(tmp_path / "adapter", ADAPTER, **fields)
    expected = write_hf(tmp_path / "merged", CONFIG, merged(STATE, ADAPTER, scaling))
    assert_same(load(open_checkpoint(base, lora=adapter)), load(open_checkpoint(expected)))


def test_patterns_of_rank_and_alpha(tmp_path: Path) -> None:
    ranks = {"q_proj": 2, "k_proj": 4, "up_proj": 3, "down_proj": 4}
    adapter = random_adapter(CONFIG, ranks)
    fields = {
        "target_modules": list(ranks),
        "rank_pattern": {"q_proj": 2, r"model\.layers\.\d+\.mlp\.(up|gate)_proj": 3, "proj": 9},
        "alpha_pattern": {"layers.1.self_attn.k_proj": 5},
    }
    expected = dict(STATE)
    for module in module_shapes(CONFIG):
        part = module.rpartition(".")[2]
        alpha = 5 if module == "model.layers.1.self_attn.k_proj" else 8
        if part in ranks:
            only = {name: half for name, half in adapter.items() if f".{module}." in f".{name}"}
            expected |= {
                name: tensor
                for name, tensor in merged(STATE, only, alpha / ranks[part]).items()
                if name.startswith(f"{module}.")
            }
    base = write_hf(tmp_path / "base", CONFIG, STATE)
    found = load(open_checkpoint(base, lora=write_adapter(tmp_path / "adapter", adapter, **fields)))
    assert_same(found, load(open_checkpoint(write_hf(tmp_path / "merged", CONFIG, expected))))


@pytest.mark.parametrize("online", [None, "fp8", "fp8_block"])
def test_it_is_merged_in_fp32_and_rounded_once(online: str | None, tmp_path: Path) -> None:
    config = tiny_config(
        num_heads=4, num_kv_heads=4, head_dim=32, hidden_size=128, intermediate_size=128, dtype="bfloat16"
    )
    state = random_state_dict(config, dtype=torch.bfloat16)
    adapter = {name: half.to(torch.bfloat16) for name, half in random_adapter(config).items()}
    base = write_hf(tmp_path / "base", config, state)
    exact = write_hf(tmp_path / "exact", config, merged(state, adapter, 2.0))  # fp32
    options = {} if online is None else {"online": ONLINE[online]}
    found = load(open_checkpoint(base, lora=write_adapter(tmp_path / "adapter", adapter)), torch.bfloat16, **options)
    assert_same(found, load(open_checkpoint(exact), torch.bfloat16, **options))


def grown(config: ModelConfig, by: int, *names: str) -> StateDict:
    generator = torch.Generator().manual_seed(1)
    return {
        f"base_model.model.{name}.weight": torch.randn(config.vocab_size + by, config.hidden_size, generator=generator)
        for name in names or ("model.embed_tokens", "lm_head")
    }


@pytest.mark.parametrize("by", [0, 2])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("write", [write_hf, write_mistral])
def test_what_is_saved_in_full(write: Callable[..., Path], is_tied: bool, by: int, tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=is_tied)
    state = random_state_dict(config)
    saved = grown(config, by) | {
        "base_model.model.model.norm.weight": torch.full((24,), 3.0),
        f"{PREFIX}self_attn.k_proj.weight": torch.full((16, 24), 0.5),
    }
    adapter = random_adapter(config, ("q_proj",))
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm", "k_proj"]}
    path = write_adapter(tmp_path / "adapter", adapter | saved, **fields)
    expected = merged(state, adapter, 2.0) | {
        name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()
    }
    checkpoint = open_checkpoint(write(tmp_path / "base", config, state), lora=path)
    wanted = tiny_config(vocab_size=config.vocab_size + by)
    assert checkpoint.model_config == wanted
    assert_same(load(checkpoint), load(open_checkpoint(write_hf(tmp_path / "merged", wanted, expected))))


def test_embeddings_and_head_may_have_products(tmp_path: Path) -> None:
    a, b = torch.randn(4, 97, generator=torch.Generator().manual_seed(3)), torch.ones(24, 4)
    head_a, head_b = torch.ones(4, 24), torch.randn(97, 4, generator=torch.Generator().manual_seed(4))
    adapter = {
        "base_model.model.model.embed_tokens.lora_embedding_A": a,
        "base_model.model.model.embed_tokens.lora_embedding_B": b,
        "base_model.model.lm_head.lora_A.weight": head_a,
        "base_model.model.lm_head.lora_B.weight": head_b,
    }
    path = write_adapter(tmp_path / "adapter", adapter, target_modules=["embed_tokens", "lm_head"])
    expected = STATE | {
        "model.embed_tokens.weight": STATE["model.embed_tokens.weight"] + 2 * (b @ a).T,
        "lm_head.weight": STATE["lm_head.weight"] + 2 * (head_b @ head_a),
    }
    found = load(open_checkpoint(write_hf(tmp_path / "base", CONFIG, STATE), lora=path))
    theirs = load(open_checkpoint(write_hf(tmp_path / "merged", CONFIG, expected)))
    torch.testing.assert_close(found.embed_tokens, theirs.embed_tokens)
    torch.testing.assert_close(found.lm_head.weight, theirs.lm_head.weight)


def test_names_that_peft_writes_twice(tmp_path: Path) -> None:
    saved = grown(CONFIG, 2)
    twice = saved | {
        name.replace(".weight", ".modules_to_save.weight"): tensor.clone() for name, tensor in saved.items()
    }
    twice |= {name.replace(".weight", ".original_module.weight"): tensor + 1 for name, tensor in saved.items()}
    base = write_hf(tmp_path / "base", CONFIG, STATE)
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    adapter = random_adapter(CONFIG, ("q_proj",))
    found = load(open_checkpoint(base, lora=write_adapter(tmp_path / "twice", adapter | twice, **fields)))
    assert_same(found, load(open_checkpoint(base, lora=write_adapter(tmp_path / "once", adapter | saved, **fields))))
    twice["base_model.model.lm_head.modules_to_save.weight"] = saved["base_model.model.lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head.*: is there under two names, and the numbers differ"):
        open_checkpoint(base, lora=write_adapter(tmp_path / "differ", adapter | twice, **fields))


# ---- wherever a model is given


def test_an_engine_answers_as_the_merged_model(tmp_path: Path) -> None:
    base = write_hf(tmp_path / "base", CONFIG, STATE)
    adapter = write_adapter(tmp_path / "adapter", ADAPTER)
    whole = write_hf(tmp_path / "merged", CONFIG, merged(STATE, ADAPTER, 2.0))
    options: dict[str, Any] = {"device": "cpu", "skip_tokenizer_init": True, "num_kv_pages": 16, "page_size": 16}
    prompt = {"prompt_token_ids": list(range(3, 43))}  # more than a page, so that the prefix cache has part in it
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)

    def answers(engine: Engine) -> list[list[int]]:
        return [list(engine.generate(prompt, params)[0].outputs[0].token_ids) for _ in range(2)]

    with (
        Engine(base, **options) as plain,
        Engine(base, lora=adapter, **options) as tuned,
        Engine(whole, **options) as expected,
    ):
        assert answers(tuned) == answers(expected) != answers(plain)
        assert tuned.config.lora == str(adapter)
        assert any(f"merged with adapter {adapter}: LoRA of rank 4" in row.name for row in tuned.startup_log.rows)
    with pytest.raises(ValueError, match="lora needs the checkpoint's weights, and load_format 'dummy'"):
        Engine(base, lora=adapter, load_format="dummy", **options)


def test_a_quantised_checkpoint_is_that_of_the_merged_model(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    state = random_state_dict(config)
    saved = grown(config, 2)
    adapter = random_adapter(config)
    path = write_adapter(tmp_path / "adapter", adapter | saved, modules_to_save=["embed_tokens", "lm_head"])
    (path / "tekken.json").write_text('{"is": "of the adapter"}')
    base = write_hf(tmp_path / "base", config, state)
    (base / "tekken.json").write_text('{"is": "of the model"}')
    whole = merged(state, adapter, 2.0) | {name.removeprefix("base_model.model."): x for name, x in saved.items()}
    quantize_checkpoint(base, tmp_path / "found", lora=path)
    wanted = tiny_config(vocab_size=config.vocab_size + 2)
    quantize_checkpoint(write_hf(tmp_path / "merged", wanted, whole), tmp_path / "expected")
    found, expected = (open_checkpoint(tmp_path / name) for name in ("found", "expected"))
    assert found.model_config == expected.model_config
    assert_same(load(found), load(expected))
    assert "of the adapter" in (tmp_path / "found" / "tekken.json").read_text()
    assert not (tmp_path / "found" / "adapter_config.json").exists()


# ---- what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "adapter_config.json: peft_type must be 'LORA', got 'IA3'"),
        ({"use_dora": True}, "use_dora is not supported, got True: DoRA"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices is not supported, got \[1\]"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is not supported"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"a_new_kind": 3}, "a_new_kind is not supported, got 3: it is not known here"),
        ({"bias": "all"}, "bias must be 'none'.* got 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out must be false"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported: it replaces the model's weights"),
        ({"r": 0}, "r must be from 1 to .*, got 0"),
        ({"r": "8"}, "r must be an integer, got '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be finite"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: '\(' is not a regular expression"),
        ({"rank_pattern": {"(a*)*b": 2}}, "rank_pattern: the pattern .* repeats a group"),
        ({"target_modules": "((q|k)+)+_proj"}, "target_modules: the pattern .* repeats a group"),
        ({"target_modules": ".*.*.*.*.*q_proj"}, "target_modules: the pattern .* more than 4 repetitions"),
        ({"target_modules": "a{9999999999}"}, "target_modules: .* is not a regular expression"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform must be an integer, got '0'"),
        ({"modules_to_save": "lm_head"}, "modules_to_save must be names of modules, got 'lm_head'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, and it is not there in full"),
        ({"target_modules": 7}, "target_modules must be names of modules, got 7"),
        ({"r": 8}, r"layers.0.mlp.down_proj.lora_A.weight: lora_A must be \[8, 40\], found \[4, 40\]"),
        ({"rank_pattern": {"q_proj": 2}}, rf"{Q0}: lora_A must be \[2, 24\], found \[4, 24\]"),
        ({"target_modules": ["q_proj"]}, "layers.0.self_attn.k_proj: has lora_A and lora_B, and target_modules does not"),
        ({"layers_to_transform": [0]}, "layers.1.self_attn.q_proj: has lora_A and lora_B, and target_modules does not"),
        ({"target_modules": [*SEVEN, "lm_head"]}, "lm_head: target_modules names it, and lora_A and lora_B are not "
                                                  "there"),
    ],
)  # fmt: skip
def test_fields_that_a_merge_would_leave_out(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = write_hf(tmp_path / "base", CONFIG, STATE)
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(base, lora=write_adapter(tmp_path / "adapter", ADAPTER, **fields))
    assert str(tmp_path / "adapter") in str(caught.value)


def change(**changes: Tensor | None) -> StateDict:
    """``ADAPTER`` with other tensors; None takes one away."""
    state = ADAPTER | {name: tensor for name, tensor in changes.items() if tensor is not None}
    return {name: tensor for name, tensor in state.items() if changes.get(name, tensor) is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (change(**{Q0: None}), "layers.0.self_attn.q_proj: lora_B is there and its other half is not"),
        (change(**{Q0: torch.zeros(4, 25)}), rf"{Q0}: lora_A must be \[4, 24\], found \[4, 25\]"),
        (change(**{Q0: torch.zeros(4)}), rf"{Q0}: lora_A must be \[4, 24\], found \[4\]"),
        (change(**{Q0: torch.zeros(4, 24, dtype=torch.int8)}), f"{Q0}: must be bfloat16, .* found int8"),
        (change(**{f"{PREFIX}self_attn.q_proj.lora_magnitude_vector": torch.zeros(32)}), "DoRA is not supported"),
        (change(**{f"{PREFIX}self_attn.q_proj.lora_B.bias": torch.zeros(32)}), "belongs to nothing in this model"),
        (change(**{f"{PREFIX}input_layernorm.lora_A.weight": torch.zeros(4, 24)}), "belongs to nothing in this model"),
        (change(**{Q0.replace("layers.0", "layers.9"): torch.zeros(4, 24)}), "layers.9.* belongs to nothing in this "
                                                                             "model"),
        (change(**{"base_model.model.score.weight": torch.zeros(2, 24)}), "score.weight: .*belongs to nothing"),
        (change(**{"base_model.model.model.norm.weight": torch.zeros(25)}), r"norm.weight: in full must be \[24\]"),
        (change(**{f"{PREFIX}mlp.up_proj.weight": torch.zeros(40, 24)}), "up_proj: is there in full, and "
                                                                         "modules_to_save"),
        (ADAPTER | grown(CONFIG, 2, "lm_head"), "the vocabulary grows from 97 to 99, and embed_tokens is not in the"),
        (ADAPTER | grown(CONFIG, -1), "embed_tokens: has 96 rows, and the model's vocab_size is 97"),
        (ADAPTER | grown(CONFIG, 2, "model.embed_tokens") | grown(CONFIG, 3, "lm_head"), r"must be \[100, 24\], found \[99"),
        ({}, "target_modules names it, and lora_A and lora_B are not there"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_of_this_model(state: StateDict, message: str, tmp_path: Path) -> None:
    base = write_hf(tmp_path / "base", CONFIG, STATE)
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(base, lora=write_adapter(tmp_path / "adapter", state))
    assert "adapter_model.safetensors" in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none(value: float, tmp_path: Path) -> None:
    base = write_hf(tmp_path / "base", CONFIG, STATE)
    bad = change(**{Q0: torch.full((4, 24), value)})
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: lora_A of .*q_proj holds NaN or infinity"):
        load(open_checkpoint(base, lora=write_adapter(tmp_path / "half", bad)))
    bad = change(**{"base_model.model.model.norm.weight": torch.full((24,), value)})
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: model.norm holds NaN or infinity"):
        load(open_checkpoint(base, lora=write_adapter(tmp_path / "whole", bad, modules_to_save=["norm"])))
    bad = change(**{Q0: torch.full((4, 24), 3e38), Q0.replace("_A", "_B"): torch.full((32, 4), 3e38)})
    with pytest.raises(ValueError, match=r"what is added to .*q_proj is not finite in fp32"):
        load(open_checkpoint(base, lora=write_adapter(tmp_path / "product", bad)))


def test_tied_embeddings_and_an_adapter_of_one_of_the_two(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    state = random_state_dict(config)
    base = write_hf(tmp_path / "base", config, state)
    adapter = random_adapter(config, ("q_proj",))
    old = state["model.embed_tokens.weight"]
    for name, head in (("model.embed_tokens", old), ("lm_head", None)):
        saved = grown(config, 0, name)
        new = saved[f"base_model.model.{name}.weight"]
        path = write_adapter(tmp_path / name, adapter | saved, target_modules=["q_proj"])
        found = load(open_checkpoint(base, lora=path))
        assert torch.equal(found.embed_tokens, old if head is None else new)
        assert torch.equal(found.lm_head.weight, new if head is None else head)
        path = write_adapter(tmp_path / f"grown {name}", adapter | grown(config, 2, name), target_modules=["q_proj"])
        with pytest.raises(ValueError, match="the vocabulary grows from 97 to 99, and .* is not in the adapter"):
            open_checkpoint(base, lora=path)
    halves = {"A.weight": torch.ones(4, 24), "B.weight": torch.ones(97, 4)}
    product = {f"base_model.model.lm_head.lora_{name}": half for name, half in halves.items()}
    path = write_adapter(tmp_path / "product", adapter | product, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head: lora_A and lora_B of what tie_word_embeddings makes one"):
        open_checkpoint(base, lora=path)


def test_fp8_is_not_merged_with(tmp_path: Path) -> None:
    config = tiny_config(num_heads=2, num_kv_heads=2, head_dim=64, hidden_size=128, intermediate_size=128)
    base = tmp_path / "base"
    base.mkdir()
    write_fp8(base, config, random_state_dict(config), "compressed-tensors dynamic")
    adapter = write_adapter(tmp_path / "adapter", random_adapter(config))
    with pytest.raises(ValueError, match=r"changes model.layers.0.mlp.down_proj.weight, which .* holds in FP8: merge"):
        open_checkpoint(base, lora=adapter)


def test_files_that_are_no_adapter(tmp_path: Path) -> None:
    base = write_hf(tmp_path / "base", CONFIG, STATE)
    adapter = write_adapter(tmp_path / "adapter", ADAPTER)
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    for size in (0, 9, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="adapter_model.safetensors is cut off"):
            open_checkpoint(base, lora=adapter)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors does not exist$"):
        open_checkpoint(base, lora=adapter)
    for part in (2, 1):
        (adapter / f"adapter_model-{part}.safetensors").write_bytes(whole)
    with pytest.raises(
        FileNotFoundError, match=r"put the tensors of adapter_model-1.safetensors, adapter_model-2.* into"
    ):
        open_checkpoint(base, lora=adapter)
    (adapter / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"adapter_model.bin is a pickle.*load the adapter with peft and save it"):
        open_checkpoint(base, lora=adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is not valid JSON"):
        open_checkpoint(base, lora=adapter)
    with pytest.raises(
        ValueError, match=r"lora .*nothing' does not exist; give the directory that holds adapter_config"
    ):
        open_checkpoint(base, lora=tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"config.json' is a file; give the directory"):
        open_checkpoint(base, lora=base / "config.json")


def test_an_adapter_given_as_the_model(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, ADAPTER, base_model_name_or_path="org/base")
    with pytest.raises(ValueError, match="is an adapter and no model: give org/base as the model, and this as lora"):
        open_checkpoint(adapter)
    # A folder that holds both is a model.
    write_hf(tmp_path, CONFIG, STATE)
    assert take_inventory(open_checkpoint(adapter), CONFIG).tensors
    assert json.loads((tmp_path / "config.json").read_text()) == hf_config(CONFIG)
