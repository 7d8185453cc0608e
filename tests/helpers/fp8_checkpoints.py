"""FP8 checkpoints as each tool writes them, made from a state dict; and what their numbers mean, worked out apart from
the engine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_engine.config import ModelConfig
from tests.helpers.checkpoints import StateDict, hf_config, mistral_params, mistral_state_dict, write_shards

FP8 = torch.float8_e4m3fn
BLOCK = 128

# Flavour: (what a weight has a scale for, whether inputs have static scales or None for inputs that stay as they are).
FLAVOURS: dict[str, tuple[str, bool | None]] = {
    "compressed-tensors static": ("tensor", True),
    "compressed-tensors dynamic": ("channel", False),
    "compressed-tensors block": ("block", False),
    "compressed-tensors weights only": ("channel", None),
    "fp8 static": ("tensor", True),
    "fp8 dynamic": ("tensor", False),
    "fp8 block": ("block", False),
    "fp8 of transformers": ("tensor", True),
    "modelopt": ("tensor", True),
    "modelopt in its own file": ("tensor", True),
    "modelopt per channel": ("channel", False),
    "mistral static": ("tensor", True),
    "mistral dynamic": ("tensor", False),
}


def is_quantised(name: str) -> bool:
    """Whether a tensor of a state dict is a linear layer's inside of the blocks."""
    return name.endswith("_proj.weight")


def quantise(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """FP8 numbers of ``weight`` and fp32 scales: (), (rows, 1), or (rows / 128, width / 128)."""
    if kind == "tensor":
        scales = (weight.float().abs().max() / 448).reshape(())
        return (weight.float() / scales).clamp(-448, 448).to(FP8), scales
    if kind == "channel":
        scales = weight.float().abs().amax(1, keepdim=True) / 448
        return (weight.float() / scales).clamp(-448, 448).to(FP8), scales
    rows, width = weight.shape
    scales = torch.empty(-(-rows // BLOCK), -(-width // BLOCK))
    numbers = torch.empty(weight.shape, dtype=FP8)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            scales[i, j] = weight[part].float().abs().max() / 448
            numbers[part] = (weight[part].float() / scales[i, j]).clamp(-448, 448).to(FP8)
    return numbers, scales


def dequantise(numbers: Tensor, scales: Tensor) -> Tensor:
    """fp32 products of numbers and scales, element by element."""
    if scales.dim() == 2 and scales.shape != (numbers.shape[0], 1):
        scales = scales.repeat_interleave(BLOCK, 0)[: numbers.shape[0]].repeat_interleave(BLOCK, 1)[
            :, : numbers.shape[1]
        ]
    return numbers.float() * scales


def write_fp8(
    path: Path, config: ModelConfig, state: StateDict, flavour: str, *, kv: str | None = None, shards: int = 1
) -> tuple[StateDict, StateDict]:
    """A checkpoint of ``flavour``; kv: None, "tensor" or "head" scales of keys and values.

    Returns what its weights mean, as a state dict, and its other scales by module: ``NAME.input_scale``,
    ``self_attn.k_scale`` of a layer.
    """
    kind, is_static = FLAVOURS[flavour]
    method = flavour.split()[0]
    generator = torch.Generator().manual_seed(len(flavour))
    stored, meaning, others = dict(state), dict(state), StateDict()
    names = {
        "compressed-tensors": ("weight_scale", "input_scale"),
        "fp8": ("weight_scale_inv", "activation_scale")
        if flavour.endswith("transformers")
        else ("weight_scale", "input_scale"),
        "modelopt": ("weight_scale", "input_scale"),
        "mistral": ("qscale_weight", "qscale_act"),
    }[method]
    if flavour == "fp8 block":
        names = ("weight_scale_inv", "input_scale")
    for name in filter(is_quantised, state):
        module = name.removesuffix(".weight")
        stored[name], scales = quantise(state[name], kind)
        meaning[name] = dequantise(stored[name], scales)
        if is_static:
            # q, k, v read one input, and so do gate and up.
            shared = module.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
            if f"{shared}.input_scale" not in others:
                others[f"{shared}.input_scale"] = 0.005 + 0.02 * torch.rand((), generator=generator)
            others[f"{module}.input_scale"] = others[f"{shared}.input_scale"]
            stored[f"{module}.{names[1]}"] = others[f"{module}.input_scale"].clone()
        as_vector = method == "compressed-tensors" and kind == "tensor"
        stored[f"{module}.{names[0]}"] = scales.reshape(1).clone() if as_vector else scales
    for layer in range(config.num_layers if kv else 0):
        for letter in "kv":
            shape = (config.num_kv_heads,) if kv == "head" else ()
            scale = 0.01 + 0.02 * torch.rand(shape, generator=generator)
            others[f"model.layers.{layer}.self_attn.{letter}_scale"] = scale
            form = "{}.{}_proj.{}_scale" if method == "modelopt" else "{}.{}_scale"
            stored[form.format(f"model.layers.{layer}.self_attn", letter, letter)] = scale.clone()
    _write(path, config, stored, flavour, kind, is_static, kv is not None, shards)
    return meaning, others


def _write(
    path: Path,
    config: ModelConfig,
    stored: StateDict,
    flavour: str,
    kind: str,
    is_static: bool | None,
    kv: bool,
    shards: int,
) -> None:
    if flavour.startswith("mistral"):
        scales = {name: tensor for name, tensor in stored.items() if name.endswith(("qscale_weight", "qscale_act"))}
        renamed = mistral_state_dict(config, {name: stored[name] for name in stored if name not in scales})
        for name, tensor in scales.items():
            module, _, suffix = name.rpartition(".")
            (other,) = mistral_state_dict(config, {f"{module}.weight": torch.zeros(config.q_size, 1)})
            renamed[f"{other.removesuffix('.weight')}.{suffix}"] = tensor
        write_shards(path, "consolidated", renamed, shards)
        scheme = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR" if is_static else "NO_SCALES"}
        (path / "params.json").write_text(json.dumps(mistral_params(config) | {"quantization": scheme}))
        return
    write_shards(path, "model", stored, shards)
    data = hf_config(config)
    block = quantization_config(flavour, kind, is_static, kv)
    if flavour == "modelopt in its own file":
        (path / "hf_quant_config.json").write_text(json.dumps(block))
    else:
        data["quantization_config"] = block
    (path / "config.json").write_text(json.dumps(data))


def quantization_config(flavour: str, kind: str, is_static: bool | None, kv: bool) -> dict[str, Any]:
    """What each tool writes into config.json (or, ModelOpt, beside it)."""
    if flavour.startswith("compressed"):
        number = {"num_bits": 8, "type": "float", "symmetric": True, "observer": "minmax"}
        weights = number | {"strategy": kind, "dynamic": False}
        inputs: dict[str, Any] | None = number | {
            "strategy": "tensor" if is_static else "token",
            "dynamic": not is_static,
        }
        if kind == "block":
            weights["block_structure"] = [BLOCK, BLOCK]
            inputs = number | {"strategy": "group", "group_size": BLOCK, "dynamic": True}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None if is_static is None else inputs}
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group | {"output_activations": None}},
            "ignore": ["lm_head"],
            "kv_cache_scheme": number | {"strategy": "tensor", "dynamic": False} if kv else None,
        }
    if flavour.startswith("fp8"):
        block: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "static" if is_static else "dynamic"}
        if flavour.endswith("transformers"):
            return block | {"weight_block_size": None, "modules_to_not_convert": ["lm_head"]}
        if kind == "block":
            return block | {"weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3"}
        return block | {"ignored_layers": ["lm_head"]} | ({"kv_cache_scheme": "static"} if kv else {})
    algorithm = "FP8_PER_CHANNEL_PER_TOKEN" if kind == "channel" else "FP8"
    inner = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8" if kv else None, "exclude_modules": ["lm_head"]}
    producer = {"producer": {"name": "modelopt", "version": "0.37.0"}}
    if flavour == "modelopt in its own file":
        return producer | {"quantization": inner}
    return producer | {"quant_method": "modelopt", **inner}
