"""Causal attention of a step's query tokens over their requests' paged keys and values."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from nemo_engine.ops.op import Case, Impl, Op, Site, cpu_heads_run, cpu_only, cuda_runs, triton_heads_run
from nemo_engine.ops.paged_kv import PagedKV

_TRITON_MAX_HEAD_DIM = 256
_TRITON_MAX_GROUP = 64  # of 128 rows in a prefill tile
_CUDA_HEAD_DIM = 128
_CUDA_GROUPS = (1, 2, 4, 8)
_CUDA_PAGE_SIZES = (16, 32, 64, 128)
_SCORES = 1 << 26  # scores that the definition holds at once, of as many queries as that is: 256 MiB in fp32


class Workspace:
    """Scratch memory that is used again from layer to layer and step to step; grows to the largest request."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._frozen: tuple[Tensor, ...] = ()

    def freeze(self) -> None:
        """Keep the memory of all buffers from now on: captured graphs write to it.

        One that grows later is a new one beside it.
        """
        self._frozen = tuple(self._buffers.values())

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; the one taken before under this name is overwritten."""
        count = 1
        for size in shape:
            count *= size
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[name, dtype] = torch.empty(count, dtype=dtype, device=device)
        return buffer[:count].view(shape)


@dataclass(frozen=True, eq=False)
class AttentionMeta:
    """Where the rows of a step lie. R rows, decode rows first; row i has queries ``query_start_loc[i] .. [i + 1] - 1``.

    ``seq_lens[i]`` counts the keys of row i, those of its own queries included; its last query sees all of them. Its
    pages are ``page_table[slot_ids[i]]``; entries past its last page mean nothing. A decode row has one query. In a
    wide step decode rows come in runs of ``run_length`` (2, 4 or 8), whose keys a kernel may read once for all: the
    rows of a run are of one slot, that of its first. A row of slot 0 in a run of another is padding, whose result means
    nothing.

    Decode rows may end with empty ones, of no query and no keys, in steps that are padded to a fixed number of rows:
    query i is still that of decode row i, and the queries that follow are those of the rows after them.
    ``max_queries`` is set then.
    """

    num_decodes: int
    query_start_loc: Tensor  # (R + 1,) int64
    seq_lens: Tensor  # (R,) int64
    page_table: Tensor  # (slots, pages) int64
    slot_ids: Tensor  # (R,) int64
    page_size: int
    num_pages: int  # of the row that has the most, or more
    longest: int  # row, in queries
    workspace: Workspace = field(default_factory=Workspace)
    prefill_pages: tuple[int, ...] | None = None  # of each row from num_decodes on, or more; None: num_pages each
    run_length: int = 1  # decode rows
    max_queries: int | None = None  # of the rows from num_decodes on together; None: there are no empty decode rows
    max_pages: int | None = None  # of these rows together; None: see prefill_pages
    _kept: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns, made by the first layer of the step that asks and kept for the others."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    @cached_property
    def pages(self) -> Tensor:
        """(R, num_pages) int64: the pages of each row."""
        return self.page_table[:, : self.num_pages][self.slot_ids]


def paged_attention(q: Tensor, kv: PagedKV, meta: AttentionMeta, scale: float) -> Tensor:
    """``softmax(scale * q k^T) v`` of each query over the keys of its request up to its own position.

    q: (T, Hq, D), Hq a multiple of the KV heads Hk, query head h reading KV head ``h // (Hq / Hk)``. Scores and sums
    are in fp32 (fp64 for fp64). A decode row may have no keys: zeros. Returns (T, Hq, D).
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty_like(q)
    starts, lens = meta.query_start_loc.tolist(), meta.seq_lens.tolist()
    for row, length in enumerate(lens):
        k, v = (
            _scaled(gather_row(cache, meta.pages[row], length).to(wide), factors)
            for cache, factors in ((kv.k, kv.k_scale), (kv.v, kv.v_scale))
        )
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


def _scaled(x: Tensor, factors: Tensor | None) -> Tensor:
    """x: (Hk, L, D), times a factor per head."""
    return x if factors is None else x * factors.to(x.dtype).view(-1, 1, 1)


def gather_row(cache: Tensor, page_table: Tensor, length: int) -> Tensor:
    """The first ``length`` entries of one row: (Hk, length, D)."""
    page_size = cache.shape[2]
    pages = cache[page_table[: -(-length // page_size)]]  # (n, Hk, page_size, D)
    return pages.transpose(0, 1).flatten(1, 2)[:, :length]


def _cases() -> Iterator[Case]:
    for name, heads, kv_heads, dim, page_size, rows in (
        ("one decode", 4, 1, 8, 16, [(1, 1)]),
        ("decodes around a page boundary", 8, 2, 16, 16, [(1, 15), (1, 16), (1, 17), (1, 1), (1, 49)]),
        ("one long decode among short ones", 8, 1, 16, 16, [(1, 3), (1, 900), (1, 2)]),
        ("whole prefills", 4, 4, 8, 16, [(15, 15), (16, 16), (17, 17), (1, 1)]),
        ("chunks over a prefix", 8, 2, 16, 16, [(5, 37), (1, 17), (16, 32), (300, 700)]),
        ("mixed", 6, 2, 32, 64, [(1, 64), (1, 65), (33, 129), (64, 64)]),
        ("no, one and many keys", 4, 1, 16, 16, [(1, 0), (1, 64), (1, 0), (1, 1), (1, 3000), (1, 63), (1, 0)]),
        ("pages of 128", 8, 2, 24, 128, [(1, 127), (1, 128), (1, 129), (70, 300)]),
        ("true size", 32, 8, 128, 64, [(1, 130), (3, 67)]),
        ("heads of 128, one key", 4, 1, 128, 16, [(1, 1)]),
        ("heads of 128, decodes around page boundaries", 8, 2, 128, 16, [(1, 15), (1, 16), (1, 17), (1, 1), (1, 129)]),
        ("heads of 128, pages of 32", 2, 2, 128, 32, [(1, 31), (1, 33), (1, 64), (1, 65), (2, 34)]),
        ("heads of 128, one very long decode", 8, 1, 128, 128, [(1, 5), (1, 2049), (1, 127), (1, 128)]),
        ("heads of 128, a long decode among short ones", 4, 1, 128, 16, [(1, 5)] * 20 + [(1, 2500)] + [(1, 65)] * 19),
        ("heads of 128, decodes of no keys", 8, 2, 128, 32, [(1, 0), (1, 200), (1, 1), (1, 0), (1, 0)]),
        ("heads of 128, chunks over prefixes", 4, 2, 128, 16, [(1, 20), (5, 37), (16, 32), (70, 200), (2, 2)]),
        ("heads of 128, pairs", 4, 2, 128, 128, [(1, 300), (1, 64), (1, 63), (130, 130)]),
        ("empty decode rows", 8, 2, 16, 16, [(1, 5), (1, 70), *[(0, 0)] * 9, (9, 20), (0, 0), (33, 33), (1, 4)]),
        ("heads of 128, empty decode rows", 8, 2, 128, 64, [(1, 130), *[(0, 0)] * 4, (3, 67), (0, 0), (40, 90)]),
        ("heads of 128, no decodes but empty rows", 4, 1, 128, 16, [*[(0, 0)] * 3, (65, 81)]),
    ):  # fmt: skip
        yield from _both(name, rows, (heads, kv_heads, dim, page_size))
    yield from _run_cases()


def _run_cases() -> Iterator[Case]:
    for name, heads, kv_heads, dim, page_size, rows, run in (
        ("a run of 2", 4, 2, 16, 16, [(1, 1), (1, 2)], 2),
        ("runs of 4 around page and tile ends", 8, 2, 16, 16,
         [(1, n) for n in (15, 16, 17, 17, 62, 63, 64, 65, 64, 65, 66, 67, 1, 1, 1, 1)], 4),
        ("runs of 4, long ones", 4, 1, 24, 64,
         [(1, n) for n in (897, 898, 899, 900, 3, 3, 3, 3, 126, 127, 128, 129)], 4),
        ("runs of 8, many groups", 6, 2, 8, 32, [(1, n) for n in (*range(1020, 1028), *[50] * 8, *range(58, 66))], 8),
        ("runs of 8, true size", 32, 8, 128, 64, [(1, n) for n in (*range(123, 131), *range(1, 9))], 8),
        ("runs of 4 and prefills", 8, 2, 32, 16, [*[(1, n) for n in range(30, 34)], (5, 37), (70, 70)], 4),
        ("runs of 2, no keys", 8, 2, 128, 16, [(1, n) for n in (0, 0, 200, 201, 0, 0, 0, 1)], 2),
        ("runs of 4, a very long one", 8, 1, 128, 128, [(1, n) for n in (5, 5, 5, 5, 2047, 2048, 2049, 2050)], 4),
        ("heads of 128, runs of 2", 8, 2, 128, 32, [(1, n) for n in (15, 16, 63, 64, 64, 65, 1, 1, 700, 701)], 2),
        ("heads of 128, runs of 4 around page and tile ends", 8, 2, 128, 16,
         [(1, n) for n in (14, 15, 16, 17, 17, 17, 17, 17, 62, 63, 64, 65, 63, 64, 64, 64, 126, 127, 128, 129)], 4),
        ("heads of 128, runs of 8, one cut within its queries", 4, 1, 128, 16,
         [(1, n) for n in (*range(253, 261), *range(3, 11), *range(60, 68), *[64] * 8)], 8),
        ("heads of 128, runs of 4, prefills", 2, 1, 128, 64, [*[(1, n) for n in range(62, 66)], (5, 37), (70, 70)], 4),
        ("heads of 128, runs of 8, group of 1", 2, 2, 128, 16, [(1, n) for n in (*range(12, 20), *range(70, 78))], 8),
        ("heads of 128, runs of 8, group of 8", 8, 1, 128, 16, [(1, n) for n in (*range(60, 68), *[302] * 8)], 8),
    ):  # fmt: skip
        yield from _both(name, rows, (heads, kv_heads, dim, page_size), run)


def _both(name: str, rows: list[tuple[int, int]], shape: tuple[int, int, int, int], run: int = 1) -> Iterator[Case]:
    """With a cache of the activations' dtype, and of FP8."""
    site = dict(zip(("num_heads", "num_kv_heads", "head_dim", "page_size"), shape, strict=True))
    for suffix, kv_dtype in (("", None), (", fp8", torch.float8_e4m3fn)):
        make = partial(_make, rows=rows, shape=shape, is_fp8=kv_dtype is not None, run=run)
        yield Case(name + suffix, make, site | {"kv_dtype": kv_dtype})


def _make(
    dtype: torch.dtype, rows: list[tuple[int, int]], shape: tuple[int, int, int, int], is_fp8: bool, run: int
) -> tuple[object, ...]:
    return attention_inputs(rows, *shape, dtype, is_fp8, run)


def attention_inputs(
    rows: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    dim: int,
    page_size: int,
    dtype: torch.dtype,
    is_fp8: bool = False,
    run_length: int = 1,
) -> tuple[Tensor, PagedKV, AttentionMeta, float]:
    """Random arguments for ``rows`` of (queries, keys), single-query rows at the front being decodes, in runs of
    ``run_length``.

    Pages are shuffled, and every cache entry that must not be read is NaN. FP8 caches have a scale per head.
    """
    generator = torch.Generator().manual_seed(sum(length for _, length in rows) + heads)
    widths = [-(-length // page_size) for _, length in rows]
    order = (1 + torch.randperm(sum(widths) + 2, generator=generator)).tolist()
    slots = torch.randperm(len(rows) + 2, generator=generator)[: len(rows)]
    caches = [torch.full((sum(widths) + 3, kv_heads, page_size, dim), torch.nan) for _ in range(2)]
    page_table = torch.full((len(rows) + 2, max(widths)), 1 << 40)  # far outside: reading it would show
    for index, (_, length) in enumerate(rows):
        pages = [order.pop() for _ in range(widths[index])]
        page_table[slots[index], : len(pages)] = torch.tensor(pages)
        for cache in caches:
            content = torch.randn(kv_heads, len(pages) * page_size, dim, generator=generator)
            content[:, length:] = torch.nan
            cache[pages] = content.unflatten(1, (-1, page_size)).transpose(0, 1)
    queries = [count for count, _ in rows]
    num_decodes = next((i for i, count in enumerate(queries) if count > 1), len(rows))
    if 0 in queries:  # decode rows end with the first empty ones
        num_decodes = next(i for i in range(queries.index(0), len(rows)) if queries[i])
    for first in range(
        0, num_decodes if run_length > 1 else 0, run_length
    ):  # the pages of a run are those of its longest
        run = slice(first, first + run_length)
        longest = max(range(len(rows))[run], key=lambda index: rows[index][1])
        slots[run] = slots[longest]
    meta = AttentionMeta(
        num_decodes=num_decodes,
        query_start_loc=torch.tensor([0, *queries]).cumsum(0),
        seq_lens=torch.tensor([length for _, length in rows]),
        page_table=page_table,
        slot_ids=slots,
        page_size=page_size,
        num_pages=max(widths),
        longest=max(queries),
        run_length=run_length,
        max_queries=sum(queries[num_decodes:]) + 5 if 0 in queries else None,
    )
    q = torch.randn(sum(queries), heads, dim, generator=generator).to(dtype)
    kv_dtype = torch.float8_e4m3fn if is_fp8 else dtype
    scales = [torch.randint(2, 8, (kv_heads,), generator=generator) / 16 if is_fp8 else None for _ in range(2)]
    return q, PagedKV(caches[0].to(kv_dtype), caches[1].to(kv_dtype), *scales), meta, dim**-0.5


def _cost(q: Tensor, kv: PagedKV, meta: AttentionMeta, scale: float) -> tuple[int, int]:
    dim, decodes, run, flops = q.shape[2], meta.num_decodes, meta.run_length, 0
    keys = meta.seq_lens[:decodes].reshape(decodes // run, run).amax(1).sum() + meta.seq_lens[decodes:].sum()
    num_bytes = 2 * q.nbytes + 2 * int(keys) * kv.num_heads * dim * kv.dtype.itemsize
    for queries, length in zip(meta.query_start_loc.diff().tolist(), meta.seq_lens.tolist(), strict=True):
        flops += 4 * q.shape[1] * dim * (queries * length - queries * (queries - 1) // 2)
    return num_bytes, flops


def _triton_supports(site: Site) -> str | None:
    if site.head_dim > _TRITON_MAX_HEAD_DIM:
        return f"head_dim of at most {_TRITON_MAX_HEAD_DIM}, this is {site.head_dim}"
    if site.num_heads // site.num_kv_heads > _TRITON_MAX_GROUP:
        return f"at most {_TRITON_MAX_GROUP} query heads per KV head, these are {site.num_heads // site.num_kv_heads}"
    return triton_heads_run(site)


def _cuda_supports(site: Site) -> str | None:
    if site.head_dim != _CUDA_HEAD_DIM:
        return f"head_dim of {_CUDA_HEAD_DIM}, this is {site.head_dim}"
    if site.num_heads % site.num_kv_heads or site.num_heads // site.num_kv_heads not in _CUDA_GROUPS:
        return f"1, 2, 4 or 8 query heads per KV head, these are {site.num_heads} and {site.num_kv_heads}"
    if site.page_size not in _CUDA_PAGE_SIZES:
        return f"pages of 16, 32, 64 or 128 tokens, these are {site.page_size}"
    return cuda_runs(site)


def _flash_attn_supports(site: Site) -> str | None:
    """FlashAttention 2 or 3, whichever is installed and reads our pages."""
    if site.device_type != "cuda":
        return f"runs on NVIDIA GPUs, this is {site.device_type}"
    if site.kv_dtype not in (None, site.dtype):
        return "reads no FP8 keys and values beside queries that are not FP8"
    if site.dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, the model is {str(site.dtype).removeprefix('torch.')}"
    adapter = importlib.import_module("nemo_engine.ops.flash_attn")
    reason: str | None = adapter.why_not_heads(site.num_heads, site.num_kv_heads, site.head_dim)
    if reason is None:
        library = adapter.choose(site.capability, site.page_size)
        reason = library if isinstance(library, str) else None
    return reason


def _flash_attn_library(site: Site) -> str:
    adapter = importlib.import_module("nemo_engine.ops.flash_attn")
    description: str = adapter.describe(site.capability, site.page_size)
    return description


PAGED_ATTENTION = Op(
    "paged_attention",
    paged_attention,
    (
        Impl("triton", "nemo_engine.ops.triton.attention:paged_attention", _triton_supports),
        Impl("cuda", "nemo_engine.ops.cuda.attention:paged_attention", _cuda_supports),
        Impl("flash_attn", "nemo_engine.ops.flash_attn:paged_attention", _flash_attn_supports, _flash_attn_library),
        Impl("cpu", "nemo_engine.ops.cpu.compiled:paged_attention", cpu_heads_run),
        Impl("torch", "nemo_engine.ops.cpu.attention:paged_attention", cpu_only),
    ),
    _cases,
    _cost,
)
