"""Rotary embedding of q and k, and the write of k and v into their pages, by csrc/rope."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_engine.ops.cuda import library, row_stride, stream_of

_FP8 = torch.float8_e4m3fn


def rope_and_append_kv_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """As ``nemo_engine.ops.rope.rope_and_append_kv_``; heads of 128, each token's heads dense, page_size a power of two.

    Caches are bf16, or FP8 with or without scales.
    """
    tokens, heads, dim = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    assert dim == 128 and k.shape == v.shape == (tokens, kv_heads, dim), (q.shape, k.shape, v.shape)
    assert all(x.dtype == torch.bfloat16 and x.stride(2) == 1 and row_stride(x, 1) == dim for x in (q, k, v)), (q, k, v)
    assert table.dtype == torch.float32 and table.is_contiguous() and table.shape[1:] == (2, dim // 2), table.shape
    for index in (positions, slot_mapping):
        assert index.dtype == torch.int64 and index.shape == (tokens,) and index.is_contiguous(), index.shape
    is_fp8 = k_cache.dtype == _FP8
    for cache, scale in ((k_cache, k_scale), (v_cache, v_scale)):
        assert cache.shape == k_cache.shape and cache.shape[3] == dim and cache.is_contiguous(), cache.shape
        assert cache.dtype == (_FP8 if is_fp8 else q.dtype), cache.dtype
        if scale is not None:
            assert is_fp8 and scale.dtype == torch.float32 and scale.shape == (kv_heads,) and scale.is_contiguous()
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device)
    library().rope_and_append_kv(
        is_fp8, out.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), table.data_ptr(), positions.data_ptr(),
        slot_mapping.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), 0 if k_scale is None else k_scale.data_ptr(),
        0 if v_scale is None else v_scale.data_ptr(), tokens, row_stride(q), row_stride(k), row_stride(v), heads, kv_heads,
        page_size, stream_of(q),
    )  # fmt: skip
    return out
