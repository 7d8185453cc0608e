"""Causal attention over paged keys and values: prefill in one kernel; decode split over the keys, planned on the
device.

Query heads that share a KV head are packed into the rows of one tile, so keys and values are read once. Keys and values
may be FP8 (e4m3): they are widened to the queries' dtype, so both products accumulate in fp32 whatever the length of
the context.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import decode_split as split
from .device import facts, stages_in

_PREFILL_KEYS = 64  # of one tile
_PREFILL_ROWS = 128  # queries times heads of one tile

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile_rows(
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
def _attend_tile(
    acc, mass, best, q, k_ptr, v_ptr, rows, key, end, last_key, scale,
    MASKED: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in base 2. q: (M, D); acc: (M, D) fp32; mass, best: (M,) fp32; rows: see
    ``_tile_rows``.

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
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(best - shift)
    acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * decay[:, None], input_precision="ieee")
    return acc, mass * decay + tl.sum(weights, 1), new_best


@triton.jit(do_not_specialize=["num_rows", "first_row"])
def _prefill_kernel(
    out_ptr, q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, page_table_ptr, slot_ids_ptr, starts_ptr, seq_lens_ptr,
    scale, num_rows, first_row, q_stride, q_head_stride, table_stride, page_stride, head_stride, num_heads,
    HAS_SCALES: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, PAGE_SIZE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One tile of M / GROUP_PAD queries of one row and one KV head.

    Row i starts at tile ``starts[i] / queries + i``.
    """
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
    acc = tl.zeros((M, D), tl.float32)
    mass = tl.zeros((M,), tl.float32)
    best = tl.full((M,), float("-inf"), tl.float32)
    first_position = (length - count + first_query).to(tl.int32)
    end = tl.minimum(first_position + QUERIES, length.to(tl.int32))  # keys that the last query sees
    seen_by_all = (first_position + 1) // N * N
    rows = _tile_rows(table, 0, end, head, page_stride, head_stride, DIM, PAGE_SIZE, N)
    for key in tl.range(0, seen_by_all, N):
        acc, mass, best = _attend_tile(
            acc, mass, best, q, k_ptr, v_ptr, rows, key, end, position, score_scale, False, DIM, N, D
        )
        rows = _tile_rows(table, key + N, end, head, page_stride, head_stride, DIM, PAGE_SIZE, N)
    for key in tl.range(seen_by_all, end, N):
        acc, mass, best = _attend_tile(
            acc, mass, best, q, k_ptr, v_ptr, rows, key, end, position, score_scale, True, DIM, N, D
        )
        rows = _tile_rows(table, key + N, end, head, page_stride, head_stride, DIM, PAGE_SIZE, N)
    acc = acc / mass[:, None]
    if HAS_SCALES:
        acc *= tl.load(v_scale_ptr + head)
    out_rows = ((start + query).to(tl.int64) * num_heads + q_head) * DIM
    tl.store(out_ptr + out_rows[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_units", "is_padded"])
def _plan_kernel(
    plan_ptr, seq_lens_ptr, num_rows, num_units, is_padded,
    TILE: tl.constexpr, PART_COST: tl.constexpr, MIN_SHARE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``plan_decode``: one cut after the other, each from the row that holds the place on the line where the unit
    before it ends.
    """
    row = tl.arange(0, ROWS)
    length = tl.load(seq_lens_ptr + row, mask=row < num_rows, other=0).to(tl.int32)
    # Empty rows at the end belong to no unit: one after the other, they would hold the last one up.
    num_rows = tl.where(is_padded > 0, tl.max(tl.where(length > 0, row + 1, 0), 0), num_rows)
    line = tl.where(length > 0, (length + TILE - 1) // TILE + PART_COST, 0)
    total = tl.sum(line, 0)
    share = tl.maximum((total + num_units - 1) // num_units, MIN_SHARE)
    # Start and row in one number, so that one maximum finds both. Rows of no keys lie where the next row starts, before
    # it.
    starts = (tl.cumsum(line, 0) - line).to(tl.int64) * ROWS + row
    cut_ptr = plan_ptr + 4
    cut_row_ptr = plan_ptr + 6 + 2 * num_units
    for word in range(4):  # without any keys, the first unit has no rows
        tl.store(cut_ptr + word, 0)
    place = tl.zeros((), tl.int32)
    unit = tl.zeros((), tl.int32)
    num_cut_rows = tl.zeros((), tl.int32)
    while place < total:
        reached = place + share + PART_COST
        held = tl.max(tl.where(starts < (reached + 1).to(tl.int64) * ROWS, starts, 0), 0)
        start = (held // ROWS).to(tl.int32)
        is_end = reached >= total
        place = tl.where(is_end, total, tl.maximum(start, reached - PART_COST))
        tile = tl.where(is_end, 0, place - start)
        tl.store(cut_row_ptr + num_cut_rows, unit)
        num_cut_rows += ((tile > 0) & (tile <= share)).to(tl.int32)  # the row's first cut: later ones are a share apart
        unit += 1
        tl.store(cut_ptr + 2 * unit, tl.where(is_end, num_rows, (held % ROWS).to(tl.int32)))
        tl.store(cut_ptr + 2 * unit + 1, tile)
    tl.store(plan_ptr, share)
    tl.store(plan_ptr + 1, tl.sum(((length <= 0) & (row < num_rows)).to(tl.int32), 0))
    tl.store(plan_ptr + 2, tl.maximum(unit, 1))
    tl.store(plan_ptr + 3, num_cut_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _decode_kernel(
    out_ptr, part_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, page_table_ptr, slot_ids_ptr,
    seq_lens_ptr, query_lens_ptr, plan_ptr, scale, num_rows, q_stride, q_head_stride, table_stride, page_stride,
    head_stride, num_heads, HAS_SCALES: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    PAGE_SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One unit of the rows' keys, for one KV head: a row's result itself if the unit has the whole row, else a part and
    its log-sum-exp. A row has QUERIES queries, each with its own number of keys.
    """
    unit = tl.program_id(0)
    head = tl.program_id(1)
    num_units = tl.load(plan_ptr + 2)
    if unit >= num_units:
        return
    m = tl.arange(0, M)
    d = tl.arange(0, D)
    query = m // GROUP
    q_head = head * GROUP + m % GROUP
    place = query * num_heads + q_head  # among all heads of the row's queries
    is_used = m < GROUP * QUERIES
    mask = is_used[:, None] & (d < DIM)[None, :]
    score_scale = scale * LOG2_E
    if HAS_SCALES:
        score_scale *= tl.load(k_scale_ptr + head)
    wide = tl.zeros((), tl.int64)
    if tl.load(plan_ptr + 1) > 0:  # rows of no keys are zeros
        for row in range(unit, num_rows, num_units):
            if tl.load(seq_lens_ptr + row) <= 0:
                places = ((wide + row) * QUERIES * num_heads + place)[:, None] * DIM + d[None, :]
                tl.store(out_ptr + places, tl.zeros((M, D), out_ptr.dtype.element_ty), mask=mask)
    first_row = tl.load(plan_ptr + 4 + 2 * unit)
    first_tile = tl.load(plan_ptr + 5 + 2 * unit)
    last_row = tl.load(plan_ptr + 6 + 2 * unit)
    last_tile = tl.load(plan_ptr + 7 + 2 * unit)
    for row in range(first_row, last_row + (last_tile > 0).to(tl.int32)):
        length = tl.load(seq_lens_ptr + row).to(tl.int32)
        begin = tl.where(row == first_row, first_tile * N, 0)
        end = tl.where(row == last_row, tl.minimum(last_tile * N, length), length)
        table = page_table_ptr + tl.load(slot_ids_ptr + row * QUERIES).to(tl.int64) * table_stride
        q_rows = ((wide + row) * QUERIES + query) * q_stride + q_head * q_head_stride
        q = tl.load(q_ptr + q_rows[:, None] + d[None, :], mask=mask, other=0.0)
        acc = tl.zeros((M, D), tl.float32)
        mass = tl.zeros((M,), tl.float32)
        best = tl.full((M,), float("-inf"), tl.float32)
        last_key = tl.zeros((M,), tl.int32) + (end - 1)
        if QUERIES > 1:
            seen = tl.load(query_lens_ptr + row * QUERIES + query, mask=is_used, other=1).to(tl.int32)
            last_key = tl.minimum(last_key, seen - 1)
        rows = _tile_rows(table, begin, end, head, page_stride, head_stride, DIM, PAGE_SIZE, N)
        for key in tl.range(begin, end, N):
            acc, mass, best = _attend_tile(
                acc, mass, best, q, k_ptr, v_ptr, rows, key, end, last_key, score_scale, True, DIM, N, D
            )
            rows = _tile_rows(table, key + N, end, head, page_stride, head_stride, DIM, PAGE_SIZE, N)
        if QUERIES > 1:  # a part may lie behind all keys of a query: it is 0 then, and its weight 2^-inf
            mass = tl.where(mass > 0, mass, 1.0)
        acc = acc / mass[:, None]
        if HAS_SCALES:
            acc *= tl.load(v_scale_ptr + head)
        if (begin == 0) & (end == length):
            out_rows = ((wide + row) * QUERIES * num_heads + place) * DIM
            tl.store(
                out_ptr + out_rows[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask & (length > 0)
            )
        else:  # a unit has at most one part with the end of a row or its middle, and one with its beginning
            part_rows = (2 * unit + (begin == 0).to(tl.int32)) * QUERIES * num_heads + place
            tl.store(part_ptr + part_rows[:, None] * DIM + d[None, :], acc, mask=mask)
            tl.store(lse_ptr + part_rows, best + tl.log2(mass), mask=is_used)


@triton.jit(do_not_specialize=["num_units"])
def _combine_kernel(
    out_ptr, part_ptr, lse_ptr, seq_lens_ptr, plan_ptr, num_units, num_heads,
    TILE: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Merge the parts of a row that is cut, for one head of one of its queries: SPLITS at a time, in order.

    num_heads: of all queries of a row.
    """
    index = tl.program_id(0)
    head = tl.program_id(1)
    if index >= tl.load(plan_ptr + 3):
        return
    unit = tl.load(plan_ptr + 6 + 2 * num_units + index)  # in which the row begins
    row = tl.load(plan_ptr + 6 + 2 * unit)
    tile = tl.load(plan_ptr + 7 + 2 * unit)
    share = tl.load(plan_ptr)
    tiles = (tl.load(seq_lens_ptr + row).to(tl.int32) + TILE - 1) // TILE
    end = 1 + (tiles - tile + share - 1) // share  # parts: each but the first and the last is a share
    d = tl.arange(0, D)
    best = float("-inf")
    mass = 0.0
    acc = tl.zeros((D,), tl.float32)
    for block in range(0, end, SPLITS):
        number = block + tl.arange(0, SPLITS)
        is_part = number < end
        place = (2 * (unit + number) + (number == 0).to(tl.int32)) * num_heads + head
        lse = tl.load(lse_ptr + place, mask=is_part, other=float("-inf"))
        part = tl.load(
            part_ptr + place[:, None] * DIM + d[None, :], mask=is_part[:, None] & (d < DIM)[None, :], other=0.0
        )
        new_best = tl.maximum(best, tl.max(lse, 0))
        weights = tl.exp2(lse - new_best)
        decay = tl.exp2(best - new_best)
        acc = acc * decay + tl.sum(part * weights[:, None], 0)
        mass = mass * decay + tl.sum(weights, 0)
        best = new_best
    place = (row.to(tl.int64) * num_heads + head) * DIM + d
    tl.store(out_ptr + place, (acc / mass).to(out_ptr.dtype.element_ty), mask=d < DIM)


def num_decode_units(kv_heads: int, device: torch.device) -> int:
    """Units of work per KV head: the decode kernel's fixed grid, see ``nemo_engine.kernels.decode_split``."""
    return split.num_units(facts(device).sms, kv_heads)


def plan_decode(seq_lens: torch.Tensor, num_units: int, is_padded: bool = False) -> torch.Tensor:
    """How decode attention splits its rows into units of work, by their lengths on the device.

    seq_lens: (B,) int64. is_padded: as if rows of no keys at the end were not there. Returns (6 + 3 num_units,) int32:
    the tiles of a share; the numbers of rows without keys, of units with work, and of rows that are cut;
    ``nemo_engine.kernels.decode_split.cuts``; and in which units the rows begin that are cut.
    """
    rows = seq_lens.shape[0]
    plan = torch.empty(6 + 3 * num_units, dtype=torch.int32, device=seq_lens.device)
    padded = triton.next_power_of_2(rows)
    _plan_kernel[(1,)](
        plan, seq_lens, rows, num_units, int(is_padded), TILE=split.TILE, PART_COST=split.PART_COST,
        MIN_SHARE=split.MIN_SHARE, ROWS=padded, num_warps=1 if padded <= 256 else 4,
    )  # fmt: skip
    return plan


def decode(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    slot_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    plan: torch.Tensor,
    scale: float,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    query_lens: torch.Tensor | None = None,
) -> None:
    """One query per row, or several. out, q: (B, Hq, D); k_cache, v_cache: (pages, Hk, page_size, D), dense;
    page_table: (slots, P). Row i reads ``seq_lens[i]`` keys in the pages ``page_table[slot_ids[i]]``; slot_ids,
    seq_lens: (B,). A row of no keys gives zeros. plan: see ``plan_decode``. query_lens: (B Q,): with Q = 2, 4 or 8
    queries a row, one after the other, how many keys each sees; slot_ids is then (B Q,), and each row's first counts.
    k_scale, v_scale: (Hk,) fp32 of an FP8 cache. A row's split, and so its last bits, depend on the other rows.
    """
    rows, (num_queries, heads, dim) = seq_lens.shape[0], q.shape
    queries = num_queries // rows
    kv_heads, page_size = k_cache.shape[1:3]
    group = heads // kv_heads
    units = plan.shape[0] // 3 - 2
    results = queries * heads  # of a row
    part = torch.empty(2 * units, results, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(2 * units, results, dtype=torch.float32, device=q.device)
    padded = max(16, triton.next_power_of_2(dim))
    shared = facts(q.device).shared // split.BLOCKS_PER_SM
    stages = stages_in(4, 2 * split.TILE * padded * k_cache.itemsize, 8 << 10, shared)
    _decode_kernel[(units, kv_heads)](
        out, part, lse, q, k_cache, v_cache, k_scale, v_scale, page_table, slot_ids, seq_lens, query_lens, plan, scale,
        rows, q.stride(0), q.stride(1), page_table.stride(0), k_cache.stride(0), k_cache.stride(1), heads,
        HAS_SCALES=k_scale is not None, DIM=dim, GROUP=group, QUERIES=queries, PAGE_SIZE=page_size,
        M=max(16, triton.next_power_of_2(group * queries)), N=split.TILE, D=padded, num_warps=4, num_stages=stages,
    )  # fmt: skip
    _combine_kernel[(min(rows, units), results)](
        out, part, lse, seq_lens, plan, units, results, TILE=split.TILE, DIM=dim, SPLITS=16, D=padded, num_warps=4
    )


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
    + 1,); slot_ids, seq_lens: (R,); ``num_queries``: of all these rows together. The rest as in ``decode``. A row's
    bits do not depend on other rows.
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
        N=_PREFILL_KEYS, D=padded, num_warps=8, num_stages=stages,
    )  # fmt: skip
