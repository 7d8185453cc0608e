"""Paged attention by csrc/attention: rows of one query by the decode kernel, rows of several by the prefill kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_engine.ops.attention import AttentionMeta
from nemo_engine.ops.cuda import counters, library, row_stride, stream_of
from nemo_engine.ops.cuda.prefill import prefill

_FP8 = torch.float8_e4m3fn
_MOST_UNITS = 65535  # of a launch; more queries than that take several


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMeta,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """As ``nemo_engine.ops.attention.paged_attention``: q bf16, caches bf16 or FP8, heads of 128.

    FP8 caches are read by the decode kernel for every query. A query's last bits depend on the others of its step, since these
    decide how its keys are split.
    """
    _check(q, k_cache, v_cache, meta, k_scale, v_scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decodes, rows = meta.num_decodes, meta.seq_lens.shape[0]
    size = _MOST_UNITS - library().decode_units(0, k_cache.shape[1])
    for first in range(0, decodes, size):
        queries = (first, min(size, decodes - first))
        _decode(out, q, k_cache, v_cache, meta, scale, k_scale, v_scale, queries, queries)
    if decodes < rows and k_cache.dtype != _FP8:
        prefill(out, q, k_cache, v_cache, meta, scale)
    elif decodes < rows:
        for first in range(decodes, q.shape[0], size):
            queries = (first, min(size, q.shape[0] - first))
            _decode(out, q, k_cache, v_cache, meta, scale, k_scale, v_scale, queries, (decodes, rows - decodes))
    return out


def _decode(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMeta,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    queries: tuple[int, int],
    rows: tuple[int, int],
) -> None:
    """(first, count) of queries, and of the rows that they are of. The plan is made by the first layer of a step."""
    kernels, stream = library(), stream_of(q)
    is_fp8 = k_cache.dtype == _FP8
    heads, kv_heads, page_size = q.shape[1], *k_cache.shape[1:3]
    first, items = queries
    units = kernels.decode_units(items, kv_heads)

    def make_plan() -> Tensor:
        plan = torch.empty(kernels.decode_plan_words(items), dtype=torch.int32, device=q.device)
        kernels.plan_decode(
            plan.data_ptr(), meta.query_start_loc.data_ptr(), meta.seq_lens.data_ptr(), meta.slot_ids.data_ptr(),
            *queries, *rows, units, kernels.decode_keys_per_tile(is_fp8), stream,
        )  # fmt: skip
        return plan

    plan = meta.once(f"CUDA decode plan of {first}", make_plan)
    words = kernels.decode_scratch_words(items, units, heads)
    counts = counters(q.device, items * kv_heads, meta.page_table.data_ptr())
    scratch = meta.workspace.take("CUDA decode parts", (words,), torch.float32, q.device)
    kernels.decode_attention(
        is_fp8, out[first:].data_ptr(), q[first:].data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        0 if k_scale is None else k_scale.data_ptr(), 0 if v_scale is None else v_scale.data_ptr(),
        meta.page_table.data_ptr(), plan.data_ptr(), scratch.data_ptr(), counts.data_ptr(),
        row_stride(q), row_stride(q, 1), row_stride(meta.page_table), items, units, heads, kv_heads, page_size, scale, stream,
    )  # fmt: skip


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMeta,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    kv_heads, dim = k_cache.shape[1], q.shape[2]
    assert q.dtype == torch.bfloat16 and dim == 128 and q.stride(2) == 1, (q.dtype, q.shape, q.stride())
    assert k_cache.shape == v_cache.shape and k_cache.shape[3] == dim, (k_cache.shape, v_cache.shape)
    for cache, factors in ((k_cache, k_scale), (v_cache, v_scale)):
        assert cache.dtype in (torch.bfloat16, _FP8) and cache.dtype == k_cache.dtype and cache.is_contiguous()
        if factors is not None:
            assert cache.dtype == _FP8 and factors.dtype == torch.float32 and factors.shape == (kv_heads,), factors
    for index in (meta.query_start_loc, meta.seq_lens, meta.slot_ids):
        assert index.dtype == torch.int64 and index.is_contiguous(), (index.dtype, index.stride())
    assert meta.page_table.dtype == torch.int64 and row_stride(meta.page_table, 1) == 1, meta.page_table.stride()
