"""Writing an FP8 checkpoint in the compressed-tensors format, which transformers and vLLM read.

Nothing that looks like a checkpoint exists before all of it does: it is written beside its place and renamed at the
end.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nemo_engine.checkpoint.calibration import Calibration
from nemo_engine.checkpoint.checkpoint import Checkpoint
from nemo_engine.checkpoint.hub import TEMPLATE_FILES, TEMPLATE_FOLDER, TEXT_FILES
from nemo_engine.checkpoint.inventory import take_inventory
from nemo_engine.checkpoint.layout import HF, PARTS, PROJECTION_OF
from nemo_engine.checkpoint.loader import TensorReader
from nemo_engine.checkpoint.quant_config import BLOCK
from nemo_engine.checkpoint.safetensors_files import read_json
from nemo_engine.config import ModelConfig
from nemo_engine.ops.blocks import quantize_weight_blocks
from nemo_engine.ops.quantize import quantize_channels

Scheme = Literal["dynamic", "static", "block"]
KVScales = Literal["none", "tensor", "head"]
SHARD_BYTES = 4 << 30


def export_fp8(
    checkpoint: Checkpoint,
    out: Path,
    *,
    scheme: Scheme = "dynamic",
    calibration: Calibration | None = None,
    kv_scales: KVScales = "none",
    quantize_lm_head: bool = False,
    advance: Callable[[int], object] = lambda num_bytes: None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Quantise ``checkpoint`` into the directory ``out``, in Hugging Face's layout whatever its own.

    scheme: weights per output channel with inputs per token ("dynamic") or with calibrated scales ("static"), or by 128
    x 128 ("block").
    kv_scales: one per layer or one per head, from ``calibration``. advance is called with the number of bytes just
    read. Raises ``ValueError`` for a checkpoint that is or cannot be quantised, ``FileExistsError`` if ``out`` exists
    and is not empty.
    """
    check_wanted(checkpoint, out, scheme, kv_scales, has_texts=calibration is not None)
    out = out.resolve()  # "." and links: what is renamed at the end is a directory with a name
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        tensors = _tensors(checkpoint, scheme, calibration, kv_scales, quantize_lm_head, advance)
        _write_shards(partial, tensors, shard_bytes)
        _copy_beside(checkpoint.path, partial)
        if checkpoint.adapter is not None:
            _copy_text(checkpoint, partial)
        config = _config(checkpoint) | {"quantization_config": _scheme(scheme, kv_scales, quantize_lm_head)}
        config["vocab_size"] = checkpoint.model_config.vocab_size
        config["tie_word_embeddings"] = checkpoint.model_config.tie_word_embeddings and not quantize_lm_head
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file in partial.iterdir():
            file.chmod(0o644)  # tempfile and safetensors let the owner alone read what they write
            with file.open("rb") as written:
                os.fsync(written.fileno())  # or a crash could leave a whole folder of files cut off
        partial.chmod(0o755)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_wanted(checkpoint: Checkpoint, out: Path, scheme: Scheme, kv_scales: KVScales, *, has_texts: bool) -> None:
    """Raise for what ``export_fp8`` refuses, before anything is read."""
    if scheme not in ("dynamic", "static", "block"):
        raise ValueError(f"scheme must be one of 'dynamic', 'static', 'block', got {scheme!r}")
    if kv_scales not in ("none", "tensor", "head"):
        raise ValueError(f"kv_scales must be one of 'none', 'tensor', 'head', got {kv_scales!r}")
    if checkpoint.quantization is not None:
        raise ValueError(f"{checkpoint.path} is quantised already: {checkpoint.quantization.describe()}")
    needs_texts = scheme == "static" or kv_scales != "none"
    if needs_texts != has_texts:
        raise ValueError(
            f"scheme {scheme!r} with kv_scales {kv_scales!r} "
            + (
                "needs text to calibrate on, and there is none"
                if needs_texts
                else "needs no text to calibrate on, and there is some"
            )
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty directory")
    parent = next(folder for folder in out.resolve().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{out} cannot be made: {parent} is not a directory that can be written to")
    if scheme == "block":
        _check_blocks(checkpoint.model_config)


def _check_blocks(config: ModelConfig) -> None:
    """Raise ``ValueError`` for sizes that the readers of scheme "block" cannot take."""
    last = {parts[-1] for parts in PARTS.values()}
    for tensor in HF.expected(config):
        if tensor.layer is None or tensor.part not in PROJECTION_OF:
            continue
        rows, width = tensor.shape
        if width % BLOCK:  # compressed-tensors takes inputs in whole groups
            raise ValueError(
                f"scheme 'block' needs rows of whole blocks of {BLOCK}, and {tensor.name} has {width} columns"
            )
        if rows % BLOCK and tensor.part not in last:
            raise ValueError(
                f"scheme 'block' needs whole blocks of {BLOCK} rows in what is fused, and {tensor.name} has {rows}"
            )


def _tensors(
    checkpoint: Checkpoint,
    scheme: Scheme,
    calibration: Calibration | None,
    kv_scales: str,
    quantize_lm_head: bool,
    advance: Callable[[int], object],
) -> Iterator[tuple[str, Tensor]]:
    """Names in Hugging Face's layout and tensors, one after the other."""
    config = checkpoint.model_config
    dtype = getattr(torch, config.dtype)
    tensors = list(take_inventory(checkpoint, config).tensors)
    if quantize_lm_head and config.tie_word_embeddings:
        tensors += [
            replace(stored, expected=replace(stored.expected, part="lm_head", module="lm_head"))
            for stored in tensors
            if stored.expected.part == "embed_tokens"
        ]
    reader = TensorReader(checkpoint, config.head_dim)
    for stored in tensors:
        x, tensor = reader.whole(stored), stored.expected
        advance(stored.info.nbytes)
        name = f"{tensor.module}.weight"
        projection = PROJECTION_OF.get(tensor.part)
        if projection is None or (projection == "lm_head" and not quantize_lm_head):
            yield name, x.to(dtype)
            continue
        values, scales = (quantize_weight_blocks if scheme == "block" else quantize_channels)(x)
        if not scales.isfinite().all():
            raise ValueError(f"{tensor.name} holds NaN or infinity, and cannot be quantised to FP8")
        yield name, values
        yield f"{tensor.module}.weight_scale", scales
        if scheme == "static":
            assert calibration is not None
            yield f"{tensor.module}.input_scale", calibration.inputs[tensor.layer, projection].reshape(1).clone()
    if kv_scales != "none":
        assert calibration is not None
        for layer in range(config.num_layers):
            module = HF.attention(layer)
            for letter, scales in (("k", calibration.keys[layer]), ("v", calibration.values[layer])):
                yield (
                    f"{module}.{letter}_scale",
                    scales.max().reshape(1) if kv_scales == "tensor" else scales.view(-1, 1, 1),
                )


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int) -> None:
    """One file, or several of at most about ``shard_bytes`` and their index."""
    files: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        file = folder / f"{len(files)}.part"
        try:
            save_file(shard, file, metadata={"format": "pt"})
        except SafetensorError as error:  # no space left, for one
            raise OSError(f"{file} cannot be written: {error}") from None
        files.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(held.nbytes for held in shard.values()) + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor.contiguous()
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(files):
        file = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{index}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def _copy_beside(source: Path, folder: Path) -> None:
    """Copy the small files that are neither weights nor configuration: tokenizer, generation settings, licence,
    templates.
    """
    for file in sorted(source.iterdir()):
        is_weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or ".safetensors." in file.name
        if file.is_file() and not is_weights and file.name not in ("config.json", "params.json"):
            shutil.copy(file, folder / file.name)
    templates = source / TEMPLATE_FOLDER
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)


def _copy_text(checkpoint: Checkpoint, folder: Path) -> None:
    """For a model with an adapter, copy tokenizer and chat template, each from the first directory that has it."""
    if checkpoint.tokenizer_path != checkpoint.path:
        for name in TEXT_FILES:
            if name not in TEMPLATE_FILES and (checkpoint.tokenizer_path / name).is_file():
                shutil.copy(checkpoint.tokenizer_path / name, folder / name)
    source = next((place for place in checkpoint.text_folders if _has_template(place)), None)
    if source is None:
        return
    for name in TEMPLATE_FILES:
        (folder / name).unlink(missing_ok=True)
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    shutil.rmtree(folder / TEMPLATE_FOLDER, ignore_errors=True)
    if (source / TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / TEMPLATE_FOLDER, folder / TEMPLATE_FOLDER)
    template, data = _tokenizer_config(source).get("chat_template"), _tokenizer_config(folder)
    if template != data.get("chat_template"):
        (folder / "tokenizer_config.json").write_text(json.dumps(data | {"chat_template": template}, indent=2) + "\n")


def _has_template(folder: Path) -> bool:
    files = [folder / name for name in TEMPLATE_FILES] + [*folder.glob(f"{TEMPLATE_FOLDER}/*.jinja")]
    return any(file.is_file() for file in files) or _tokenizer_config(folder).get("chat_template") is not None


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    data = read_json(file) if file.is_file() else {}
    return data if isinstance(data, dict) else {}


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's config.json; for Mistral's layout, one that is made of params.json."""
    if checkpoint.layout == "hf":
        data: dict[str, Any] = json.loads((checkpoint.path / "config.json").read_bytes())
        return data
    return hf_config(checkpoint.model_config)


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """``config`` as Hugging Face's config.json."""
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
        "eos_token_id": list(config.eos_token_ids)
        if len(config.eos_token_ids) > 1
        else next(iter(config.eos_token_ids), None),
    }


def _scheme(scheme: Scheme, kv_scales: str, quantize_lm_head: bool) -> dict[str, Any]:
    """The ``quantization_config`` of compressed-tensors."""
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    weights: dict[str, Any] = number | {"strategy": "channel", "dynamic": False}
    inputs: dict[str, Any] = number | {"strategy": "token", "dynamic": True}
    if scheme == "static":
        inputs = number | {"strategy": "tensor", "dynamic": False}
    elif scheme == "block":
        weights |= {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
        inputs |= {"strategy": "group", "group_size": BLOCK}
    kv = number | {"strategy": "tensor" if kv_scales == "tensor" else "attn_head", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [] if quantize_lm_head else ["lm_head"],
        "kv_cache_scheme": None if kv_scales == "none" else kv,
    }
