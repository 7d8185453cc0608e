"""The kernels of csrc/cpu and the packed products, beside the cases that test_ops holds every implementation
against.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nemo_engine.model.weights import dummy_weights
from nemo_engine.ops import norm, sample
from nemo_engine.ops.activation import silu_mul
from nemo_engine.ops.attention import attention_inputs, paged_attention
from nemo_engine.ops.cpu import compiled as cpu
from nemo_engine.ops.cpu import packed, products
from nemo_engine.ops.fused import NORM_LINEAR, SILU_MUL_LINEAR
from nemo_engine.ops.linear import LINEAR
from nemo_engine.ops.op import Op, compiled_for_cpu
from nemo_engine.ops.paged_kv import PagedKV
from nemo_engine.ops.sample import SampleFacts, SlotParams
from tests.helpers.checkpoints import tiny_config
from tests.helpers.lanes import has_lanes
from tests.ops.proofs import prove, run

built = pytest.mark.skipif(compiled_for_cpu() is None, reason="nemo_engine._cpu is not built: there is no C++ compiler")
packs = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bf16 products on this CPU"
)


@built
@pytest.mark.parametrize("seed", range(40))
def test_attention_of_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    kv_heads, group = rng.choice((1, 2, 3, 8)), rng.choice((1, 2, 3, 4, 5, 7, 8))
    dim, page_size = rng.choice((2, 16, 30, 64, 128, 130, 256)), rng.choice((16, 32, 64, 128))
    lengths = [rng.choice((1, 15, 16, 17, 63, 64, 65, rng.randrange(1, 700))) for _ in range(rng.randrange(1, 6))]
    dtype = rng.choice((torch.float32, torch.bfloat16))
    rows = [(1, length) for length in lengths]
    q, kv, meta, scale = attention_inputs(rows, group * kv_heads, kv_heads, dim, page_size, dtype)
    expected = paged_attention(q.float(), PagedKV(kv.k.float(), kv.v.float()), meta, scale)
    tolerance = 2e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(
        cpu.paged_attention(q, kv, meta, scale).float(), expected, rtol=tolerance, atol=tolerance / 4
    )


@built
def test_large_and_infinite_scores() -> None:
    q, kv, meta, _ = attention_inputs([(1, 100), (1, 40)], 4, 2, 16, 16, torch.float32)
    torch.testing.assert_close(
        cpu.paged_attention(q, kv, meta, 300.0), paged_attention(q, kv, meta, 300.0), rtol=2e-4, atol=1e-4
    )
    poisoned = kv.k.clone()
    poisoned[meta.pages[0, 0], 0, 3] = torch.nan  # a key of the first row's first KV head
    out = cpu.paged_attention(q, PagedKV(poisoned, kv.v), meta, 1.0)
    assert out[0, :2].isnan().all() and out[0, 2:].isfinite().all() and out[1].isfinite().all()


@built
def test_threads_change_nothing() -> None:
    args = attention_inputs([(1, 700), (1, 3), (1, 64), (1, 1200)], 8, 2, 128, 64, torch.bfloat16)
    x, residual = (torch.randn(300, 256).bfloat16() for _ in range(2))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append((cpu.paged_attention(*args), *cpu.rms_norm(x, x[0], 1e-5, residual), cpu.silu_mul(x)))
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@built
@pytest.mark.parametrize("width", [1, 7, 15, 16, 17, 100, 2048])
def test_rows_of_any_width(width: int) -> None:
    x = torch.randn(5, 2 * width) * 3
    for got, expected in (
        (cpu.silu_mul(x), silu_mul(x)),
        (cpu.rms_norm(x, x[1], 1e-5)[0], norm.rms_norm(x, x[1], 1e-5)[0]),
        (cpu.rms_norm(x[:, ::2], x[1, :width], 1e-5)[0], norm.rms_norm(x[:, ::2], x[1, :width], 1e-5)[0]),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@built
def test_silu_of_every_bf16_number() -> None:
    gate = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    got, expected = (f(torch.stack([gate, torch.ones_like(gate)], 1)).float() for f in (cpu.silu_mul, silu_mul))
    assert torch.equal(got.isnan(), expected.isnan())
    finite = expected.isfinite()
    assert torch.equal(got.isfinite(), finite)
    # One unit of the last place; what is next to nothing may be nothing.
    assert ((got - expected).abs()[finite] <= expected.abs()[finite] * 2**-7 + 1e-35).all()
    assert (got == expected)[finite].float().mean() > 0.99


@built
def test_calls_with_wrong_arguments_are_refused() -> None:
    library = compiled_for_cpu()
    assert library is not None
    for arguments in ((), (True, 0, 0, 1), (True, 0, 0, 1, 1, 1), (True, "0", 0, 1, 1)):
        with pytest.raises(TypeError):
            library.silu_mul(*arguments)


@built
def test_it_shares_the_threads_of_torch() -> None:
    code = (
        "import torch, nemo_engine._cpu\n"
        "maps = open('/proc/self/maps').read()\n"
        "print(len({line.split()[-1] for line in maps.splitlines() if 'libgomp' in line or 'libiomp' in line or "
        "'libomp' in line}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "1\n", run.stderr


def with_packed_weight(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its last argument packed."""
    return lambda *args: function(*args[:-1], products.pack_weight(args[-1]))


@built
@pytest.mark.parametrize("op", [LINEAR, NORM_LINEAR, SILU_MUL_LINEAR], ids=lambda op: op.name)
def test_compiled_products(op: Op) -> None:
    """Against the definition; the norm and the activation within give the bits of those before."""
    function = with_packed_weight(getattr(products, op.name))
    composed = {
        "linear": products.linear,
        "norm_linear": lambda *args: (products.linear(cpu.rms_norm(args[0], *args[2:4], args[1])[0], args[4]),),
        "silu_mul_linear": lambda *args: products.linear(cpu.silu_mul(args[0]), args[1]),
    }
    for case in op.cases():
        args = case.make(torch.bfloat16)
        if args[-1].shape[1] % 2 == 0:
            prove(op, function, case, torch.bfloat16)
            (got, *_), (expected, *_) = (run(f, args) for f in (function, with_packed_weight(composed[op.name])))
            assert torch.equal(got, expected), case.name


@built
@pytest.mark.parametrize("lanes", [16, 8, 4])
def test_rows_have_the_same_bits_alone_in_any_batch_and_with_any_threads(lanes: int) -> None:
    library = compiled_for_cpu()
    assert library is not None
    widest = next(count for count in (16, 8, 4) if has_lanes(count))
    if lanes > widest:
        pytest.skip(f"this CPU has vectors of {widest} numbers at most")
    generator = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    library.set_lanes(lanes)
    try:
        for outputs, width in ((1, 2), (15, 6), (40, 48), (129, 640), (320, 130), (87, 4098)):  # the last one in parts
            x = torch.randn(103, width, generator=generator).bfloat16()
            weight = (torch.randn(outputs, width, generator=generator) * width**-0.5).bfloat16()
            packed_weight = products.pack_weight(weight)
            torch.set_num_threads(1)
            alone = torch.cat([products.linear(x[row : row + 1], packed_weight) for row in range(len(x))])
            exact = x.double() @ weight.double().T
            torch.testing.assert_close(alone.double(), exact, rtol=2**-8, atol=1e-5)
            for rows, count in ((2, 1), (3, 2), (4, 3), (5, 1), (7, 5), (11, 1), (12, 2), (16, 2), (103, 3)):
                torch.set_num_threads(count)
                assert torch.equal(products.linear(x[:rows], packed_weight), alone[:rows]), (outputs, width, rows)
    finally:
        library.set_lanes(widest)
        torch.set_num_threads(threads)


@built
def test_what_products_refuse() -> None:
    x, weight = torch.ones(2, 48).bfloat16(), products.pack_weight(torch.ones(33, 48).bfloat16())
    with pytest.raises(ValueError, match="rows of 46, the weight is of 48"):
        products.linear(x[:, :46], weight)
    with pytest.raises(TypeError, match="bfloat16"):
        products.linear(x.float(), weight)
    with pytest.raises(RuntimeError):
        F.linear(x, weight)  # the order is not that of a matrix
    with pytest.raises(ValueError, match="no vectors of 5"):
        compiled_for_cpu().set_lanes(5)  # type: ignore[union-attr]


@built
def test_greedy_rows_with_numbers_that_are_none() -> None:
    """Of any width and place: the first of equal maxima, also at -0; NaN, infinities and rows that are all masked."""
    for dtype, width in ((torch.bfloat16, 1), (torch.float32, 15), (torch.bfloat16, 16), (torch.float32, 1000)):
        generator = torch.Generator().manual_seed(width)
        logits = torch.randn(9, width, generator=generator).to(dtype)
        logits[1] = -torch.inf
        logits[2, -1] = torch.nan
        logits[3, width // 2] = torch.inf
        logits[4] = 0.0
        logits[4, 0] = -0.0
        logits[5] = -torch.inf
        logits[5, -1] = -3.0
        logits[6, 0] = torch.nan
        logits[7, width // 3 :] = 9.0
        rows = torch.arange(9)
        args = (logits, rows, rows, SlotParams.off(9, width, torch.device("cpu")))
        facts = SampleFacts(rows[:0], 0, False, 0, False, rows[:0], False)
        assert torch.equal(cpu.sample_(*args, facts), sample.sample_(*args, facts)), (dtype, width)


@packs
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64, 300])
@pytest.mark.parametrize(("outputs", "width"), [(1, 16), (5, 48), (33, 130), (256, 640), (6144, 256)])
def test_packed_products(rows: int, outputs: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows + outputs)
    x, weight = (torch.randn(n, width, generator=generator).bfloat16() for n in (rows, outputs))
    product = packed.linear(x, packed.pack_weight(weight))
    assert product.dtype == torch.bfloat16
    torch.testing.assert_close(product.float(), x.float() @ weight.float().T, rtol=2**-7, atol=1e-3 * width**0.5)
    assert torch.equal(packed.linear(x, weight), F.linear(x, weight))  # one that is not packed


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 65])
def test_widened_products(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of outputs, the last of which is smaller; the result is rounded once."""
    monkeypatch.setattr(packed, "_WIDENED", 500)
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 48, generator=generator).bfloat16() for n in (rows, 33))
    torch.testing.assert_close(
        packed.linear_widened(x, weight).double(), x.double() @ weight.double().T, rtol=2**-8, atol=1e-5
    )


@packs
@pytest.mark.parametrize("is_tied", [False, True])
def test_packing_a_model(is_tied: bool) -> None:
    weights = dummy_weights(tiny_config(tie_word_embeddings=is_tied), torch.bfloat16)
    before = weights.num_bytes
    x = torch.randn(3, weights.embed_tokens.shape[1]).bfloat16()
    expected = [F.linear(x, linear.weight) for linear in (weights.layers[-1].gate_up, weights.lm_head)]
    weights.pack(packed.pack_weight)
    assert all(layer.qkv.weight.layout != torch.strided for layer in weights.layers)
    assert (weights.lm_head.weight is weights.embed_tokens) == is_tied  # embeddings are looked up, so they stay
    for linear, product in zip((weights.layers[-1].gate_up, weights.lm_head), expected, strict=True):
        torch.testing.assert_close(packed.linear(x, linear.weight), product, rtol=2**-7, atol=1e-3)
    assert before <= weights.num_bytes <= 1.5 * before


@built
@pytest.mark.parametrize("longest", [0, 40, 100, 700])
def test_long_prompts_go_elsewhere_and_come_out_the_same(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decodes, whole prompts and chunks, of which those of more keys than ``longest`` are left to SDPA."""
    monkeypatch.setattr(cpu, "_SDPA_FROM", longest)
    rows = [(1, 500), (1, 3), (40, 40), (41, 41), (5, 130), (100, 100), (64, 101)]
    q, kv, meta, scale = attention_inputs(rows, 4, 2, 32, 16, torch.float32)
    assert cpu._query_rows(meta).long == [i for i, (n, keys) in enumerate(rows) if n > 1 and keys > longest]
    torch.testing.assert_close(
        cpu.paged_attention(q, kv, meta, scale), paged_attention(q, kv, meta, scale), rtol=2e-5, atol=5e-6
    )
