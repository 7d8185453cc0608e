"""Attention of rows with several queries, by csrc/attention/prefill."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_engine.ops.attention import AttentionMeta
from nemo_engine.ops.cuda import library, row_stride, stream_of


def prefill(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMeta,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Fills ``out`` for the rows from ``meta.num_decodes`` on. out, q: (T, Hq, 128) bf16, all queries of the step.

    Arguments as ``nemo_engine.ops.attention.paged_attention``; caches bf16 without scales. A row's bits do not depend on other rows.
    """
    assert k_scale is None and v_scale is None, "an FP8 cache is not served"
    tokens, heads, dim = q.shape
    pages, kv_heads, page_size, _ = k_cache.shape
    assert dim == 128 and q.stride(2) == 1 and out.shape == q.shape and out.is_contiguous(), (
        q.shape,
        q.stride(),
        out.shape,
    )
    assert k_cache.shape == v_cache.shape and k_cache.shape[3] == dim, (k_cache.shape, v_cache.shape)
    assert k_cache.is_contiguous() and v_cache.is_contiguous(), (k_cache.stride(), v_cache.stride())
    assert all(x.dtype == torch.bfloat16 for x in (out, q, k_cache, v_cache)), (q.dtype, k_cache.dtype)
    rows = meta.seq_lens.shape[0]
    sizes = {"slot_ids": rows, "query_start_loc": rows + 1, "seq_lens": rows}
    for name, size in sizes.items():
        index = getattr(meta, name)
        assert index.dtype == torch.int64 and index.shape == (size,) and index.is_contiguous(), (name, index.shape)
    table = meta.page_table
    assert table.dtype == torch.int64 and row_stride(table, 1) == 1, (table.dtype, table.stride())
    first = meta.num_decodes
    if rows == first:
        return
    library().prefill_attention(
        out.data_ptr(), q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), table.data_ptr(), meta.slot_ids.data_ptr(),
        meta.query_start_loc.data_ptr(), meta.seq_lens.data_ptr(), row_stride(q), row_stride(q, 1), row_stride(table), pages, first,
        rows - first, tokens - first, heads, kv_heads, page_size, scale, stream_of(q),
    )  # fmt: skip
