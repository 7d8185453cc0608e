"""How many of a CPU's cores a step takes while an event loop and its clients need some too."""

from __future__ import annotations

import torch

from nemo_engine.ops.op import compiled_for_cpu

_ALONE = 256 << 20  # bytes of weights times tokens: what one core does in some two milliseconds


class SharedCores:
    """Gives small steps to one core, large ones to all.

    Every operation of a step waits for the slowest of its threads. One that shares its core with another program comes late by that program's
    turn, a hundred times what its share of a small operation takes.
    """

    def __init__(self, weight_bytes: int) -> None:
        self._most_tokens = _ALONE // max(weight_bytes, 1)
        self._all = 0  # of the thread that runs the steps: what torch takes there, once it has been asked
        self._now = 0
        self._cpu = compiled_for_cpu()

    def take(self, num_tokens: int) -> None:
        """Before a step of ``num_tokens``, in the thread that runs it: its threads, and no other's, become as many as are worth it."""
        if self._cpu is None:  # torch could only change them for the whole process
            return
        self._all = self._all or torch.get_num_threads()
        wanted = 1 if num_tokens <= self._most_tokens else self._all
        if wanted != self._now:
            self._cpu.set_num_threads(wanted)
            self._now = wanted
