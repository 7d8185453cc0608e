"""The CUDA kernels of ``nemo_engine._C`` behind the signatures of the operations, one module per family.

Everything about tensors is checked here: the library sees addresses, sizes, strides and a stream. Nothing is allocated
there.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

_counters: dict[tuple[torch.device, int], list[Tensor]] = {}
_numbers: dict[tuple[torch.device, int], int] = {}  # of weights, by device and address


def library() -> Any:
    """The compiled module. Selection has seen that it is there and made for the device."""
    return importlib.import_module("nemo_engine._C")


def address(tensor: Tensor | None) -> int:
    """Where its elements begin; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def stream_of(tensor: Tensor) -> int:
    """The stream that a launch over ``tensor`` belongs on."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def counters(device: torch.device, count: int, owner: int = 0) -> Tensor:
    """``count`` int32 zeros at one address.

    A kernel that counts its blocks there leaves zeros, so launches of one stream share them.

    ``owner`` tells engines apart, whose streams may run at the same time: the address of something that an engine keeps
    and passes. What was too small for a later call is kept all the same: a captured graph has its address.
    """
    arrays = _counters.setdefault((device, owner), [])
    if not arrays or len(arrays[-1]) < count:
        arrays.append(torch.zeros(max(count, 1 << 16), dtype=torch.int32, device=device))
    return arrays[-1][:count]


def counters_of(weight: Tensor, count: int) -> Tensor:
    """``counters`` of the launches over one weight, which an engine has for itself: others may run at the same time."""
    number = _numbers.setdefault((weight.device, weight.data_ptr()), len(_numbers))
    return counters(weight.device, count * (number + 1))[count * number :]


def row_stride(tensor: Tensor, dim: int = 0) -> int:
    """Elements between neighbours along ``dim``.

    Of a single one any stride is right, and torch may have left any: what it holds.
    """
    return tensor.stride(dim) if tensor.shape[dim] > 1 else tensor.shape[dim + 1 :].numel()
