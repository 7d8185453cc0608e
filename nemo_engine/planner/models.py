"""The model that a plan is for: its configuration, the formats of its weights and its cache, and the bytes of both.

Reads no tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_engine.checkpoint.checkpoint import open_checkpoint
from nemo_engine.checkpoint.hub import Needs
from nemo_engine.checkpoint.inventory import DENSE, Inventory, LinearKind, planned_inventory
from nemo_engine.checkpoint.quant_config import Quantization, resolve_online
from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.memory_plan import Sizes, weight_bytes

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}

COMMON: dict[str, Any] = {
    "head_dim": 128, "num_kv_heads": 8, "num_heads": 32, "intermediate_size": 14336, "rope_theta": 1e6, "rms_norm_eps":
    1e-5, "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 1, "eos_token_ids": (2,),
}  # fmt: skip
# From the config.json of mistralai/Mistral-Nemo-Instruct-2407, mistralai/Mistral-7B-Instruct-v0.3,
# nvidia/Mistral-NeMo-Minitron-8B-Base.
BUILT_IN = {
    "nemo": ModelConfig(
        vocab_size=131072, hidden_size=5120, num_layers=40, max_position_embeddings=131072, **COMMON
    ),
    "mistral-7b-v0.3": ModelConfig(
        vocab_size=32768, hidden_size=4096, num_layers=32, max_position_embeddings=32768, **COMMON
    ),
    "minitron-8b": ModelConfig(
        vocab_size=131072, hidden_size=4096, num_layers=40, max_position_embeddings=8192,
        **{**COMMON, "intermediate_size": 11520},
    ),
}  # fmt: skip


# Unquantised repositories of these shapes, which need no network to plan.
REPOSITORIES = {
    "mistralai/mistral-nemo-instruct-2407": "nemo",
    "mistralai/mistral-nemo-base-2407": "nemo",
    "mistralai/mistral-7b-instruct-v0.3": "mistral-7b-v0.3",
    "mistralai/mistral-7b-v0.3": "mistral-7b-v0.3",
    "nvidia/mistral-nemo-minitron-8b-base": "minitron-8b",
}


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model to plan for; ``quantization`` is how its checkpoint stores its weights, None if it is not quantised."""

    name: str
    config: ModelConfig
    quantization: Quantization | None = None


@dataclass(frozen=True, slots=True)
class Formats:
    """The formats in which numbers are stored and multiplied, for one model and one ``EngineConfig``."""

    sizes: Sizes
    kinds: Mapping[tuple[int | None, str], LinearKind]

    @property
    def is_linear_fp8(self) -> bool:
        """Whether the layers' products have FP8 operands."""
        return any(layer is not None for layer, _ in self.kinds)

    @property
    def is_head_fp8(self) -> bool:
        """Whether the head's product has FP8 operands."""
        return (None, "lm_head") in self.kinds

    @property
    def is_kv_fp8(self) -> bool:
        """Whether keys and values are FP8."""
        return self.sizes.kv_cache == 1

    def kind_of(self, layer: int | None, projection: str) -> LinearKind:
        """The kind in which ``projection`` of ``layer`` is stored."""
        return self.kinds.get((layer, projection), DENSE)


def read_model(name: str, revision: str | None = None) -> PlannedModel:
    """A built-in model by its name or its repository, or one that ``open_checkpoint`` opens; only configuration and
    headers are read.

    Raises ``ValueError`` or ``FileNotFoundError`` naming the file and what is wrong with it.
    """
    shape = BUILT_IN.get(REPOSITORIES.get(name.lower(), name))
    if shape is not None and revision is None and not Path(name).is_dir():
        return PlannedModel(name, shape)
    needs: Needs = "headers" if Path(name).is_dir() else "config"
    checkpoint = open_checkpoint(name, revision=revision, needs=needs)
    return PlannedModel(name, checkpoint.model_config, checkpoint.quantization)


def formats_of(model: PlannedModel, config: EngineConfig, inventory: Inventory | None = None) -> Formats:
    """The formats that start-up would resolve for ``model`` and ``config``; ``inventory`` is that of the files, if
    there are any.

    Raises ``ValueError`` where model and options conflict.
    """
    dtype = model.config.dtype if config.dtype == "auto" else config.dtype
    itemsize = ITEMSIZE[dtype]
    stored, online = model.quantization, resolve_online(config, model.quantization)
    kinds = (inventory or planned_inventory(model.config, stored, online)).kinds
    if kinds and dtype == "float64":
        raise ValueError(f"dtype {dtype!r} computes nothing in FP8, and the model is quantised")
    kv = config.kv_cache_dtype
    if kv == "auto":
        kv_itemsize = 1 if stored is not None and stored.kv_cache else itemsize
    elif kv.startswith("fp8"):
        kv_itemsize = 1
    elif kv != dtype:
        raise ValueError(
            f"kv_cache_dtype {kv!r} conflicts with the dtype of the activations, {dtype}: use 'auto' or 'fp8'"
        )
    else:
        kv_itemsize = itemsize
    formats = Formats(Sizes(itemsize, kv_itemsize), kinds)
    num_bytes = weight_bytes(model.config, itemsize, formats.kind_of)
    return replace(formats, sizes=Sizes(itemsize, kv_itemsize, num_bytes))
