"""How many of a CPU's cores a step takes while an event loop and its clients need some too."""

from __future__ import annotations

import torch

from nemo_engine.ops.op import compiled_for_cpu

# What one core does in some two milliseconds: bytes that it reads once, and bytes of weights, in a cache by then, times the tokens that they meet.
_READ = 32 << 20
_MULTIPLIED = 256 << 20


class SharedCores:
    """Gives small steps to one core, large ones to all.

    Every operation of a step waits for the slowest of its threads. One that shares its core with another program comes late by that program's
    turn, a hundred times what its share of a small operation takes.

    weight_bytes, page_bytes: of all layers.
    """

    def __init__(self, weight_bytes: int, page_bytes: int) -> None:
        self._weight_bytes = weight_bytes
        self._page_bytes = page_bytes
        self._all = 0  # of the thread that runs the steps: what torch takes there, once it has been asked
        self._now = 0
        self._cpu = compiled_for_cpu()

    def take(self, num_tokens: int, num_pages: int) -> None:
        """Before a step of ``num_tokens`` that attends to ``num_pages``, in the thread that runs it: its threads become as many as are worth it.

        Those of other threads stay.
        """
        if self._cpu is None:  # torch could only change them for the whole process
            return
        self._all = self._all or torch.get_num_threads()
        is_small = (
            self._weight_bytes * num_tokens <= _MULTIPLIED
            and self._weight_bytes + self._page_bytes * num_pages <= _READ
        )
        wanted = 1 if is_small else self._all
        if wanted != self._now:
            self._cpu.set_num_threads(wanted)
            self._now = wanted
