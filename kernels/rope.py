"""Rotary embedding of q and k, and the write of k and v into their pages.

One program per token and some of its heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .device import dependent, wait_for_previous
from .fp8 import FP8_MAX

_HEADS = 8  # of one program: q's heads first, then k's and v's


@triton.jit
def _rope_kernel(
    q_out_ptr, q_ptr, k_ptr, v_ptr, table_ptr, positions_ptr, slot_mapping_ptr, k_cache_ptr, v_cache_ptr, k_scale_ptr,
    v_scale_ptr, q_stride, k_stride, v_stride, page_stride, head_stride, num_heads, kv_heads,
    HAS_SCALES: tl.constexpr, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """HALF: DIM / 2, padded to a power of two.

    A cache of FP8 holds entries divided by their head's scale, saturated.
    """
    wait_for_previous(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    q_blocks = tl.cdiv(num_heads, HEADS)
    block = tl.program_id(1)
    half: tl.constexpr = DIM // 2
    i = tl.arange(0, HALF)
    angle = table_ptr + tl.load(positions_ptr + token) * DIM + i
    cos = tl.load(angle, mask=i < half, other=0.0)[None, :]
    sin = tl.load(angle + half, mask=i < half, other=0.0)[None, :]
    head = (block % q_blocks) * HEADS + tl.arange(0, HEADS)
    if block < q_blocks:
        mask = (head < num_heads)[:, None] & (i < half)[None, :]
        places = head[:, None] * DIM + i[None, :]
        first = tl.load(q_ptr + token * q_stride + places, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(q_ptr + token * q_stride + places + half, mask=mask, other=0.0).to(tl.float32)
        dtype = q_out_ptr.dtype.element_ty
        out_ptr = q_out_ptr + token * num_heads * DIM + places
        tl.store(out_ptr, (first * cos - second * sin).to(dtype), mask=mask)
        tl.store(out_ptr + half, (second * cos + first * sin).to(dtype), mask=mask)
    else:
        head = (block - q_blocks) * HEADS + tl.arange(0, HEADS)
        mask = (head < kv_heads)[:, None] & (i < half)[None, :]
        places = head[:, None] * DIM + i[None, :]
        slot = tl.load(slot_mapping_ptr + token)
        cache = slot // PAGE_SIZE * page_stride + head[:, None] * head_stride + slot % PAGE_SIZE * DIM + i[None, :]
        first = tl.load(k_ptr + token * k_stride + places, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(k_ptr + token * k_stride + places + half, mask=mask, other=0.0).to(tl.float32)
        v_first = tl.load(v_ptr + token * v_stride + places, mask=mask, other=0.0).to(tl.float32)
        v_second = tl.load(v_ptr + token * v_stride + places + half, mask=mask, other=0.0).to(tl.float32)
        # Rounded to the activations' dtype first: what a cache of that dtype would hold is what is quantised.
        k_first = (first * cos - second * sin).to(k_ptr.dtype.element_ty).to(tl.float32)
        k_second = (second * cos + first * sin).to(k_ptr.dtype.element_ty).to(tl.float32)
        if HAS_SCALES:
            k_scale = tl.load(k_scale_ptr + head, mask=head < kv_heads, other=1.0)[:, None]
            v_scale = tl.load(v_scale_ptr + head, mask=head < kv_heads, other=1.0)[:, None]
            k_first, k_second = tl.div_rn(k_first, k_scale), tl.div_rn(k_second, k_scale)
            v_first, v_second = tl.div_rn(v_first, v_scale), tl.div_rn(v_second, v_scale)
        _store_pair(k_cache_ptr + cache, k_first, k_second, mask, half)
        _store_pair(v_cache_ptr + cache, v_first, v_second, mask, half)


@triton.jit
def _store_pair(place, first, second, mask, half: tl.constexpr):
    dtype = place.dtype.element_ty
    if dtype == tl.float8e4nv:
        first = tl.clamp(first, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
        second = tl.clamp(second, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    tl.store(place, first.to(dtype), mask=mask)
    tl.store(place + half, second.to(dtype), mask=mask)


def rope_and_append_kv_(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate q and k (half-split pairs), write k and v into their pages, return the rotated q (T, Hq, D).

    q: (T, Hq, D); k, v: (T, Hk, D), each token's heads dense; table: (positions, 2, D / 2) fp32, cosines then sines;
    positions, slot_mapping: (T,) int64, the latter ``page * page_size + offset``; k_cache, v_cache: (pages, Hk,
    page_size, D), dense, of q's dtype or FP8 e4m3, then divided by k_scale, v_scale: (Hk,) fp32.
    """
    tokens, heads, dim = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    assert k.shape == v.shape == (tokens, kv_heads, dim) and dim % 2 == 0, (q.shape, k.shape, v.shape)
    assert all(x.stride(1) == dim and x.stride(2) == 1 for x in (q, k, v)), (q.stride(), k.stride(), v.stride())
    assert table.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device)
    if tokens:
        grid = (tokens, triton.cdiv(heads, _HEADS) + triton.cdiv(kv_heads, _HEADS))
        _rope_kernel[grid](
            out, q, k, v, table, positions, slot_mapping, k_cache, v_cache, k_scale, v_scale,
            q.stride(0), k.stride(0), v.stride(0), k_cache.stride(0), k_cache.stride(1), heads, kv_heads,
            HAS_SCALES=k_scale is not None, PAGE_SIZE=page_size, DIM=dim, HEADS=_HEADS,
            HALF=triton.next_power_of_2(dim // 2), num_warps=2, **dependent(q.device),
        )  # fmt: skip
    return out
