"""What an operation is: one definition in plain torch, a table of implementations, cases and cost; and how one is
chosen.

The tables are data: implementations are named as text and imported when selected, so a machine without triton or nvcc
imports everything. Selection happens once, at start-up, from static facts, and yields plain callables.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from nemo_engine.config import ModelConfig

CUDA_NOT_BUILT = "nemo_engine._C is not built here (make cuda; it needs nvcc)"
CPU_NOT_BUILT = "nemo_engine._cpu is not built here (pip install -e . builds it where there is a C++ compiler)"
_CPU_MAX_HEAD_DIM = 256
SEMANTICS = "semantics"  # the name under which the definition itself can be asked for
COMPOSED = "composed"  # of an operation that is several others: these, one after the other


@dataclass(frozen=True, slots=True)
class Site:
    """The static facts of one place of use: where an operation runs and the shapes that it will always see."""

    device_type: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    hidden_size: int
    intermediate_size: int
    kv_dtype: torch.dtype | None = None  # of the KV cache, if it is not ``dtype``

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
    ) -> Site:
        """Where ``model`` runs with activations of ``dtype`` on ``device``."""
        return cls(
            device_type=device.type,
            capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
            dtype=dtype,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            page_size=page_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            kv_dtype=kv_dtype,
        )


@dataclass(frozen=True, slots=True)
class Impl:
    """One implementation: ``target`` is "module:function"; ``supports`` returns None, or why it cannot serve a site.

    ``describe``: what it calls at a site that it serves, where its name does not say.
    ``replaces``: of an operation that stands for several others, the ones that it does in one call and was measured to
    be faster than; it is the default then, unless one of them is preferred.
    """

    name: str
    target: str
    supports: Callable[[Site], str | None]
    describe: Callable[[Site], str] | None = None
    replaces: tuple[str, ...] = ()

    def load(self) -> Callable[..., Any]:
        """Import the function."""
        module, _, function = self.target.partition(":")
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return loaded


@dataclass(frozen=True, slots=True)
class Case:
    """Named inputs of an operation: ``make(dtype)`` gives its arguments, with everything that must not be read set to
    NaN.

    ``site``: facts of a ``Site`` that follow from the shapes, for implementations that do not serve all.
    """

    name: str
    make: Callable[[torch.dtype], tuple[Any, ...]]
    site: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Op:
    """An operation. ``impls`` are in order of preference; ``cost`` maps a case's arguments to (bytes moved, flops).

    ``is_fp8``: only models with FP8 weights or activations need it. ``composed``: of an operation that is several
    others in one launch, the same as calls of those, which its first argument has as attributes; it is the default,
    over the chosen ones.
    """

    name: str
    semantics: Callable[..., Any]
    impls: tuple[Impl, ...]
    cases: Callable[[], Iterator[Case]]
    cost: Callable[..., tuple[int, int]]
    is_fp8: bool = False
    composed: Callable[..., Any] | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """What was selected for an operation, and why the others were not."""

    op: str
    chosen: str
    rejected: tuple[tuple[str, str], ...]
    function: Callable[..., Any]
    is_fp8: bool
    description: str | None = None  # of the chosen one, see ``Impl.describe``


def select(op: Op, site: Site, prefer: Mapping[str, str]) -> Choice:
    """The first implementation that supports ``site``, or the one that ``prefer`` names.

    An operation that is several others in one launch is composed of those (the choice's function is then still the
    definition) unless ``prefer`` names a kernel of the whole, or one ``replaces`` them; others have not been measured.
    If nothing serves: the definition, on a CPU, and on every device for what only an FP8 model needs. Raises
    ``ValueError`` with the reasons if the preferred one is unknown or cannot serve, or if nothing can.
    """
    wanted = prefer.get(op.name)
    known = [*(impl.name for impl in op.impls), *([COMPOSED] if op.composed else []), SEMANTICS]
    if wanted is not None and wanted not in known:
        raise ValueError(f"prefer[{op.name!r}] must be one of {', '.join(known)}, got {wanted!r}")
    rejected: list[tuple[str, str]] = []
    for impl in op.impls:
        reason = impl.supports(site)
        if wanted not in (None, impl.name):
            rejected.append((impl.name, f"{wanted} is preferred"))
        elif (
            wanted is None
            and op.composed is not None
            and not (impl.replaces and prefer.keys().isdisjoint(impl.replaces))
        ):
            rejected.append((impl.name, reason or "not measured yet, runs where it is preferred"))
        elif reason is None:
            description = impl.describe(site) if impl.describe is not None else None
            return Choice(op.name, impl.name, tuple(rejected), impl.load(), op.is_fp8, description)
        elif wanted == impl.name:
            raise ValueError(f"prefer[{op.name!r}] = {wanted!r} cannot serve here: {reason}")
        else:
            rejected.append((impl.name, reason))
    if op.composed is not None and wanted in (None, COMPOSED):
        return Choice(op.name, COMPOSED, tuple(rejected), op.semantics, op.is_fp8)
    if site.device_type != "cpu" and wanted is None and not op.is_fp8:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
        raise ValueError(
            f"no kernel for {op.name} here: {reasons} (prefer={{{op.name!r}: {SEMANTICS!r}}} runs its definition, "
            "slowly)"
        )
    return Choice(op.name, SEMANTICS, tuple(rejected), op.semantics, op.is_fp8)


def cpu_only(site: Site) -> str | None:
    """``supports`` of implementations that are made for the CPU."""
    return None if site.device_type == "cpu" else "made for the CPU"


@functools.cache
def compiled_for_cpu() -> ModuleType | None:
    """The kernels of csrc/cpu, if they were built.

    They take their threads from torch, whose OpenMP is loaded before them, as here.
    """
    try:
        return importlib.import_module("nemo_engine._cpu")
    except ImportError:
        return None


def cpu_runs(site: Site) -> str | None:
    """What every kernel of csrc/cpu needs: a CPU, bf16 or fp32, and the compiled library."""
    if site.device_type != "cpu":
        return "made for the CPU"
    if site.dtype not in (torch.bfloat16, torch.float32):
        return f"computes in bfloat16 or float32, the model is {str(site.dtype).removeprefix('torch.')}"
    return cpu_counts_run(site)


def cpu_counts_run(site: Site) -> str | None:
    """What kernels of csrc/cpu need that see tokens and places alone: a CPU and the compiled library."""
    if site.device_type != "cpu":
        return "made for the CPU"
    return None if compiled_for_cpu() is not None else CPU_NOT_BUILT


def cpu_heads_run(site: Site) -> str | None:
    """What the kernels of csrc/cpu that handle heads need: their size, and a cache of the model's dtype."""
    if site.head_dim > _CPU_MAX_HEAD_DIM or site.head_dim % 2:
        return f"an even head_dim of at most {_CPU_MAX_HEAD_DIM}, this is {site.head_dim}"
    if site.kv_dtype not in (None, site.dtype):
        return f"keys and values in the model's dtype, these are {str(site.kv_dtype).removeprefix('torch.')}"
    return cpu_runs(site)


def triton_runs(site: Site) -> str | None:
    """What every Triton kernel needs: triton, and a GPU with bf16 or Triton's interpreter (which is for tests)."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("nemo_engine.kernels") is None:
        return "nemo_engine.kernels is not installed (pip install -e .)"
    if site.dtype == torch.float64:
        return "computes in fp32, and the model is fp64"
    if site.device_type == "cpu":
        return (
            None if os.environ.get("TRITON_INTERPRET") == "1" else "Triton runs on a CPU with TRITON_INTERPRET=1 only"
        )
    if site.capability is None or site.capability < (8, 0):
        this = f"{site.device_type} {site.capability or ''}".rstrip()
        return f"needs an NVIDIA GPU of compute capability 8.0, this is {this}"
    return None


def cuda_runs(site: Site) -> str | None:
    """What every CUDA C++ kernel needs: bf16, the compiled library, and the device that it was compiled for."""
    if site.dtype != torch.bfloat16:
        return f"computes in bfloat16, the model is {str(site.dtype).removeprefix('torch.')}"
    if site.device_type == "cuda" and site.capability != (9, 0):
        return f"made for compute capability (9, 0), Hopper, this is {site.capability}"
    if importlib.util.find_spec("nemo_engine._C") is None:
        return CUDA_NOT_BUILT
    built_for = importlib.import_module("nemo_engine._C").device_type
    return None if site.device_type == built_for else f"built for {built_for}, this is {site.device_type}"


def needs_fp8(supports: Callable[[Site], str | None]) -> Callable[[Site], str | None]:
    """``supports`` of a kernel that converts or multiplies FP8 e4m3, which GPUs do from compute capability 8.9 on."""

    def also(site: Site) -> str | None:
        if site.capability is not None and site.capability < (8, 9):
            return f"FP8 needs an NVIDIA GPU of compute capability 8.9, this is {site.capability}"
        return supports(site)

    return also


def triton_heads_run(site: Site) -> str | None:
    """What Triton's kernels that handle heads need: ``triton_runs``, and conversions of FP8 if the KV cache is FP8."""
    return (needs_fp8(triton_runs) if site.kv_dtype == torch.float8_e4m3fn else triton_runs)(site)
