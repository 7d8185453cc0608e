"""Paged attention beyond the common cases: random shapes, the choice of pages, order of rows, memory of long
contexts.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_engine.ops import attention
from nemo_engine.ops.attention import attention_inputs, paged_attention
from nemo_engine.ops.cpu import attention as attention_cpu
from nemo_engine.ops.cpu.attention import paged_attention as paged_attention_torch
from nemo_engine.ops.paged_kv import PagedKV
from nemo_engine.ops.rope import ROPE_AND_APPEND_KV, RopeMeta
from nemo_engine.ops.triton.attention import paged_attention as paged_attention_triton
from tests.helpers.interpreted import backwards

ROOT = Path(__file__).parents[2]


def dense(q: Tensor, kv: PagedKV, meta: Any, scale: float) -> Tensor:
    """Independent of the code under test: one query and one head at a time, in plain Python loops."""
    out = torch.zeros_like(q)
    size, group = kv.page_size, q.shape[1] // kv.num_heads
    for row, length in enumerate(meta.seq_lens.tolist()):
        first, end = meta.query_start_loc[row : row + 2].tolist()
        places = [(int(meta.page_table[meta.slot_ids[row], at // size]), at % size) for at in range(length)]
        for token in range(first, end):
            seen = places[: length - (end - 1 - token)]
            for head in range(q.shape[1]):
                k = torch.stack([kv.k[page, head // group, offset] for page, offset in seen])
                v = torch.stack([kv.v[page, head // group, offset] for page, offset in seen])
                out[token, head] = torch.softmax(k @ q[token, head] * scale, 0) @ v
    return out


@pytest.mark.parametrize("function", [paged_attention, paged_attention_torch])
@pytest.mark.parametrize("seed", range(6))
def test_random_shapes_equal_a_dense_computation(function: Any, seed: int) -> None:
    rng = random.Random(seed)
    page_size = rng.choice([16, 32])
    kv_heads, group = rng.choice([(1, 1), (2, 1), (1, 8), (3, 2)])
    lengths = [
        rng.choice([1, page_size - 1, page_size, page_size + 1, 2 * page_size, rng.randint(1, 70)]) for _ in range(6)
    ]
    rows = [(1, length) for length in lengths[:3]] + [(rng.randint(min(2, n), min(n, 9)), n) for n in lengths[3:]]
    args = attention_inputs(rows, kv_heads * group, kv_heads, rng.choice([4, 10]), page_size, torch.float64)
    torch.testing.assert_close(function(*args), dense(*args), rtol=0, atol=1e-13)


@pytest.mark.parametrize("queries_at_once", [1, 7, 100])
def test_the_definition_does_not_depend_on_its_blocks(monkeypatch: pytest.MonkeyPatch, queries_at_once: int) -> None:
    args = attention_inputs([(1, 90), (60, 90)], 4, 2, 8, 16, torch.float64)
    expected = paged_attention(*args)
    monkeypatch.setattr(attention, "_SCORES", queries_at_once * 4 * 90)
    torch.testing.assert_close(paged_attention(*args), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("page_blocks", [1, 3])
def test_decode_does_not_depend_on_its_blocks(monkeypatch: pytest.MonkeyPatch, page_blocks: int) -> None:
    args = attention_inputs([(1, 33), (1, 1), (1, 16), (1, 90)], 4, 2, 8, 16, torch.float64)
    expected = paged_attention_torch(*args)
    monkeypatch.setattr(attention_cpu, "_BLOCK_BYTES", page_blocks * 2 * 16 * 8 * 8)
    torch.testing.assert_close(paged_attention_torch(*args), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_row_has_the_same_bits_alone_as_in_its_batch(dtype: torch.dtype) -> None:
    rows = [(1, 5), (1, 900), (1, 64), (1, 129), (40, 200), (17, 17)]
    q, kv, meta, scale = attention_inputs(rows, 8, 2, 128, 64, dtype)
    together = paged_attention_torch(q, kv, meta, scale)
    for row in range(len(rows)):
        own = slice(*meta.query_start_loc[row : row + 2].tolist())
        alone = attention.AttentionMeta(
            int(row < meta.num_decodes),
            torch.tensor([0, rows[row][0]]),
            meta.seq_lens[row : row + 1],
            meta.page_table,
            meta.slot_ids[row : row + 1],
            64,
            meta.num_pages,
            rows[row][0],
        )
        assert torch.equal(paged_attention_torch(q[own], kv, alone, scale), together[own])


MEMORY = """
import resource, torch
from nemo_engine.ops.attention import attention_inputs
from {module} import paged_attention
torch.set_num_threads(1)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
paged_attention(*attention_inputs([(1, 40), (30, 64)], 4, 1, 8, 64, torch.float32))
args = attention_inputs({rows}, 4, 1, 8, 64, torch.float32)
before = peak()
assert not paged_attention(*args).isnan().any()
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("module", "rows", "most_mib"),
    [
        # 1,024 queries over 131,072 keys: the scores of all would take 2 GiB, a mask 128 MiB.
        ("nemo_engine.ops.cpu.attention", [(1, 131072), (1024, 131072)], 64),
        ("nemo_engine.ops.attention", [(128, 131072)], 900),
    ],
)
def test_memory_of_a_long_context_is_bounded(module: str, rows: list[tuple[int, int]], most_mib: int) -> None:
    code = MEMORY.format(module=module, rows=rows)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < most_mib


@pytest.mark.interpreted
@pytest.mark.parametrize("is_fp8", [False, True])
def test_a_prefill_in_triton_has_the_same_bits_alone_as_in_its_batch(is_fp8: bool) -> None:
    rows = [(1, 5), (1, 200), (17, 17), (40, 130), (33, 33)]
    q, kv, meta, scale = attention_inputs(rows, 8, 2, 32, 16, torch.bfloat16, is_fp8)
    together = paged_attention_triton(q, kv, meta, scale)
    for row in range(meta.num_decodes, len(rows)):
        own = slice(*meta.query_start_loc[row : row + 2].tolist())
        alone = attention.AttentionMeta(
            num_decodes=0,
            query_start_loc=torch.tensor([0, rows[row][0]]),
            seq_lens=meta.seq_lens[row : row + 1],
            page_table=meta.page_table,
            slot_ids=meta.slot_ids[row : row + 1],
            page_size=16,
            num_pages=meta.num_pages,
            longest=rows[row][0],
        )
        assert torch.equal(paged_attention_triton(q[own], kv, alone, scale), together[own])


@pytest.mark.interpreted
def test_parts_of_a_decode_are_merged_in_order_whichever_is_the_last() -> None:
    for run, lengths in ((1, (70, 2400, 0, 5)), (2, (6, 7, 2049, 2050))):
        args = attention_inputs([(1, n) for n in lengths], 4, 2, 16, 64, torch.bfloat16, False, run)
        out = paged_attention_triton(*args)
        with backwards():
            assert torch.equal(paged_attention_triton(*args), out), run
        cuts, counts = args[2].once("decode plan", lambda: None)
        assert cuts[2] > 17 and not counts.any()  # units: more parts of one row than are merged at once
        torch.testing.assert_close(out, paged_attention(*args), rtol=2e-2, atol=2e-2)


@pytest.mark.interpreted
@pytest.mark.parametrize("exponent", [-100, 100])
def test_queries_of_any_size_meet_fp8_keys_in_triton(exponent: int) -> None:
    """They are multiplied in fp16, which ends at 65,504: powers of 2 that cancel change no bit."""
    q, kv, meta, scale = attention_inputs([(1, 70), (1, 5), (40, 130)], 8, 2, 32, 16, torch.bfloat16, True)
    q[0, 0], q[-1, 1] = 0.0, 2.0**-20  # which a small part of a row joins
    q[-1, 1, 0] = 1.0
    out = paged_attention_triton(q, kv, meta, scale)
    torch.testing.assert_close(out, paged_attention(q, kv, meta, scale), rtol=2e-2, atol=2e-2)
    assert torch.equal(paged_attention_triton(q * 2.0**exponent, kv, meta, scale * 2.0**-exponent), out)


@pytest.mark.interpreted
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(("dtype", "is_fp8"), [(torch.bfloat16, True), (torch.float16, True), (torch.float16, False)])
def test_many_keys_of_little_weight_count_in_triton(queries: int, dtype: torch.dtype, is_fp8: bool) -> None:
    """Each of them 2^-26 of the first, which is 0 in fp16: over a long context they are as much as one key is."""
    q, kv, meta, scale = attention_inputs([(queries, 200)], 4, 2, 16, 16, dtype, is_fp8)
    q.fill_(1.0), kv.k.fill_(0.0), kv.v.fill_(64.0)
    first = int(meta.page_table[meta.slot_ids[0], 0])
    kv.k[first, :, 0], kv.v[first, :, 0] = 26 * math.log(2) / (16 * scale), 0.0
    if kv.k_scale is not None:
        kv.k_scale.fill_(float(26 * math.log(2) / (16 * scale) / kv.k[first, 0, 0, 0].float()))
    out = paged_attention_triton(q, kv, meta, scale).double()
    torch.testing.assert_close(out, paged_attention(q, kv, meta, scale).double(), rtol=2e-2, atol=0)
    assert (out > 0).all()


@pytest.mark.interpreted
def test_caches_of_more_than_two_billion_entries_in_triton() -> None:
    """Keys and values in the last pages of a cache whose offsets need more than 32 bits: written, then read."""
    page_size, dim, num_pages = 128, 128, (1 << 31) // (128 * 128) + 3
    cache = torch.empty(num_pages, 1, page_size, dim, dtype=torch.float8_e4m3fn)  # one memory for keys and values
    generator = torch.Generator().manual_seed(1)
    length, pages = 140, torch.tensor([[num_pages - 1, num_pages - 2]])
    at = torch.arange(length)
    q, k = (torch.randn(length, heads, dim, generator=generator).bfloat16() for heads in (2, 1))
    table = torch.zeros(length, 2, dim // 2)
    table[:, 0] = 1.0  # cosines: nothing is rotated
    one = torch.ones(1)
    mapping = pages[0, at // page_size] * page_size + at % page_size
    rope_and_append_kv_ = ROPE_AND_APPEND_KV.impls[0].load()
    kv = PagedKV(cache, cache, one, one)
    rope_and_append_kv_(q, k, k, kv, RopeMeta(table, at, mapping))
    stored = k.to(torch.float8_e4m3fn)
    assert torch.equal(cache[num_pages - 1, 0].view(torch.uint8), stored[:page_size, 0].view(torch.uint8))
    small = torch.zeros(3, 1, page_size, dim)
    small[1, 0], small[2, 0, : length - page_size] = stored[:page_size, 0].float(), stored[page_size:, 0].float()
    for decodes, queries in ((1, q[-1:]), (0, q[-3:])):
        metas = [
            attention.AttentionMeta(
                num_decodes=decodes,
                query_start_loc=torch.tensor([0, len(queries)]),
                seq_lens=torch.tensor([length]),
                page_table=own,
                slot_ids=torch.tensor([0]),
                page_size=page_size,
                num_pages=2,
                longest=len(queries),
            )
            for own in (pages, torch.tensor([[1, 2]]))
        ]
        far = paged_attention_triton(queries, kv, metas[0], 0.1)
        near = paged_attention(queries.float(), PagedKV(small, small), metas[1], 0.1)
        torch.testing.assert_close(far.float(), near, rtol=0.02, atol=0.02)
