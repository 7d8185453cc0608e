"""Decode steps as CUDA graphs: one launch for a whole step, for a short list of batch sizes.

A captured function reads its inputs from tensors at fixed addresses, and what it returns lies at fixed addresses too, overwritten by the
next replay. All captures share one memory pool: they never run at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Captured(Generic[T]):
    """What was captured: ``outputs`` hold the results after each ``replay``."""

    outputs: T
    replay: Callable[[], None]


Capture = Callable[[Callable[[], Any]], Captured[Any]]


def cuda_capture(device: torch.device) -> Capture:
    """Captures into CUDA graphs. The function runs once before, so that libraries and kernels are loaded."""
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Callable[[], T]) -> Captured[T]:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            outputs = function()
        return Captured(outputs, graph.replay)

    return capture


@dataclass(frozen=True, slots=True)
class DecodeGraph:
    """Decode steps of exactly ``size`` rows, whose description is copied into ``words`` before a replay.

    ``whole`` goes from the request table to the sampled tokens and back into the table. ``forward`` ends at the logits, for batches whose
    logits the host has work with before a token is chosen.
    """

    size: int
    words: Tensor
    whole: Captured[Tensor]
    forward: Captured[Tensor]
