"""What is planned for: a model's configuration, what its weights and its cache are stored as, and the bytes of both. Reads no tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.model.layout import PARTS, expected_tensors
from nemo_engine.model.quantization import ONLINE, Quantization, quantization_of
from nemo_engine.planner.memory import Sizes, weight_bytes

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}

_COMMON: dict[str, Any] = {
    "head_dim": 128, "num_kv_heads": 8, "num_heads": 32, "intermediate_size": 14336, "rope_theta": 1e6, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 1, "eos_token_ids": (2,),
}  # fmt: skip
# By the config.json of mistralai/Mistral-Nemo-Instruct-2407, mistralai/Mistral-7B-Instruct-v0.3, nvidia/Mistral-NeMo-Minitron-8B-Base.
BUILT_IN = {
    "nemo": ModelConfig(
        vocab_size=131072, hidden_size=5120, num_layers=40, max_position_embeddings=131072, **_COMMON
    ),
    "mistral-7b-v0.3": ModelConfig(
        vocab_size=32768, hidden_size=4096, num_layers=32, max_position_embeddings=32768, **_COMMON
    ),
    "minitron-8b": ModelConfig(
        vocab_size=131072, hidden_size=4096, num_layers=40, max_position_embeddings=8192,
        **{**_COMMON, "intermediate_size": 11520},
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model to plan for; ``quantization`` is how its checkpoint stores its weights, None if it is not quantised."""

    name: str
    config: ModelConfig
    quantization: Quantization | None = None


@dataclass(frozen=True, slots=True)
class WeightKind:
    """What a projection is stored as, see ``memory.Kind``."""

    scales: Literal["none", "channel", "block"] = "none"
    has_input_scale: bool = False


@dataclass(frozen=True, slots=True)
class Formats:
    """What numbers are stored and multiplied as, for one model and one ``EngineConfig``."""

    sizes: Sizes
    kinds: Mapping[tuple[int | None, str], WeightKind]

    @property
    def is_linear_fp8(self) -> bool:
        """Whether the layers' products have FP8 operands."""
        return any(layer is not None for layer, _ in self.kinds)

    @property
    def is_head_fp8(self) -> bool:
        """Whether the head's product has."""
        return (None, "lm_head") in self.kinds

    @property
    def is_kv_fp8(self) -> bool:
        """Whether keys and values are FP8."""
        return self.sizes.kv_cache == 1

    def kind_of(self, layer: int | None, projection: str) -> WeightKind:
        """What ``projection`` of ``layer`` is stored as."""
        return self.kinds.get((layer, projection), WeightKind())


def read_model(name: str) -> PlannedModel | None:
    """A built-in model by name, or the configuration of a directory; None for what only the engine can open (a Hub id, a lack of head_dim).

    Raises ``ValueError`` naming the file and what is wrong with it.
    """
    if name in BUILT_IN:
        return PlannedModel(name, BUILT_IN[name])
    folder = Path(name).expanduser()
    is_mistral = not (folder / "config.json").is_file()
    file = folder / ("params.json" if is_mistral else "config.json")
    if not file.is_file():
        return None
    data = _read_object(file)
    if data.get("head_dim") is None:
        return None
    extra = {key: folder / f"{key}.json" for key in ("generation_config", "hf_quant_config")}
    found = {key: _read_object(path) for key, path in extra.items() if path.is_file() and not is_mistral}
    try:
        if is_mistral:
            config = ModelConfig.from_mistral(data)
        else:
            config = ModelConfig.from_hf(data, generation_config=found.get("generation_config"))
        quantization = quantization_of(data, found.get("hf_quant_config"), is_mistral=is_mistral)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return PlannedModel(name, config, quantization)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(data).__name__}")
    return data


def formats_of(model: PlannedModel, config: EngineConfig) -> Formats:
    """What ``config`` makes of ``model``, as start-up resolves it. Raises ``ValueError`` where they conflict."""
    dtype = model.config.dtype if config.dtype == "auto" else config.dtype
    itemsize = ITEMSIZE[dtype]
    stored, online = model.quantization, _online(config, model.quantization)
    kinds = projection_kinds(model.config, stored, online)
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


def _online(config: EngineConfig, stored: Quantization | None) -> Quantization | None:
    """What becomes FP8 while it loads."""
    name = config.quantization
    head = replace(ONLINE["fp8"], targets=("lm_head",), ignored=()) if config.quantize_lm_head else None
    if stored is not None and stored.weights != "none":
        if name is not None and (stored.activations == "none" or (name == "fp8_block") != (stored.weights == "block")):
            raise ValueError(
                f"quantization {name!r} conflicts with what the checkpoint is already: {stored.describe()}"
            )
        return head
    if name is None:
        return head
    return replace(ONLINE[name], ignored=()) if config.quantize_lm_head else ONLINE[name]


def projection_kinds(
    config: ModelConfig, stored: Quantization | None, online: Quantization | None
) -> dict[tuple[int | None, str], WeightKind]:
    """The projections that are FP8, in a checkpoint of ``stored`` whose others become what ``online`` says."""
    projection_of = {part: projection for projection, parts in PARTS.items() for part in parts} | {"lm_head": "lm_head"}
    kinds: dict[tuple[int | None, str], WeightKind] = {}
    for tensor in expected_tensors(config, "hf"):
        if tensor.part not in projection_of:
            continue
        module = tensor.name.removesuffix(".weight")
        for scheme in (online, stored):
            if scheme is None or scheme.activations == "none":
                continue
            covered = scheme.covers(module)
            if tensor.part != "lm_head" if covered is None else covered:
                by: Literal["channel", "block"] = "block" if scheme.weights == "block" else "channel"
                kinds[tensor.layer, projection_of[tensor.part]] = WeightKind(by, scheme.activations == "static")
    return kinds
