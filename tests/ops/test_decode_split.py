"""How decode attention splits its rows: the rule, how well it fills a GPU, and that the kernels follow it."""

from __future__ import annotations

import dataclasses
import importlib
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nemo_engine.benchmarks.decode_split import KV_HEADS, SMS, fill, mixes, rule_fill
from nemo_engine.kernels.decode_split import MIN_SHARE, PART_COST, TILE, cuts, num_units, parts, share_of
from nemo_engine.ops import attention
from nemo_engine.ops.attention import attention_inputs
from nemo_engine.ops.cuda import attention as cuda_attention
from tests.emulation.library import emulated


def batches() -> Iterator[tuple[list[int], int]]:
    """Lengths with what lies at the edges of tiles and shares, and units."""
    rng = random.Random(5)
    for units in (1, 5, 33):
        yield [0, 0], units
        yield [1] * (units + 2), units
        yield [TILE * MIN_SHARE * units + edge for edge in (-1, 0, 1)], units
        yield [units * 40 * TILE - PART_COST * TILE], units
        for rows in (1, 7, 70):
            kinds = (0, 1, TILE - 1, TILE, TILE + 1, rng.randint(1, 2000), rng.randint(1, 50_000))
            yield [rng.choice(kinds) for _ in range(rows)], units
    yield [130_000], 264
    yield [rng.choice((0, 5, 700)) for _ in range(1500)], 33  # more than the threads that plan


def tiles(begin: int, end: int) -> int:
    return -(-(end - begin) // TILE)


def test_every_key_is_read_once_and_units_end_together() -> None:
    for lengths, units in batches():
        split, share = parts(lengths, units), share_of(lengths, units)
        read = sorted((row, begin, end) for unit in split for row, begin, end in unit)
        assert len(split) <= units
        for row, length in enumerate(lengths):
            spans = [(begin, end) for at, begin, end in read if at == row]
            edges = [0, *(end for _, end in spans)]
            assert [begin for begin, _ in spans] == edges[:-1] and edges[-1] == length
        for index, unit in enumerate(split):
            costs = [tiles(begin, end) + PART_COST for _, begin, end in unit]
            assert sum(costs) <= share + PART_COST
            assert sum(costs) >= share or index == len(split) - 1
            assert sum(begin > 0 for _, begin, _ in unit) <= 1
            assert sum(begin == 0 and end < lengths[row] for row, begin, end in unit) <= 1


@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 64, 66])
def test_rows_are_whole_where_that_is_as_fast(rows: int) -> None:
    """Equal rows that the units divide among themselves, and one unit for each row if there are as many or one more."""
    units = 33
    split = parts([4096] * rows, units)
    if rows in (32, 33, 66):
        assert all(end - begin == 4096 for unit in split for _, begin, end in unit)
    else:
        assert len(split) >= units - 1 and len({begin for unit in split for _, begin, _ in unit}) > 1


def test_the_rule_fills_the_gpu() -> None:
    """NeMo's heads on an H200: at least 0.95 of the least time wherever the work is 256k keys or more, 0.93 from 64k
    keys on.
    """
    units = num_units(SMS, KV_HEADS)
    assert units * KV_HEADS == 264
    seen = {name: rule_fill(lengths, units) for name, lengths in mixes().items()}
    large = {name for name, lengths in mixes().items() if sum(lengths) >= 256 * 1024}
    assert len(large) >= 10
    assert {name: share for name, share in seen.items() if name in large and not 0.95 <= share <= 1} == {}
    named = ("1 x 130,560", "17 x 8,192", "1 x 131,072 in 64 x 1,024", "8 x 8,192")
    assert min(seen[name] for name in named) >= 0.93


def test_the_model_sees_a_second_wave_and_a_lone_row() -> None:
    """What earlier rules did: 40 equal blocks on 33 places, and a long row that one block reads."""
    assert fill([130560], [[3264]] * 40, 33) < 0.8
    assert fill([1024] * 64 + [131072], [[1024]] * 64 + [[131072]], 33) < 0.1
    assert fill([130560], [[130560]], 1) > 0.99


@pytest.mark.interpreted
def test_triton_cuts_as_the_rule_says() -> None:
    kernels: Any = importlib.import_module("nemo_engine.kernels.decode")
    for lengths, units in batches():
        expected, split = cuts(lengths, units), parts(lengths, units)
        plan, counts = kernels.plan_decode(torch.tensor(lengths), units, 3)
        share, empty, used, *words = plan.tolist()
        assert (share, empty, used) == (share_of(lengths, units), lengths.count(0), max(1, len(split)))
        assert list(zip(words[::2], words[1::2], strict=True))[: len(expected)] == expected
        assert counts.shape == (units, 3) and not counts.any()
        if lengths[-1]:  # empty rows behind them are as if they were not there
            padded, _ = kernels.plan_decode(torch.tensor([*lengths, 0, 0, 0]), units, 3, True)
            assert padded[: 3 + 2 * len(expected)].tolist() == [share, empty, used, *words[: 2 * len(expected)]]


def test_cuda_cuts_as_the_rule_says(emulated_library: Any) -> None:
    with emulated(emulated_library):
        for lengths, units in batches():
            rows, expected = len(lengths), cuts(lengths, units)
            heads = share_of(lengths, units), rows * (0 in lengths), max(1, len(expected) - 1)
            for num_empty in (0, 3):  # rows without a query behind them are no items
                num_rows = rows + num_empty
                plan = torch.full((emulated_library.decode_plan_words(num_rows, units, 1),), -1, dtype=torch.int32)
                starts = torch.arange(num_rows + 1).clamp(max=rows)
                lens, slots = torch.tensor([*lengths, *[0] * num_empty]), 3 + torch.arange(num_rows)
                addresses = [x.data_ptr() for x in (plan, starts, lens, slots)]
                emulated_library.plan_decode(*addresses, 0, num_rows, 0, num_rows, units, 1, 0)
                share, empty, used, *words = plan.tolist()
                assert (share, empty, used) == heads
                assert list(zip(words[::2], words[1::2], strict=False))[: len(expected)] == expected
                listed = words[2 * units + 2 :]
                assert listed[:num_rows] == [*lengths, *[-1] * num_empty]
                assert listed[num_rows:][:num_rows] == [*slots[:rows].tolist(), *[-1] * num_empty]


@pytest.mark.parametrize("width", [2, 4, 8])
def test_cuda_cuts_runs_by_the_query_that_sees_the_most(emulated_library: Any, width: int) -> None:
    rng, units = random.Random(width), 5
    seen = [[rng.randint(0, 900) for _ in range(width)] for _ in range(40)]
    expected = cuts([max(run) for run in seen], units)
    slots = [[rng.randrange(99) for _ in run] for run in seen]
    plan = torch.full((emulated_library.decode_plan_words(len(seen), units, width),), -1, dtype=torch.int32)
    inputs = torch.arange(len(seen) * width + 1), torch.tensor(seen).flatten(), torch.tensor(slots).flatten()
    with emulated(emulated_library):
        addresses = [x.data_ptr() for x in (plan, *inputs)]
        emulated_library.plan_decode(*addresses, 0, len(seen), 0, len(seen) * width, units, width, 0)
    words = plan[3:].tolist()
    assert list(zip(words[::2], words[1::2], strict=False))[: len(expected)] == expected
    lengths, of_slots, _, *listed = plan[5 + 2 * units :].split(len(seen))
    assert lengths.tolist() == [max(run) for run in seen] and of_slots.tolist() == [run[0] for run in slots]
    assert torch.cat(listed).tolist() == inputs[1].tolist()


def test_units_are_as_many_as_the_blocks_that_run_at_once(emulated_library: Any) -> None:
    with emulated(emulated_library):
        for kv_heads in (1, 2, 3, 8, 100, 1000):
            assert emulated_library.decode_units(kv_heads) == num_units(132, kv_heads)


def check_on(library: Any, sms: int, args: Any) -> None:
    """Attention of ``args`` on so many SMs, in two orders of threads and blocks, against its definition."""
    library.emulator.set_num_sms(sms)
    try:
        with emulated(library):
            for seed in range(2):
                library.emulator.seed(seed)
                got = cuda_attention.paged_attention(*args)
    finally:
        library.emulator.set_num_sms(132)
    torch.testing.assert_close(got, attention.paged_attention(*args), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("sms", [1, 4])
def test_cuda_in_few_units(emulated_library: Any, is_fp8: bool, sms: int) -> None:
    """More rows than units, units of many rows, rows of many units, edges of pages and tiles, and rows without keys."""
    rng = random.Random(sms)
    lengths = [0, 1, 63, 64, 65, 900, 0, 16, 129, 300, 17, 5, 0, 0]
    rng.shuffle(lengths)
    rows = [(1, length) for length in lengths] + [(3, 70), (2, 2)]
    args = attention_inputs(rows, 4, 2, 128, 16, torch.bfloat16, is_fp8)
    check_on(emulated_library, sms, args)


RUNS = [5, 59, 121, 0, 253, 640, 16, 1]  # keys of the first query of each


def run_inputs(width: int, heads: int, kv_heads: int, is_fp8: bool) -> Any:
    """Runs with ends of pages and tiles between their queries, and some with fewer drafts than places."""
    rows = [(1, first + min(place, first % (width + 1))) for first in RUNS for place in range(width)]
    return attention_inputs(rows, heads, kv_heads, 128, 16, torch.bfloat16, is_fp8, width)


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize(("width", "heads", "kv_heads"), [(2, 8, 2), (4, 4, 1), (8, 2, 2), (8, 4, 1), (8, 8, 1)])
def test_cuda_in_few_units_of_runs(emulated_library: Any, is_fp8: bool, width: int, heads: int, kv_heads: int) -> None:
    """Units of many runs, runs of many units, and parts behind all that the first queries of a run see."""
    args = run_inputs(width, heads, kv_heads, is_fp8)
    check_on(emulated_library, 4, args)


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("width", [2, 4, 8])
def test_a_query_of_a_run_has_the_bits_that_it_has_alone(emulated_library: Any, is_fp8: bool, width: int) -> None:
    """Where its keys are cut the same: here not at all."""
    q, kv, meta, scale = run_inputs(width, 8, 2, is_fp8)
    alone = dataclasses.replace(meta, run_length=1, workspace=attention.Workspace(), _kept={})
    emulated_library.emulator.set_num_sms(1)
    try:
        with emulated(emulated_library):
            together, one_by_one = (cuda_attention.paged_attention(q, kv, each, scale) for each in (meta, alone))
    finally:
        emulated_library.emulator.set_num_sms(132)
    assert torch.equal(together.view(torch.int16), one_by_one.view(torch.int16))


def test_padding_in_a_run_changes_nothing_of_its_first_query(emulated_library: Any) -> None:
    """Rows of slot 0, of one key in page 0, in a run of another slot, and a run of nothing else."""
    q, kv, meta, scale = attention_inputs([(1, 70)] * 4 + [(1, 1)] * 4, 4, 1, 128, 16, torch.bfloat16, False, 4)
    meta.slot_ids[1:] = meta.page_table[0] = 0
    meta.seq_lens[1:] = 1
    kv.k[0], kv.v[0] = 0, 0
    with emulated(emulated_library):
        got = cuda_attention.paged_attention(q, kv, meta, scale)
    torch.testing.assert_close(got[0], attention.paged_attention(q, kv, meta, scale)[0], rtol=0.02, atol=0.02)
    assert got.isfinite().all()


@pytest.mark.interpreted
@pytest.mark.parametrize(("is_fp8", "sms"), [(False, 4), (True, 1)])
def test_triton_in_few_units(monkeypatch: pytest.MonkeyPatch, is_fp8: bool, sms: int) -> None:
    from nemo_engine.kernels import device
    from nemo_engine.ops.triton.attention import paged_attention as paged_attention_triton

    monkeypatch.setattr(device, "elsewhere", device.Facts(sms, 227 << 10))
    rng = random.Random(sms)
    lengths = [0, 1, 63, 64, 65, 900, 0, 16, 129, 300, 17, 5, 0, 0]
    rng.shuffle(lengths)
    args = attention_inputs([(1, length) for length in lengths], 4, 2, 16, 16, torch.bfloat16, is_fp8)
    torch.testing.assert_close(paged_attention_triton(*args), attention.paged_attention(*args), rtol=0.02, atol=0.02)
