"""Copies between host and device that never wait: through pinned memory, on the current stream.

Pinned memory comes from torch's caching host allocator, which gives a block out again only when the copies that used it
are done on the device. So a step needs no ring of its own, and as many blocks exist as steps were ever in flight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def staged(
    values: Sequence[int] | Sequence[float] | Tensor, device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """``values`` on the host, in memory from which copying to ``device`` does not wait."""
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory() if device.type == "cuda" else host


def to_device(
    values: Sequence[int] | Sequence[float] | Tensor, device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """``values`` on ``device``. On CUDA the copy is enqueued, and the caller does not wait for it."""
    return staged(values, device, dtype).to(device, non_blocking=True)


class Download:
    """A device tensor on its way to the host. Enqueued when made, waited for in ``tolist``."""

    def __init__(self, source: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = source
        if not source.is_cuda:
            self._host = source.clone()  # the next step may overwrite it
        else:
            self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._host.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def tolist(self) -> list:
        """The values, as nested lists."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
