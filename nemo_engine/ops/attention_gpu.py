"""Adapters of attention kernels for GPUs: which rows go to which kernel."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from nemo_engine.ops.attention import AttentionMeta


def paged_attention_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMeta,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """``paged_attention`` in Triton. The plan of the decode rows is made once a step, on the device.

    A decode row's last bits depend on the other decode rows of its step, since these decide how its keys are split.
    """
    kernels = importlib.import_module("nemo_engine.kernels.attention")
    assert q.stride(2) == 1 and k_cache.is_contiguous() and v_cache.is_contiguous(), (q.stride(), k_cache.stride())
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decodes = meta.num_decodes
    if decodes:
        lens = meta.seq_lens[:decodes]
        units = kernels.num_decode_units(k_cache.shape[1], q.device)
        plan = meta.once("decode plan", lambda: kernels.plan_decode(lens, units))
        kernels.decode(
            out[:decodes],
            q[:decodes],
            k_cache,
            v_cache,
            meta.page_table,
            meta.slot_ids[:decodes],
            lens,
            plan,
            scale,
            k_scale,
            v_scale,
        )
    if decodes < meta.seq_lens.shape[0]:
        kernels.prefill(
            out,
            q,
            k_cache,
            v_cache,
            meta.page_table,
            meta.slot_ids,
            meta.query_start_loc,
            meta.seq_lens,
            scale,
            decodes,
            q.shape[0] - decodes,
            k_scale,
            v_scale,
        )
    return out


def paged_attention_flash_attn(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMeta,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """``paged_attention`` by FlashAttention 3: one call for the decode rows, one for the others. Not for FP8 caches."""
    flash = importlib.import_module("flash_attn_interface")
    assert k_scale is None and v_scale is None and k_cache.dtype == q.dtype, (k_cache.dtype, q.dtype)
    pages = meta.once("int32 pages", lambda: meta.pages.to(torch.int32))
    lens = meta.once("int32 lengths", lambda: meta.seq_lens.to(torch.int32))
    starts = meta.once("int32 starts", lambda: meta.query_start_loc.to(torch.int32))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decodes = meta.num_decodes
    # Its pages are (tokens, heads, D), ours (heads, tokens, D): it takes strides.
    caches = {"k_cache": k_cache.transpose(1, 2), "v_cache": v_cache.transpose(1, 2)}
    if decodes:
        out[:decodes] = flash.flash_attn_with_kvcache(
            q[:decodes].unsqueeze(1),
            **caches,
            cache_seqlens=lens[:decodes],
            page_table=pages[:decodes],
            softmax_scale=scale,
            causal=True,
        ).squeeze(1)
    if decodes < meta.seq_lens.shape[0]:
        out[decodes:] = flash.flash_attn_with_kvcache(
            q[decodes:],
            **caches,
            cache_seqlens=lens[decodes:],
            page_table=pages[decodes:],
            cu_seqlens_q=starts[decodes:] - decodes,  # each decode row before is one query
            max_seqlen_q=meta.longest,
            softmax_scale=scale,
            causal=True,
        )
    return out
