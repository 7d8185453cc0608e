"""Attention of rows with several queries, by csrc/attention/prefill."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_engine.ops.attention import AttentionMeta
from nemo_engine.ops.cuda import library, stream_of
from nemo_engine.ops.op import Site

_PAGE_SIZES = (16, 32, 64, 128)
_GROUPS = (1, 2, 4, 8)


def supports_prefill(site: Site) -> str | None:
    """What this kernel needs of the shapes, and that the cache is bf16."""
    if site.head_dim != 128:
        return f"head_dim of 128, this is {site.head_dim}"
    if site.num_heads % site.num_kv_heads or site.num_heads // site.num_kv_heads not in _GROUPS:
        return f"1, 2, 4 or 8 query heads per KV head, these are {site.num_heads} and {site.num_kv_heads}"
    if site.page_size not in _PAGE_SIZES:
        return f"pages of 16, 32, 64 or 128 tokens, these are {site.page_size}"
    if site.kv_dtype not in (None, torch.bfloat16):
        return "reads keys and values in bfloat16 only"
    return None


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
    assert table.dtype == torch.int64 and table.stride(1) == 1, (table.dtype, table.stride())
    first = meta.num_decodes
    if rows == first:
        return
    library().prefill_attention(
        out.data_ptr(), q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), table.data_ptr(), meta.slot_ids.data_ptr(),
        meta.query_start_loc.data_ptr(), meta.seq_lens.data_ptr(), q.stride(0), q.stride(1), table.stride(0), pages, first,
        rows - first, tokens - first, heads, kv_heads, page_size, scale, stream_of(q),
    )  # fmt: skip
