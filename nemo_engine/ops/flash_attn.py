"""Paged attention by FlashAttention 3, where it is installed."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from nemo_engine.ops.attention import AttentionMeta
from nemo_engine.ops.paged_kv import PagedKV


def paged_attention(q: Tensor, kv: PagedKV, meta: AttentionMeta, scale: float) -> Tensor:
    """``paged_attention`` by FlashAttention 3: one call for the decode rows, one for the others. Not for FP8 caches."""
    flash = importlib.import_module("flash_attn_interface")
    assert kv.k_scale is None and kv.v_scale is None and kv.dtype == q.dtype, (kv.dtype, q.dtype)
    pages = meta.once("int32 pages", lambda: meta.pages.to(torch.int32))
    lens = meta.once("int32 lengths", lambda: meta.seq_lens.to(torch.int32))
    starts = meta.once("int32 starts", lambda: meta.query_start_loc.to(torch.int32))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decodes = meta.num_decodes
    # Its pages are (tokens, heads, D), ours (heads, tokens, D): it takes strides.
    caches = {"k_cache": kv.k.transpose(1, 2), "v_cache": kv.v.transpose(1, 2)}
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
