"""Paged attention by csrc/attention: decode rows, a run at once, by the decode kernel, others by the prefill kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_engine.ops.attention import AttentionMeta
from nemo_engine.ops.cuda import address, counters, library, row_stride, stream_of
from nemo_engine.ops.cuda.prefill import prefill
from nemo_engine.ops.paged_kv import PagedKV

_FP8 = torch.float8_e4m3fn
MAX_COLUMNS = 32  # query heads of a KV head times queries, whose keys are read once


def paged_attention(q: Tensor, kv: PagedKV, meta: AttentionMeta, scale: float) -> Tensor:
    """As ``nemo_engine.ops.attention.paged_attention``: q bf16, caches bf16 or FP8, heads of 128.

    A decode row's last bits depend on the other decode rows of its step, since these decide how its keys are split.
    """
    _check(q, kv, meta)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if meta.num_decodes:
        _decode(out, q, kv, meta, scale)
    if meta.num_decodes < meta.seq_lens.shape[0]:
        prefill(out, q, kv, meta, scale)
    return out


def _decode(out: Tensor, q: Tensor, kv: PagedKV, meta: AttentionMeta, scale: float) -> None:
    """Fills ``out`` for the decode rows. Their plan is made by the first layer of a step.

    A run is an item of the plan, or two where it has more columns than the kernel.
    """
    kernels, stream = library(), stream_of(q)
    heads, kv_heads, rows = q.shape[1], kv.num_heads, meta.num_decodes
    width = min(meta.run_length, MAX_COLUMNS * kv_heads // heads)
    items, units = rows // width, kernels.decode_units(kv_heads)

    def make_plan() -> Tensor:
        plan = torch.empty(kernels.decode_plan_words(items, units, width), dtype=torch.int32, device=q.device)
        kernels.plan_decode(
            plan.data_ptr(), meta.query_start_loc.data_ptr(), meta.seq_lens.data_ptr(), meta.slot_ids.data_ptr(),
            0, items, 0, rows, units, width, stream,
        )  # fmt: skip
        return plan

    plan = meta.once("CUDA decode plan", make_plan)
    words = kernels.decode_scratch_words(units, heads, width)
    counts = counters(q.device, units * kv_heads, meta.page_table.data_ptr())
    scratch = meta.workspace.take("CUDA decode parts", (words,), torch.float32, q.device)
    kernels.decode_attention(
        kv.dtype == _FP8, out.data_ptr(), q.data_ptr(), kv.k.data_ptr(), kv.v.data_ptr(), address(kv.k_scale),
        address(kv.v_scale), meta.page_table.data_ptr(), plan.data_ptr(), scratch.data_ptr(), counts.data_ptr(),
        row_stride(q), row_stride(q, 1), row_stride(meta.page_table), items, units, width, heads, kv_heads,
        kv.page_size, scale, stream,
    )  # fmt: skip


def _check(q: Tensor, kv: PagedKV, meta: AttentionMeta) -> None:
    dim = q.shape[2]
    assert q.dtype == torch.bfloat16 and dim == 128 and q.stride(2) == 1, (q.dtype, q.shape, q.stride())
    assert kv.k.shape == kv.v.shape and kv.k.shape[3] == dim, (kv.k.shape, kv.v.shape)
    for cache, factors in ((kv.k, kv.k_scale), (kv.v, kv.v_scale)):
        assert cache.dtype in (torch.bfloat16, _FP8) and cache.dtype == kv.dtype and cache.is_contiguous()
        if factors is not None:
            assert cache.dtype == _FP8 and factors.dtype == torch.float32 and factors.shape == (kv.num_heads,), factors
    rows = meta.seq_lens.shape[0]
    for index, size in ((meta.query_start_loc, rows + 1), (meta.seq_lens, rows), (meta.slot_ids, rows)):
        assert index.dtype == torch.int64 and index.shape == (size,) and index.is_contiguous(), (
            index.dtype,
            index.shape,
        )
    assert meta.page_table.dtype == torch.int64 and row_stride(meta.page_table, 1) == 1, meta.page_table.stride()
