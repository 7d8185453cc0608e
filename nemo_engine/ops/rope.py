"""Rotary position embedding of q and k, and the write of k and v into their pages, in one operation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nemo_engine.ops.op import Case, Op


def rope_table(head_dim: int, theta: float, max_len: int, device: torch.device) -> Tensor:
    """Cosines and sines of every position: (max_len, 2, head_dim / 2) fp32.

    Angle of position p and pair i: ``p * theta^(-2 i / head_dim)``, in fp32 as in transformers (``rotate_half``).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequencies = 1.0 / (theta**exponents)
    table = torch.empty(max_len, 2, head_dim // 2, device=device)
    torch.mul(torch.arange(max_len, device=device).float().unsqueeze(1), frequencies, out=table[:, 0])
    torch.sin(table[:, 0], out=table[:, 1])
    table[:, 0].cos_()
    return table


def rope_and_append_kv_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """Rotate q and k (half-split pairs), write k and v into the cache, return the rotated q.

    q: (T, Hq, D); k, v: (T, Hk, D); table: see ``rope_table``; positions, slot_mapping: (T,) int64, the latter being
    ``page * page_size + offset``; k_cache, v_cache: (pages, Hk, page_size, D), modified. The rotation is computed in fp32 (fp64
    for fp64) and rounded once. Returns (T, Hq, D).
    """
    angles = table[positions].to(q.dtype if q.dtype == torch.float64 else torch.float32)
    cos, sin = angles[:, :1], angles[:, 1:]  # (T, 1, D / 2) each
    page_size = k_cache.shape[2]
    pages, offsets = slot_mapping // page_size, slot_mapping % page_size
    k_cache[pages, :, offsets] = _rotate(k, cos, sin).to(k_cache.dtype)
    v_cache[pages, :, offsets] = v.to(v_cache.dtype)
    return _rotate(q, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    wide = x.to(cos.dtype)
    out = wide * torch.cat([cos, cos], dim=-1)
    out[..., :half].addcmul_(wide[..., half:], sin, value=-1)
    out[..., half:].addcmul_(wide[..., :half], sin)
    return out.to(x.dtype)


def _cases() -> Iterator[Case]:
    for tokens, heads, kv_heads, dim, page_size in ((1, 4, 1, 8, 16), (7, 2, 2, 16, 16), (40, 8, 2, 128, 64)):

        def make(
            dtype: torch.dtype,
            tokens: int = tokens,
            heads: int = heads,
            kv: int = kv_heads,
            dim: int = dim,
            size: int = page_size,
        ) -> tuple[object, ...]:
            generator = torch.Generator().manual_seed(tokens)
            q, k, v = (torch.randn(tokens, n, dim, generator=generator).to(dtype) for n in (heads, kv, kv))
            num_pages = tokens // size + 3
            caches = [torch.full((num_pages, kv, size, dim), torch.nan, dtype=dtype) for _ in range(2)]
            positions = torch.randperm(4 * tokens, generator=generator)[:tokens]
            mapping = size + torch.randperm((num_pages - 1) * size, generator=generator)[:tokens]
            table = rope_table(dim, 10000.0, 4 * tokens, torch.device("cpu"))
            return q, k, v, table, positions, mapping, *caches

        yield Case(f"{tokens} tokens, {heads}/{kv_heads} heads of {dim}", make)


def _cost(q: Tensor, k: Tensor, v: Tensor, table: Tensor, *rest: Tensor) -> tuple[int, int]:
    return 2 * (q.nbytes + k.nbytes + v.nbytes), 3 * (q.numel() + k.numel())


ROPE_AND_APPEND_KV = Op("rope_and_append_kv_", rope_and_append_kv_, (), _cases, _cost)
