"""What kernels must know of the GPU to choose their tiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@dataclass(frozen=True, slots=True)
class Facts:
    """Multiprocessors of a GPU, the bytes of shared memory that one block may have, and whether a launch may begin
    before the one before it has ended.
    """

    sms: int
    shared: int
    is_dependent: bool = False


HOPPER = Facts(132, 227 << 10, True)  # an H100 or H200
elsewhere = HOPPER  # what tensors that are on no GPU are treated as; changed where kernels are compiled for another one


def facts(device: torch.device) -> Facts:
    """The facts of ``device`` if it is a GPU, else ``elsewhere``."""
    return _facts_of(device) if device.type == "cuda" else elsewhere


@cache
def _facts_of(device: torch.device) -> Facts:
    properties = torch.cuda.get_device_properties(device)
    return Facts(properties.multi_processor_count, properties.shared_memory_per_block_optin, properties.major >= 9)


def dependent(device: torch.device) -> dict[str, bool]:
    """How a kernel that begins with ``wait_for_previous`` is launched."""
    is_dependent = facts(device).is_dependent and not triton.knobs.runtime.interpret
    return {"DEPENDENT": is_dependent, "launch_pdl": is_dependent}


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):
    """The launch before has ended, and the next one may begin, which waits likewise: before this, nothing is read or
    written.
    """
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


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
