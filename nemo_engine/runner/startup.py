"""Start-up of the device half: opens the checkpoint, loads weights, sizes the KV cache, builds the runner."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_engine.config import EngineConfig, ModelConfig, resolve_max_model_len
from nemo_engine.ledger import Ledger
from nemo_engine.model.checkpoint import Checkpoint, open_checkpoint
from nemo_engine.model.weights import dummy_weights, load_weights
from nemo_engine.ops import SEMANTICS, Ops, Site
from nemo_engine.runner.graphs import cuda_capture, graph_sizes
from nemo_engine.runner.memory import GIB, MemoryPlan, plan_memory, what_would_fit
from nemo_engine.runner.runner import Runner

_logger = logging.getLogger("nemo_engine")

CPU_KV_GIB = 1.0  # by default; more if one request of the whole context needs it, up to CPU_KV_GIB_MOST
CPU_KV_GIB_MOST = 4.0


@dataclass(frozen=True, slots=True)
class DeviceHalf:
    """A runner that is ready, and what start-up found out."""

    runner: Runner
    model_config: ModelConfig
    model_path: Path
    num_pages: int
    max_model_len: int
    pipeline_depth: int  # steps in flight: on the CPU a launch computes at once, so there is nothing to overlap


def start_device_half(model: str | Path, config: EngineConfig, ledger: Ledger) -> DeviceHalf:
    """Bring up ``model`` as ``config`` says. Raises ``ValueError`` for what cannot work, before anything is allocated."""
    device = resolve_device(config.device)
    with ledger.stage("open checkpoint"):
        checkpoint = open_checkpoint(model, revision=config.revision, needs_weights=config.load_format != "dummy")
    model_config = checkpoint.model_config
    dtype = resolve_dtype(config.dtype, model_config.dtype, device)
    ops = Ops.select(Site.of(model_config, config.page_size, dtype, device), config.prefer or {})
    if device.type == "cuda" and not config.enforce_eager:
        check_capturable(ops)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    num_pages, max_model_len, memory = plan_kv_cache(model_config, config, dtype, free)
    try:
        runner = _build(checkpoint, config, ops, ledger, num_pages, max_model_len, device, dtype)
    except torch.OutOfMemoryError as error:
        assert memory is not None and free is not None
        reason = f"out of device memory at start-up: {str(error).splitlines()[0]}"
        raise ValueError(_memory_message(reason, memory, model_config, config, max_model_len, dtype)) from None
    if memory is not None:
        _logger.info("memory as planned:\n%s", memory.format())
        _verify(memory, device)
    depth = config.pipeline_depth or (1 if device.type == "cpu" else 2)
    return DeviceHalf(runner, model_config, checkpoint.path, num_pages, max_model_len, depth)


def check_capturable(ops: Ops) -> None:
    """Raise ``ValueError`` if a step with these operations cannot become a CUDA graph: definitions may wait for the device."""
    waiting = [choice.op for choice in ops.choices if choice.chosen == SEMANTICS and not choice.is_fp8]
    if waiting:
        names = ", ".join(f"{name!r}: {SEMANTICS!r}" for name in waiting)
        raise ValueError(
            f"prefer={{{names}}} cannot be captured in CUDA graphs: set enforce_eager=True, or prefer a kernel"
        )


def _build(
    checkpoint: Checkpoint,
    config: EngineConfig,
    ops: Ops,
    ledger: Ledger,
    num_pages: int,
    max_model_len: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Runner:
    """Load the weights and make a runner that is ready: on CUDA, nothing is compiled or captured later."""
    model_config = checkpoint.model_config
    if config.load_format == "dummy":
        with ledger.stage("make dummy weights") as stage:
            weights = dummy_weights(model_config, dtype, device, config.seed)
            stage.num_bytes = weights.num_bytes
    else:
        weights = load_weights(checkpoint, model_config, dtype=dtype, device=device, progress=None, ledger=ledger)
    page_bytes = config.page_size * model_config.kv_bytes_per_token(dtype.itemsize)
    with ledger.stage("allocate KV cache", num_bytes=(num_pages + 1) * page_bytes):
        runner = Runner(
            model_config,
            config,
            weights,
            ops,
            num_pages=num_pages,
            max_model_len=max_model_len,
            device=device,
            dtype=dtype,
        )
    if device.type == "cuda":
        sizes = () if config.enforce_eager else graph_sizes(config.max_num_seqs)
        with ledger.stage("compile kernels and run every kind of step"):
            runner.warm_up(sizes)
            torch.cuda.synchronize(device)
        if sizes:
            before = torch.cuda.mem_get_info(device)[0]
            with ledger.stage(f"capture CUDA graphs of {len(sizes)} batch sizes") as stage:
                runner.capture(sizes, cuda_capture(device))
                torch.cuda.synchronize(device)
                stage.num_bytes = max(0, before - torch.cuda.mem_get_info(device)[0])
    return runner


def _verify(memory: MemoryPlan, device: torch.device) -> None:
    """Warn if start-up took more than was planned for it."""
    peak = torch.cuda.max_memory_reserved(device)
    planned = memory.total - memory.reserve
    if peak > planned:
        _logger.warning(
            "start-up took %.2f GiB of device memory, and %.2f GiB were planned; the reserve is smaller by the difference",
            peak / GIB,
            planned / GIB,
        )


def resolve_device(name: str) -> torch.device:
    """The device of option ``device``; "auto" takes CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not there: torch {torch.__version__} finds no CUDA device; use 'cpu'")
    return torch.device(name)


def resolve_dtype(name: str, checkpoint_dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations; "auto" is the checkpoint's."""
    dtype = getattr(torch, checkpoint_dtype if name == "auto" else name)
    assert isinstance(dtype, torch.dtype)
    if dtype is torch.float64 and device.type != "cpu":
        raise ValueError(f"dtype 'float64' works on the CPU only, got device {str(device)!r}")
    return dtype


def plan_kv_cache(
    model: ModelConfig, config: EngineConfig, dtype: torch.dtype, free: int | None
) -> tuple[int, int, MemoryPlan | None]:
    """The number of KV pages, ``max_model_len``, and on a GPU with ``free`` bytes what its memory goes to.

    An explicit ``max_model_len`` that the KV budget cannot hold is refused with the arithmetic; without one, the context is cut to what
    fits. So is a budget that the device cannot hold beside everything else.
    """
    wanted = resolve_max_model_len(model, config)
    token_bytes = model.kv_bytes_per_token(dtype.itemsize)
    page_bytes = token_bytes * config.page_size
    num_pages: int | None = None
    if config.num_kv_pages is not None:
        num_pages = config.num_kv_pages
    elif config.kv_cache_gib is not None:
        num_pages = int(config.kv_cache_gib * GIB) // page_bytes
        if num_pages == 0:
            raise ValueError(
                f"kv_cache_gib must hold at least one page of {config.page_size} tokens ({page_bytes} bytes), "
                f"got {config.kv_cache_gib}"
            )
    elif free is None:
        whole = wanted * token_bytes / GIB
        num_pages = int((max(CPU_KV_GIB, whole) if whole <= CPU_KV_GIB_MOST else CPU_KV_GIB_MOST) * GIB) // page_bytes
    memory = None
    if free is not None:
        memory = plan_memory(model, config, wanted, dtype.itemsize, free, num_pages)
        num_pages = memory.kv_cache // page_bytes - 1
        if memory.total > free or num_pages == 0:
            reason = "the plan does not fit into the device's memory"
            raise ValueError(_memory_message(reason, memory, model, config, wanted, dtype))
    assert num_pages is not None
    capacity = num_pages * config.page_size
    if wanted <= capacity:
        return num_pages, wanted, memory
    arithmetic = (
        f"a context of {wanted} tokens needs {wanted * token_bytes / GIB:.2f} GiB of KV cache ({token_bytes} bytes per token), "
        f"and {num_pages} pages of {config.page_size} tokens ({num_pages * page_bytes / GIB:.2f} GiB) hold {capacity}"
    )
    if isinstance(config.max_model_len, int):
        reason = (
            f"max_model_len {wanted} does not fit: {arithmetic}; set max_model_len to at most {capacity} or 'auto', "
            "or raise kv_cache_gib or num_kv_pages"
        )
        raise ValueError(reason if memory is None else _memory_message(reason, memory, model, config, wanted, dtype))
    if capacity == 0:
        raise ValueError(f"no memory for the KV cache: {arithmetic}")
    _logger.info("max_model_len is %d: %s", capacity, arithmetic)
    return num_pages, capacity, memory


def _memory_message(
    reason: str, memory: MemoryPlan, model: ModelConfig, config: EngineConfig, max_model_len: int, dtype: torch.dtype
) -> str:
    fitting = what_would_fit(model, config, max_model_len, dtype.itemsize, memory.free)
    return f"{reason}\n{memory.format()}\n{fitting}"
