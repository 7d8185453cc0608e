"""Every FP8 format means what its tool means, bit for bit; what is not supported is refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_engine.checkpoint.checkpoint import Checkpoint, open_checkpoint
from nemo_engine.checkpoint.inventory import planned_inventory
from nemo_engine.checkpoint.loader import load_weights
from nemo_engine.checkpoint.quant_config import ONLINE, quantization_of
from nemo_engine.config import ModelConfig
from nemo_engine.model.linear import DenseLinear, Fp8Linear, Linear
from nemo_engine.model.weights import NemoWeights, dummy_weights
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf, write_mistral
from tests.helpers.fp8_checkpoints import (
    FLAVOURS,
    FP8,
    dequantise,
    is_quantised,
    quantise,
    quantization_config,
    write_fp8,
)

SMALL = tiny_config()
BLOCKS = tiny_config(num_heads=2, num_kv_heads=1, head_dim=128, hidden_size=200, intermediate_size=256, num_layers=1)


def config_for(flavour: str) -> ModelConfig:
    return BLOCKS if FLAVOURS[flavour][0] == "block" else SMALL


def load(path: Path, **options: Any) -> NemoWeights:
    checkpoint = open_checkpoint(path)
    return load_weights(checkpoint, checkpoint.model_config, dtype=torch.float32, progress=False, **options)


def meaning_of(linear: Linear) -> Tensor:
    """The weight that a layer multiplies with, in fp32."""
    return linear.weight if isinstance(linear, DenseLinear) else dequantise(linear.weight, linear.scales)


def fused(state: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The projections of a layer, put together from a state dict."""
    part = {name: state[f"model.layers.{layer}.{name}_proj.weight"] for name in (
        "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")}  # fmt: skip
    return {
        "qkv": torch.cat([part["self_attn.q"], part["self_attn.k"], part["self_attn.v"]]),
        "o": part["self_attn.o"],
        "gate_up": torch.cat([part["mlp.gate"], part["mlp.up"]]),
        "down": part["mlp.down"],
    }


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("is_widened", [False, True])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_weights_mean_what_the_checkpoint_means(flavour: str, is_widened: bool, shards: int, tmp_path: Path) -> None:
    config = config_for(flavour)
    state = random_state_dict(config, seed=3)
    meaning, others = write_fp8(tmp_path, config, state, flavour, shards=shards)
    weights = load(tmp_path, is_widened=is_widened)
    is_static = FLAVOURS[flavour][1]
    for index, layer in enumerate(weights.layers):
        for name, expected in fused(meaning, index).items():
            linear = getattr(layer, name)
            assert meaning_of(linear).equal(expected), name
            if is_static is None:
                assert isinstance(linear, DenseLinear)
                continue
            assert isinstance(linear, Fp8Linear) and linear.weight.dtype == (torch.float32 if is_widened else FP8)
            assert linear.scales.dtype == torch.float32
            if is_static:
                module = {"qkv": "self_attn.q", "o": "self_attn.o", "gate_up": "mlp.gate", "down": "mlp.down"}[name]
                assert linear.input_scale is not None
                assert linear.input_scale.equal(others[f"model.layers.{index}.{module}_proj.input_scale"])
            else:
                assert linear.input_scale is None
    assert isinstance(weights.lm_head, DenseLinear) and weights.lm_head.weight.equal(state["lm_head.weight"])
    assert weights.embed_tokens.equal(state["model.embed_tokens.weight"])


@pytest.mark.parametrize("kv", ["tensor", "head"])
@pytest.mark.parametrize(
    "flavour", ["compressed-tensors static", "compressed-tensors dynamic", "fp8 static", "modelopt"]
)
def test_scales_of_keys_and_values(flavour: str, kv: str, tmp_path: Path) -> None:
    _, others = write_fp8(tmp_path, SMALL, random_state_dict(SMALL), flavour, kv=kv)
    quantization = open_checkpoint(tmp_path).quantization
    assert quantization is not None and quantization.kv_cache
    for index, layer in enumerate(load(tmp_path, needs_kv_scales=True).layers):
        for letter, scale in (("k", layer.k_scale), ("v", layer.v_scale)):
            expected = others[f"model.layers.{index}.self_attn.{letter}_scale"].expand(SMALL.num_kv_heads)
            assert scale is not None and scale.equal(expected)
    assert load(tmp_path).layers[0].k_scale is None


def test_input_scales_of_a_fused_projection_that_differ(tmp_path: Path) -> None:
    """No part may saturate: the largest serves all."""
    write_fp8(tmp_path, SMALL, random_state_dict(SMALL), "fp8 static")
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.1.self_attn.k_proj.input_scale"] = torch.tensor(7.0)
    save_file(state, tmp_path / "model.safetensors")
    linear = load(tmp_path).layers[1].qkv
    assert isinstance(linear, Fp8Linear) and linear.input_scale is not None and linear.input_scale == 7.0


def test_layers_that_are_left_out_stay_dense(tmp_path: Path) -> None:
    """By name, by expression and by pattern, as each tool writes them."""
    state = random_state_dict(SMALL, seed=1)
    for flavour, key, patterns in (
        ("compressed-tensors static", "ignore", ["lm_head", "re:.*layers\\.0\\.mlp.*", "model.layers.1.self_attn.o_proj"]),
        ("fp8 static", "ignored_layers", ["lm_head", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj",
                                          "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"]),
        ("modelopt", "exclude_modules", ["lm_head", "*layers.0.mlp*", "model.layers.1.self_attn.o_proj"]),
    ):  # fmt: skip
        path = tmp_path / flavour
        meaning, _ = write_fp8(path, SMALL, state, flavour)
        stored = load_file(path / "model.safetensors")
        for module in ("0.mlp.gate_proj", "0.mlp.up_proj", "0.mlp.down_proj", "1.self_attn.o_proj"):
            name = f"model.layers.{module}"
            stored = {key: value for key, value in stored.items() if not key.startswith(f"{name}.")}
            stored[f"{name}.weight"] = meaning[f"{name}.weight"] = state[f"{name}.weight"]
        save_file(stored, path / "model.safetensors")
        data = json.loads((path / "config.json").read_text())
        data["quantization_config"][key] = patterns
        (path / "config.json").write_text(json.dumps(data))
        layers = load(path).layers
        kinds = {type(getattr(layer, name)).__name__ for layer in layers for name in ("qkv",)}
        assert kinds == {"Fp8Linear"}
        assert isinstance(layers[0].gate_up, DenseLinear) and isinstance(layers[0].down, DenseLinear)
        assert isinstance(layers[1].o, DenseLinear) and isinstance(layers[0].o, Fp8Linear)
        for index, layer in enumerate(layers):
            for name, expected in fused(meaning, index).items():
                assert meaning_of(getattr(layer, name)).equal(expected)


# ---- quantised while loading


@pytest.mark.parametrize("layout", ["hf", "mistral"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", ["fp8", "fp8_block"])
def test_quantised_while_loading(scheme: str, stored: torch.dtype, layout: str, tmp_path: Path) -> None:
    state = random_state_dict(BLOCKS, seed=2, dtype=stored)
    (write_hf if layout == "hf" else write_mistral)(tmp_path, BLOCKS, state)
    weights = load(tmp_path, online=ONLINE[scheme])
    kind = "block" if scheme == "fp8_block" else "channel"
    expected = {
        name: dequantise(*quantise(tensor, kind)) if is_quantised(name) else tensor.float()
        for name, tensor in state.items()
    }
    for index, layer in enumerate(weights.layers):
        for name, tensor in fused(expected, index).items():
            assert isinstance(getattr(layer, name), Fp8Linear)
            assert meaning_of(getattr(layer, name)).equal(tensor), name
    assert isinstance(weights.lm_head, DenseLinear)


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_head_in_fp8_on_request(is_tied: bool, tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=is_tied)
    state = random_state_dict(config)
    write_hf(tmp_path, config, state)
    online = ONLINE["fp8"].__class__("online", "channel", "dynamic", targets=("lm_head",))
    weights = load(tmp_path, online=online)
    source = state["model.embed_tokens.weight" if is_tied else "lm_head.weight"]
    assert isinstance(weights.lm_head, Fp8Linear)
    assert meaning_of(weights.lm_head).equal(dequantise(*quantise(source, "channel")))
    assert weights.embed_tokens.equal(state["model.embed_tokens.weight"])
    assert isinstance(weights.layers[0].qkv, DenseLinear)


def test_edges_of_quantising(tmp_path: Path) -> None:
    """Zero rows, subnormal rows and rows of one huge value come out finite and as near as FP8 can."""
    state = random_state_dict(SMALL, dtype=torch.float32)
    name = "model.layers.0.mlp.down_proj.weight"
    state[name][0] = 0
    state[name][1] = 1e-42
    state[name][2] = 0
    state[name][2, 3] = 3e38
    write_hf(tmp_path, SMALL, state)
    found = meaning_of(load(tmp_path, online=ONLINE["fp8"]).layers[0].down)
    assert found.isfinite().all() and (found[0] == 0).all() and found[1].abs().max() <= 1e-37
    assert found[2, 3] == pytest.approx(3e38, rel=1e-6) and found[2].count_nonzero() == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(value: float, tmp_path: Path) -> None:
    state = random_state_dict(SMALL)
    state["model.layers.1.mlp.up_proj.weight"][5, 6] = value
    write_hf(tmp_path / "dense", SMALL, state)
    with pytest.raises(ValueError, match="model.layers.1.mlp.up_proj.weight holds NaN or infinity"):
        load(tmp_path / "dense", online=ONLINE["fp8"])
    write_fp8(tmp_path / "stored", SMALL, random_state_dict(SMALL), "fp8 static")
    stored = load_file(tmp_path / "stored" / "model.safetensors")
    stored["model.layers.0.self_attn.v_proj.weight"].view(torch.uint8)[3, 4] = 0xFF
    save_file(stored, tmp_path / "stored" / "model.safetensors")
    with pytest.raises(ValueError, match="model.layers.0.self_attn.v_proj.weight holds NaN"):
        load(tmp_path / "stored")
    for scale in (value, -1.0):
        write_fp8(tmp_path / "scale", SMALL, random_state_dict(SMALL), "fp8 static")
        stored = load_file(tmp_path / "scale" / "model.safetensors")
        stored["model.layers.0.self_attn.o_proj.weight_scale"].fill_(scale)
        save_file(stored, tmp_path / "scale" / "model.safetensors")
        with pytest.raises(ValueError, match="o_proj.weight_scale must be finite and not negative"):
            load(tmp_path / "scale")


def test_dummy_weights_of_a_quantised_model() -> None:
    inventory = planned_inventory(
        SMALL, quantization_of({"quantization_config": quantization_config("fp8 static", "tensor", True, False)}), None
    )
    weights = dummy_weights(SMALL, torch.bfloat16, kind_of=inventory.kind_of)
    linear = weights.layers[1].down
    assert isinstance(linear, Fp8Linear) and linear.input_scale is not None and linear.input_scale > 0
    assert isinstance(weights.lm_head, DenseLinear)
    expected = dummy_weights(SMALL, torch.float32).layers[1].down.weight.std()
    torch.testing.assert_close(meaning_of(linear).std(), expected, rtol=0.05, atol=0)


# ---- what does not fit


def changed(path: Path, change: dict[str, Tensor | None]) -> Checkpoint:
    state = load_file(path / "model.safetensors")
    state |= {name: tensor for name, tensor in change.items() if tensor is not None}
    save_file(
        {name: tensor for name, tensor in state.items() if change.get(name, tensor) is not None},
        path / "model.safetensors",
    )
    return open_checkpoint(path)


OUT = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("flavour", "change", "message"),
    [
        ("fp8 static", {f"{OUT}.weight_scale": None}, f"{OUT}.weight_scale: expected beside an FP8 weight, not found"),
        ("fp8 static", {f"{OUT}.input_scale": None}, f"{OUT}.input_scale: expected, as activations have static scales"),
        ("fp8 dynamic", {f"{OUT}.input_scale": torch.ones(())}, f"{OUT}.input_scale: not expected, as activations have "
                                                                "no static"),
        ("fp8 static", {f"{OUT}.weight_scale": torch.ones(24)}, r"o_proj.weight_scale: expected \[\] or \[1\] or \[1, 1\], found \[24\]"),
        ("compressed-tensors dynamic", {f"{OUT}.weight_scale": torch.ones(23, 1)}, r"expected \[24, 1\] or \[24\], found \[23, 1\]"),
        ("fp8 static", {f"{OUT}.weight": torch.ones(24, 32)}, "expected float8_e4m3fn, as the configuration's "
                                                              "quantization covers it, found float32"),
        ("fp8 static", {"lm_head.weight": torch.ones(97, 24).to(FP8)}, "lm_head.weight: found float8_e4m3fn .* leaves "
                                                                       "it out"),
        ("fp8 static", {"model.norm.weight": torch.ones(24).to(FP8)}, "model.norm.weight: found float8_e4m3fn .* is no "
                                                                      "linear layer"),
        ("fp8 static", {"model.layers.0.self_attn.k_scale": torch.ones(())}, "k_scale: found in layer 0, but not the "
                                                                             "scale of its values"),
        ("fp8 static", {"model.layers.0.self_attn.q_zero": torch.ones(())}, "q_zero: not expected"),
        ("mistral static", {}, ""),
    ],
)  # fmt: skip
def test_tensors_that_contradict_the_configuration(flavour: str, change: Any, message: str, tmp_path: Path) -> None:
    write_fp8(tmp_path, SMALL, random_state_dict(SMALL), flavour)
    if not change:
        load(tmp_path)
        return
    checkpoint = changed(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_weights(checkpoint, SMALL, dtype=torch.float32, progress=False)


def test_a_fused_projection_of_two_kinds_is_refused(tmp_path: Path) -> None:
    write_fp8(tmp_path, SMALL, random_state_dict(SMALL), "mistral static")
    path = tmp_path / "consolidated.safetensors"
    state = load_file(path)
    state["layers.0.attention.wk.weight"] = state["layers.0.attention.wk.weight"].float()
    del state["layers.0.attention.wk.qscale_weight"], state["layers.0.attention.wk.qscale_act"]
    save_file(state, path)
    with pytest.raises(ValueError, match="wk.weight: is not FP8, and layers.0.attention.wq.weight of the same fused"):
        load(tmp_path)


def test_scales_of_keys_in_some_layers_only_are_refused(tmp_path: Path) -> None:
    write_fp8(tmp_path, SMALL, random_state_dict(SMALL), "fp8 static", kv="tensor")
    gone: dict[str, Tensor | None] = {f"model.layers.1.self_attn.{letter}_scale": None for letter in "kv"}
    with pytest.raises(ValueError, match="layer 1 has no scales of keys and values"):
        load_weights(changed(tmp_path, gone), SMALL, dtype=torch.float32)


def group(**weights: Any) -> dict[str, Any]:
    number = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": "x",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": number}},
    }


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq' \\(INT4\\)"),
        ({"quant_method": "mxfp4"}, "quant_method 'mxfp4'"),
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes'"),
        ({}, "quant_method 'unnamed'"),
        (group(num_bits=4, type="int"), "compressed-tensors INT4 weights"),
        (group(num_bits=4), "compressed-tensors FP4 weights"),
        (group(strategy="group"), "strategy 'group'"),
        (group(symmetric=False), "asymmetric"),
        (group(dynamic=True), "dynamic"),
        (group(strategy="block", block_structure=[64, 64]), r"blocks of \[64, 64\]"),
        (group() | {"sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}}, "sparsity '2:4'"),
        (group() | {"kv_cache_scheme": {"num_bits": 8, "type": "int"}}, "kv_cache_scheme of INT8"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "has no config_groups"),
        ({"quant_method": "fp8", "activation_scheme": "odd"}, "activation_scheme 'odd'"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "ModelOpt quant_algo 'NVFP4'"),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"},
            "kv_cache_quant_algo 'NVFP4'",
        ),
        (group() | {"ignore": ["re:("]}, "is not a regular expression"),
        (group() | {"ignore": "lm_head"}, "must be a list of names"),
        ([], "must be a JSON object"),
    ],
)
def test_unsupported_schemes_are_named(block: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantization_of({"quantization_config": block})


def test_unsupported_schemes_of_mistral_are_named() -> None:
    for block, message in (
        ({"qformat_weight": "nvfp4"}, "'nvfp4'"),
        ({"qformat_weight": "fp8_e4m3", "qscheme_act": "X"}, "'X'"),
    ):
        with pytest.raises(ValueError, match=message):
            quantization_of({"quantization": block}, is_mistral=True)
    with pytest.raises(ValueError, match="use the Hugging Face layout"):
        quantization_of({"quantization_config": {}}, is_mistral=True)
