"""Finding a checkpoint and reading what it is: a directory in either layout, a Hub repository, or the bundled model.

Only configuration and file headers are read here, without torch; ``loading`` reads the tensors. A local path never
touches the network.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_engine.checkpoint.hub import ADAPTER_FILES, CONVERSION, Needs, download, download_adapter, weight_sets_of
from nemo_engine.checkpoint.layout import HF, MISTRAL, WITH_VOCABULARY, Layout, TensorNames, names_in
from nemo_engine.checkpoint.lora import Adapter, read_adapter
from nemo_engine.checkpoint.quant_config import (
    BLOCK,
    WEIGHT_SCALES,
    Quantization,
    quantization_of,
    refuse_foreign_tensors,
)
from nemo_engine.checkpoint.safetensors_files import Headers, TensorInfo, read_json, read_weight_set
from nemo_engine.config import ModelConfig

BUNDLED = {"nemo-tiny": Path(__file__).parent.parent / "assets" / "nemo-tiny"}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_TOKENIZER_FILES = ("tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer.model.v3")

_logger = logging.getLogger("nemo_engine")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: ``tensors`` by what ``names`` calls them; empty if weights were not asked for.

    ``quantization`` is None if it is not quantised. ``unused_files`` are the weight files of the other layout, where a
    directory holds both. With an ``adapter``, ``model_config`` and ``tensors`` are those of the model that it makes.
    """

    path: Path
    names: TensorNames
    model_config: ModelConfig
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    quantization: Quantization | None = None
    unused_files: tuple[str, ...] = ()
    adapter: Adapter | None = None

    @property
    def layout(self) -> Layout:
        """Whose names and order of rows the files have."""
        return self.names.layout

    @property
    def text_folders(self) -> tuple[Path, ...]:
        """Where tokenizer and chat template are looked for, each by itself: what an adapter brings goes before what the
        model has.
        """
        return (self.path,) if self.adapter is None else (self.adapter.path, self.path)

    @property
    def tokenizer_path(self) -> Path:
        """The first of ``text_folders`` that has a tokenizer, the model's own if none has."""
        places = [folder / name for folder in self.text_folders for name in _TOKENIZER_FILES]
        return next((place.parent for place in places if place.exists()), self.path)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(info.nbytes for info in self.tensors.values())

    def describe(self) -> str:
        """One line: where it is, which layout was taken, and which files were left alone."""
        name = {"hf": "Hugging Face", "mistral": "Mistral"}[self.layout]
        files = sorted({info.file.name for info in self.tensors.values()})
        holds = f"{len(self.tensors)} tensors in {files[0]}" if files else "configuration only"
        if len(files) > 1:
            holds += f" and {len(files) - 1} more"
        if self.names not in (HF, MISTRAL):
            holds += f", named {self.names.prefix}..."
        if self.quantization is not None:
            holds += f"; {self.quantization.describe()}"
        if self.adapter is not None:
            holds += f"; with {self.adapter.describe()}"
        unused = f"; not used: {', '.join(self.unused_files)}" if self.unused_files else ""
        return f"{self.path}: {name} layout, {holds}{unused}"


def open_checkpoint(
    model: str | Path,
    *,
    revision: str | None = None,
    needs: Needs = "weights",
    lora: str | Path | None = None,
) -> Checkpoint:
    """Open a directory, a Hub repository ("org/name") or "nemo-tiny".

    What exists on disk or looks like a path is local. needs: "weights"; "headers", of weights where there are any,
    which from the Hub are read without the weights; or "config" alone. lora: a PEFT adapter, a directory or a Hub
    repository, which the model is merged with. Raises ``FileNotFoundError`` or ``ValueError`` naming the file that is
    absent or broken.
    """
    path, remote = _resolve(model, revision, needs)
    checkpoint = _open_directory(path, needs, remote)
    if lora is not None:
        checkpoint = _with_adapter(checkpoint, read_adapter(_resolve_adapter(lora), checkpoint.model_config))
    _logger.info("%s", checkpoint.describe())
    return checkpoint


def _resolve(model: str | Path, revision: str | None, needs: Needs) -> tuple[Path, Headers | None]:
    """The directory of ``model``, downloaded if it has to be; and the headers of what was left on the Hub."""
    if not isinstance(model, (str, os.PathLike)) or not str(model):
        raise ValueError(f"model must be a directory, a Hub repository id or a bundled model, got {model!r}")
    path = BUNDLED.get(model) if isinstance(model, str) else None
    if path is None:
        path = Path(model).expanduser()
        if _is_hub_id(model):
            return download(str(model), revision=revision, needs=needs)
    if not path.exists():
        raise FileNotFoundError(
            f"model {str(model)!r} does not exist; give a checkpoint directory, a Hub repository id such as "
            f"'mistralai/Mistral-Nemo-Instruct-2407', or {' or '.join(map(repr, BUNDLED))}"
        )
    if not path.is_dir():
        if path.suffix in (".gguf", ".ggml"):
            raise ValueError(f"model {str(model)!r} is {_GGUF}")
        raise ValueError(f"model {str(model)!r} is a file; give the directory that holds it and its configuration")
    if revision is not None:
        raise ValueError(f"revision is for Hub repositories, and {str(model)!r} is a local directory; got {revision!r}")
    return path, None


def _resolve_adapter(lora: str | Path) -> Path:
    """The directory of an adapter, downloaded if it has to be."""
    path = Path(lora).expanduser()
    if path.is_dir():
        return path
    if not path.exists() and _is_hub_id(lora):
        return download_adapter(str(lora))
    what = "is a file" if path.exists() else "does not exist"
    raise ValueError(f"lora {str(lora)!r} {what}; give the directory that holds {' and '.join(ADAPTER_FILES)}")


def _is_hub_id(model: str | Path) -> bool:
    """Whether ``model`` is nothing on disk and looks like no path, but like "org/name"."""
    name = str(model)
    looks_local = not isinstance(model, str) or name.startswith((".", "/", "~")) or name.count("/") > 1
    return not looks_local and not Path(model).exists() and _HUB_ID.fullmatch(name) is not None


def _open_directory(path: Path, needs: Needs, remote: Headers | None) -> Checkpoint:
    files = sorted({file.name for file in path.iterdir()} | set(remote or ()))
    weight_sets = weight_sets_of(files)
    if "adapter_config.json" in files and "config.json" not in files and "params.json" not in files:
        base = _base_of(path / "adapter_config.json")
        raise ValueError(
            f"{path} is an adapter and no model: give {base or 'the model it was made for'} as the model, and this as "
            "lora"
        )
    if needs == "weights" and not weight_sets:
        raise FileNotFoundError(no_weights_message(path))
    if weight_sets:
        stem = weight_sets[0].stem
    else:
        stem = "model" if "config.json" in files or "params.json" not in files else "consolidated"
    usual = HF if stem == "model" else MISTRAL
    data = _read_config_file(path, usual.layout)
    quantization = _quantization(path, usual.layout, data)
    if needs == "config" or not weight_sets:
        return Checkpoint(path, usual, _model_config(path, usual, data, {}), {}, quantization)
    tensors = read_weight_set(path, stem, remote)
    unused_files = tuple(file for unused in weight_sets[1:] for file in unused.files)
    try:
        refuse_foreign_tensors(tensors)
        names = names_in(usual.layout, tensors)
        config = _model_config(path, names, data, tensors)
        _check_num_layers(config, names.layout, len(tensors))
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
    return Checkpoint(path, names, config, _without_padding(tensors, names, config), quantization, unused_files)


_GGUF = (
    "a GGUF file, whose numbers only llama.cpp and its like compute with: run it there, or give the safetensors "
    "checkpoint that it was made "
    "from, with quantization='fp8' where memory is short"
)


def no_weights_message(path: Path) -> str:
    """What a directory without a weight set holds instead, and what to do with it."""
    files = sorted(file.name for file in path.iterdir())
    needed = (
        "model.safetensors or model.safetensors.index.json with its shards (and config.json), "
        "or consolidated.safetensors (and params.json)"
    )
    if any(re.fullmatch(r"(model|consolidated)-.*\.safetensors", name) for name in files):
        return f"{path} holds shards of safetensors but not their index (half copied?); needed is {needed}"
    if any(name.endswith((".gguf", ".ggml")) for name in files):
        return f"{path} holds {_GGUF}"
    if any(re.fullmatch(r"pytorch_model.*\.bin", name) for name in files):
        return (
            f"{path} holds its weights as a pickle (pytorch_model.bin), which may hold code and is not read: where you "
            "trust it, convert it with" + CONVERSION.format(path=str(path))
        )
    other = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".safetensors"))]
    contents = f"it has {', '.join(other)}, which cannot be read" if other else "it has no weights at all"
    return f"{path} holds no checkpoint that can be read: {contents}; needed is {needed}"


def _base_of(file: Path) -> str | None:
    """What an adapter says that it was made for."""
    data = read_json(file)
    base = data.get("base_model_name_or_path") if isinstance(data, dict) else None
    return base if isinstance(base, str) and base else None


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


def _model_config(
    path: Path, names: TensorNames, data: dict[str, Any], tensors: Mapping[str, TensorInfo]
) -> ModelConfig:
    """The configuration; where the file is silent about head_dim or dtype, the tensors say what they are."""
    heads_key, kv_heads_key = (
        ("num_attention_heads", "num_key_value_heads") if names.layout == "hf" else ("n_heads", "n_kv_heads")
    )
    if data.get("head_dim") is None:
        head_dim = _head_dim_of_tensors(names, tensors, data.get(heads_key), data.get(kv_heads_key))
        data = data | ({} if head_dim is None else {"head_dim": head_dim})
    embeddings = tensors.get(names.tensor("embed_tokens"))
    if embeddings is not None and data.get("dtype") is None and data.get("torch_dtype") is None:
        data = data | {"dtype": embeddings.dtype}
    generation_file = path / "generation_config.json"
    try:
        if names.layout == "mistral":
            return ModelConfig.from_mistral(data)
        generation_config = read_json(generation_file) if generation_file.exists() else None
        return ModelConfig.from_hf(data, generation_config=generation_config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _head_dim_of_tensors(
    names: TensorNames, tensors: Mapping[str, TensorInfo], num_heads: Any, num_kv_heads: Any
) -> int | None:
    """Rows of the first layer's query projection over its heads; the key projection must agree. None without them."""
    projections = []
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    for part, heads in (("q_proj", num_heads), ("k_proj", num_kv_heads)):
        name = names.tensor(part, 0)
        if name not in tensors or type(heads) is not int or heads < 1 or not tensors[name].shape:
            return None
        projections.append((name, tensors[name].shape[0], heads))
    (q_name, q_rows, _), (k_name, k_rows, _) = projections
    if q_rows % num_heads or k_rows % num_kv_heads or q_rows // num_heads != k_rows // num_kv_heads:
        raise ValueError(
            f"the configuration has no head_dim, and the tensors disagree about it: {q_name} has {q_rows} rows for "
            f"{num_heads} heads, {k_name} has {k_rows} for {num_kv_heads}"
        )
    return q_rows // num_heads


def _check_num_layers(config: ModelConfig, layout: Layout, num_tensors: int) -> None:
    """Raise ``ValueError`` if so many tensors cannot have the layers of ``config``, before they are listed one by
    one.
    """
    if config.num_layers > num_tensors:
        name = "config.json: num_hidden_layers" if layout == "hf" else "params.json: n_layers"
        raise ValueError(f"{name} is {config.num_layers}, and all weight files together hold {num_tensors} tensors")


def _without_padding(
    tensors: Mapping[str, TensorInfo], names: TensorNames, config: ModelConfig
) -> dict[str, TensorInfo]:
    """``tensors`` less the rows of embeddings and head, and their scales, beyond the vocabulary of the
    configuration.
    """
    changed = dict(tensors)
    for part in WITH_VOCABULARY:
        info, module = tensors.get(names.tensor(part)), names.module(part)
        if info is None or len(info.shape) != 2 or info.shape[0] <= config.vocab_size:
            continue
        rows, wanted = info.shape[0], config.vocab_size
        for name in (f"{module}.weight", *(f"{module}.{suffix}" for suffix in WEIGHT_SCALES)):
            if name in tensors and tensors[name].shape[:1] == (rows,):
                changed[name] = _first_rows(tensors[name], wanted)
            elif name in tensors and len(tensors[name].shape) == 2 and tensors[name].shape[0] == -(-rows // BLOCK):
                changed[name] = _first_rows(tensors[name], -(-wanted // BLOCK))
        _logger.warning(
            "%s.weight in %s has %d rows, and vocab_size is %d: the last %d are padding and are not read",
            module, info.file.name, rows, wanted, rows - wanted,
        )  # fmt: skip
    return changed


def _first_rows(info: TensorInfo, rows: int) -> TensorInfo:
    return replace(info, shape=(rows, *info.shape[1:]), nbytes=info.nbytes // info.shape[0] * rows)


def _with_adapter(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """``checkpoint`` as ``adapter`` makes it: tensors that it brings whole take the place of the model's."""
    names, config = checkpoint.names, checkpoint.model_config
    whole = {names.tensor(part, layer): info for (layer, part), info in adapter.whole.items()}
    config = replace(
        config,
        vocab_size=adapter.vocab_size,
        tie_word_embeddings=config.tie_word_embeddings
        and not adapter.whole.keys() & {(None, "embed_tokens"), (None, "lm_head")},
    )
    tensors = dict(checkpoint.tensors)
    if tensors:
        untied = checkpoint.model_config.tie_word_embeddings and not config.tie_word_embeddings
        if untied and names.tensor("embed_tokens") in tensors:
            # Training saw the head that the embeddings were; an adapter that brings the embeddings alone leaves it as
            # it was.
            tensors[names.tensor("lm_head")] = tensors[names.tensor("embed_tokens")]
        tensors |= whole
    for layer, part in adapter.low_rank:
        stored = tensors.get(names.tensor(part, layer))
        if stored is not None and stored.dtype.startswith("float8"):
            raise ValueError(
                f"{adapter.path} changes {names.tensor(part, layer)}, which {checkpoint.path} holds in FP8: merge it "
                "with the unquantised "
                "checkpoint, with quantization='fp8' if it is to be FP8 afterwards"
            )
    return replace(checkpoint, model_config=config, tensors=tensors, adapter=adapter)
