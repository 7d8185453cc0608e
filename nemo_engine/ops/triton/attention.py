"""Paged attention by the Triton kernels: decode rows, a run of them at once, by the decode kernel, rows of several
queries by the prefill kernel.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from nemo_engine.ops.attention import AttentionMeta
from nemo_engine.ops.paged_kv import PagedKV


def paged_attention(q: Tensor, kv: PagedKV, meta: AttentionMeta, scale: float) -> Tensor:
    """As ``nemo_engine.ops.attention.paged_attention``. The plan of the decode rows is made once a step, on the device.

    A decode row's last bits depend on the other decode rows of its step, since these decide how its keys are split.
    """
    assert q.stride(2) == 1 and kv.k.is_contiguous() and kv.v.is_contiguous(), (q.stride(), kv.k.stride())
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decodes = meta.num_decodes
    if decodes:
        kernels = importlib.import_module("nemo_engine.kernels.decode")
        query_lens, run = meta.seq_lens[:decodes], meta.run_length
        lens = meta.once("run lengths", lambda: query_lens.view(-1, run).amax(1)) if run > 1 else query_lens
        units = kernels.num_decode_units(kv.num_heads, q.device)
        is_padded = meta.max_queries is not None
        plan = meta.once("decode plan", lambda: kernels.plan_decode(lens, units, kv.num_heads, is_padded))
        kernels.decode(
            out[:decodes], q[:decodes], kv.k, kv.v, meta.page_table, meta.slot_ids[:decodes], lens, plan, scale,
            kv.k_scale, kv.v_scale, query_lens if run > 1 else None,
        )  # fmt: skip
    if decodes < meta.seq_lens.shape[0]:
        importlib.import_module("nemo_engine.kernels.attention").prefill(
            out, q, kv.k, kv.v, meta.page_table, meta.slot_ids, meta.query_start_loc, meta.seq_lens, scale, decodes,
            q.shape[0] - decodes if meta.max_queries is None else meta.max_queries, kv.k_scale, kv.v_scale,
        )  # fmt: skip
    return out
