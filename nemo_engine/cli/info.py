"""``nemo-engine info``: what a checkpoint is and what it needs, read from its configuration and file headers alone."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_engine.config import DEFAULT_CONTEXT_CAP, ModelConfig

if TYPE_CHECKING:
    from nemo_engine.model.checkpoint import Checkpoint

GIB = 1 << 30
_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
_MEMORY_GIB = (8.0, 16.0, 24.0, 40.0, 80.0, 141.0)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "info",
        help="show what a checkpoint is, its sizes, and what context fits",
        description="Show a checkpoint's configuration and sizes, the KV cache's bytes per token, and what fits into so much "
        "memory. Loads no weights.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="PATH", help="a checkpoint directory, a Hub repository id, or nemo-tiny")
    parser.add_argument(
        "--gib", type=_positive, action="append", metavar="X", help="memory for weights and KV cache; may be repeated"
    )
    parser.add_argument("--revision", metavar="NAME", help="of a Hub repository")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from nemo_engine.model.checkpoint import BUNDLED, open_checkpoint
    from nemo_engine.text import chat_line, load_tokenizer

    # Of a Hub repository, only the configuration is fetched: its weights would be a long download for a few numbers.
    folder = BUNDLED.get(args.model, Path(args.model).expanduser())
    has_weights = folder.is_dir() and any(folder.glob("*.safetensors"))
    checkpoint = open_checkpoint(args.model, revision=args.revision, needs_weights=has_weights)
    sizes = sizes_of(checkpoint)
    rows = describe(checkpoint, sizes)
    tokenizer = load_tokenizer(checkpoint.path)
    if tokenizer is None:
        rows.append(("tokenizer", "none: token ids only"))
    else:
        rows.append(
            ("tokenizer", f"{tokenizer.describe()}; {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint}")
        )
        rows.append(("chat", chat_line(tokenizer, [checkpoint.path]).removeprefix("chat ")))
        difference = tokenizer.differs_from(checkpoint.model_config.vocab_size)
        if difference is not None:
            rows.append(("", difference))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))
    print("\n" + "\n".join(fits(checkpoint.model_config, sizes.num_bytes, args.gib or _MEMORY_GIB)))
    return 0


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a checkpoint's tensors; ``source`` is "file headers" or "configuration"."""

    num_tensors: int
    num_parameters: int
    num_bytes: int
    source: str


def sizes_of(checkpoint: Checkpoint) -> Sizes:
    """Sizes as the files state them, or without weight files as they follow from the configuration."""
    from nemo_engine.model.layout import expected_tensors

    config = checkpoint.model_config
    expected = expected_tensors(config, checkpoint.layout)
    if checkpoint.tensors:
        names = {tensor.name for tensor in expected}  # the others are scales
        num_parameters = sum(prod(tensor.shape) for name, tensor in checkpoint.tensors.items() if name in names)
        return Sizes(len(checkpoint.tensors), num_parameters, checkpoint.num_bytes, "file headers")
    num_parameters = sum(prod(tensor.shape) for tensor in expected)
    return Sizes(len(expected), num_parameters, num_parameters * _DTYPE_BYTES[config.dtype], "configuration")


def describe(checkpoint: Checkpoint, sizes: Sizes) -> list[tuple[str, str]]:
    """Names and values of what the configuration and the headers say."""
    config = checkpoint.model_config
    kv_bytes = config.kv_bytes_per_token(_DTYPE_BYTES["bfloat16"])
    context = f"{config.max_position_embeddings} tokens"
    if config.max_position_embeddings > DEFAULT_CONTEXT_CAP:
        context += f" claimed, {DEFAULT_CONTEXT_CAP} served unless max_model_len asks for more"
    tokens = context_of(config)
    kv_cache = f"{kv_bytes:,} bytes per token in bf16; {size(kv_bytes * tokens)} for {tokens} tokens; half in FP8"
    return [
        ("checkpoint", checkpoint.describe()),
        ("layers", f"{config.num_layers}"),
        ("hidden size", f"{config.hidden_size}, intermediate {config.intermediate_size}"),
        ("heads", f"{config.num_heads} query, {config.num_kv_heads} KV, of {config.head_dim}"),
        ("vocabulary", f"{config.vocab_size}, embeddings {'tied' if config.tie_word_embeddings else 'untied'}"),
        ("RoPE theta", f"{config.rope_theta:g}"),
        ("context", context),
        ("bos, eos", f"{config.bos_token_id}, {', '.join(map(str, config.eos_token_ids)) or 'none'}"),
        ("dtype", config.dtype),
        ("parameters", f"{sizes.num_parameters:,} in {sizes.num_tensors} tensors (by the {sizes.source})"),
        ("weights", f"{size(sizes.num_bytes)} ({sizes.num_bytes:,} bytes)"),
        ("KV cache", kv_cache),
    ]


def fits(config: ModelConfig, weight_bytes: int, memory_gib: tuple[float, ...] | list[float]) -> list[str]:
    """Lines of a table: what KV cache is left in so much memory beside the weights; activations are not counted."""
    kv_bytes = config.kv_bytes_per_token(_DTYPE_BYTES["bfloat16"])
    heads = ("memory GiB", "KV cache GiB", "tokens", f"requests of {context_of(config)}")
    rows = [heads]
    for gib in memory_gib:
        left = int(gib * GIB) - weight_bytes
        tokens = max(left, 0) // kv_bytes
        if left <= 0:
            rows.append((f"{gib:g}", "-", "weights do not fit", "-"))
        else:
            rows.append((f"{gib:g}", f"{left / GIB:.2f}", f"{tokens:,}", f"{tokens / context_of(config):.2f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return ["What fits: weights as stored, KV cache in bf16, activations not counted", *lines]


def context_of(config: ModelConfig) -> int:
    """The context that is served by default."""
    return min(config.max_position_embeddings, DEFAULT_CONTEXT_CAP)


def size(num_bytes: int) -> str:
    """``num_bytes`` in MiB or GiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / (1 << 20):.2f} MiB"


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"a number of GiB greater than 0 is needed, got {text}")
    return value
