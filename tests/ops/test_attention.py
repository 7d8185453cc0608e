"""Paged attention beyond the common cases: random shapes, the choice of pages, order of rows, memory of long contexts."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_engine.ops import attention, attention_cpu
from nemo_engine.ops.attention import attention_inputs, paged_attention
from nemo_engine.ops.attention_cpu import paged_attention as paged_attention_torch

ROOT = Path(__file__).parents[2]


def dense(q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: Any, scale: float, *unscaled: None) -> Tensor:
    """Independent of the code under test: one query and one head at a time, in plain Python loops."""
    out = torch.zeros_like(q)
    size, group = k_cache.shape[2], q.shape[1] // k_cache.shape[1]
    for row, length in enumerate(meta.seq_lens.tolist()):
        first, end = meta.query_start_loc[row : row + 2].tolist()
        places = [(int(meta.page_table[meta.slot_ids[row], at // size]), at % size) for at in range(length)]
        for token in range(first, end):
            seen = places[: length - (end - 1 - token)]
            for head in range(q.shape[1]):
                k = torch.stack([k_cache[page, head // group, offset] for page, offset in seen])
                v = torch.stack([v_cache[page, head // group, offset] for page, offset in seen])
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
    q, k_cache, v_cache, meta, scale, _, _ = attention_inputs(rows, 8, 2, 128, 64, dtype)
    together = paged_attention_torch(q, k_cache, v_cache, meta, scale)
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
        )
        assert torch.equal(paged_attention_torch(q[own], k_cache, v_cache, alone, scale), together[own])


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
        ("nemo_engine.ops.attention_cpu", [(1, 131072), (1024, 131072)], 64),
        ("nemo_engine.ops.attention", [(128, 131072)], 900),
    ],
)
def test_memory_of_a_long_context_is_bounded(module: str, rows: list[tuple[int, int]], most_mib: int) -> None:
    code = MEMORY.format(module=module, rows=rows)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < most_mib
