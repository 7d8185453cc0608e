"""Causal attention over paged keys and values: the tiles of both kernels, and prefill.

Query heads that share a KV head are packed into the rows of one tile, so keys and values are read once. Keys and values
may be FP8 (e4m3): they are widened to fp16, which an instruction does for two of them, exactly (to bf16 it takes a slow
one more for each), or to fp32 for queries in fp32. Both products accumulate in fp32 whatever the length of the context.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .device import dependent, facts, stages_in, wait_for_previous

_PREFILL_KEYS = 64  # of one tile
_PREFILL_ROWS = 128  # queries times heads of one tile

LOG2_E = tl.constexpr(1.4426950408889634)
# Weights in fp16 are 2^15 times what they are beside the largest, which cancels: at most 2^15, and what fp16 rounds
# away, 2^-40 of the largest each, stays nothing beside them over the longest context.
_FP16_SHIFT = tl.constexpr(15.0)


@triton.jit
def tile_rows(
    page_table_ptr, key, end, head, page_stride, head_stride,
    DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Offsets of the cache rows of keys ``key .. key + N - 1``, (N,) int64; those from ``end`` on are any valid ones.

    Callers look them up one tile ahead: in the tile's own iteration, its loads could only start once the page is known.
    """
    n = tl.arange(0, N)
    if PAGE_SIZE >= N:  # the tile lies in one page
        page = tl.load(page_table_ptr + key // PAGE_SIZE, mask=key < end, other=0).to(tl.int64)
        offset = key % PAGE_SIZE + n
    else:
        page = tl.load(page_table_ptr + (key + n) // PAGE_SIZE, mask=key + n < end, other=0).to(tl.int64)
        offset = (key + n) % PAGE_SIZE
    return page * page_stride + head * head_stride + offset * DIM


@triton.jit
def queries_beside(q, k_ptr, scale):
    """q: (M, D), and the scale of its scores, for keys as they lie in the cache: as they are, or beside FP8 keys in
    fp16, each row multiplied by a power of 2 that its scale, (M, 1), takes back. bf16 fits: what is rounded away is
    2^-39 of the row's largest.
    """
    if k_ptr.dtype.element_ty.primitive_bitwidth == 8 and q.dtype.primitive_bitwidth == 16:
        wide = q.to(tl.float32)
        exponent = tl.max(tl.abs(wide), 1).to(tl.int32, bitcast=True) >> 23
        power = tl.minimum(268 - exponent, 253)  # the largest becomes 2^14 or more, less than 2^15
        q = (wide * (power << 23).to(tl.float32, bitcast=True)[:, None]).to(tl.float16)
        scale = scale * ((254 - power) << 23).to(tl.float32, bitcast=True)[:, None]
    return q, scale


@triton.jit
def attend_tile(
    acc, mass, best, q, k_ptr, v_ptr, rows, key, end, last_key, scale,
    MASKED: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in base 2. q: (M, D), scale: see ``queries_beside``; acc: (M, D) fp32; mass,
    best: (M,) fp32; rows: see ``tile_rows``.

    Keys from ``end`` on do not exist; row m sees keys up to ``last_key[m]``, which matters where MASKED.
    """
    n = tl.arange(0, N)
    d = tl.arange(0, D)
    places = rows[:, None] + d[None, :]
    # What lies past the end may be NaN: it is not read, and counts as 0.
    if MASKED:
        mask = (key + n < end)[:, None] & (d < DIM)[None, :]
        k = tl.load(k_ptr + places, mask=mask, other=0.0)
        v = tl.load(v_ptr + places, mask=mask, other=0.0)
    elif DIM == D:
        k = tl.load(k_ptr + places)
        v = tl.load(v_ptr + places)
    else:
        k = tl.load(k_ptr + places, mask=(d < DIM)[None, :], other=0.0)
        v = tl.load(v_ptr + places, mask=(d < DIM)[None, :], other=0.0)
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where((key + n)[None, :] <= last_key[:, None], scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    # A row that sees nothing yet: subtract 0, so that exp2(-inf - 0) is 0 and not NaN.
    shift = tl.where(new_best == float("-inf"), 0.0, new_best) if MASKED else new_best
    decay = tl.exp2(best - shift)
    if q.dtype == tl.float16:
        shift -= _FP16_SHIFT
    weights = tl.exp2(scores - shift[:, None])
    acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * decay[:, None], input_precision="ieee")
    return acc, mass * decay + tl.sum(weights, 1), new_best


@triton.jit(do_not_specialize=["num_rows", "first_row"])
def _prefill_kernel(
    out_ptr, q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, page_table_ptr, slot_ids_ptr, starts_ptr, seq_lens_ptr,
    scale, num_rows, first_row, q_stride, q_head_stride, table_stride, page_stride, head_stride, num_heads,
    HAS_SCALES: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One tile of M / GROUP_PAD queries of one row and one KV head.

    Row i starts at tile ``starts[i] / queries + i``.
    """
    wait_for_previous(DEPENDENT)
    QUERIES: tl.constexpr = M // GROUP_PAD
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tiles see the most keys: they go first
    head = tl.program_id(1)
    base = tl.load(starts_ptr + first_row)
    low = 0
    high = num_rows
    while high - low > 1:  # the last row whose first tile is not after this one
        middle = (low + high) // 2
        if (tl.load(starts_ptr + first_row + middle) - base) // QUERIES + middle <= tile:
            low = middle
        else:
            high = middle
    start = tl.load(starts_ptr + first_row + low)
    count = tl.load(starts_ptr + first_row + low + 1) - start
    first_query = (tile - ((start - base) // QUERIES + low)) * QUERIES
    if first_query >= count:
        return
    length = tl.load(seq_lens_ptr + first_row + low)
    slot = tl.load(slot_ids_ptr + first_row + low).to(tl.int64)
    table = page_table_ptr + slot * table_stride
    m = tl.arange(0, M)
    d = tl.arange(0, D)
    query = first_query + m // GROUP_PAD
    q_head = head * GROUP + m % GROUP_PAD
    is_row = (query < count) & (m % GROUP_PAD < GROUP)
    mask = is_row[:, None] & (d < DIM)[None, :]
    q_rows = (start + query).to(tl.int64) * q_stride + q_head * q_head_stride
    q = tl.load(q_ptr + q_rows[:, None] + d[None, :], mask=mask, other=0.0)
    position = length - count + query  # (M,) of each query in its request
    score_scale = scale * LOG2_E
    if HAS_SCALES:
        score_scale *= tl.load(k_scale_ptr + head)
    q, score_scale = queries_beside(q, k_ptr, score_scale)
    acc = tl.zeros((M, D), tl.float32)
    mass = tl.zeros((M,), tl.float32)
    best = tl.full((M,), float("-inf"), tl.float32)
    first_position = (length - count + first_query).to(tl.int32)
    end = tl.minimum(first_position + QUERIES, length.to(tl.int32))  # keys that the last query sees
    seen_by_all = (first_position + 1) // N * N
    rows = tile_rows(table, 0, end, head, page_stride, head_stride, DIM, PAGE_SIZE, N)
    for key in tl.range(0, seen_by_all, N):
        acc, mass, best = attend_tile(
            acc, mass, best, q, k_ptr, v_ptr, rows, key, end, position, score_scale, False, DIM, N, D
        )
        rows = tile_rows(table, key + N, end, head, page_stride, head_stride, DIM, PAGE_SIZE, N)
    for key in tl.range(seen_by_all, end, N):
        acc, mass, best = attend_tile(
            acc, mass, best, q, k_ptr, v_ptr, rows, key, end, position, score_scale, True, DIM, N, D
        )
        rows = tile_rows(table, key + N, end, head, page_stride, head_stride, DIM, PAGE_SIZE, N)
    acc = acc / mass[:, None]
    if HAS_SCALES:
        acc *= tl.load(v_scale_ptr + head)
    out_rows = ((start + query).to(tl.int64) * num_heads + q_head) * DIM
    tl.store(out_ptr + out_rows[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def prefill(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    slot_ids: torch.Tensor,
    starts: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    first_row: int,
    num_queries: int,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Rows ``first_row ..`` of several queries each, at the end of their keys. out, q: (T, Hq, D).

    Row i has queries ``starts[i] .. starts[i + 1] - 1``, and ``seq_lens[i]`` keys with those of its queries. starts: (R
    + 1,); slot_ids, seq_lens: (R,); ``num_queries``: of all these rows together. The rest as in
    ``nemo_engine.kernels.decode.decode``. A row's bits do not depend on other rows.
    """
    heads, dim = q.shape[1:]
    kv_heads, page_size = k_cache.shape[1:3]
    group = heads // kv_heads
    group_pad = triton.next_power_of_2(group)
    rows = seq_lens.shape[0] - first_row
    tiles = num_queries // (_PREFILL_ROWS // group_pad) + rows
    padded = max(16, triton.next_power_of_2(dim))
    in_use = _PREFILL_ROWS * padded * q.itemsize
    stages = stages_in(3, 2 * _PREFILL_KEYS * padded * k_cache.itemsize, in_use, facts(q.device).shared)
    _prefill_kernel[(tiles, kv_heads)](
        out, q, k_cache, v_cache, k_scale, v_scale, page_table, slot_ids, starts, seq_lens, scale, rows, first_row,
        q.stride(0), q.stride(1), page_table.stride(0), k_cache.stride(0), k_cache.stride(1), heads,
        HAS_SCALES=k_scale is not None, DIM=dim, GROUP=group, GROUP_PAD=group_pad, PAGE_SIZE=page_size, M=_PREFILL_ROWS,
        N=_PREFILL_KEYS, D=padded, num_warps=8, num_stages=stages, **dependent(q.device),
    )  # fmt: skip
