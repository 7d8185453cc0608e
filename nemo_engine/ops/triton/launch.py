"""Launches of Triton kernels that pass ``JITFunction.run`` by once a variant is compiled.

``run`` takes some 20 us a launch: it reads settings, makes words of what every argument is and looks them up. What it
makes of a launch follows from little: dtypes and alignment of tensors, which numbers are 1 or divisible by 16, the
constants. A ``Launcher`` looks the compiled kernel up by that, and hands everything else to ``run``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_VERSION = "3.6."  # of Triton, whose insides are read here; others launch as they do
_ONES = ((), (1, 1), (1,), ())  # what a grid of so many dimensions lacks
_MAX_MAPS = 1 << 14  # tensor maps that are kept: those of weights stay the same, those of activations are few


def install() -> None:
    """Launch all Triton kernels of this package so from now on, and encode each tensor map once. A second call changes
    nothing. Under a Triton that is not ``_VERSION`` nothing changes at all.
    """
    if not triton.__version__.startswith(_VERSION):
        return
    for kernel in kernels():
        if "run" not in vars(kernel):
            kernel.run = Launcher(kernel)
            kernel.__class__ = _Launched
    utils = driver.active.utils
    if not isinstance(utils.fill_tma_descriptor, _TensorMaps):
        utils.fill_tma_descriptor = _TensorMaps(utils.fill_tma_descriptor)


def kernels() -> list[JITFunction]:
    """All of ``nemo_engine.kernels``."""
    package = importlib.import_module("nemo_engine.kernels")
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)}
    return sorted(found, key=lambda kernel: (kernel.__module__, kernel.__name__))


class _Launched(JITFunction):  # type: ignore[misc]
    """A kernel with a launcher: what ``kernel[grid]`` returns costs less to call than Triton's."""

    def __getitem__(self, grid: Any) -> Any:
        return partial(self.run, grid=grid, warmup=False)


Key = tuple[Any, ...]
Entry = tuple[Callable[..., None], tuple[Any, ...], tuple[Any, ...]]


class Launcher:
    """``run`` of one kernel."""

    def __init__(self, kernel: JITFunction) -> None:
        self._kernel = kernel
        self._slow = kernel.run
        # By the arguments' types: what reads the rest that tells variants apart, or None, and the variants.
        self._by_types: dict[Key, tuple[Callable[..., Key] | None, dict[Key, Entry]]] = {}

    def __call__(self, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        """As ``JITFunction.run``; what it returns is None where the variant was known."""
        read, known = self._of_types(args)
        if read is None or warmup or callable(grid) or self._kernel.pre_run_hooks or _has_hooks():
            return self._slow(*args, grid=grid, warmup=warmup, **constants)
        active = driver.active
        device = active.get_current_device()
        key = (device, *constants, *constants.values(), *read(*args))
        entry = known.get(key)
        if entry is None:
            kernel = self._slow(*args, grid=grid, warmup=False, **constants)
            if kernel is not None:
                known[key] = self._entry(kernel, len(args), constants)
            return kernel
        launch, fixed, tail = entry
        launch(*grid, *_ONES[len(grid)], active.get_current_stream(device), *fixed, *args, *tail)
        return None

    def key(self, *args: Any) -> Key | None:
        """What variants are told apart by, beside constants and device; None if it is not known for these types."""
        read, _ = self._of_types(args)
        return None if read is None else (*map(type, args), *read(*args))

    def _of_types(self, args: tuple[Any, ...]) -> tuple[Callable[..., Key] | None, dict[Key, Entry]]:
        types = tuple(map(type, args))
        found = self._by_types.get(types)
        if found is None:
            read = _reader(types, [(p.is_constexpr, p.do_not_specialize) for p in self._kernel.params])
            found = self._by_types[types] = (read, {})
        return found

    def _entry(self, kernel: Any, num_args: int, constants: dict[str, Any]) -> Entry:
        """What launches ``kernel``, and what it takes before and behind the arguments."""
        tail = tuple([constants.get(param.name, param.default) for param in self._kernel.params[num_args:]])
        run, nothing = kernel.run, (None, None, None)  # no metadata and no hooks
        if getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1):
            return run, (kernel.function, kernel.packed_metadata, *nothing), tail
        how = run.launch_cooperative_grid, run.launch_pdl, None, None
        return run.launch, (kernel.function, *how, kernel.packed_metadata, *nothing), tail


def _reader(types: tuple[type, ...], params: list[tuple[bool, bool]]) -> Callable[..., Key] | None:
    """A function of arguments of these types that returns what Triton's variants follow from, None where it is unknown.

    params: of each, whether it is a constant, and whether Triton does not look at its value.

    Made as text, as Triton makes the like of it: a loop over the arguments takes as long as all the rest.
    """
    facts: list[str] = []
    addresses: list[str] = []
    for index, (kind, (is_constant, is_free)) in enumerate(zip(types, params, strict=False)):
        x = f"x{index}"
        if is_constant or kind is type(None):
            facts.append(x)
        elif kind is torch.Tensor or kind is torch.nn.Parameter:
            facts.append(f"{x}.dtype")
            addresses += [] if is_free else [f"{x}.data_ptr()"]
        elif kind is int:
            size = f"0 if -{1 << 31} <= {x} < {1 << 31} else 1 if {x} < {1 << 63} else 2"
            facts += [size] if is_free else [size, f"2 if {x} == 1 else {x} & 15 == 0"]  # 2, since True is 1
        elif kind is TensorDescriptor:
            facts += [f"{x}.base.dtype", f"*{x}.block_shape", f"{x}.padding", f"len({x}.shape)"]
        elif kind is not float:
            return None
    if addresses:  # which are divisible by 16; nearly always all are
        each = "".join([f"{address} & 15 == 0, " for address in addresses])
        facts.append(f"({' | '.join(addresses)}) & 15 and ({each})")
    names = ", ".join([f"x{index}" for index in range(len(types))])
    reader: Callable[..., Key] = eval(f"lambda {names}: ({', '.join([*facts, ''])})")
    return reader


def _has_hooks() -> bool:
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class _TensorMaps:
    """``fill_tma_descriptor`` of Triton's driver, whose results depend on its arguments alone and are copied into each
    launch.
    """

    def __init__(self, fill: Callable[..., Any]) -> None:
        self._fill = fill
        self._maps: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *args: Any) -> Any:
        key = tuple([tuple(arg) if isinstance(arg, (list, tuple)) else arg for arg in args])
        found = self._maps.get(key)
        if found is None:
            if len(self._maps) >= _MAX_MAPS:
                self._maps.clear()
            found = self._maps[key] = self._fill(*args)
        return found
