"""What the CUDA kernels move: the emulation counts it at small sizes, arithmetic knows it at NeMo's, and goals hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nemo_engine.ops.attention import attention_inputs
from nemo_engine.ops.cuda import activation, linear, norm, rope
from nemo_engine.ops.cuda import attention as cuda_attention
from nemo_engine.ops.quantize import FP8
from nemo_engine.ops.rope import RopeMeta
from tests.emulation.library import emulated

pytest.importorskip("triton")  # which the reports' tools come with

from nemo_engine.benchmarks import cuda_traffic as traffic  # noqa: E402

pytestmark = pytest.mark.emulated


@pytest.fixture
def counting(emulated_library: Any) -> Iterator[Any]:
    """The library, whose launches count what they move."""
    emulator = emulated_library.emulator
    emulator.seed(0)
    emulator.clear_launches()
    emulator.count(True)
    with emulated(emulated_library):
        yield emulator
    emulator.count(False)
    emulator.clear_launches()


def launched(emulator: Any, name: str, run: Callable[[], Any]) -> Any:
    emulator.clear_launches()
    run()
    (launch,) = (launch for launch in emulator.launches() if launch["name"].startswith(name))
    return launch


# ---- what is counted


def test_accesses_of_warps(emulated_library: Any, counting: Any) -> None:
    x, y = torch.zeros(3, 128), torch.zeros(3, 128)
    launch = launched(
        counting, "rotate", lambda: emulated_library.checks.rotate(y.data_ptr(), x.data_ptr(), 3, 128, 0, 0)
    )
    counts = launch["counts"]
    assert counts == {
        "copied": 0, "read": x.nbytes, "written": y.nbytes, "read_distinct": x.nbytes, "written_distinct": y.nbytes,
        "accesses": 24, "sectors": 24 * 4, "shared_accesses": 27, "wavefronts": 27,  # 3: an mbarrier is made
    }  # fmt: skip


@pytest.mark.parametrize(("places", "wavefronts"), [("in a row", 4), ("one above the other", 16)])
def test_turns_of_the_banks(emulated_library: Any, counting: Any, places: str, wavefronts: int) -> None:
    """Four matrices of eight rows of 16 bytes: a turn each, or four where the rows of two lie one above the other."""
    lane = torch.arange(32, dtype=torch.int32)
    offsets = lane * 16 if places == "in a row" else lane % 4 * 128 + lane // 4 * 16
    memory, registers = torch.zeros(128, dtype=torch.int32), torch.zeros(32, 4, dtype=torch.int32)
    moved = lambda how: emulated_library.checks.move_matrices(  # noqa: E731
        registers.data_ptr(), memory.data_ptr(), offsets.data_ptr(), how
    )
    with_matrix = launched(counting, "move_matrices", lambda: moved(0))["counts"]
    without = launched(counting, "move_matrices", lambda: moved(9))["counts"]
    assert with_matrix["shared_accesses"] - without["shared_accesses"] == 1
    assert with_matrix["wavefronts"] - without["wavefronts"] == wavefronts


# ---- arithmetic and counts


@pytest.mark.parametrize(
    ("rows", "outputs", "width", "num_sms"),
    [
        (1, 40, 320, 132),
        (17, 130, 320, 132),
        (64, 96, 272, 132),
        (33, 200, 144, 8),
        (130, 144, 272, 132),
        (300, 400, 144, 3),
    ],
)
def test_a_linear_layer(
    emulated_library: Any, counting: Any, rows: int, outputs: int, width: int, num_sms: int
) -> None:
    x, w = torch.randn(rows, width), torch.randn(outputs, width)
    counting.set_num_sms(num_sms)
    try:
        for is_fp8 in (False, True) if rows <= 64 else (True,):
            if is_fp8:
                scales = torch.ones(rows, 1), torch.ones(outputs, 1)
                run = lambda: linear.linear_fp8(x.to(FP8), scales[0], w.to(FP8), scales[1])  # noqa: B023, E731
            else:
                run = lambda: linear.linear(x.bfloat16(), w.bfloat16())  # noqa: E731
            launch = launched(counting, "", run)
            kernel = traffic.small_linear if launch["name"] == "small_linear" else traffic.gemm
            moved = kernel(launch, rows, outputs, width)
            assert launch["counts"]["copied"] == moved.read, launch
            assert launch["counts"]["written"] == launch["counts"]["written_distinct"] == moved.written
    finally:
        counting.set_num_sms(132)


@pytest.mark.parametrize("rows", [9, 33])
@pytest.mark.parametrize("is_fp8", [False, True])
def test_an_input_that_blocks_make_together(counting: Any, rows: int, is_fp8: bool) -> None:
    """Each row is made by one block, and read as one that was there."""
    outputs, width = 72, 272
    x, weight, norm_weight = (torch.randn(n, width).bfloat16() for n in (rows, outputs, 1))
    args = x, x, norm_weight[0], 1e-5
    if is_fp8:
        run = lambda: linear.norm_linear_fp8(*args, weight.to(FP8), torch.ones(outputs, 1))  # noqa: E731
    else:
        run = lambda: linear.norm_linear(*args, weight)  # noqa: E731
    launch = launched(counting, "small_linear", run)
    product = traffic.small_linear(launch, rows, outputs, width)
    made = rows * width * 3 + 4 * rows if is_fp8 else rows * width * 4  # and the sum
    assert launch["counts"]["copied"] == product.read
    assert launch["counts"]["written_distinct"] >= product.written + made  # and who has seen which rows
    assert launch["counts"]["written"] <= product.written + made + 4 * (2 * rows + 2 * launch["grid"][0] + 2)


def test_the_first_product_of_an_mlp_stores_the_activation(counting: Any) -> None:
    rows, hidden, inner = 130, 144, 208
    x, gate_up, down = torch.randn(rows, hidden).bfloat16(), torch.randn(2 * inner, hidden), torch.randn(hidden, inner)
    weights = [(w.to(FP8), torch.ones(len(w), 1), None) for w in (gate_up, down)]
    counting.clear_launches()
    linear.mlp_fp8(x, x, x[0], 1e-5, weights[0], weights[1])
    launches = counting.launches()
    assert [launch["name"] for launch in launches] == ["rms_norm_fp8", "gemm_fp8", "quantize_tokens", "gemm_fp8"]
    for launch, outputs, width in ((launches[1], 2 * inner, hidden), (launches[3], hidden, inner)):
        moved = traffic.gemm(launch, rows, outputs, width, has_residual=outputs == hidden)
        assert (launch["counts"]["copied"], launch["counts"]["written"]) == (moved.read, moved.written)
    assert launches[1]["counts"]["written"] == rows * inner * 2


def test_rows(counting: Any) -> None:
    """Norm, activation, quantisation and rotation."""
    rows, width = 3, 512
    x, weight, gate_up = torch.randn(rows, width).bfloat16(), torch.ones(width).bfloat16(), torch.randn(rows, 2 * width)
    gate_up = gate_up.bfloat16()
    q, kv, _, _ = attention_inputs([(1, 70)] * rows, 8, 2, 128, 64, torch.bfloat16)
    k, v, at = torch.randn(rows, 2, 128).bfloat16(), torch.randn(rows, 2, 128).bfloat16(), torch.arange(rows)
    table = RopeMeta(torch.zeros(80, 2, 64), at, at)
    for run, moved in (
        (lambda: norm.rms_norm(x, weight, 1e-5, x), lambda a: traffic.norm(a, rows, width, 2)),
        (lambda: norm.rms_norm_fp8(x, weight, 1e-5, x), lambda a: traffic.norm(a, rows, width, 1)),
        (lambda: activation.silu_mul(gate_up), lambda a: traffic.elementwise(a, rows, 2 * width, width, 2)),
        (lambda: activation.silu_mul_fp8(gate_up), lambda a: traffic.elementwise(a, rows, 2 * width, width, 1)),
        (lambda: activation.quantize_tokens(x), lambda a: traffic.elementwise(a, rows, width, width, 1)),
        (lambda: rope.rope_and_append_kv_(q, k, v, kv, table), lambda a: traffic.rope_moved(a, rows, 8, 2, 2)),
    ):
        launch = launched(counting, "", run)
        expected, counts = moved(launch), launch["counts"]
        beside = 16 * launch["threads"] // 32 * launch["grid"][0] * 2 if launch["name"].startswith("rope") else 0
        assert expected.read <= counts["read"] <= expected.read + beside, (launch, expected)  # positions and places
        assert counts["written"] == expected.written, (launch, expected)


@pytest.mark.parametrize("is_fp8", [False, True])
def test_attention(counting: Any, is_fp8: bool) -> None:
    size = 1 if is_fp8 else 2
    q, kv, meta, scale = attention_inputs([(1, 70), (1, 200)], 8, 2, 128, 64, torch.bfloat16, is_fp8)
    launch = launched(counting, "decode_attention", lambda: cuda_attention.paged_attention(q, kv, meta, scale))
    assert launch["counts"]["copied"] == traffic.decode(launch, [70, 200], 8, 2, size).read
    q, kv, meta, scale = attention_inputs([(200, 200)], 8, 2, 128, 64, torch.bfloat16, is_fp8)
    launch = launched(counting, "prefill_attention", lambda: cuda_attention.paged_attention(q, kv, meta, scale))
    moved = traffic.prefill(launch, 200, 8, 2)
    assert (launch["counts"]["copied"], launch["counts"]["written"]) == (moved.read, moved.written)
    if is_fp8:
        counting.clear_launches()
        cuda_attention.paged_attention(q, kv, meta, scale)
        (launch,) = (launch for launch in counting.launches() if launch["name"] == "gather_pages")
        moved = traffic.gather(launch, 200, 2)
        assert moved.read <= launch["counts"]["read"] < 1.05 * moved.read  # the page table
        assert launch["counts"]["written"] == moved.written


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize(("width", "reads"), [(2, 1), (4, 1), (8, 2)])
def test_a_run_reads_its_keys_once(counting: Any, is_fp8: bool, width: int, reads: int) -> None:
    """All that its queries see together, as one query of as many keys; 64 columns in two halves."""
    rows, copied, size = [(1, first + place) for first in (70, 200) for place in range(width)], [], 1 if is_fp8 else 2
    for run, each in ((1, rows[width - 1 :: width]), (width, rows)):
        q, kv, meta, scale = attention_inputs(each, 16, 2, 128, 64, torch.bfloat16, is_fp8, run)
        launch = launched(counting, "decode_attention", lambda: cuda_attention.paged_attention(q, kv, meta, scale))  # noqa: B023
        copied.append(launch["counts"]["copied"])
        assert copied[-1] == traffic.decode(launch, [length for _, length in each], 16, 2, size, run).read
    assert copied[0] * reads * 0.97 <= copied[1] <= copied[0] * reads


# ---- NeMo's sizes


@pytest.fixture(scope="module")
def at_true_size() -> tuple[list[traffic.Line], dict[tuple[bool, int], int]]:
    return traffic.lines()


def test_the_report_is_the_one_that_was_reviewed(at_true_size: Any) -> None:
    stored = traffic.STORED.read_text().splitlines()
    changed = sorted(set(traffic.report(*at_true_size)) ^ set(stored))
    assert not changed, "run `make kernel-report` and review its difference:\n" + "\n".join(changed)


def test_small_linear_layers_read_hardly_more_than_their_weights(at_true_size: Any) -> None:
    """L2 gives some 1.28 times what memory does: beyond that, a layer of few rows would wait for L2, unless the barriers of a
    cluster would take as long, as for qkv at 16 rows.
    """
    lines = [line for line in at_true_size[0] if line.weights is not None and line.rows <= 64]
    assert len(lines) == 5 * 9 and max(line.weights for line in lines) <= 1.34
    assert max(line.weights for line in lines if line.rows == 64) <= 1.3


def test_fp8_products_ask_l2_for_what_it_can_give(at_true_size: Any) -> None:
    """32 KiB a step are 5.5 TB/s at 1400 TFLOP/s."""
    lines = [line for line in at_true_size[0] if line.step is not None and line.rows >= 2048]
    assert len(lines) == 8 and max(line.step for line in lines) <= 32


def test_linear_layers_fill_the_gpu(at_true_size: Any) -> None:
    lines = [line for line in at_true_size[0] if line.name.startswith("linear") and line.rows in (64, 128, 256)]
    assert len(lines) == 5 + 3 * 4 and min(line.fill for line in lines) >= 0.9


def test_launches_of_a_layer(at_true_size: Any) -> None:
    """Norm and qkv, rope and append, attention, o, norm and gate_up, activation and down."""
    counts = {rows: launches for (_, rows), launches in at_true_size[1].items() if rows <= 64}
    assert counts == dict.fromkeys((1, 8, 16, 32, 64), 6)


def test_prefill_over_fp8_pages_moves_three_bytes_an_element_more(at_true_size: Any) -> None:
    """It reads one and writes two; then it is the bf16 kernel."""
    ideal = {line.name + f" {line.rows}": line for line in at_true_size[0]}
    for rows in (2048, 8192):
        bf16, fp8 = (ideal[f"paged_attention prefill{suffix} {rows}"] for suffix in ("", " fp8"))
        elements = 2 * rows * 8 * 128
        bytes_of = [line.ideal * (elements * size + 4 * rows * 4096) for line, size in ((bf16, 2), (fp8, 1))]
        assert bytes_of[1] - bytes_of[0] <= 3 * elements * 1.001
