"""CUDA graphs without a GPU: what a function does to tensors is recorded once and then done again on the same memory.

Like a CUDA graph, a replay runs no Python of the function: it repeats operations and kernel launches with the tensors,
numbers and grids of the capture. So whatever the function decides from values on the host, or allocates anew, shows as
a wrong result or is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from nemo_engine.runner.graphs import Captured

# What makes the host wait for the device, or a shape depend on values: a capture refuses these.
REFUSED = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "equal",
    "is_nonzero",
    "bincount",
}
LIBRARIES = ("nemo_engine._C", "flash_attn_interface")


class Recorder(TorchDispatchMode):
    """Notes every operation on tensors, every launch of an interpreted Triton kernel and every call into a library. Those
    know tensors by their addresses, so all that are made are kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []
        self.made: list[Any] = []
        self.memory: set[int] = set()  # that was made, by address

    def library(self, library: Any) -> Any:
        """``library`` with its calls noted."""

        def noted(function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                with _disable_current_modes():
                    result = function(*args, **kwargs)

                def again() -> None:
                    value = function(*args, **kwargs)
                    if isinstance(value, torch.Tensor):
                        result.copy_(value)

                self.steps.append(again)
                return result

            return call if callable(function) else function

        return SimpleNamespace(**{name: noted(getattr(library, name)) for name in dir(library) if name[0] != "_"})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in REFUSED:
            raise RuntimeError(f"{name} in a captured function: the host would wait for the device")
        if name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise RuntimeError(f"{name} by a mask in a captured function: its shape depends on values")
        outputs = func(*args, **kwargs)
        self.made.append(outputs)
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        fresh = [
            index
            for index, x in enumerate(tree_leaves(outputs))
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in inputs
        ]
        kept = tree_leaves(outputs)
        self.memory |= {kept[index].untyped_storage().data_ptr() for index in fresh}

        def again() -> None:
            results = tree_leaves(func(*args, **kwargs))
            for index in fresh:
                kept[index].copy_(results[index])

        if name not in ("empty", "new_empty", "empty_like", "empty_strided"):
            self.steps.append(again)
        return outputs


def emulated_capture(function: Callable[[], Any]) -> Captured[Any]:
    """A ``Capture`` for the CPU.

    Triton kernels are recorded where they are interpreted, CUDA ones where they are emulated, and FlashAttention.
    """
    from triton.runtime.interpreter import GridExecutor

    function()  # as on a GPU, once before
    recorder = Recorder()
    launch = GridExecutor.__call__

    def recorded_launch(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            launch(self, *args, **kwargs)
        recorder.steps.append(lambda: launch(self, *args, **kwargs))

    GridExecutor.__call__ = recorded_launch
    libraries = {name: sys.modules[name] for name in LIBRARIES if name in sys.modules}
    try:
        sys.modules.update({name: recorder.library(library) for name, library in libraries.items()})
        with recorder:
            outputs = function()
    finally:
        GridExecutor.__call__ = launch
        sys.modules.update(libraries)

    def replay() -> None:
        for step in recorder.steps:
            step()

    for x in tree_leaves(outputs):  # a capture computes nothing: results come with the first replay
        if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() in recorder.memory:
            x.view(torch.uint8).fill_(0x7F)
    return Captured(outputs, replay)
