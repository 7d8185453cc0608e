"""Rotary position embedding of q and k, and the write of k and v into their pages, in one operation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_engine.ops.op import Case, Impl, Op, Site, cpu_heads_run, cuda_runs, triton_heads_run
from nemo_engine.ops.paged_kv import PagedKV
from nemo_engine.ops.quantize import FP8, FP8_MAX

_CUDA_HEAD_DIM = 128  # of the models that the CUDA kernel is made for


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


@dataclass(frozen=True, slots=True, eq=False)
class RopeMeta:
    """Where the T tokens of a step lie, and the angles of all positions."""

    table: Tensor  # as ``rope_table`` makes it
    positions: Tensor  # (T,) int64
    slot_mapping: Tensor  # (T,) int64: ``page * page_size + offset`` in the cache


def rope_and_append_kv_(q: Tensor, k: Tensor, v: Tensor, kv: PagedKV, meta: RopeMeta) -> Tensor:
    """Rotate q and k (half-split pairs), write k and v into the cache, return the rotated q.

    q: (T, Hq, D); k, v: (T, Hk, D); the caches of ``kv`` are modified. The rotation is computed in fp32 (fp64 for fp64)
    and rounded once. An FP8 cache holds the rounded entries divided by their head's factor, saturated at the largest
    FP8 number. Returns (T, Hq, D).
    """
    angles = meta.table[meta.positions].to(q.dtype if q.dtype == torch.float64 else torch.float32)
    cos, sin = angles[:, :1], angles[:, 1:]  # (T, 1, D / 2) each
    pages, offsets = meta.slot_mapping // kv.page_size, meta.slot_mapping % kv.page_size
    _store_(kv.k, pages, offsets, _rotate(k, cos, sin), kv.k_scale)
    _store_(kv.v, pages, offsets, v, kv.v_scale)
    return _rotate(q, cos, sin)


def _store_(cache: Tensor, pages: Tensor, offsets: Tensor, x: Tensor, scale: Tensor | None) -> None:
    """x: (T, Hk, D)."""
    is_fp8 = cache.dtype == FP8
    if is_fp8 or scale is not None:
        x = x if x.dtype == torch.float64 else x.float()
        if scale is not None:
            x = x / scale.to(x.dtype).unsqueeze(1)
        x = x.clamp(-FP8_MAX, FP8_MAX)
    if is_fp8:  # written as bytes: not every device can scatter FP8
        cache.view(torch.uint8)[pages, :, offsets] = x.to(cache.dtype).view(torch.uint8)
    else:
        cache[pages, :, offsets] = x.to(cache.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    wide = x.to(cos.dtype)
    out = wide * torch.cat([cos, cos], dim=-1)
    out[..., :half].addcmul_(wide[..., half:], sin, value=-1)
    out[..., half:].addcmul_(wide[..., :half], sin)
    return out.to(x.dtype)


def _cases() -> Iterator[Case]:
    for tokens, heads, kv_heads, dim, page_size in (
        (0, 4, 1, 8, 16), (1, 4, 1, 8, 16), (7, 2, 2, 16, 16), (5, 6, 3, 24, 32), (3, 64, 8, 128, 128),
        (40, 8, 2, 128, 64), (0, 4, 1, 128, 16), (1, 32, 8, 128, 16), (37, 4, 1, 128, 32), (2, 6, 3, 128, 16),
    ):  # fmt: skip
        for is_fp8 in (False, True):

            def make(
                dtype: torch.dtype,
                tokens: int = tokens,
                heads: int = heads,
                kv: int = kv_heads,
                dim: int = dim,
                size: int = page_size,
                is_fp8: bool = is_fp8,
            ) -> tuple[object, ...]:
                generator = torch.Generator().manual_seed(tokens)
                qkv = torch.randn(tokens, (heads + 2 * kv) * dim, generator=generator).to(dtype)
                q, k, v = (x.unflatten(1, (-1, dim)) for x in qkv.split([heads * dim, kv * dim, kv * dim], dim=1))
                num_pages = tokens // size + 3
                kv_dtype = FP8 if is_fp8 else dtype
                caches = [torch.full((num_pages, kv, size, dim), torch.nan).to(kv_dtype) for _ in range(2)]
                positions = torch.randperm(4 * tokens + 1, generator=generator)[:tokens]
                mapping = size + torch.randperm((num_pages - 1) * size, generator=generator)[:tokens]
                table = rope_table(dim, 10000.0, 4 * tokens + 1, torch.device("cpu"))
                # Small enough that some entries saturate.
                scales = [0.004 + 0.004 * torch.rand(kv, generator=generator) if is_fp8 else None for _ in range(2)]
                return q, k, v, PagedKV(*caches, *scales), RopeMeta(table, positions, mapping)

            name = f"{tokens} tokens, {heads}/{kv_heads} heads of {dim}{', fp8' if is_fp8 else ''}"
            site = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim, "page_size": page_size}
            yield Case(name, make, site | {"kv_dtype": FP8 if is_fp8 else None})


def _cost(q: Tensor, k: Tensor, v: Tensor, kv: PagedKV, meta: RopeMeta) -> tuple[int, int]:
    return 2 * q.nbytes + k.nbytes + v.nbytes + 2 * k.numel() * kv.dtype.itemsize, 3 * (q.numel() + k.numel())


def _triton_supports(site: Site) -> str | None:
    return f"an even head_dim, this is {site.head_dim}" if site.head_dim % 2 else triton_heads_run(site)


def _cuda_supports(site: Site) -> str | None:
    if site.head_dim != _CUDA_HEAD_DIM:
        return f"heads of {_CUDA_HEAD_DIM}, these have {site.head_dim}"
    if site.page_size & (site.page_size - 1):
        return f"a page_size that is a power of two, this is {site.page_size}"
    return cuda_runs(site)


ROPE_AND_APPEND_KV = Op(
    "rope_and_append_kv_",
    rope_and_append_kv_,
    (
        Impl("triton", "nemo_engine.ops.triton.rope:rope_and_append_kv_", _triton_supports),
        Impl("cuda", "nemo_engine.ops.cuda.rope:rope_and_append_kv_", _cuda_supports),
        Impl("cpu", "nemo_engine.ops.cpu.compiled:rope_and_append_kv_", cpu_heads_run),
    ),
    _cases,
    _cost,
)
