"""Causal attention of a step's query tokens over their requests' paged keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from nemo_engine.ops.op import Case, Impl, Op, cpu_only

_BLOCK_BYTES = 2 << 20  # of widened pages that decode attention works on at once, so that they stay in L2
_SCORES = 1 << 26  # scores that the definition holds at once, of as many queries as that is: 256 MiB in fp32


class Workspace:
    """Scratch memory that is used again from layer to layer and step to step; grows to the largest request."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; the one taken before under this name is overwritten."""
        count = 1
        for size in shape:
            count *= size
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[name, dtype] = torch.empty(count, dtype=dtype, device=device)
        return buffer[:count].view(shape)


@dataclass(frozen=True, slots=True, eq=False)
class DecodePages:
    """The N pages that the decode rows of a step read, row after row."""

    pages: Tensor  # (N,) int64
    row: Tensor  # (N,) int64: which row reads each
    is_past_end: Tensor  # (N, page_size) bool: places past the row's last key, all in the rows' last pages
    tails: list[tuple[int, int]]  # (index into pages, first place past the end) of the last pages that are not full


@dataclass(frozen=True, eq=False)
class AttentionMeta:
    """Where the rows of a step lie. R rows, decode rows first; row i has queries ``query_start_loc[i] .. [i + 1] - 1``.

    ``seq_lens[i]`` counts the keys of row i, those of its own queries included; its last query sees all of them.
    ``page_table`` is (R, pages), int64; entries past a row's last page mean nothing.
    """

    num_decodes: int
    query_start_loc: Tensor  # (R + 1,) int64
    seq_lens: Tensor  # (R,) int64
    page_table: Tensor  # (R, pages) int64
    page_size: int
    workspace: Workspace = field(default_factory=Workspace)

    @cached_property
    def decode_pages(self) -> DecodePages:
        """What the decode rows read; the same for all layers of the step."""
        lens = self.seq_lens[: self.num_decodes]
        num_pages = (lens + (self.page_size - 1)) // self.page_size
        is_page = torch.arange(self.page_table.shape[1], device=lens.device) < num_pages.unsqueeze(1)
        row, index = is_page.nonzero(as_tuple=True)
        pages = self.page_table[: self.num_decodes][row, index]
        num_valid = (lens[row] - index * self.page_size).clamp_(max=self.page_size)
        is_past_end = torch.arange(self.page_size, device=lens.device) >= num_valid.unsqueeze(1)
        last = num_pages.cumsum(0) - 1
        tails = [pair for pair in zip(last.tolist(), num_valid[last].tolist(), strict=True) if pair[1] < self.page_size]
        return DecodePages(pages, row, is_past_end, tails)


def paged_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float) -> Tensor:
    """``softmax(scale * q k^T) v`` of each query over the keys of its request up to its own position.

    q: (T, Hq, D); k_cache, v_cache: (pages, Hk, page_size, D), Hq a multiple of Hk, query head h reading KV head
    ``h // (Hq / Hk)``. Scores and sums are in fp32 (fp64 for fp64). Returns (T, Hq, D).
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty_like(q)
    starts, lens = meta.query_start_loc.tolist(), meta.seq_lens.tolist()
    for row, length in enumerate(lens):
        k, v = (_gather_row(cache, meta.page_table[row], length).to(wide) for cache in (k_cache, v_cache))
        group = q.shape[1] // k.shape[0]
        first = length - (starts[row + 1] - starts[row])  # position of the row's first query
        block_size = max(1, _SCORES // (q.shape[1] * max(1, length)))
        for begin in range(starts[row], starts[row + 1], block_size):
            end = min(begin + block_size, starts[row + 1])
            position = first + begin - starts[row]
            num_keys = position + end - begin
            block = q[begin:end].to(wide).transpose(0, 1).unflatten(0, (-1, group))  # (Hk, G, t, D)
            scores = block @ k[:, None, :num_keys].transpose(-1, -2) * scale
            is_later = torch.ones(end - begin, num_keys, dtype=torch.bool, device=q.device).triu_(position + 1)
            weights = scores.masked_fill_(is_later, -torch.inf).softmax(-1)
            out[begin:end] = (weights @ v[:, None, :num_keys]).flatten(0, 1).transpose(0, 1).to(q.dtype)
    return out


def paged_attention_torch(q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float) -> Tensor:
    """``paged_attention``, vectorised for the CPU: all decode rows at once, page by page; prefill rows by SDPA."""
    out = torch.empty_like(q)
    decodes = meta.num_decodes
    if decodes:
        out[:decodes] = _decode(q[:decodes], k_cache, v_cache, meta, scale)
    if decodes < len(meta.seq_lens):
        starts, lens = meta.query_start_loc.tolist(), meta.seq_lens.tolist()
        for row in range(decodes, len(lens)):
            k, v = (_gather_row(cache, meta.page_table[row], lens[row]) for cache in (k_cache, v_cache))
            queries = slice(starts[row], starts[row + 1])
            out[queries] = _prefill(q[queries], k, v, scale)
    return out


def _gather_row(cache: Tensor, page_table: Tensor, length: int) -> Tensor:
    """The first ``length`` entries of one row: (Hk, length, D)."""
    page_size = cache.shape[2]
    pages = cache[page_table[: -(-length // page_size)]]  # (n, Hk, page_size, D)
    return pages.transpose(0, 1).flatten(1, 2)[:, :length]


def _decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float) -> Tensor:
    """One query per row. Every page is a partial attention of its own; a row's pages are then combined.

    With m the row's largest score, page j contributes ``sum exp(s - m) v`` and ``sum exp(s - m)``.
    q: (B, Hq, D) -> (B, Hq, D).
    """
    num_rows, num_heads, dim = q.shape
    _, kv_heads, page_size, _ = k_cache.shape
    group = num_heads // kv_heads
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    plan = meta.decode_pages
    pages, row = plan.pages, plan.row
    grouped = (q.to(wide) * scale).view(num_rows, kv_heads, group, dim)[row]  # (N, Hk, G, D)
    scores = grouped.new_empty(len(pages), kv_heads, group, page_size)
    for block, k in _page_blocks(k_cache, pages, wide, meta.workspace):
        torch.bmm(grouped[block].flatten(0, 1), k.flatten(0, 1).transpose(1, 2), out=scores[block].flatten(0, 1))
    scores.masked_fill_(plan.is_past_end[:, None, None], -torch.inf)
    page_max = scores.amax(-1)  # (N, Hk, G)
    row_max = page_max.new_full((num_rows, kv_heads, group), -torch.inf)
    row_max.scatter_reduce_(0, row[:, None, None].expand_as(page_max), page_max, "amax")
    weights = scores.sub_(row_max[row].unsqueeze(-1)).exp_()
    partial = torch.empty_like(grouped)
    tails = iter(plan.tails)
    tail = next(tails, None)
    for block, v in _page_blocks(v_cache, pages, wide, meta.workspace):
        # A last page's tail may hold anything, NaN too, and 0 * NaN is NaN.
        while tail is not None and tail[0] < block.stop:
            v[tail[0] - block.start, :, tail[1] :].zero_()
            tail = next(tails, None)
        torch.bmm(weights[block].flatten(0, 1), v.flatten(0, 1), out=partial[block].flatten(0, 1))
    total = partial.new_zeros(num_rows, kv_heads, group, dim).index_add_(0, row, partial)
    mass = partial.new_zeros(num_rows, kv_heads, group).index_add_(0, row, weights.sum(-1))
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


def _cases() -> Iterator[Case]:
    for name, heads, kv_heads, dim, page_size, rows in (
        ("one decode", 4, 1, 8, 16, [(1, 1)]),
        ("decodes around a page boundary", 8, 2, 16, 16, [(1, 15), (1, 16), (1, 17), (1, 1), (1, 49)]),
        ("one long decode among short ones", 8, 1, 16, 16, [(1, 3), (1, 900), (1, 2)]),
        ("whole prefills", 4, 4, 8, 16, [(15, 15), (16, 16), (17, 17), (1, 1)]),
        ("chunks over a prefix", 8, 2, 16, 16, [(5, 37), (1, 17), (16, 32), (300, 700)]),
        ("mixed", 6, 2, 32, 64, [(1, 64), (1, 65), (33, 129), (64, 64)]),
        ("true size", 32, 8, 128, 64, [(1, 130), (3, 67)]),
    ):  # fmt: skip

        def make(
            dtype: torch.dtype,
            heads: int = heads,
            kv_heads: int = kv_heads,
            dim: int = dim,
            page_size: int = page_size,
            rows: list[tuple[int, int]] = rows,
        ) -> tuple[object, ...]:
            return attention_inputs(rows, heads, kv_heads, dim, page_size, dtype)

        yield Case(name, make)


def attention_inputs(
    rows: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, page_size: int, dtype: torch.dtype
) -> tuple[object, ...]:
    """Random arguments for ``rows`` of (queries, keys), single-query rows at the front being decodes.

    Pages are shuffled, and every cache entry that must not be read is NaN.
    """
    generator = torch.Generator().manual_seed(sum(length for _, length in rows))
    widths = [-(-length // page_size) for _, length in rows]
    order = (1 + torch.randperm(sum(widths) + 2, generator=generator)).tolist()
    caches = [torch.full((sum(widths) + 3, kv_heads, page_size, dim), torch.nan) for _ in range(2)]
    page_table = torch.zeros(len(rows), max(widths), dtype=torch.int64)
    for index, (_, length) in enumerate(rows):
        pages = [order.pop() for _ in range(widths[index])]
        page_table[index, : len(pages)] = torch.tensor(pages)
        for cache in caches:
            content = torch.randn(kv_heads, len(pages) * page_size, dim, generator=generator)
            content[:, length:] = torch.nan
            cache[pages] = content.unflatten(1, (-1, page_size)).transpose(0, 1)
    queries = [count for count, _ in rows]
    num_decodes = next((i for i, count in enumerate(queries) if count > 1), len(rows))
    starts = torch.tensor([0, *queries]).cumsum(0)
    q = torch.randn(sum(queries), heads, dim, generator=generator).to(dtype)
    meta = AttentionMeta(num_decodes, starts, torch.tensor([length for _, length in rows]), page_table, page_size)
    return q, caches[0].to(dtype), caches[1].to(dtype), meta, dim**-0.5


def _cost(q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMeta, scale: float) -> tuple[int, int]:
    kv_heads, _, dim = k_cache.shape[1:]
    num_bytes, flops = 2 * q.nbytes, 0
    for queries, length in zip(meta.query_start_loc.diff().tolist(), meta.seq_lens.tolist(), strict=True):
        num_bytes += 2 * length * kv_heads * dim * k_cache.element_size()
        flops += 4 * q.shape[1] * dim * (queries * length - queries * (queries - 1) // 2)
    return num_bytes, flops


PAGED_ATTENTION = Op(
    "paged_attention",
    paged_attention,
    (Impl("torch", "nemo_engine.ops.attention:paged_attention_torch", cpu_only),),
    _cases,
    _cost,
)
