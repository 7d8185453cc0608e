"""What the cases of the operations do not reach of the CUDA kernels, in emulation: bad arguments, odd strides, far
addresses, launches at true sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_engine.ops import attention, cuda, fused
from nemo_engine.ops.attention import attention_inputs
from nemo_engine.ops.blocks import quantize_weight_blocks
from nemo_engine.ops.cuda import activation, linear, norm, rope
from nemo_engine.ops.cuda import attention as cuda_attention
from nemo_engine.ops.linear import LINEAR_FP8, _make_fp8
from nemo_engine.ops.op import Case, Op
from nemo_engine.ops.paged_kv import PagedKV
from nemo_engine.ops.quantize import FP8, quantize_channels, quantize_tokens
from nemo_engine.ops.rope import RopeMeta, rope_and_append_kv_, rope_table
from tests.emulation.library import emulated, watched
from tests.ops.proofs import prove
from tests.ops.test_ops import site

ALL_ROWS = dict.fromkeys(linear._FUSED_ROWS, 8)  # for which a launch can make its input
AT = 1 << 20  # an address that may be anything's
NORM = {"sum": AT, "x": AT, "residual": AT, "weight": AT, "rows": 4, "width": 64, "x_stride": 64, "residual_stride": 64}
SMALL = {
    "y": AT, "input": 0, "x": AT, "residual": AT, "norm": AT, "sum": AT, "fixed_scale": AT, "eps": 1e-5, "rows": 4,
    "width": 64, "x_stride": 64, "residual_stride": 64, "made": 0, "made_scales": 0, "counts": 0, "weight": AT,
    "outputs": 8, "weight_stride": 64, "stream": 0,
}  # fmt: skip
SMALL_FP8 = SMALL | {"x_scales": AT, "x_scale_stride": 1, "w_scales": AT, "w_scale_stride": 1, "is_block": False}
GEMM = {
    "y": AT, "x": AT, "x_stride": 64, "x_scales": AT, "x_scale_stride": 1, "w": AT, "w_stride": 64, "w_scales": AT,
    "w_scale_stride": 1, "residual": AT, "residual_stride": 64, "is_block": False, "is_gated": False, "rows": 4,
    "outputs": 64, "width": 64, "stream": 0,
}  # fmt: skip
PAGED = {
    "out": AT, "q": AT, "k_cache": AT, "v_cache": AT, "page_table": AT, "q_stride": 1024, "q_head_stride": 128,
    "table_stride": 8, "num_heads": 8, "num_kv_heads": 2, "page_size": 16, "scale": 0.1, "stream": 0,
}  # fmt: skip
SCALES = {"k_scale": AT, "v_scale": AT}
ROWS = {"rows": 4, "width": 64, "stride": 64, "stream": 0}
SAMPLED = """tokens logits slot_ids positions temperature min_p top_k top_p seed_keys frequency presence repetition
output_counts prompt_mask best note counters""".split()
CALLS: dict[str, dict[str, Any]] = {
    "rms_norm": {"y": AT, **NORM, "eps": 1e-5, "stream": 0},
    "rms_norm_fp8": {"y": AT, "scales": AT, **NORM, "scale": AT, "eps": 1e-5, "stream": 0},
    "silu_mul": {"y": AT, "gate_up": AT, **ROWS},
    "silu_mul_fp8": {"y": AT, "scales": AT, "gate_up": AT, "scale": AT, **ROWS},
    "quantize_tokens": {"y": AT, "scales": AT, "x": AT, "scale": AT, **ROWS},
    "quantize_token_blocks": {"y": AT, "scales": AT, "x": AT, **ROWS},
    "rope_and_append_kv": {
        "is_fp8": True,
        "q_out": AT,
        "q": AT,
        "k": AT,
        "v": AT,
        "table": AT,
        "positions": AT,
        "slot_mapping": AT,
        "k_cache": AT,
        "v_cache": AT,
        **SCALES,
        "tokens": 3,
        "q_stride": 512,
        "k_stride": 512,
        "v_stride": 512,
        "num_heads": 4,
        "num_kv_heads": 2,
        "page_size": 16,
        "stream": 0,
    },
    "small_linear": {**SMALL, "input": 1, "made": AT, "counts": AT},
    "small_linear_fp8": SMALL_FP8,
    "gemm_fp8": GEMM,
    "prefill_attention": {
        **PAGED,
        **SCALES,
        "slot_ids": AT,
        "starts": AT,
        "seq_lens": AT,
        "out_stride": 1024,
        "num_pages": 9,
        "num_rows": 2,
        "num_queries": 9,
    },
    "gather_pages": {
        "k_out": AT,
        "v_out": AT,
        "k_cache": AT,
        "v_cache": AT,
        "page_table": AT,
        "slot_ids": AT,
        "bounds": AT,
        "table_stride": 8,
        "num_rows": 2,
        "out_pages": 9,
        "num_kv_heads": 8,
        "first_head": 4,
        "num_heads": 4,
        "page_size": 16,
        "stream": 0,
    },
    "decode_attention": {
        **PAGED,
        **SCALES,
        "is_fp8": True,
        "plan": AT,
        "scratch": AT,
        "counters": AT,
        "num_items": 3,
        "num_units": 30,
        "width": 2,
    },
    "plan_decode": {
        "plan": AT,
        "starts": AT,
        "seq_lens": AT,
        "slot_ids": AT,
        "first_query": 0,
        "num_items": 3,
        "first_row": 0,
        "num_rows": 3,
        "num_units": 30,
        "width": 2,
        "stream": 0,
    },
    "decode_units": {"num_kv_heads": 8},
    "decode_plan_words": {"num_items": 3, "num_units": 30, "width": 4},
    "decode_scratch_words": {"num_units": 30, "num_heads": 8, "width": 4},
    "small_linear_fits": {"input": 1, "is_fp8": False, "rows": 1, "outputs": 8, "width": 64},
    "sample_subs": {"vocab_size": 1000},
    "sample": {
        "is_bf16": True,
        **dict.fromkeys(SAMPLED, AT),
        "stride": 1000,
        "rows": 2,
        "vocab_size": 1000,
        "stream": 0,
    },
}
MAY_BE_NULL = {"scale", "k_scale", "v_scale", "fixed_scale", "residual", "made"}
UNUSED = {("small_linear_fits", "rows"), ("small_linear", "made_scales")}
UNUSED |= {("small_linear_fp8", name) for name in ("made", "made_scales", "counts")}  # of an input that is there


def mistakes() -> Iterator[Any]:
    """(function, its arguments with one that is wrong, the name of that)."""
    for function, arguments in CALLS.items():
        for name, value in arguments.items():
            if isinstance(value, bool) or name in ("stream", "scale") and value != AT or (function, name) in UNUSED:
                continue
            wrong = {AT: [AT + 1, 0]}.get(value, [-1])
            if name in MAY_BE_NULL:
                wrong = [AT + 1]
            if name == "prompt_mask":
                wrong = [0]
            if name == "norm" and function == "small_linear_fp8":  # of an input that is there
                continue
            for bad in wrong:
                yield pytest.param(function, {**arguments, name: bad}, name, id=f"{function}-{name}-{bad}")


@pytest.fixture
def dry(emulated_library: Any) -> Iterator[Any]:
    """The library, with launches noted and not run."""
    emulator = emulated_library.emulator
    emulator.set_dry_run(True)
    emulator.clear_launches()
    with emulated(emulated_library):
        yield emulated_library
    emulator.set_dry_run(False)
    emulator.clear_launches()


def test_good_arguments_are_taken(dry: Any) -> None:
    for function, arguments in CALLS.items():
        getattr(dry, function)(**arguments)


@pytest.mark.parametrize(("function", "arguments", "name"), list(mistakes()))
def test_a_bad_argument_is_named(dry: Any, function: str, arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{name}\b.*, got "):
        getattr(dry, function)(**arguments)


@pytest.mark.parametrize(
    ("function", "change", "words"),
    [
        ("gemm_fp8", {"rows": 1 << 24, "outputs": 1 << 24}, "more tiles than an int holds"),
        ("small_linear_fp8", {"input": 4}, "input must be 0 to 3, got 4"),
        ("small_linear", {"input": 3}, "input must be 0 to 2 for bf16 weights"),
        ("small_linear", {"rows": 9, "made": 0}, "rows must be 1 to 8, got 9"),
        ("small_linear", {"rows": 65}, "rows must be 1 to 64, got 65"),
        ("small_linear", {"input": 0, "made": AT}, "made must be null for an input that is there"),
        ("small_linear_fp8", {"input": 3, "made": AT, "counts": AT}, "made_scales must be 4-byte aligned and not null"),
        ("gemm_fp8", {"is_gated": True, "outputs": 24}, "outputs must be a multiple of 16, got 24"),
        ("gemm_fp8", {"is_gated": True}, "residual must be null for a gated product"),
        ("gemm_fp8", {"is_gated": True, "is_block": True}, "is_block must be false for a gated product"),
        ("decode_units", {"num_kv_heads": 0}, "num_kv_heads must be 1 to 1024, got 0"),
        ("decode_attention", {"num_kv_heads": 3}, "num_heads must be a multiple of 3, got 8"),
        ("decode_attention", {"num_heads": 32}, "num_heads must be 2 to 16, got 32"),
        ("decode_attention", {"num_units": 65536}, "num_units must be 1 to 65535, got 65536"),
        ("decode_attention", {"num_heads": 16, "width": 8}, "width must be at most 4, got 8"),
        ("decode_plan_words", {"width": 9}, "width must be 1 to 8, got 9"),
        ("decode_attention", {"page_size": 24}, "page_size must be a power of two, at least 16, got 24"),
        ("prefill_attention", {"num_heads": 6}, "num_heads must be 1, 2, 4 or 8 times num_kv_heads, got 6 and 2"),
        ("prefill_attention", {"num_pages": 1 << 30}, "num_pages must be 1 to 67108863, got 1073741824"),
        ("gather_pages", {"first_head": 5}, "first_head must be 0 to 4, got 5"),
        ("rms_norm", {"width": 16392}, "width must be 8 to 16384, got 16392"),
        ("rms_norm", {"eps": float("nan")}, "eps must not be negative, got nan"),
        ("rope_and_append_kv", {"page_size": 0}, "page_size must be a power of two, got 0"),
        ("sample", {"rows": 65536}, "rows must be 1 to 65535, got 65536"),
    ],
)  # fmt: skip
def test_what_no_kernel_can_do_is_refused(dry: Any, function: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        getattr(dry, function)(**{**CALLS[function], **change})


def test_arguments_have_names_in_type_errors(dry: Any) -> None:
    with pytest.raises(TypeError, match="vocab_size: .*int"):
        dry.sample_subs(vocab_size=1 << 40)
    with pytest.raises(TypeError, match="gate_up"):
        dry.silu_mul(-1, AT, 4, 64, 64, 0)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, None),
        ({"num_heads": 4, "num_kv_heads": 1}, None),
        ({"page_size": 256}, "pages of 16, 32, 64 or 128 tokens, these are 256"),
        ({"num_heads": 6, "num_kv_heads": 4}, "1, 2, 4 or 8 query heads per KV head, these are 6 and 4"),
        ({"num_heads": 24}, "1, 2, 4 or 8 query heads per KV head, these are 24 and 8"),
        ({"head_dim": 64}, "head_dim of 128, this is 64"),
        ({"dtype": torch.float32}, "computes in bfloat16, the model is float32"),
        ({"device_type": "cuda", "capability": (10, 0)}, "compute capability (9, 0), Hopper, this is (10, 0)"),
        ({"device_type": "cuda"}, "built for cpu, this is cuda"),
    ],
)
def test_attention_says_what_it_does_not_serve(dry: Any, facts: dict[str, Any], reason: str | None) -> None:
    impl = next(impl for impl in attention.PAGED_ATTENTION.impls if impl.name == "cuda")
    here = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 64} | facts
    said = impl.supports(site(**({"dtype": torch.bfloat16} | here)))
    assert said is None if reason is None else reason in str(said)


# ---- launches at true sizes


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 8, 64])
@pytest.mark.parametrize(
    ("hidden", "inner"), [(5120, 14336), (4096, 14336), (4096, 11520)], ids=["NeMo", "7B", "Minitron"]
)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_launches_of_a_decode_layer_at_true_size(
    dry: Any, rows: int, is_fp8: bool, hidden: int, inner: int, ranks: int
) -> None:
    """Six, whether each block makes its input for itself or all of them together."""
    heads, kv_heads, inner = 32 // ranks, 8 // ranks, inner // ranks

    def weight(outputs: int, width: int) -> tuple[Tensor, ...]:
        if is_fp8:
            return torch.empty(outputs, width, dtype=FP8), torch.empty(outputs, 1)
        return (torch.empty(outputs, width, dtype=torch.bfloat16),)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    q, cache, meta, scale = attention_inputs([(1, 70)] * rows, heads, kv_heads, 128, 64, torch.bfloat16, is_fp8)
    x, residual, norm_weight, ints = empty(rows, hidden), empty(rows, hidden), empty(hidden), torch.zeros(rows).long()
    kv = empty(rows, kv_heads, 128)
    suffix = "_fp8" if is_fp8 else ""
    norm_linear, activated = getattr(linear, f"norm_linear{suffix}"), getattr(linear, f"silu_mul_linear{suffix}")
    norm_linear(x, residual, norm_weight, 1e-5, *weight((heads + 2 * kv_heads) * 128, hidden))
    rope.rope_and_append_kv_(q, kv, kv, cache, RopeMeta(torch.empty(80, 2, 64), ints, ints))
    cuda_attention.paged_attention(q, cache, meta, scale)
    out = empty(rows, heads * 128)
    linear.quantize_linear_fp8(out, *weight(hidden, heads * 128)) if is_fp8 else linear.linear(
        out, *weight(hidden, heads * 128)
    )
    norm_linear(x, residual, norm_weight, 1e-5, *weight(2 * inner, hidden))
    activated(empty(rows, 2 * inner), *weight(hidden, inner))
    names = [launch["name"] for launch in dry.emulator.launches()]
    assert len([name for name in names if name != "plan_decode"]) == 6, names  # the plan is made once a step
    assert all(launch["is_dependent"] for launch in dry.emulator.launches())


# ---- strides, addresses, sizes


def transposed(x: Tensor) -> Tensor:
    """One row with the stride between rows that a transposition leaves: 1."""
    assert len(x) == 1
    return x.clone().as_strided(x.shape, (1, 1))


def same(one: Any, other: Any) -> bool:
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return all(a.view(torch.uint8).equal(b.view(torch.uint8)) for a, b in pairs)


def test_the_stride_of_a_single_row_is_not_looked_at(emulated_library: Any) -> None:
    torch.manual_seed(1)
    x, residual, weight = (torch.randn(n, 48).bfloat16() for n in (1, 1, 24))
    gate_up, norm_weight = torch.randn(1, 96).bfloat16(), torch.ones(48).bfloat16()
    x8, x_scales = quantize_tokens(x)
    w8, w_scales = quantize_channels(weight.float())
    with emulated(emulated_library):
        for turn in (transposed, torch.clone):  # the second is for comparison
            results = [
                norm.rms_norm(turn(x), norm_weight, 1e-5, turn(residual)),
                norm.rms_norm_fp8(turn(x), norm_weight, 1e-5, turn(residual)),
                activation.silu_mul(turn(gate_up)),
                activation.silu_mul_fp8(turn(gate_up)),
                activation.quantize_tokens(turn(x)),
                activation.quantize_token_blocks(turn(x)),
                linear.linear(turn(x), weight),
                linear.linear(x, transposed(weight[:1]) if turn is transposed else weight[:1]),
                linear.linear_fp8(turn(x8), x_scales.expand(1, 1), w8, w_scales),
                linear.norm_linear(turn(x), turn(residual), norm_weight, 1e-5, weight),
                linear.silu_mul_linear_fp8(turn(gate_up), w8, w_scales),
            ]
            if turn is transposed:
                turned = results
    assert all(same(one, other) for one, other in zip(turned, results, strict=True))


def test_a_static_scale_may_be_expanded(emulated_library: Any) -> None:
    x8, w8 = (torch.randn(n, 64).to(FP8) for n in (3, 8))
    scale, w_scales = torch.tensor(0.5), torch.rand(8, 1)
    with emulated(emulated_library):
        got = linear.linear_fp8(x8, scale.expand(3, 1), w8, w_scales)
        assert got.equal(linear.linear_fp8(x8, torch.full((3, 1), 0.5), w8, w_scales))


def test_one_head_of_any_stride(emulated_library: Any) -> None:
    """A single KV head, whose stride between heads torch is free to choose, as its tensor-parallel slices have it."""
    q, k, v = (torch.randn(2, heads, 128).bfloat16() for heads in (4, 1, 1))
    caches = [torch.zeros(2, 1, 16, 128).bfloat16() for _ in range(4)]
    at = torch.tensor([3, 17])
    odd = [x.as_strided(x.shape, (128, 7, 1)) for x in (k, v)]
    meta = RopeMeta(rope_table(128, 1e4, 20, q.device), at, at)
    with emulated(emulated_library):
        got = rope.rope_and_append_kv_(q, *odd, PagedKV(*caches[:2]), meta)
    expected = rope_and_append_kv_(q, k, v, PagedKV(*caches[2:]), meta)
    assert got.equal(expected) and caches[0].equal(caches[2]) and caches[1].equal(caches[3])


@pytest.mark.parametrize(
    ("rows", "outputs", "width", "num_sms"), [(1, 256, 10008, 1), (3, 16, 14336, 132), (8, 8, 14336, 132)]
)
def test_an_activation_too_wide_for_shared_memory_is_made_in_parts(
    emulated_library: Any, monkeypatch: pytest.MonkeyPatch, rows: int, outputs: int, width: int, num_sms: int
) -> None:
    """Also with two tiles to a block, and with a last part that is shorter."""
    monkeypatch.setattr(linear, "_FUSED_ROWS", ALL_ROWS)
    torch.manual_seed(rows)
    gate_up, weight = torch.randn(rows, 2 * width).bfloat16(), (torch.randn(outputs, width) * width**-0.5).bfloat16()
    emulator = emulated_library.emulator
    emulator.set_num_sms(num_sms)
    emulator.clear_launches()
    expected = fused.SILU_MUL_LINEAR.semantics(gate_up, weight)
    try:
        with emulated(emulated_library):
            for seed in range(3):
                emulator.seed(seed)
                got = linear.silu_mul_linear(gate_up, weight)
                torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    finally:
        emulator.set_num_sms(132)
    launches = [(launch["name"], launch["shared_bytes"] < 220 << 10) for launch in emulator.launches()]
    assert launches == 3 * [("small_linear", True)]


@pytest.mark.parametrize(
    "op",
    [fused.NORM_LINEAR, fused.NORM_LINEAR_FP8, fused.SILU_MUL_LINEAR, fused.SILU_MUL_LINEAR_FP8],
    ids=lambda op: op.name,
)
def test_inputs_are_made_for_more_rows_than_pay(emulated_library: Any, monkeypatch: pytest.MonkeyPatch, op: Op) -> None:
    """A launch can do so for up to 8 rows: how many are served is a matter of speed."""
    monkeypatch.setattr(linear, "_FUSED_ROWS", ALL_ROWS)
    function = watched(emulated_library, op, getattr(linear, op.name))
    emulated_library.emulator.clear_launches()
    with emulated(emulated_library):
        for case in op.cases():
            if 1 < case.make(torch.bfloat16)[0].shape[0] <= 8:
                prove(op, function, case, torch.bfloat16)
    assert {launch["name"] for launch in emulated_library.emulator.launches()} == {"small_linear"}


def test_blocks_that_make_rows_together_leave_no_trace(emulated_library: Any) -> None:
    """One launch after the other over a weight, of other numbers of rows and blocks: whoever comes last leaves zeros."""
    torch.manual_seed(0)
    width, weight = 272, (torch.randn(200, 272) * 0.06).bfloat16()
    norm_weight, emulator = torch.ones(width).bfloat16(), emulated_library.emulator
    try:
        with emulated(emulated_library):
            for rows, num_sms in ((9, 132), (64, 3), (3, 8), (33, 1), (9, 132)):
                emulator.seed(rows)
                emulator.set_num_sms(num_sms)
                x = torch.randn(rows, width).bfloat16()
                got = linear.norm_linear(x, x, norm_weight, 1e-5, weight)
                expected = fused.NORM_LINEAR.semantics(x, x, norm_weight, 1e-5, weight)
                torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
                assert not cuda.counters_of(weight, 2)[:2].any()
    finally:
        emulator.set_num_sms(132)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_caches_of_more_than_two_billion_entries(emulated_library: Any, dtype: torch.dtype) -> None:
    """Keys and values in the last pages of a cache whose offsets need more than 32 bits: written, then read."""
    page_size, dim, num_pages, length = 128, 128, (1 << 31) // (128 * 128) + 3, 140
    keys, values = (torch.empty(num_pages, 1, page_size, dim, dtype=dtype) for _ in range(2))  # hardly touched
    pages, at = torch.tensor([[num_pages - 1, num_pages - 2]]), torch.arange(length)
    torch.manual_seed(1)
    q, k = (torch.randn(length, heads, dim).bfloat16() for heads in (2, 1))
    table = torch.stack([torch.ones(length, dim // 2), torch.zeros(length, dim // 2)], 1)  # nothing is rotated
    mapping = pages[0, at // page_size] * page_size + at % page_size
    with emulated(emulated_library):
        rope.rope_and_append_kv_(q, k, k, PagedKV(keys, values), RopeMeta(table, at, mapping))
        stored = k.to(dtype)
        assert same(keys[num_pages - 1, 0], stored[:page_size, 0])
        assert same(values[num_pages - 1, 0], stored[:page_size, 0])
        small = torch.zeros(3, 1, page_size, dim)
        small[1, 0], small[2, 0, : length - page_size] = stored[:page_size, 0].float(), stored[page_size:, 0].float()
        for decodes, queries in ((1, q[-1:]), (0, q[-3:])):
            far, near = (
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
            )
            got = cuda_attention.paged_attention(queries, PagedKV(keys, values), far, 0.1)
            expected = attention.paged_attention(queries.float(), PagedKV(small, small), near, 0.1)
            torch.testing.assert_close(got.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("is_block", [False, True])
def test_a_product_of_many_rows_adds_what_the_norm_would(emulated_library: Any, is_block: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x, w, residual = (torch.randn(shape, generator=generator) for shape in ((65, 272), (152, 272), (65, 152)))
    weights = quantize_weight_blocks(w) if is_block else quantize_tokens(w)
    x, residual = x.bfloat16(), residual.bfloat16()
    with emulated(emulated_library):
        product, total = (linear.quantize_linear_fp8(x, *weights, None, added) for added in (None, residual))
    assert product.residual is total.residual is None and torch.equal(total.x, product.x + residual)


def test_counters_outlive_larger_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph has their address."""
    monkeypatch.setattr(cuda, "_counters", {})
    first = cuda.counters(torch.device("cpu"), 10)
    assert len(cuda.counters(torch.device("cpu"), 1 << 17)) == 1 << 17
    held = [tensor.data_ptr() for made in cuda._counters.values() for tensor in made]
    assert first.data_ptr() in held and len(held) == 2


@pytest.mark.parametrize("kind", ["block", "channel"])
def test_tiles_of_256_rows(emulated_library: Any, kind: str) -> None:
    """Which a launch takes where multiprocessors are few: each warpgroup then multiplies 64 rows after 64."""
    op = LINEAR_FP8
    case = Case("tall", partial(_make_fp8, rows=256, outputs=136, width=272, kind=kind))
    emulator = emulated_library.emulator
    emulator.clear_launches()
    emulator.set_num_sms(1)
    try:
        with emulated(emulated_library):
            prove(op, watched(emulated_library, op, linear.linear_fp8), case, torch.bfloat16)
    finally:
        emulator.set_num_sms(132)
    assert {(launch["cluster"], launch["maps"][0]["box"][1]) for launch in emulator.launches()} == {(1, 256)}
