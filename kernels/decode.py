"""Decode attention over paged keys and values: one query a row, or a run of them, split over the keys as planned on the
device, in one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import decode_split as split
from .attention import LOG2_E, attend_tile, queries_beside, tile_rows
from .device import dependent, facts, stages_in, wait_for_previous

_MERGED_ELEMENTS = 2 << 10  # of parts that are read at once: more do not fit into registers beside the tiles


@triton.jit(do_not_specialize=["num_rows", "num_units", "num_counts", "is_padded"])
def _plan_kernel(
    plan_ptr, seq_lens_ptr, num_rows, num_units, num_counts, is_padded,
    TILE: tl.constexpr, PART_COST: tl.constexpr, MIN_SHARE: tl.constexpr, ROWS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """``plan_decode``: one cut after the other, each from the row that holds the place on the line where the unit
    before it ends. COUNTS: ``num_counts``, or more.
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
    cut_ptr = plan_ptr + 3
    for word in range(4):  # without any keys, the first unit has no rows
        tl.store(cut_ptr + word, 0)
    place = tl.zeros((), tl.int32)
    unit = tl.zeros((), tl.int32)
    while place < total:
        reached = place + share + PART_COST
        held = tl.max(tl.where(starts < (reached + 1).to(tl.int64) * ROWS, starts, 0), 0)
        start = (held // ROWS).to(tl.int32)
        is_end = reached >= total
        place = tl.where(is_end, total, tl.maximum(start, reached - PART_COST))
        tile = tl.where(is_end, 0, place - start)
        unit += 1
        tl.store(cut_ptr + 2 * unit, tl.where(is_end, num_rows, (held % ROWS).to(tl.int32)))
        tl.store(cut_ptr + 2 * unit + 1, tile)
    tl.store(plan_ptr, share)
    tl.store(plan_ptr + 1, tl.sum(((length <= 0) & (row < num_rows)).to(tl.int32), 0))
    tl.store(plan_ptr + 2, tl.maximum(unit, 1))
    count = tl.arange(0, COUNTS)
    tl.store(cut_ptr + 2 * num_units + 2 + count, tl.zeros((COUNTS,), tl.int32), mask=count < num_counts)


@triton.jit(do_not_specialize=["num_rows"])
def _decode_kernel(
    out_ptr, part_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, page_table_ptr, slot_ids_ptr,
    seq_lens_ptr, query_lens_ptr, plan_ptr, counts_ptr, scale, num_rows, q_stride, q_head_stride, table_stride,
    page_stride, head_stride, num_heads, HAS_SCALES: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr,
    QUERIES: tl.constexpr, PAGE_SIZE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    RESULTS: tl.constexpr, PARTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One unit of the rows' keys, for one KV head: a row's result itself if the unit has the whole row, else a part and
    its log-sum-exp; the last unit to store a part of a row merges them. A row has QUERIES queries, each with its own
    number of keys. ``counts_ptr``: parts by the unit in which their row begins and the head, 0 before and after.
    """
    wait_for_previous(DEPENDENT)
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
    share = tl.load(plan_ptr)
    first_row = tl.load(plan_ptr + 3 + 2 * unit)
    first_tile = tl.load(plan_ptr + 4 + 2 * unit)
    last_row = tl.load(plan_ptr + 5 + 2 * unit)
    last_tile = tl.load(plan_ptr + 6 + 2 * unit)
    for row in range(first_row, last_row + (last_tile > 0).to(tl.int32)):
        length = tl.load(seq_lens_ptr + row).to(tl.int32)
        begin = tl.where(row == first_row, first_tile * N, 0)
        end = tl.where(row == last_row, tl.minimum(last_tile * N, length), length)
        table = page_table_ptr + tl.load(slot_ids_ptr + row * QUERIES).to(tl.int64) * table_stride
        q_rows = ((wide + row) * QUERIES + query) * q_stride + q_head * q_head_stride
        q, row_scale = queries_beside(tl.load(q_ptr + q_rows[:, None] + d[None, :], mask, 0.0), k_ptr, score_scale)
        acc = tl.zeros((M, D), tl.float32)
        mass = tl.zeros((M,), tl.float32)
        best = tl.full((M,), float("-inf"), tl.float32)
        last_key = tl.zeros((M,), tl.int32) + (end - 1)
        if QUERIES > 1:
            seen = tl.load(query_lens_ptr + row * QUERIES + query, mask=is_used, other=1).to(tl.int32)
            last_key = tl.minimum(last_key, seen - 1)
        rows = tile_rows(table, begin, end, head, page_stride, head_stride, DIM, PAGE_SIZE, N)
        for key in tl.range(begin, end, N):
            acc, mass, best = attend_tile(
                acc, mass, best, q, k_ptr, v_ptr, rows, key, end, last_key, row_scale, True, DIM, N, D
            )
            rows = tile_rows(table, key + N, end, head, page_stride, head_stride, DIM, PAGE_SIZE, N)
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
            # The row's first cut is in its first share, the others are a share apart.
            begun = unit if begin == 0 else unit - 1 - (first_tile - 1) // share
            parts = 1 + (tl.cdiv(length, N) - tl.load(plan_ptr + 6 + 2 * begun) + share - 1) // share
            _merge_if_last(
                out_ptr + (wide + row) * QUERIES * num_heads * DIM, part_ptr, lse_ptr,
                counts_ptr + begun * tl.num_programs(1) + head, begun, parts, head, num_heads, DIM, GROUP, QUERIES,
                RESULTS, PARTS, D,
            )  # fmt: skip


@triton.jit
def _merge_if_last(
    out_ptr, part_ptr, lse_ptr, count_ptr, first_unit, num_parts, head, num_heads, DIM: tl.constexpr,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, RESULTS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """``_merge_parts``, if this program is the last to count one of ``num_parts``."""
    tl.debug_barrier()  # all threads have stored
    if tl.atomic_add(count_ptr, 1, sem="acq_rel") == num_parts - 1:
        tl.store(count_ptr, 0)
        _merge_parts(
            out_ptr, part_ptr, lse_ptr, first_unit, num_parts, head, num_heads, DIM, GROUP, QUERIES, RESULTS, PARTS, D
        )


@triton.jit
def _merge_parts(
    out_ptr, part_ptr, lse_ptr, first_unit, num_parts, head, num_heads, DIM: tl.constexpr, GROUP: tl.constexpr,
    QUERIES: tl.constexpr, RESULTS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The parts of a row for one KV head, from those of ``first_unit`` on, PARTS at a time and in order, become its
    RESULTS results or less.
    """
    result = tl.arange(0, RESULTS)
    d = tl.arange(0, D)
    place = result // GROUP * num_heads + head * GROUP + result % GROUP  # among all heads of the row's queries
    is_used = result < GROUP * QUERIES
    mask = is_used[:, None] & (d < DIM)[None, :]
    best = tl.full((RESULTS,), float("-inf"), tl.float32)
    mass = tl.zeros((RESULTS,), tl.float32)
    acc = tl.zeros((RESULTS, D), tl.float32)
    for first in range(0, num_parts, PARTS):
        number = first + tl.arange(0, PARTS)
        is_part = number < num_parts
        rows = (2 * (first_unit + number) + (number == 0).to(tl.int32)) * QUERIES * num_heads
        rows = rows[:, None] + place[None, :]
        lse = tl.load(
            lse_ptr + rows, mask=is_part[:, None] & is_used[None, :], other=float("-inf"), cache_modifier=".cg"
        )
        part = tl.load(
            part_ptr + rows[:, :, None] * DIM + d[None, None, :], mask=is_part[:, None, None] & mask[None, :, :],
            other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        new_best = tl.maximum(best, tl.max(lse, 0))
        shift = tl.where(new_best == float("-inf"), 0.0, new_best)  # of results that are not used
        weights = tl.exp2(lse - shift[None, :])
        decay = tl.exp2(best - shift)
        acc = acc * decay[:, None] + tl.sum(part * weights[:, :, None], 0)
        mass = mass * decay + tl.sum(weights, 0)
        best = new_best
    acc = acc / tl.where(mass > 0, mass, 1.0)[:, None]
    tl.store(out_ptr + place[:, None] * DIM + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def num_decode_units(kv_heads: int, device: torch.device) -> int:
    """Units of work per KV head: the decode kernel's fixed grid, see ``nemo_engine.kernels.decode_split``."""
    return split.num_units(facts(device).sms, kv_heads)


def plan_decode(
    seq_lens: torch.Tensor, num_units: int, kv_heads: int, is_padded: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """How decode attention splits its rows into units of work, by their lengths on the device.

    seq_lens: (B,) int64. is_padded: as if rows of no keys at the end were not there. Returns (5 + 2 num_units,) int32:
    the tiles of a share, the numbers of rows without keys and of units with work, and
    ``nemo_engine.kernels.decode_split.cuts``; and (num_units, kv_heads) int32, zeros, which ``decode`` leaves zeros.
    """
    rows, num_counts = seq_lens.shape[0], num_units * kv_heads
    plan = torch.empty(5 + 2 * num_units + num_counts, dtype=torch.int32, device=seq_lens.device)
    padded = triton.next_power_of_2(rows)
    _plan_kernel[(1,)](
        plan, seq_lens, rows, num_units, num_counts, int(is_padded), TILE=split.TILE, PART_COST=split.PART_COST,
        MIN_SHARE=split.MIN_SHARE, ROWS=padded, COUNTS=triton.next_power_of_2(num_counts),
        num_warps=1 if padded <= 256 else 4,
    )  # fmt: skip
    return plan[:-num_counts], plan[-num_counts:].view(num_units, kv_heads)


def decode(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    slot_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    plan: tuple[torch.Tensor, torch.Tensor],
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
    units, results = plan[1].shape[0], triton.next_power_of_2(group * queries)
    part = torch.empty(2 * units, queries * heads, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(2 * units, queries * heads, dtype=torch.float32, device=q.device)
    padded = max(16, triton.next_power_of_2(dim))
    shared = facts(q.device).shared // split.BLOCKS_PER_SM
    stages = stages_in(4, 2 * split.TILE * padded * k_cache.itemsize, 8 << 10, shared)
    _decode_kernel[(units, kv_heads)](
        out, part, lse, q, k_cache, v_cache, k_scale, v_scale, page_table, slot_ids, seq_lens, query_lens, *plan, scale,
        rows, q.stride(0), q.stride(1), page_table.stride(0), k_cache.stride(0), k_cache.stride(1), heads,
        HAS_SCALES=k_scale is not None, DIM=dim, GROUP=group, QUERIES=queries, PAGE_SIZE=page_size,
        M=max(16, results), N=split.TILE, D=padded, RESULTS=results,
        PARTS=max(1, _MERGED_ELEMENTS // (results * padded)), num_warps=4, num_stages=stages, **dependent(q.device),
    )  # fmt: skip
