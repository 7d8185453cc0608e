"""Long sums over FP8: a tensor core that accumulates them alone is far off, and the kernels, which promote, are not.

In emulation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_engine.ops.attention import AttentionMeta
from nemo_engine.ops.cuda.attention import paged_attention
from nemo_engine.ops.cuda.linear import linear_fp8
from nemo_engine.ops.paged_kv import PagedKV
from tests.emulation.library import emulated
from tests.test_emulation import a_registers, b_registers

pytestmark = pytest.mark.emulated

FP8 = torch.float8_e4m3fn


@pytest.fixture
def library(emulated_library: Any) -> Iterator[Any]:
    emulated_library.emulator.seed(0)
    with emulated(emulated_library):
        yield emulated_library


def accumulated_in_the_tensor_core(library: Any, x: Tensor, w: Tensor) -> float:
    """``x @ w`` of two FP8 vectors with one accumulator, 32 of K at a time, as without promotion."""
    d = torch.zeros(32, 4)
    for x_part, w_part in zip(x.view(torch.uint8).split(32), w.view(torch.uint8).split(32), strict=True):
        a = a_registers(x_part.view(FP8).repeat(16, 1))
        b = b_registers(w_part.view(FP8).repeat(8, 1))
        library.checks.warp_product(d.data_ptr(), a.data_ptr(), b.data_ptr(), 2)
    return float(d[0, 0])


def test_a_dot_product_of_14336(library: Any) -> None:
    """A sum of the down projection's length, all terms positive, as after a bias in one direction."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.rand(14336, generator=generator).add(0.5).to(FP8) for _ in range(2))
    exact = float(x.double() @ w.double())
    assert abs(accumulated_in_the_tensor_core(library, x, w) / exact - 1) > 0.02
    for rows in (1, 64, 128):  # two small kernels and the large one
        scales = torch.ones(rows, 1), torch.ones(8, 1)
        got = linear_fp8(x.repeat(rows, 1), scales[0], w.repeat(8, 1), scales[1])
        assert (got.double() / exact - 1).abs().max() <= 2**-8, rows  # one rounding to bf16


def test_the_values_of_131072_tokens(library: Any) -> None:
    """Equal weights over values of one sign: the result is their mean. 64 of them stand for all."""
    keys, page = 131072, 64
    values = torch.rand(page, 128, generator=torch.Generator().manual_seed(0)).add(0.5)
    v_cache = values.to(FP8).view(1, 1, page, 128)
    exact = v_cache.double().mean(dim=2).view(128)
    one = v_cache[0, 0, :, 0].contiguous().view(torch.uint8).repeat(keys // page).view(FP8)
    alone = accumulated_in_the_tensor_core(library, torch.ones(keys).to(FP8), one) / keys
    assert abs(alone / float(exact[0]) - 1) > 0.1
    q, k_cache = torch.zeros(1, 1, 128, dtype=torch.bfloat16), torch.zeros(1, 1, page, 128).to(FP8)
    meta = AttentionMeta(
        num_decodes=1,
        query_start_loc=torch.tensor([0, 1]),
        seq_lens=torch.tensor([keys]),
        page_table=torch.zeros(1, keys // page, dtype=torch.int64),
        slot_ids=torch.tensor([0]),
        page_size=page,
        num_pages=keys // page,
        longest=1,
    )
    got = paged_attention(q, PagedKV(k_cache, v_cache), meta, 0.1)
    assert (got.view(128).double() / exact - 1).abs().max() <= 2**-8
