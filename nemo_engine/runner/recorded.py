"""Decode steps on a CPU as one call of csrc/cpu, from the request table to the logits or to the next tokens in it:
recorded once, done again for any number of rows.

Like a CUDA graph, a recording has its inputs and outputs at fixed addresses. Unlike one, it takes the number of rows
when it is done again, for every tensor of a decode step has its rows first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_engine.ops.cpu.compiled import choose
from nemo_engine.ops.op import compiled_for_cpu
from nemo_engine.runner.step_compute import Logits, StepCompute
from nemo_engine.runner.step_rows import StepRows
from nemo_engine.runner.transfer import to_device

MAX_ROWS = 64  # of a recorded step; the operations of larger ones take far longer than their calls
_RECORDED = (
    "build_batch_",
    "embed",
    "norm_linear",
    "rope_and_append_kv_",
    "paged_attention",
    "silu_mul_linear",
    "linear",
    "sample_",
    "advance_",
)
_cpu: Any = compiled_for_cpu()
_EMPTY = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


def why_not_recorded(step: StepCompute) -> str | None:
    """Why the operations of decode steps run one by one; None if they can be recorded."""
    others = [f"{c.op} is {c.chosen}" for c in step.ops.choices if c.op in _RECORDED and c.chosen != "cpu"]
    if others:
        return ", ".join(others)
    weights = step.model.weights
    projections = [p for layer in weights.layers for p in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    if any(linear.weight.dim() == 2 for linear in (*projections, weights.lm_head)):
        return "a weight is not packed (a head that is the embeddings, or FP8)"
    return None


class RecordedDecodes:
    """Decode steps of up to ``size`` rows, whose description is copied into ``words`` before: ``size`` rows, of which
    the first are computed.
    """

    def __init__(self, step: StepCompute, size: int) -> None:
        self.size = size
        self.words = to_device(StepRows.pack([0] * size, [1] * size, {}, range(size)), step.table.device)
        rows = StepRows.of(self.words, size, size, size, 1, step.table.page_table.shape[1])
        self._ahead = torch.zeros_like(rows.slots)
        self._is_ahead = False  # whether any of them is not 0
        with _recording() as self._forward:
            hidden, self.seq_lens = step.forward(rows, self._ahead)
            self._logits = step.model.logits(hidden)
        with _recording() as self._choose:
            self._tokens = choose(self._logits, rows.slots, self.seq_lens, step.sampler.slot_params)
        with _recording() as self._advance:
            step.advance(rows, self.seq_lens, self._tokens)

    def logits(self, rows: StepRows, num_rows: int, ahead: Sequence[int] = ()) -> Logits:
        """Compute the first ``num_rows``, at most ``size``, of ``rows``, which are those of ``words``.

        ahead: how many places after the last known token each row computes; none do if it is empty. These and other
        results hold until the next step.
        """
        self._replay(num_rows, ahead, self._forward)
        seq_lens = self.seq_lens[:num_rows]
        return self._logits[:num_rows], rows.slots[:num_rows], seq_lens, seq_lens

    def draw(self, num_rows: int, ahead: Sequence[int]) -> Tensor:
        """Choose the tokens too, of rows none of which wants more than a draw."""
        self._replay(num_rows, ahead, self._forward, self._choose)
        return self._tokens[:num_rows]

    def run(self, num_rows: int) -> Tensor:
        """A whole narrow step of such rows: what ``draw`` returns is in the table afterwards."""
        self._replay(num_rows, (), self._forward, self._choose, self._advance)
        return self._tokens[:num_rows]

    def _replay(self, num_rows: int, ahead: Sequence[int], *recordings: _Recording) -> None:
        assert num_rows <= self.size, (num_rows, self.size)
        if any(ahead):
            self._ahead[:num_rows].copy_(torch.tensor(ahead))
        elif self._is_ahead:
            self._ahead.zero_()
        self._is_ahead = any(ahead)
        _cpu.replay(num_rows, *[recording.program for recording in recordings])


@contextmanager
def _recording() -> Iterator[_Recording]:
    """Record what csrc/cpu is called for inside."""
    _cpu.start_recording()
    try:
        with _Recording() as recording:
            yield recording
    finally:
        recording.program = _cpu.stop_recording()


class _Recording(TorchDispatchMode):
    """Inside, torch makes memory and views, and computes nothing, for that would not be recorded. ``memory`` is what
    was made, ``program`` the calls that need it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[Tensor] = []
        self.program: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        results = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
        if func.overloadpacket.__name__ in _EMPTY:
            self.memory += results
            return outputs
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if func._schema.is_mutable or any(x.untyped_storage().data_ptr() not in given for x in results):
            raise RuntimeError(f"{func} computes in a step that is being recorded")
        return outputs
