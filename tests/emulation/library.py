"""The CUDA kernels compiled for the CPU: built once, loaded as ``nemo_engine._C``, with every tensor they may touch
made known.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from csrc.build import cmake_build
from nemo_engine.ops import cuda
from nemo_engine.ops.op import Op
from tests.ops.proofs import tensors

# Arguments that no kernel writes: these alone may be read while the kernel before still runs.
CONSTANTS = {
    "weight", "norm_weight", "w8", "w_scales", "gate_up_weights", "down_weights", "table", "scale", "x_scale", "k_scale",
    "v_scale",
}  # fmt: skip
ROOT = Path(__file__).parent.parent.parent
BUILD = ROOT / "build" / "emulated"


def build(folder: Path = BUILD, *options: str, source: Path = ROOT) -> Path:
    """Compile what changed; returns the library. Raises ``RuntimeError`` with the compiler's words."""
    cmake_build(folder, "-DNEMO_EMULATED=ON", *options, source=source)
    (library,) = folder.glob("_C*.so")
    return library


def why_not() -> str | None:
    """Why the kernels cannot be compiled for the CPU here; None if they can."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "no C++ compiler is installed"
    return None


@functools.cache
def load() -> Any:
    """The emulated library, compiled if need be."""
    return open_library(build())


def open_library(path: Path) -> Any:
    """A compiled library as a module.

    Its name is its own: pybind11 hands out what it has made under a name before, such as the real one.
    """
    spec = importlib.util.spec_from_file_location(f"emulated_{abs(hash(path))}._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def emulated(library: Any) -> Iterator[Any]:
    """Inside, ``nemo_engine._C`` is ``library``."""
    before = sys.modules.get("nemo_engine._C")
    sys.modules["nemo_engine._C"] = library
    cuda._counters.clear()
    try:
        yield library
    finally:
        cuda._counters.clear()
        del sys.modules["nemo_engine._C"]
        if before is not None:
            sys.modules["nemo_engine._C"] = before


class Watch(TorchDispatchMode):
    """Inside it, the emulation knows every array: those in ``tensors``, those in ``constants``, and what torch makes
    meanwhile.

    What is made empty is poisoned, so that an element that a kernel does not write shows.
    """

    def __init__(self, library: Any, tensors: list[Tensor], constants: list[Tensor]) -> None:
        super().__init__()
        self.emulator = library.emulator
        self.emulator.forget()
        self.held: list[Tensor] = []
        constant = {tensor.untyped_storage().data_ptr() for tensor in constants}
        for tensor in itertools.chain(*cuda._counters.values()):
            self.allow(tensor, False)
        for tensor in tensors:
            self.allow(tensor, tensor.untyped_storage().data_ptr() in constant)

    def allow(self, tensor: Tensor, is_constant: bool) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self.held.append(tensor)  # while it is allowed, nothing else may come to lie there
            self.emulator.allow(storage.data_ptr(), storage.nbytes(), is_constant)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            name = func.overloadpacket.__name__
            if name in ("empty", "empty_like", "empty_strided", "new_empty"):
                result.view(torch.uint8).fill_(0xFF) if result.numel() else None
            self.allow(result, False)
        return result

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.emulator.forget()


def constants_of(name: str, value: Any) -> list[Tensor]:
    """The tensors of an argument, or of a dataclass's fields, whose names say that no kernel writes them."""
    if dataclasses.is_dataclass(value):
        return [x for field in dataclasses.fields(value) for x in constants_of(field.name, getattr(value, field.name))]
    return tensors((value,)) if name in CONSTANTS else []


def watched(library: Any, op: Op, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` over arrays that the emulation knows; each call runs threads and blocks in another order."""
    names = list(inspect.signature(op.semantics).parameters)
    seeds = itertools.count()

    def call(*args: Any) -> Any:
        library.emulator.seed(next(seeds))
        constants = [tensor for name, arg in zip(names, args, strict=False) for tensor in constants_of(name, arg)]
        with Watch(library, tensors(args), constants):
            return function(*args)

    return call
