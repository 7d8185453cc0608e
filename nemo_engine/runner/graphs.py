"""Steps as CUDA graphs: two launches for a whole step, for a short list of batch sizes.

A captured function reads its inputs from tensors at fixed addresses, and what it returns lies at fixed addresses too,
overwritten by the next replay. The captures of an engine share one memory pool: they never run at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from nemo_engine.checkpoint.progress import progress_bar
from nemo_engine.runner.step_compute import Logits, StepCompute
from nemo_engine.runner.step_rows import StepRows
from nemo_engine.runner.transfer import to_device

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Captured(Generic[T]):
    """What was captured: ``outputs`` hold the results after each ``replay``."""

    outputs: T
    replay: Callable[[], None]


Capture = Callable[[Callable[[], Any]], Captured[Any]]


@cache
def _capture_stream(device_index: int) -> torch.cuda.Stream:
    """The stream of all captures of this process on a device.

    torch's allocator gives a block again only to the stream that it was first given to, so captures on streams of their
    own would share no memory; and cuBLAS keeps a workspace for each stream that it was ever used on.
    """
    return torch.cuda.Stream(device_index)


def cuda_capture(device: torch.device) -> Capture:
    """Captures into CUDA graphs. The function runs once before, so that libraries and kernels are loaded."""
    pool = torch.cuda.graph_pool_handle()
    stream = _capture_stream(torch.cuda.current_device() if device.index is None else device.index)

    def capture(function: Callable[[], T]) -> Captured[T]:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": in the mode "global", any other thread of the process that allocates device memory breaks the
        # capture.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            outputs = function()
        return Captured(outputs, graph.replay)

    return capture


@dataclass(frozen=True, slots=True)
class StepGraph:
    """Steps of the very shape of ``rows``, whose description is copied into ``words`` before a replay.

    ``forward`` goes from the request table to the logits. ``finish`` chooses tokens from them and enters these into the
    table, unless the host has work with the logits before.
    """

    words: Tensor
    rows: StepRows  # slices of ``words``
    forward: Captured[Logits]
    finish: Captured[Tensor]

    @property
    def size(self) -> int:
        """Decode rows."""
        return self.rows.num_decodes

    @classmethod
    def of(cls, step: StepCompute, words: Tensor, rows: StepRows, capture: Capture) -> StepGraph:
        """Capture both; ``words`` are of padding."""
        forward = capture(lambda: step.logits(rows, *step.forward(rows)))
        forward.replay()  # a capture computes nothing, and what follows reads the results

        def finish() -> Tensor:
            logits, slot_ids, positions, seq_lens = forward.outputs
            tokens = step.sampler.sample_any(logits, slot_ids, positions)
            step.advance(rows, seq_lens, tokens)
            return tokens

        return cls(words, rows, forward, capture(finish))


def capture_decodes(step: StepCompute, sizes: Sequence[tuple[int, int]], capture: Capture) -> tuple[StepGraph, ...]:
    """Graphs of decode steps of ``sizes``, rows and width, the smallest first.

    The largest is captured first, so that the others find room in its memory.
    """
    graphs = []
    with progress_bar("capture decode steps", len(sizes), None, unit="graphs") as advance:
        for size, width in sorted(sizes, reverse=True):
            words = to_device(StepRows.pack([0] * size, [1] * size, {}, range(size)), step.table.device)
            rows = StepRows.of(words, size, size, size, 1, step.table.page_table.shape[1], width=width)
            graphs.append(StepGraph.of(step, words, rows, capture))
            advance(1)
    return tuple(reversed(graphs))
