"""Finding a checkpoint and reading what it is: a directory in either layout, a Hub repository, or the bundled model.

Only configuration and file headers are read here; ``weights`` reads the tensors. A local path never touches the network.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nemo_engine.config import ModelConfig
from nemo_engine.model.hub import download, weight_sets_of
from nemo_engine.model.layout import Layout, check_num_layers, tensor_name
from nemo_engine.model.quantization import Quantization, quantization_of
from nemo_engine.model.safetensors_files import TensorInfo, read_into, read_json, read_weight_set

BUNDLED = {"nemo-tiny": Path(__file__).parent.parent / "assets" / "nemo-tiny"}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_logger = logging.getLogger("nemo_engine")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: ``tensors`` by their names in its ``layout``; empty if weights were not asked for.

    ``quantization`` is None if it is not quantised. ``unused_files`` are the weight files of the other layout, where a directory holds
    both.
    """

    path: Path
    layout: Layout
    model_config: ModelConfig
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    quantization: Quantization | None = None
    unused_files: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor as stored, on the CPU; into ``out`` (of its dtype and shape, contiguous) if given."""
        info = self.tensors[name]
        if out is None:
            out = torch.empty(info.shape, dtype=info.dtype)
        read_into(info, out)
        return out

    def describe(self) -> str:
        """One line: where it is, which layout was taken, and which files were left alone."""
        name = {"hf": "Hugging Face", "mistral": "Mistral"}[self.layout]
        files = sorted({info.file.name for info in self.tensors.values()})
        holds = f"{len(self.tensors)} tensors in {files[0]}" if files else "configuration only"
        if len(files) > 1:
            holds += f" and {len(files) - 1} more"
        if self.quantization is not None:
            holds += f"; {self.quantization.describe()}"
        unused = f"; not used: {', '.join(self.unused_files)}" if self.unused_files else ""
        return f"{self.path}: {name} layout, {holds}{unused}"


def open_checkpoint(model: str | Path, *, revision: str | None = None, needs_weights: bool = True) -> Checkpoint:
    """Open a directory, a Hub repository ("org/name") or "nemo-tiny".

    What exists on disk or looks like a path is local. Without ``needs_weights``, only the configuration is looked at and,
    from the Hub, downloaded. Raises ``FileNotFoundError`` or ``ValueError`` naming the file that is absent or broken.
    """
    checkpoint = _open_directory(_resolve(model, revision, needs_weights), needs_weights)
    _logger.info("%s", checkpoint.describe())
    return checkpoint


def _resolve(model: str | Path, revision: str | None, needs_weights: bool) -> Path:
    """The directory of ``model``, downloaded if it has to be."""
    if not isinstance(model, (str, os.PathLike)) or not str(model):
        raise ValueError(f"model must be a directory, a Hub repository id or a bundled model, got {model!r}")
    path = BUNDLED.get(model) if isinstance(model, str) else None
    if path is None:
        path = Path(model).expanduser()
        name = str(model)
        looks_local = not isinstance(model, str) or name.startswith((".", "/", "~")) or name.count("/") > 1
        if not path.exists() and not looks_local and _HUB_ID.fullmatch(name):
            return download(name, revision=revision, needs_weights=needs_weights)
    if not path.exists():
        raise FileNotFoundError(
            f"model {str(model)!r} does not exist; give a checkpoint directory, a Hub repository id such as "
            f"'mistralai/Mistral-Nemo-Instruct-2407', or {' or '.join(map(repr, BUNDLED))}"
        )
    if not path.is_dir():
        raise ValueError(f"model {str(model)!r} is a file; give the directory that holds it and its configuration")
    if revision is not None:
        raise ValueError(f"revision is for Hub repositories, and {str(model)!r} is a local directory; got {revision!r}")
    return path


def _open_directory(path: Path, needs_weights: bool) -> Checkpoint:
    files = sorted(file.name for file in path.iterdir())
    weight_sets = weight_sets_of(files)
    if needs_weights and not weight_sets:
        raise FileNotFoundError(_no_weights_message(path, files))
    if weight_sets:
        stem = weight_sets[0].stem
    else:
        stem = "model" if "config.json" in files or "params.json" not in files else "consolidated"
    layout: Layout = "hf" if stem == "model" else "mistral"
    data = _read_config_file(path, layout)
    quantization = _quantization(path, layout, data)
    if not needs_weights:
        return Checkpoint(path, layout, _model_config(path, layout, data, {}), {}, quantization)
    tensors = read_weight_set(path, stem)
    unused_files = tuple(file for unused in weight_sets[1:] for file in unused.files)
    config = _model_config(path, layout, data, tensors)
    try:
        check_num_layers(config, layout, len(tensors))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Checkpoint(path, layout, config, tensors, quantization, unused_files)


def _no_weights_message(path: Path, files: list[str]) -> str:
    needed = (
        "model.safetensors or model.safetensors.index.json with its shards (and config.json), "
        "or consolidated.safetensors (and params.json)"
    )
    if any(re.fullmatch(r"(model|consolidated)-.*\.safetensors", name) for name in files):
        return f"{path} holds shards of safetensors but not their index (half copied?); needed is {needed}"
    other = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".gguf", ".ggml", ".safetensors"))]
    found = f"it has {', '.join(other)}, which cannot be read" if other else "it has no weights at all"
    return f"{path} holds no checkpoint that can be read: {found}; needed is {needed}"


def _read_config_file(path: Path, layout: Layout) -> dict[str, Any]:
    file = path / ("config.json" if layout == "hf" else "params.json")
    data = read_json(file)
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(data).__name__}")
    return data


def _quantization(path: Path, layout: Layout, data: dict[str, Any]) -> Quantization | None:
    modelopt_file = path / "hf_quant_config.json"
    modelopt = read_json(modelopt_file) if layout == "hf" and modelopt_file.exists() else None
    try:
        return quantization_of(data, modelopt, is_mistral=layout == "mistral")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _model_config(path: Path, layout: Layout, data: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> ModelConfig:
    """The configuration; where the file is silent about head_dim or dtype, the tensors say what they are."""
    heads_key, kv_heads_key = (
        ("num_attention_heads", "num_key_value_heads") if layout == "hf" else ("n_heads", "n_kv_heads")
    )
    if data.get("head_dim") is None:
        head_dim = _head_dim_of_tensors(path, layout, tensors, data.get(heads_key), data.get(kv_heads_key))
        data = data | ({} if head_dim is None else {"head_dim": head_dim})
    embeddings = tensors.get(tensor_name(layout, "embed_tokens"))
    if embeddings is not None and data.get("dtype") is None and data.get("torch_dtype") is None:
        data = data | {"dtype": str(embeddings.dtype).removeprefix("torch.")}
    generation_file = path / "generation_config.json"
    try:
        if layout == "mistral":
            return ModelConfig.from_mistral(data)
        generation_config = read_json(generation_file) if generation_file.exists() else None
        return ModelConfig.from_hf(data, generation_config=generation_config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _head_dim_of_tensors(
    path: Path, layout: Layout, tensors: Mapping[str, TensorInfo], num_heads: Any, num_kv_heads: Any
) -> int | None:
    """Rows of the first layer's query projection over its heads; the key projection must agree. None without them."""
    found = []
    for part, heads in (("q_proj", num_heads), ("k_proj", num_kv_heads)):
        name = tensor_name(layout, part, 0)
        if name not in tensors or type(heads) is not int or heads < 1 or not tensors[name].shape:
            return None
        found.append((name, tensors[name].shape[0], heads))
    (q_name, q_rows, _), (k_name, k_rows, _) = found
    if q_rows % num_heads or k_rows % num_kv_heads or q_rows // num_heads != k_rows // num_kv_heads:
        raise ValueError(
            f"{path}: the configuration has no head_dim, and the tensors disagree about it: {q_name} has {q_rows} rows for "
            f"{num_heads} heads, {k_name} has {k_rows} for {num_kv_heads}"
        )
    return q_rows // num_heads
