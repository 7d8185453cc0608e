"""Rotary embedding of q and k, and the write of k and v into their pages, by the Triton kernel."""

from __future__ import annotations

import importlib

from torch import Tensor

from nemo_engine.ops.paged_kv import PagedKV
from nemo_engine.ops.rope import RopeMeta


def rope_and_append_kv_(q: Tensor, k: Tensor, v: Tensor, kv: PagedKV, meta: RopeMeta) -> Tensor:
    """As ``nemo_engine.ops.rope.rope_and_append_kv_``; each token's heads dense."""
    kernels = importlib.import_module("nemo_engine.kernels.rope")
    rotated: Tensor = kernels.rope_and_append_kv_(
        q, k, v, meta.table, meta.positions, meta.slot_mapping, kv.k, kv.v, kv.k_scale, kv.v_scale
    )
    return rotated
