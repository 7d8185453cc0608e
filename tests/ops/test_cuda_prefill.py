"""Prefill attention of the CUDA kernels over FP8 caches, in emulation: pages widened exactly, in turns that fit the
scratch memory, and nothing else changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_engine.config import EngineConfig
from nemo_engine.memory_plan import plan_memory, widened_bytes
from nemo_engine.ops.attention import PAGED_ATTENTION, AttentionMeta, Workspace, attention_inputs, paged_attention
from nemo_engine.ops.cuda import attention as cuda_attention
from nemo_engine.ops.cuda import prefill
from nemo_engine.ops.paged_kv import PagedKV
from nemo_engine.ops.quantize import FP8
from nemo_engine.planner.models import BUILT_IN
from tests.emulation.library import emulated, watched

NEMO = BUILT_IN["nemo"]
# (queries, keys): a decode, a long prefix, whole pages, one key past a page, a prompt of one page, one whose last tile
# is full.
ROWS = [(1, 20), (9, 150), (16, 32), (3, 33), (2, 2), (40, 128)]


@pytest.fixture
def library(emulated_library: Any) -> Iterator[Any]:
    emulated_library.emulator.clear_launches()
    with emulated(emulated_library):
        yield emulated_library
    emulated_library.emulator.set_dry_run(False)
    emulated_library.emulator.clear_launches()


def names(library: Any) -> list[str]:
    return [launch["name"] for launch in library.emulator.launches()]


@pytest.mark.emulated
@pytest.mark.parametrize(("first_head", "heads"), [(0, 3), (1, 1), (1, 2)])
def test_pages_are_widened_exactly(library: Any, first_head: int, heads: int) -> None:
    """All 256 numbers, of rows with 2, 0, 1 and 3 pages; what lies behind the last page is left alone."""
    page_size, counts = 16, [2, 0, 1, 3]
    index = torch.arange(9 * 3 * page_size * 128)
    cache = (index * 37 + index // 256).remainder(256).to(torch.uint8)
    k = cache.view(9, 3, page_size, 128).view(FP8)
    v = cache.flip(0).contiguous().view(9, 3, page_size, 128).view(FP8)
    assert set(k.view(torch.uint8).flatten().tolist()) == set(range(256))
    table = torch.tensor([[7, 1, 1 << 40], [8, 2, 5], [1 << 40] * 3, [4, 1 << 40, 1 << 40], [1 << 40] * 3])
    slots, bounds = torch.tensor([0, 2, 3, 1]), torch.tensor([0, *counts]).cumsum(0)
    wide = [torch.full((8, heads, page_size, 128), 7.0).bfloat16() for _ in range(2)]
    library.gather_pages(
        *[x.data_ptr() for x in (*wide, k, v, table, slots, bounds)], 3, 4, 7, 3, first_head, heads, page_size, 0
    )
    for got, source in zip(wide, (k, v), strict=True):
        expected = source[[7, 1, 4, 8, 2, 5]][:, first_head : first_head + heads].to(torch.bfloat16)
        assert torch.equal(got[:6].isnan(), expected.isnan()) and expected.isnan().any()
        assert torch.equal(got[:6].nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))
        assert (got[6:] == 7).all()


def attend(library: Any, q: Tensor, kv: PagedKV, meta: AttentionMeta, scale: float) -> Tensor:
    """Over tensors that the emulation knows, so that a page which is not written is read as NaN, and shows."""
    meta = dataclasses.replace(meta, workspace=Workspace(), _kept={})
    result: Tensor = watched(library, PAGED_ATTENTION, cuda_attention.paged_attention)(q, kv, meta, scale)
    return result


@pytest.mark.emulated
def test_turns_change_no_bit(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rows and by heads, with the pages of each row known and not: less scratch memory, more turns, the same
    result.
    """
    q, kv, meta, scale = attention_inputs(ROWS, 2, 2, 128, 16, torch.bfloat16, is_fp8=True)
    pages = tuple(-(-keys // 16) for _, keys in ROWS[1:])
    results, turns = [], []
    for most in (1 << 20, 24, 12, 1):  # pages of one head
        monkeypatch.setattr(prefill, "WIDENED_BYTES", most * 2 * 2 * 16 * 128)
        for known in (pages, None):
            library.emulator.clear_launches()
            results.append(attend(library, q, kv, dataclasses.replace(meta, prefill_pages=known), scale))
            turns.append(names(library).count("gather_pages"))
    assert turns == [1, 1, 2, 5, 5, 10, 6, 10]
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(results[0], paged_attention(q, kv, meta, scale), rtol=0.02, atol=0.02)


@pytest.mark.emulated
def test_a_row_has_the_same_bits_alone_as_in_its_batch(library: Any) -> None:
    q, kv, meta, scale = attention_inputs(ROWS, 4, 1, 128, 32, torch.bfloat16, is_fp8=True)
    together = attend(library, q, kv, meta, scale)
    for row in range(1, len(ROWS)):
        own = slice(*meta.query_start_loc[row : row + 2].tolist())
        alone = AttentionMeta(
            0, torch.tensor([0, ROWS[row][0]]), meta.seq_lens[row : row + 1], meta.page_table, meta.slot_ids[row : row +
            1], 32, meta.num_pages, ROWS[row][0],
        )  # fmt: skip
        assert torch.equal(attend(library, q[own], kv, alone, scale), together[own])


@pytest.mark.emulated
def test_nan_and_scales_of_a_cache_are_kept(library: Any) -> None:
    """A NaN among a row's keys or values reaches what the definition says and nothing else; no scales are scales of
    1.
    """
    q, kv, meta, scale = attention_inputs([(6, 40), (5, 40)], 2, 2, 128, 16, torch.bfloat16, is_fp8=True)
    ones = [torch.ones(2)] * 2
    plain = attend(library, q, PagedKV(*kv.caches), meta, scale)
    assert torch.equal(plain, attend(library, q, PagedKV(*kv.caches, *ones), meta, scale))
    assert not torch.equal(plain, attend(library, q, kv, meta, scale))
    page = meta.page_table[meta.slot_ids[0], 2]
    for index in range(2):
        caches = list(kv.caches)
        caches[index] = broken = caches[index].clone()
        broken.view(torch.uint8)[page, 1, 4, 9] = 0x7F  # of key 36 of the first row, which its queries 2 to 5 see
        args = (q, PagedKV(*caches), meta, scale)
        got, expected = attend(library, *args), paged_attention(*args)
        assert torch.equal(got.isnan(), expected.isnan())
        assert got[:, 1].isnan().any() and not got[:, 0].isnan().any() and not got[6:].isnan().any()


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("pages", "turns"),
    [
        ((1024,), [(0, 1, 8)]),  # 64 Ki keys
        ((2048,), [(0, 1, 4)] * 2),  # 128 Ki keys
        ((16384,), [(0, 1, 1)] * 8),  # 1 Mi keys: one head is more than the budget
        ((1,) * 40 + (2048,) + (1,) * 23, [(0, 40, 8), (40, 41, 4), (40, 41, 4), (41, 64, 8)]),
        ((1000, 24, 512, 513), [(0, 2, 8), (2, 3, 8), (3, 4, 8)]),
    ],
)
def test_scratch_memory_at_true_size(library: Any, pages: tuple[int, ...], turns: list[tuple[int, int, int]]) -> None:
    """NeMo's heads: (first row, end, heads) of each turn, by its blocks; and that the memory is as much in every step,
    and as planned.
    """
    emulator, rows, width = library.emulator, len(pages), max(2048, *pages)
    q = torch.empty(8 * rows, 32, 128, dtype=torch.bfloat16)
    cache, ints = torch.empty(3, 8, 64, 128, dtype=FP8), torch.full((rows,), 8)
    starts, table = torch.arange(rows + 1) * 8, torch.zeros(65, width, dtype=torch.int64)
    meta = AttentionMeta(0, starts, ints, table, ints, 64, max(pages), 8, prefill_pages=pages)
    emulator.set_dry_run(True)
    emulator.set_num_sms(1 << 20)  # as many blocks as items
    try:
        cuda_attention.paged_attention(q, PagedKV(cache, cache), meta, 0.1)
    finally:
        emulator.set_num_sms(132)
    blocks = [(launch["name"], launch["grid"][0]) for launch in emulator.launches()]
    expected = []
    for first, end, heads in turns:
        expected.append(("gather_pages", sum(pages[first:end])))
        expected.append(("prefill_attention", ((end - first) * 8 // 32 + end - first) * heads))
    assert blocks == expected
    taken = sum(buffer.nbytes for buffer in meta.workspace._buffers.values())
    assert taken == max(256 << 20, width * 32 << 10) == widened_bytes(NEMO, 65, width, 64, 1)


def test_the_plan_has_the_scratch_memory() -> None:
    config = EngineConfig(max_num_seqs=64, page_size=64)
    fp8, bf16 = (plan_memory(NEMO, config, 131072, 2, 100 << 30, 9, None, size).activations for size in (1, 2))
    assert fp8 - bf16 == 256 << 20
    for slots, pages, page_size in ((2, 5, 16), (65, 2048, 64), (3, 20000, 64)):
        head = 2 * 2 * page_size * 128
        assert widened_bytes(NEMO, slots, pages, page_size, 1) == head * prefill.widened_capacity(
            slots, pages, 8, page_size
        )
