"""Rotary embedding of q and k, and the write of k and v into their pages, by csrc/rope."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_engine.ops.cuda import address, library, row_stride, stream_of
from nemo_engine.ops.paged_kv import PagedKV
from nemo_engine.ops.rope import RopeMeta

_FP8 = torch.float8_e4m3fn


def rope_and_append_kv_(q: Tensor, k: Tensor, v: Tensor, kv: PagedKV, meta: RopeMeta) -> Tensor:
    """As ``nemo_engine.ops.rope.rope_and_append_kv_``; heads of 128, each token's heads dense, page_size a power of
    two.

    Caches are bf16, or FP8 with or without scales.
    """
    tokens, heads, dim = q.shape
    kv_heads, page_size, table = kv.num_heads, kv.page_size, meta.table
    assert dim == 128 and k.shape == v.shape == (tokens, kv_heads, dim), (q.shape, k.shape, v.shape)
    assert all(x.dtype == torch.bfloat16 and x.stride(2) == 1 and row_stride(x, 1) == dim for x in (q, k, v)), (q, k, v)
    assert table.dtype == torch.float32 and table.is_contiguous() and table.shape[1:] == (2, dim // 2), table.shape
    for index in (meta.positions, meta.slot_mapping):
        assert index.dtype == torch.int64 and index.shape == (tokens,) and index.is_contiguous(), index.shape
    is_fp8 = kv.dtype == _FP8
    for cache, scale in ((kv.k, kv.k_scale), (kv.v, kv.v_scale)):
        assert cache.shape == kv.k.shape and cache.shape[3] == dim and cache.is_contiguous(), cache.shape
        assert cache.dtype == (_FP8 if is_fp8 else q.dtype), cache.dtype
        if scale is not None:
            assert is_fp8 and scale.dtype == torch.float32 and scale.shape == (kv_heads,) and scale.is_contiguous()
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device)
    library().rope_and_append_kv(
        is_fp8, out.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), table.data_ptr(), meta.positions.data_ptr(),
        meta.slot_mapping.data_ptr(), kv.k.data_ptr(), kv.v.data_ptr(), address(kv.k_scale), address(kv.v_scale),
        tokens, row_stride(q), row_stride(k), row_stride(v), heads, kv_heads, page_size, stream_of(q),
    )  # fmt: skip
    return out
