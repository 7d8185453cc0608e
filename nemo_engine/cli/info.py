"""``nemo-engine info``: whether a model will run here, and what it is: from its configuration and file headers alone,
without torch.
"""

from __future__ import annotations

import argparse
from math import prod
from typing import TYPE_CHECKING

from nemo_engine.cli.values import above_zero, add_list
from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.config_reader import DEFAULT_CONTEXT_CAP
from nemo_engine.memory_plan import GIB, DoesNotFitError, plan_kv_cache
from nemo_engine.planner.gpus import GPUS, Gpu
from nemo_engine.planner.models import BUILT_IN, ITEMSIZE, Formats, PlannedModel, formats_of

if TYPE_CHECKING:
    from nemo_engine.checkpoint.checkpoint import Checkpoint
    from nemo_engine.checkpoint.inventory import Inventory

Rows = list[tuple[str, str]]

_NO = 1  # exit code: the model would be refused


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "info",
        help="show what a model is, whether it will run, and which GPUs it fits",
        description="Show what a model is, its tokenizer, sizes and quantisation, whether it would be refused and why, "
        "and which GPUs it fits. "
        "Loads no weights: of a Hub repository, configuration and headers are read. Exit code 1 if the model would be "
        "refused.",
        allow_abbrev=False,
    )
    names = ", ".join(BUILT_IN)
    parser.add_argument(
        "model", metavar="MODEL", help=f"a checkpoint directory, a Hub repository id, nemo-tiny, or one of {names}"
    )
    add_list(
        parser, "--gib", above_zero(float), "numbers of GiB above 0", metavar="X", help="free memory of other GPUs"
    )
    parser.add_argument("--revision", metavar="NAME", help="of a Hub repository")
    parser.add_argument("--lora", metavar="PATH", help="a PEFT adapter, a directory or a Hub repository")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if the model would be refused."""
    from nemo_engine.checkpoint.checkpoint import open_checkpoint
    from nemo_engine.checkpoint.hub import DownloadError

    gpus = [Gpu(f"{gib:g} GiB", "", 0, gib, "", 1.0, 1.0, None, 1.0, "") for gib in args.gib or ()]
    if args.model in BUILT_IN and args.revision is None and args.lora is None:
        config = BUILT_IN[args.model]
        _print([("model", f"{args.model}, by its published configuration"), *describe(config), *sizes(config)])
        _print_gpus(PlannedModel(args.model, config), None, gpus)
        return 0
    try:
        checkpoint = open_checkpoint(args.model, revision=args.revision, needs="headers", lora=args.lora)
    except (FileNotFoundError, DownloadError):  # nothing is known of the model
        raise
    except ValueError as error:
        _print([("model", args.model), ("runs", f"no: {error}")])
        return _NO
    inventory, reason = check(checkpoint)
    try:
        text = text_rows(checkpoint)
    except (ValueError, ImportError) as error:
        text = [("tokenizer", f"none: {error}")]
        reason = reason or f"{error}; with skip_tokenizer_init it runs for token ids"
    rows = [("model", checkpoint.describe()), ("runs", "yes" if reason is None else f"no: {reason}")]
    rows += describe(checkpoint.model_config) + sizes(checkpoint.model_config, checkpoint) + text
    _print(rows)
    if reason is not None:
        return _NO
    _print_gpus(PlannedModel(args.model, checkpoint.model_config, checkpoint.quantization), inventory, gpus)
    return 0


def check(checkpoint: Checkpoint) -> tuple[Inventory | None, str | None]:
    """What the files hold, and why the engine would refuse them; None if it would not."""
    from nemo_engine.checkpoint.checkpoint import no_weights_message
    from nemo_engine.checkpoint.inventory import take_inventory

    if not checkpoint.tensors:
        return None, no_weights_message(checkpoint.path)
    try:
        return take_inventory(checkpoint, checkpoint.model_config), None
    except ValueError as error:
        return None, str(error)


def describe(config: ModelConfig) -> Rows:
    """What the configuration says."""
    context = f"{config.max_position_embeddings} tokens"
    if config.max_position_embeddings > DEFAULT_CONTEXT_CAP:
        context += f" claimed, {DEFAULT_CONTEXT_CAP} served unless max_model_len asks for more"
    return [
        ("layers", f"{config.num_layers}"),
        ("hidden size", f"{config.hidden_size}, intermediate {config.intermediate_size}"),
        ("heads", f"{config.num_heads} query, {config.num_kv_heads} KV, of {config.head_dim}"),
        ("vocabulary", f"{config.vocab_size}, embeddings {'tied' if config.tie_word_embeddings else 'untied'}"),
        ("RoPE theta", f"{config.rope_theta:g}"),
        ("context", context),
        ("dtype", config.dtype),
    ]


def sizes(config: ModelConfig, checkpoint: Checkpoint | None = None) -> Rows:
    """Sizes as the files state them, or without weight files as they follow from the configuration."""
    from nemo_engine.checkpoint.layout import HF

    names = HF if checkpoint is None else checkpoint.names
    expected = names.expected(config)
    num_parameters = sum(prod(tensor.shape) for tensor in expected)
    num_tensors, num_bytes, source = len(expected), num_parameters * ITEMSIZE[config.dtype], "configuration"
    scheme = None if checkpoint is None else checkpoint.quantization
    if checkpoint is not None and checkpoint.tensors:
        num_tensors, num_bytes, source = len(checkpoint.tensors), checkpoint.num_bytes, "file headers"
    kv_bytes, tokens = config.kv_bytes_per_token(2), context_of(config)
    kv_cache = f"{kv_bytes:,} bytes per token in bf16; {size(kv_bytes * tokens)} for {tokens} tokens; half in FP8"
    return [
        ("parameters", f"{num_parameters:,} in {num_tensors} tensors (by the {source})"),
        ("weights", f"{size(num_bytes)} ({num_bytes:,} bytes)"),
        ("quantisation", "none" if scheme is None else scheme.describe()),
        ("KV cache", kv_cache),
    ]


def text_rows(checkpoint: Checkpoint) -> Rows:
    """What turns text into ids and back, what renders a conversation, and what ends an answer.

    This is the place of all that ``nemo_engine.text`` knows of a checkpoint's text.
    """
    from nemo_engine.text import chat_line, load_tokenizer

    config = checkpoint.model_config
    ends = ", ".join(map(str, config.eos_token_ids)) or "none"
    tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    if tokenizer is None:
        return [("tokenizer", "none: token ids only"), ("bos, eos", f"{config.bos_token_id}, {ends}")]
    rows = [
        ("tokenizer", f"{tokenizer.describe()}; {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint}"),
        ("chat", chat_line(tokenizer, checkpoint.text_folders).removeprefix("chat ")),
        ("bos, eos", f"{config.bos_token_id}, {ends}"),
    ]
    difference = tokenizer.differs_from(config.vocab_size)
    return rows if difference is None else [rows[0], ("", difference), *rows[1:]]


def fits(model: PlannedModel, inventory: Inventory | None, gpus: list[Gpu]) -> list[str]:
    """Lines of a table: on each GPU, the tokens that its KV cache holds beside everything else, as the engine plans it
    at start-up.
    """
    rows = [("GPU", "GiB", "as it is", "quantization fp8", "and kv_cache_dtype fp8")]
    choices: list[tuple[EngineConfig, Formats] | None] = []
    for weights, kv_cache in ((None, "auto"), ("fp8", "auto"), ("fp8", "fp8")):
        config = EngineConfig(quantization=weights, kv_cache_dtype=kv_cache)
        try:
            choices.append((config, formats_of(model, config, inventory if weights is None else None)))
        except ValueError:  # not of this checkpoint: it is FP8 in blocks, or float64
            choices.append(None)
    for gpu in gpus:
        free = gpu.free_bytes if gpu.marketing_gb else int(gpu.memory_gib * GIB)
        no_fp8 = bool(gpu.marketing_gb) and gpu.fp8_flops_per_s is None
        cells = ["-" if each is None else _tokens(model.config, *each, free, no_fp8) for each in choices]
        rows.append((gpu.name, f"{gpu.memory_gib:g}", cells[0], cells[1], cells[2]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return ["What fits: tokens of KV cache beside weights and steps, as the engine plans them", *lines]


def _tokens(config: ModelConfig, engine: EngineConfig, formats: Formats, free: int, no_fp8: bool) -> str:
    """How many tokens the KV cache holds in ``free`` bytes, or how much is missing, or that the GPU knows no FP8."""
    if no_fp8 and (formats.is_linear_fp8 or formats.is_head_fp8 or formats.is_kv_fp8):
        return "no FP8 here"
    try:
        pages, length, _ = plan_kv_cache(config, engine, formats.sizes, free)
    except DoesNotFitError as error:
        return f"no, by {size(error.missing)}"
    tokens = pages * engine.page_size
    return f"{tokens:,}, context {length:,}"


def _print(rows: Rows) -> None:
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))


def _print_gpus(model: PlannedModel, inventory: Inventory | None, gpus: list[Gpu]) -> None:
    print("\n" + "\n".join(fits(model, inventory, gpus or list(GPUS.values()))))


def context_of(config: ModelConfig) -> int:
    """The context that is served by default."""
    return min(config.max_position_embeddings, DEFAULT_CONTEXT_CAP)


def size(num_bytes: int) -> str:
    """``num_bytes`` in MiB or GiB."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / (1 << 20):.2f} MiB"
