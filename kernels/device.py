"""What kernels must know of the GPU to choose their tiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, slots=True)
class Facts:
    """Multiprocessors of a GPU, and the bytes of shared memory that one block may have."""

    sms: int
    shared: int


HOPPER = Facts(132, 227 << 10)  # an H100 or H200
elsewhere = HOPPER  # what tensors that are on no GPU are treated as; changed where kernels are compiled for another one


def facts(device: torch.device) -> Facts:
    """The facts of ``device`` if it is a GPU, else ``elsewhere``."""
    return _facts_of(device) if device.type == "cuda" else elsewhere


@cache
def _facts_of(device: torch.device) -> Facts:
    properties = torch.cuda.get_device_properties(device)
    return Facts(properties.multi_processor_count, properties.shared_memory_per_block_optin)


def stages_in(wanted: int, tile_bytes: int, other_bytes: int, shared: int) -> int:
    """How many tiles of keys and values may be in flight, one less than Triton's stages, in ``shared`` bytes."""
    return max(2, min(wanted, (shared - other_bytes) // tile_bytes + 1))


def zeros_of(weight: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` int32 zeros for launches over one weight, which no two streams read; the same ones at every call.

    A kernel that counts there leaves zeros.
    """
    return _zeros(weight.device, weight.data_ptr(), count)


@cache
def _zeros(device: torch.device, owner: int, count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
