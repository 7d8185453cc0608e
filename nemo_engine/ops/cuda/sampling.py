"""Token selection by csrc/sampling, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_engine.ops.cuda import counters, library, row_stride, stream_of
from nemo_engine.ops.sample import SampleFacts, SlotParams

_PARAMETERS = ("temperature", "min_p", "top_k", "top_p", "seed_keys", "frequency", "presence", "repetition")


def sample_(
    logits: Tensor, slot_ids: Tensor, positions: Tensor, params: SlotParams, facts: SampleFacts | None = None
) -> Tensor:
    """As ``nemo_engine.ops.sample.sample_``; logits bf16 or fp32, V at most 2^22. ``facts`` are for CPUs.

    Where top_p alone cuts a row, its mass is a sum of fp32 exponentials, which is off by some 1e-7. Scratch memory: V /
    32 bytes a row.
    """
    rows, vocab_size = logits.shape
    assert logits.dtype in (torch.bfloat16, torch.float32) and row_stride(logits, 1) == 1, (
        logits.dtype,
        logits.stride(),
    )
    for index in (slot_ids, positions):
        assert index.dtype == torch.int64 and index.shape == (rows,) and index.is_contiguous(), (
            index.dtype,
            index.shape,
        )
    for name in _PARAMETERS:
        value = getattr(params, name)
        expected = torch.int64 if name in ("top_k", "seed_keys") else torch.float64
        assert value.dtype == expected and value.is_contiguous(), (name, value.dtype)
    for table in (params.output_counts, params.prompt_mask):
        assert table.shape == (len(params.temperature), vocab_size) and table.is_contiguous(), table.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    shape = (rows, library().sample_subs(vocab_size))
    best, note = (torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    counts = counters(logits.device, rows, params.temperature.data_ptr())
    library().sample(
        logits.dtype == torch.bfloat16, tokens.data_ptr(), logits.data_ptr(), slot_ids.data_ptr(), positions.data_ptr(),
        *(getattr(params, name).data_ptr() for name in _PARAMETERS), params.output_counts.data_ptr(),
        params.prompt_mask.data_ptr(), best.data_ptr(), note.data_ptr(), counts.data_ptr(),
        row_stride(logits), rows, vocab_size, stream_of(logits),
    )  # fmt: skip
    return tokens
