"""Start-up of the device half: opens the checkpoint, loads weights, sizes the KV cache, builds the runner."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_engine.config import EngineConfig, ModelConfig, resolve_max_model_len
from nemo_engine.ledger import Ledger
from nemo_engine.model.checkpoint import open_checkpoint
from nemo_engine.model.weights import dummy_weights, load_weights
from nemo_engine.ops import Ops, Site
from nemo_engine.runner.runner import Runner

_logger = logging.getLogger("nemo_engine")

GIB = 1 << 30
CPU_KV_GIB = 1.0  # by default; more if one request of the whole context needs it, up to CPU_KV_GIB_MOST
CPU_KV_GIB_MOST = 4.0
CUDA_RESERVE_GIB = 4.0  # kept free on a GPU for activations, workspaces and other processes


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
    is_budget_known = device.type == "cpu" or config.num_kv_pages is not None or config.kv_cache_gib is not None
    if is_budget_known:  # then what does not fit is refused before the weights are read
        num_pages, max_model_len = plan_kv_cache(model_config, config, dtype, device)
    if config.load_format == "dummy":
        with ledger.stage("make dummy weights") as stage:
            weights = dummy_weights(model_config, dtype, device, config.seed)
            stage.num_bytes = weights.num_bytes
    else:
        weights = load_weights(checkpoint, model_config, dtype=dtype, device=device, progress=None, ledger=ledger)
    if not is_budget_known:
        num_pages, max_model_len = plan_kv_cache(model_config, config, dtype, device)
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
    depth = config.pipeline_depth or (1 if device.type == "cpu" else 2)
    return DeviceHalf(runner, model_config, checkpoint.path, num_pages, max_model_len, depth)


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
    model: ModelConfig, config: EngineConfig, dtype: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """The number of KV pages and ``max_model_len``.

    An explicit ``max_model_len`` that the KV budget cannot hold is refused with the arithmetic; without one, the context is cut to what fits.
    """
    wanted = resolve_max_model_len(model, config)
    token_bytes = model.kv_bytes_per_token(dtype.itemsize)
    page_bytes = token_bytes * config.page_size
    if config.num_kv_pages is not None:
        num_pages = config.num_kv_pages
    elif config.kv_cache_gib is not None:
        num_pages = int(config.kv_cache_gib * GIB) // page_bytes
        if num_pages == 0:
            raise ValueError(
                f"kv_cache_gib must hold at least one page of {config.page_size} tokens ({page_bytes} bytes), "
                f"got {config.kv_cache_gib}"
            )
    elif device.type == "cpu":
        whole = wanted * token_bytes / GIB
        num_pages = int((max(CPU_KV_GIB, whole) if whole <= CPU_KV_GIB_MOST else CPU_KV_GIB_MOST) * GIB) // page_bytes
    else:
        free = torch.cuda.mem_get_info(device)[0] - int(CUDA_RESERVE_GIB * GIB)
        num_pages = max(free, 0) // page_bytes
    capacity = num_pages * config.page_size
    if wanted <= capacity:
        return num_pages, wanted
    arithmetic = (
        f"a context of {wanted} tokens needs {wanted * token_bytes / GIB:.2f} GiB of KV cache ({token_bytes} bytes per token), "
        f"and {num_pages} pages of {config.page_size} tokens ({num_pages * page_bytes / GIB:.2f} GiB) hold {capacity}"
    )
    if isinstance(config.max_model_len, int):
        raise ValueError(
            f"max_model_len {wanted} does not fit: {arithmetic}; set max_model_len to at most {capacity} or 'auto', "
            "or raise kv_cache_gib or num_kv_pages"
        )
    if capacity == 0:
        raise ValueError(f"no memory for the KV cache: {arithmetic}")
    _logger.info("max_model_len is %d: %s", capacity, arithmetic)
    return num_pages, capacity
