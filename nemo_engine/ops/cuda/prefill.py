"""Attention of rows with several queries, by csrc/attention/prefill; pages of an FP8 cache are widened to bf16 before
it, by csrc/attention/gather.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from nemo_engine.ops.attention import AttentionMeta
from nemo_engine.ops.cuda import address, library, row_stride, stream_of
from nemo_engine.ops.paged_kv import PagedKV

# What widened pages may take, beyond which rows and then KV heads take turns. 128 Ki keys of 4 of NeMo's 8 KV heads: at
# 2,048 queries each of the two turns is still two full rounds of blocks.
WIDENED_BYTES = 256 << 20
_DIM = 128


def prefill(out: Tensor, q: Tensor, kv: PagedKV, meta: AttentionMeta, scale: float) -> None:
    """Fills ``out`` for the rows from ``meta.num_decodes`` on. out, q: (T, Hq, 128) bf16, all queries of the step.

    Arguments as ``nemo_engine.ops.attention.paged_attention``, which are checked there; caches bf16, or FP8, which
    takes scratch memory: ``WIDENED_BYTES``, or what one KV head of the longest row that the page table holds takes if
    that is more; less where all rows of the table take less. A row's bits do not depend on other rows.
    """
    first, rows = meta.num_decodes, meta.seq_lens.shape[0]
    if kv.dtype == torch.bfloat16:
        pages = (meta.page_table, row_stride(meta.page_table), meta.slot_ids[first:])
        _launch(out, q, kv, pages, meta, (first, rows), scale)
        return
    kv_heads, page_size = kv.num_heads, kv.page_size
    slots, width = meta.page_table.shape
    group, capacity = q.shape[1] // kv_heads, widened_capacity(slots, width, kv_heads, page_size)
    shape = (2, capacity * page_size * _DIM)
    scratch = meta.workspace.take("CUDA widened pages", shape, torch.bfloat16, q.device)
    identity = meta.once("CUDA identity pages", partial(torch.arange, capacity, device=q.device))
    turns: Iterable[tuple[int, int, int]] = [(0, rows - first, meta.max_pages or 0)]
    if meta.max_pages is None:
        turns = _turns(meta.prefill_pages or (meta.num_pages,) * (rows - first), capacity // kv_heads)
    for begin, end, count in turns:
        turn = (first + begin, first + end)
        bounds = meta.once(f"CUDA page bounds of {begin}", partial(_bounds, meta.seq_lens[slice(*turn)], page_size))
        heads = next(some for some in range(kv_heads, 0, -1) if kv_heads % some == 0 and some * count <= capacity)
        size = count * heads * page_size * _DIM
        wide_k, wide_v = (part[:size].view(count, heads, page_size, _DIM) for part in scratch)
        for head in range(0, kv_heads, heads):
            library().gather_pages(
                wide_k.data_ptr(), wide_v.data_ptr(), kv.k.data_ptr(), kv.v.data_ptr(), meta.page_table.data_ptr(),
                meta.slot_ids[turn[0] :].data_ptr(), bounds.data_ptr(), row_stride(meta.page_table), end - begin, count,
                kv_heads, head, heads, page_size, stream_of(q),
            )  # fmt: skip
            part = slice(head * group, (head + heads) * group)
            wide = PagedKV(wide_k, wide_v, *[None if x is None else x[head:] for x in (kv.k_scale, kv.v_scale)])
            _launch(out[:, part], q[:, part], wide, (identity, 1, bounds), meta, turn, scale)


def widened_capacity(slots: int, pages: int, kv_heads: int, page_size: int) -> int:
    """Pages of one KV head, K and V, that the scratch memory holds.

    The same in every step of an engine, so that it is taken once.
    """
    budget = WIDENED_BYTES // (2 * 2 * page_size * _DIM)
    return max(pages, min(budget, slots * pages * kv_heads))


def _turns(pages: Sequence[int], max_pages: int) -> Iterator[tuple[int, int, int]]:
    """(first row, end, their pages) of neighbouring rows with at most ``max_pages`` pages together, or of one row."""
    first = total = 0
    for row, count in enumerate(pages):
        if row > first and total + count > max_pages:
            yield first, row, total
            first, total = row, 0
        total += count
    yield first, len(pages), total


def _bounds(seq_lens: Tensor, page_size: int) -> Tensor:
    """(R,) -> (R + 1,): where each row's pages begin if they follow one another, and where the last ones end."""
    pages = torch.div(seq_lens + (page_size - 1), page_size, rounding_mode="floor")
    return torch.nn.functional.pad(pages.cumsum(0), (1, 0))


def _launch(
    out: Tensor,
    q: Tensor,
    kv: PagedKV,
    pages: tuple[Tensor, int, Tensor],
    meta: AttentionMeta,
    rows: tuple[int, int],
    scale: float,
) -> None:
    """One launch, for the rows from the first of ``rows`` to before the second. pages: a table, its stride, and each
    row's place there.
    """
    first, end = rows
    table, table_stride, slot_ids = pages
    queries = q.shape[0] - meta.num_decodes if meta.max_queries is None else meta.max_queries
    queries = min(queries, (end - first) * meta.longest)
    library().prefill_attention(
        out.data_ptr(), q.data_ptr(), kv.k.data_ptr(), kv.v.data_ptr(), address(kv.k_scale), address(kv.v_scale),
        table.data_ptr(), slot_ids.data_ptr(), meta.query_start_loc[first:].data_ptr(),
        meta.seq_lens[first:].data_ptr(), row_stride(out), row_stride(q), row_stride(q, 1), table_stride, kv.k.shape[0],
        end - first, queries, q.shape[1], kv.num_heads, kv.page_size, scale, stream_of(q),
    )  # fmt: skip
