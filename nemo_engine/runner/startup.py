"""Start-up of the device half: opens the checkpoint, loads weights, sizes the KV cache, builds the runner."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_engine.checkpoint.checkpoint import Checkpoint, open_checkpoint
from nemo_engine.checkpoint.hub import Needs
from nemo_engine.checkpoint.inventory import Inventory, planned_inventory, take_inventory
from nemo_engine.checkpoint.loader import load_weights
from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.memory_plan import (
    GIB,
    MemoryPlan,
    Sizes,
    graph_sizes,
    memory_message,
    mixed_graph_sizes,
    plan_kv_cache,
    weight_bytes,
    wide_graph_sizes,
)
from nemo_engine.model.weights import NemoWeights, dummy_weights
from nemo_engine.ops import SEMANTICS, Ops, Site
from nemo_engine.ops.cpu import packed, products
from nemo_engine.ops.linear import linear_fp8
from nemo_engine.ops.quantize import FP8
from nemo_engine.runner.forks import check_threads
from nemo_engine.runner.graphs import cuda_capture
from nemo_engine.runner.precision import Precision, resolve_precision, use_wide_reductions
from nemo_engine.runner.runner import Runner
from nemo_engine.startup_log import StartupLog

_logger = logging.getLogger("nemo_engine")


@dataclass(frozen=True, slots=True)
class DeviceHalf:
    """A runner that is ready, and what start-up found out."""

    runner: Runner
    model_config: ModelConfig
    model_path: Path
    num_pages: int
    max_model_len: int
    max_num_batched_tokens: int
    pipeline_depth: int


def start_device_half(
    model: str | Path,
    config: EngineConfig,
    startup_log: StartupLog,
    count_tokens: Callable[[Sequence[Path]], int | None] = lambda _: None,
) -> DeviceHalf:
    """Bring up ``model`` as ``config`` says.

    Raises ``ValueError`` for what cannot work, before anything is allocated, and ``RuntimeError`` in a forked process
    that cannot compute.
    """
    check_threads()
    device = resolve_device(config.device)
    with startup_log.stage("open checkpoint"):
        needs: Needs = "config" if config.load_format == "dummy" else "weights"
        checkpoint = open_checkpoint(model, revision=config.revision, needs=needs, lora=config.lora)
    model_config = checkpoint.model_config
    num_tokens = count_tokens(checkpoint.text_folders)
    precision = resolve_precision(config, checkpoint, device)
    site = Site.of(model_config, config.page_size, precision.dtype, device, precision.kv_dtype)
    ops = Ops.select(site, config.prefer or {})
    if device.type == "cuda":
        use_wide_reductions()
        if any(choice.chosen == "triton" for choice in ops.choices):
            importlib.import_module("nemo_engine.ops.triton.launch").install()
        if not config.enforce_eager:
            check_capturable(ops)
    with startup_log.stage("check tensors"):
        if config.load_format == "dummy":
            inventory = planned_inventory(model_config, checkpoint.quantization, precision.online)
        else:
            inventory = take_inventory(checkpoint, model_config, precision.online)
    itemsize = precision.dtype.itemsize
    sizes = Sizes(itemsize, precision.kv_dtype.itemsize, weight_bytes(model_config, itemsize, inventory.kind_of))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    num_pages, max_model_len, memory = plan_kv_cache(model_config, config, sizes, free)
    try:
        runner = _build(
            checkpoint, config, inventory, precision, ops, startup_log, num_pages, max_model_len, device, num_tokens
        )
    except torch.OutOfMemoryError as error:
        assert memory is not None and free is not None
        reason = f"out of device memory at start-up: {str(error).splitlines()[0]}"
        raise ValueError(memory_message(reason, memory, model_config, config, max_model_len, sizes)) from None
    if memory is not None:
        _logger.info("memory as planned:\n%s", memory.format())
        _verify(memory, device)
    chosen = " (max_num_batched_tokens, by default)" if config.max_num_batched_tokens is None else ""
    _logger.info("a step computes up to %d tokens%s", config.tokens_per_step, chosen)
    return DeviceHalf(
        runner, model_config, checkpoint.path, num_pages, max_model_len, config.tokens_per_step,
        config.steps_in_flight(device.type),
    )  # fmt: skip


def check_capturable(ops: Ops) -> None:
    """Raise ``ValueError`` if a step with these operations cannot become a CUDA graph: definitions may wait for the
    device.
    """
    waiting = [choice.op for choice in ops.choices if choice.chosen == SEMANTICS and not choice.is_fp8]
    if waiting:
        names = ", ".join(f"{name!r}: {SEMANTICS!r}" for name in waiting)
        raise ValueError(
            f"prefer={{{names}}} cannot be captured in CUDA graphs: set enforce_eager=True, or prefer a kernel"
        )


def _build(
    checkpoint: Checkpoint,
    config: EngineConfig,
    inventory: Inventory,
    precision: Precision,
    ops: Ops,
    startup_log: StartupLog,
    num_pages: int,
    max_model_len: int,
    device: torch.device,
    num_tokens: int | None,
) -> Runner:
    """Load the weights and make a runner that is ready: on CUDA, nothing is compiled or captured later."""
    model_config, kv_dtype = checkpoint.model_config, precision.kv_dtype
    if config.load_format == "dummy":
        with startup_log.stage("make dummy weights") as stage:
            weights = dummy_weights(model_config, precision.dtype, device, config.seed, inventory.kind_of)
            stage.num_bytes = weights.num_bytes
    else:
        weights = load_weights(
            checkpoint,
            model_config,
            dtype=precision.dtype,
            device=device,
            progress=None,
            startup_log=startup_log,
            inventory=inventory,
            online=precision.online,
            needs_kv_scales=kv_dtype == FP8,
            is_widened=precision.is_fp8 and ops.linear_fp8 is linear_fp8,
        )
    if ops.linear in (packed.linear, products.linear):
        with startup_log.stage("pack weights"):
            weights.pack(packed.pack_weight if ops.linear is packed.linear else products.pack_weight)
    page_bytes = config.page_size * model_config.kv_bytes_per_token(kv_dtype.itemsize)
    with startup_log.stage(_cache_stage(weights, kv_dtype), num_bytes=(num_pages + 1) * page_bytes):
        runner = Runner(
            model_config,
            config,
            weights,
            ops,
            num_pages=num_pages,
            max_model_len=max_model_len,
            device=device,
            kv_dtype=kv_dtype,
            without_token=_without_token(model_config, num_tokens),
        )
    if device.type == "cpu" and not config.enforce_eager:
        with startup_log.stage("record decode steps"):
            _logger.info("%s", runner.record())
    if device.type == "cuda":
        sizes = () if config.enforce_eager else graph_sizes(config.max_num_seqs)
        wide_sizes = wide_graph_sizes(config)
        with startup_log.stage("compile kernels and run every kind of step"):
            runner.warm_up(sizes, wide_sizes)
            torch.cuda.synchronize(device)
        if sizes:
            before = torch.cuda.mem_get_info(device)[0]
            mixed_sizes, count = mixed_graph_sizes(config), len(sizes) + len(wide_sizes)
            name = f"capture CUDA graphs of {count} batch sizes, and of prompts of up to {mixed_sizes[-1]} tokens"
            with startup_log.stage(name) as stage:
                runner.capture(sizes, cuda_capture(device), wide_sizes, mixed_sizes)
                torch.cuda.synchronize(device)
                stage.num_bytes = max(0, before - torch.cuda.mem_get_info(device)[0])
    return runner


def _without_token(config: ModelConfig, num_tokens: int | None) -> list[int]:
    """The ids beyond a tokenizer of ``num_tokens`` ids, if there is one, but for those that end a text: the checkpoint
    itself names these.
    """
    first = config.vocab_size if num_tokens is None else num_tokens
    return [token_id for token_id in range(first, config.vocab_size) if token_id not in config.eos_token_ids]


def _cache_stage(weights: NemoWeights, kv_dtype: torch.dtype) -> str:
    """What the KV cache holds, for the startup_log."""
    if kv_dtype != FP8:
        return "allocate KV cache"
    scales = "1" if weights.layers[0].k_scale is None else "of the checkpoint"
    return f"allocate KV cache (FP8, scales {scales})"


def _verify(memory: MemoryPlan, device: torch.device) -> None:
    """Warn if start-up took more than was planned for it."""
    peak = torch.cuda.max_memory_reserved(device)
    planned = memory.total - memory.reserve
    if peak > planned:
        _logger.warning(
            "start-up took %.2f GiB of device memory, and %.2f GiB were planned; the reserve is smaller by the "
            "difference",
            peak / GIB,
            planned / GIB,
        )


def resolve_device(name: str) -> torch.device:
    """The device of option ``device``; "auto" takes CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r}, which may hide one)"
        raise ValueError(
            f"device {name!r} is not there: torch {torch.__version__} finds no CUDA device{hidden}; use 'cpu'"
        )
    return torch.device(name)
