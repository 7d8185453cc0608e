"""Tiny random checkpoints for tests: a configuration, its weights under Hugging Face names, and both layouts on
disk.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nemo_engine.config import ModelConfig

StateDict = dict[str, torch.Tensor]


def tiny_config(**overrides: Any) -> ModelConfig:
    """A model of a few thousand parameters: q width apart from hidden, grouped KV, untied; ``overrides`` are fields."""
    config = ModelConfig(
        vocab_size=97,
        hidden_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=40,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        max_position_embeddings=131072,
        dtype="float32",
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    return dataclasses.replace(config, **overrides)


def random_state_dict(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> StateDict:
    """Seeded weights under the names of HF's ``MistralForCausalLM``, drawn in fp32, at a scale that gives peaked
    logits.

    A tensor depends on ``seed`` and its own name and shape only. Tied embeddings have no ``lm_head.weight``.
    """
    hidden, q, kv, inner = config.hidden_size, config.q_size, config.kv_size, config.intermediate_size
    scales: dict[str, tuple[tuple[int, ...], float]] = {"model.embed_tokens.weight": ((config.vocab_size, hidden), 1.0)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        scales |= {
            f"{prefix}.self_attn.q_proj.weight": ((q, hidden), 1.5 * hidden**-0.5),
            f"{prefix}.self_attn.k_proj.weight": ((kv, hidden), 1.5 * hidden**-0.5),
            f"{prefix}.self_attn.v_proj.weight": ((kv, hidden), hidden**-0.5),
            f"{prefix}.self_attn.o_proj.weight": ((hidden, q), q**-0.5),
            f"{prefix}.mlp.gate_proj.weight": ((inner, hidden), hidden**-0.5),
            f"{prefix}.mlp.up_proj.weight": ((inner, hidden), hidden**-0.5),
            f"{prefix}.mlp.down_proj.weight": ((hidden, inner), inner**-0.5),
            f"{prefix}.input_layernorm.weight": ((hidden,), 0.0),
            f"{prefix}.post_attention_layernorm.weight": ((hidden,), 0.0),
        }
    scales["model.norm.weight"] = ((hidden,), 0.0)
    if not config.tie_word_embeddings:
        scales["lm_head.weight"] = ((config.vocab_size, hidden), 2.0 * hidden**-0.5)

    state: StateDict = {}
    for name, (shape, scale) in scales.items():
        generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + zlib.crc32(name.encode())) % 2**63)
        noise = torch.randn(shape, generator=generator)
        state[name] = (noise * scale if scale else 1.0 + 0.1 * noise).to(dtype)
    return state


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """``config`` as a ``config.json``."""
    eos = config.eos_token_ids
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.dtype,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
    }


def mistral_params(config: ModelConfig) -> dict[str, Any]:
    """``config`` as a ``params.json``."""
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "rope_theta": config.rope_theta,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "max_seq_len": config.max_position_embeddings,
    }
    return params | ({"tied_embeddings": True} if config.tie_word_embeddings else {})


def mistral_state_dict(config: ModelConfig, state: Mapping[str, torch.Tensor]) -> StateDict:
    """``state`` under Mistral's names, the rows of each query and key head in interleaved rotary order."""
    outer = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
    inner = {
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    converted: StateDict = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        if stem in outer:
            converted[f"{outer[stem]}.weight"] = tensor.clone()
            continue
        _, _, layer, part = stem.split(".", 3)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            rows = [
                head * config.head_dim + half * (config.head_dim // 2) + pair
                for head in range(tensor.shape[0] // config.head_dim)
                for pair in range(config.head_dim // 2)
                for half in range(2)
            ]
            tensor = tensor[rows]
        converted[f"layers.{layer}.{inner[part]}.weight"] = tensor.clone()
    return converted


def write_shards(path: Path, stem: str, state: Mapping[str, torch.Tensor], shards: int) -> None:
    """``stem.safetensors``, or ``shards`` files with an index."""
    path.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(dict(state), path / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    names = sorted(state)
    for index in range(shards):
        file = f"{stem}-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = names[index * len(names) // shards : (index + 1) * len(names) // shards]
        save_file({name: state[name] for name in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in state.values())
    index_file = path / f"{stem}.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def write_hf(
    path: Path, config: ModelConfig, state: Mapping[str, torch.Tensor], *, shards: int = 1, **config_changes: Any
) -> Path:
    """A Hugging Face checkpoint in ``path``; ``config_changes`` go into ``config.json``. Returns ``path``."""
    write_shards(path, "model", state, shards)
    (path / "config.json").write_text(json.dumps(hf_config(config) | config_changes, indent=2))
    return path


def write_mistral(
    path: Path, config: ModelConfig, state: Mapping[str, torch.Tensor], *, shards: int = 1, **param_changes: Any
) -> Path:
    """A Mistral checkpoint in ``path`` from HF-named ``state``; ``param_changes`` go into ``params.json``.

    Returns ``path``.
    """
    write_shards(path, "consolidated", mistral_state_dict(config, state), shards)
    (path / "params.json").write_text(json.dumps(mistral_params(config) | param_changes, indent=2))
    return path


SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def module_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of every projection of every layer, by Hugging Face's name of the module."""
    q, kv, hidden, inner = config.q_size, config.kv_size, config.hidden_size, config.intermediate_size
    shapes = dict(
        zip(
            SEVEN,
            ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner)),
            strict=True,
        )
    )
    return {
        f"model.layers.{layer}.{'mlp' if part.endswith(('gate_proj', 'up_proj', 'down_proj')) else 'self_attn'}.{part}": shape
        for layer in range(config.num_layers)
        for part, shape in shapes.items()
    }


def random_adapter(
    config: ModelConfig, targets: Mapping[str, int] | tuple[str, ...] = SEVEN, seed: int = 7, rank: int = 4
) -> StateDict:
    """Both halves of a PEFT adapter's products, fp32, for ``targets``: names of projections, or such names and their
    ranks.
    """
    ranks = dict(targets) if isinstance(targets, Mapping) else dict.fromkeys(targets, rank)
    generator = torch.Generator().manual_seed(seed)
    state: StateDict = {}
    for module, (rows, width) in module_shapes(config).items():
        size = ranks.get(module.rpartition(".")[2])
        if size is not None:
            state[f"base_model.model.{module}.lora_A.weight"] = torch.randn(size, width, generator=generator)
            state[f"base_model.model.{module}.lora_B.weight"] = 0.1 * torch.randn(rows, size, generator=generator)
    return state


def write_adapter(path: Path, state: Mapping[str, torch.Tensor], **fields: Any) -> Path:
    """A PEFT adapter in ``path``; ``fields`` go into ``adapter_config.json``. Returns ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(SEVEN), "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config | fields))
    return path


def merged(state: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor], scaling: float) -> StateDict:
    """``state`` plus ``scaling`` times each product of ``adapter``, added in fp32: the formula of PEFT's
    documentation.
    """
    result = dict(state)
    for name, a in adapter.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = adapter[name.replace("lora_A", "lora_B")]
            result[f"{module}.weight"] = state[f"{module}.weight"].float() + scaling * (b.float() @ a.float())
    return result
