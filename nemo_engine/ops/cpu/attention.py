"""Paged attention for the CPU: all decode rows at once, page by page; prefill rows by SDPA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_engine.ops.attention import AttentionMeta, Workspace, gather_row
from nemo_engine.ops.paged_kv import PagedKV

_BLOCK_BYTES = 2 << 20  # of widened pages that decode attention works on at once, so that they stay in L2


@dataclass(frozen=True, slots=True, eq=False)
class DecodePages:
    """The N pages that the decode rows of a step read, row after row."""

    pages: Tensor  # (N,) int64
    row: Tensor  # (N,) int64: which row reads each
    is_past_end: Tensor  # (N, page_size) bool: places past the row's last key, all in the rows' last pages
    tails: list[tuple[int, int]]  # (index into pages, first place past the end) of the last pages that are not full


def _decode_pages(meta: AttentionMeta) -> DecodePages:
    """What the decode rows read; the same for all layers of the step."""
    lens = meta.seq_lens[: meta.num_decodes]
    num_pages = (lens + (meta.page_size - 1)) // meta.page_size
    is_page = torch.arange(meta.num_pages, device=lens.device) < num_pages.unsqueeze(1)
    row, index = is_page.nonzero(as_tuple=True)
    pages = meta.pages[: meta.num_decodes][row, index]
    num_valid = (lens[row] - index * meta.page_size).clamp_(max=meta.page_size)
    is_past_end = torch.arange(meta.page_size, device=lens.device) >= num_valid.unsqueeze(1)
    last = (num_pages.cumsum(0) - 1)[num_pages > 0]
    tails = [pair for pair in zip(last.tolist(), num_valid[last].tolist(), strict=True) if pair[1] < meta.page_size]
    return DecodePages(pages, row, is_past_end, tails)


def paged_attention(q: Tensor, kv: PagedKV, meta: AttentionMeta, scale: float) -> Tensor:
    """``paged_attention``, vectorised for the CPU: all decode rows at once, page by page; prefill rows by SDPA.

    An FP8 cache is widened as it is, and its factors are applied to the queries and to the result.
    """
    dtype = q.dtype
    if kv.dtype.itemsize == 1:
        q = q.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if kv.k_scale is not None:
        q = q * _per_query_head(kv.k_scale, q)
    out = torch.empty_like(q)
    decodes = meta.num_decodes
    if decodes:
        out[:decodes] = _decode(q[:decodes], kv, meta, scale)
    prefill_(out, range(decodes, len(meta.seq_lens)), q, kv, meta, scale)
    return (out if kv.v_scale is None else out * _per_query_head(kv.v_scale, q)).to(dtype)


def prefill_(out: Tensor, rows: Iterable[int], q: Tensor, kv: PagedKV, meta: AttentionMeta, scale: float) -> None:
    """Write the attention of ``rows`` into ``out``, each by SDPA and without factors. out, q: (T, Hq, D)."""
    starts, lens = meta.query_start_loc.tolist(), meta.seq_lens.tolist()
    for row in [row for row in rows if starts[row] < starts[row + 1]]:  # SDPA dies of no queries
        k, v = (gather_row(cache, meta.pages[row], lens[row]).to(q.dtype) for cache in kv.caches)
        queries = slice(starts[row], starts[row + 1])
        out[queries] = _prefill(q[queries], k, v, scale)


def _per_query_head(factors: Tensor, q: Tensor) -> Tensor:
    """(Hk,) -> (Hq, 1) in q's dtype."""
    return factors.to(q.dtype).repeat_interleave(q.shape[1] // len(factors)).unsqueeze(1)


def _decode(q: Tensor, kv: PagedKV, meta: AttentionMeta, scale: float) -> Tensor:
    """One query per row. Every page is a partial attention of its own; a row's pages are then combined.

    With m the row's largest score, page j contributes ``sum exp(s - m) v`` and ``sum exp(s - m)``.
    q: (B, Hq, D) -> (B, Hq, D).
    """
    num_rows, num_heads, dim = q.shape
    kv_heads, page_size = kv.num_heads, kv.page_size
    group = num_heads // kv_heads
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    plan: DecodePages = meta.once("decode pages", lambda: _decode_pages(meta))
    pages, row = plan.pages, plan.row
    grouped = (q.to(wide) * scale).view(num_rows, kv_heads, group, dim)[row]  # (N, Hk, G, D)
    scores = grouped.new_empty(len(pages), kv_heads, group, page_size)
    for block, k in _page_blocks(kv.k, pages, wide, meta.workspace):
        torch.bmm(grouped[block].flatten(0, 1), k.flatten(0, 1).transpose(1, 2), out=scores[block].flatten(0, 1))
    scores.masked_fill_(plan.is_past_end[:, None, None], -torch.inf)
    page_max = scores.amax(-1)  # (N, Hk, G)
    row_max = page_max.new_full((num_rows, kv_heads, group), -torch.inf)
    row_max.scatter_reduce_(0, row[:, None, None].expand_as(page_max), page_max, "amax")
    weights = scores.sub_(row_max[row].unsqueeze(-1)).exp_()
    partial = torch.empty_like(grouped)
    tails = iter(plan.tails)
    tail = next(tails, None)
    for block, v in _page_blocks(kv.v, pages, wide, meta.workspace):
        # A last page's tail may hold anything, NaN too, and 0 * NaN is NaN.
        while tail is not None and tail[0] < block.stop:
            v[tail[0] - block.start, :, tail[1] :].zero_()
            tail = next(tails, None)
        torch.bmm(weights[block].flatten(0, 1), v.flatten(0, 1), out=partial[block].flatten(0, 1))
    total = partial.new_zeros(num_rows, kv_heads, group, dim).index_add_(0, row, partial)
    mass = partial.new_zeros(num_rows, kv_heads, group).index_add_(0, row, weights.sum(-1))
    mass.masked_fill_(mass == 0, 1.0)  # of a row of no keys
    return (total / mass.unsqueeze(-1)).view(num_rows, num_heads, dim).to(q.dtype)


def _page_blocks(
    cache: Tensor, pages: Tensor, wide: torch.dtype, workspace: Workspace
) -> Iterator[tuple[slice, Tensor]]:
    """Copies of whole pages, widened, some at a time so that they stay in the core's cache: (n, Hk, page_size, D)."""
    page_shape = cache.shape[1:]
    count = max(1, _BLOCK_BYTES // (page_shape.numel() * wide.itemsize))
    for start in range(0, len(pages), count):
        block = slice(start, min(start + count, len(pages)))
        shape = (block.stop - start, *page_shape)
        gathered = workspace.take("pages", shape, cache.dtype, cache.device)
        torch.index_select(cache, 0, pages[block], out=gathered)
        if cache.dtype != wide:
            gathered = workspace.take("wide pages", shape, wide, cache.device).copy_(gathered)
        yield block, gathered


def _prefill(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The queries of one row, at the end of its keys. q: (t, Hq, D); k, v: (Hk, L, D) -> (t, Hq, D).

    Keys before the chunk need no mask and the chunk itself is plainly causal: two attentions, merged by their
    log-sum-exps, so no (t, L) mask is ever made.
    """
    kv_heads, num_keys, _ = k.shape
    group = q.shape[1] // kv_heads
    grouped = q.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)  # (Hk, G, t, D): KV heads are the batch of SDPA
    k, v = (x.unsqueeze(1).expand(-1, group, -1, -1) for x in (k, v))  # (Hk, G, L, D), not copied
    prefix = num_keys - len(q)
    out, lse = _attend(grouped, k[:, :, prefix:], v[:, :, prefix:], True, scale)
    if prefix:
        before, before_lse = _attend(grouped, k[:, :, :prefix], v[:, :, :prefix], False, scale)
        weight = torch.sigmoid(before_lse - lse).unsqueeze(-1)
        out = torch.lerp(out.to(lse.dtype), before.to(lse.dtype), weight)
    return out.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """SDPA for the CPU, and the log-sum-exp of its scores: q's shape, and the same without D."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    return out, lse
