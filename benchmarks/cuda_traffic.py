"""What the CUDA kernels move through L2 and how well they fill a GPU, by arithmetic from how they are launched.

Works without a GPU and without nvcc: the sources compiled for the CPU launch every operation at Mistral NeMo 12B's
sizes and run nothing; grids and the boxes of the copy engine say the rest. At small sizes the kernels run in emulation,
which counts, and ``tests/test_cuda_traffic.py`` holds this arithmetic to its counts. One line an operation and number
of rows:

    L2/ideal    bytes that the blocks ask L2 for and write there, over each byte once
    L2/weights  of a linear layer: bytes asked for over those of its weights
    KiB/step    of FP8 products of many rows: asked for per 128 x 256 x 128 of the product
    fill        tiles over what all multiprocessors do in as many rounds; of decode attention, which cuts work evenly, 1
    launches    of the operation; the last lines are those of a whole layer

Scales and page tables are left out: below 1 %. Token selection is not here: its passes depend on the logits.

    python benchmarks/cuda_traffic.py --write         # updates benchmarks/results/traffic-sm90-cuda.txt
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nemo_engine.benchmarks.cuda_kernel_report import FP8, empty, library, numbers
from nemo_engine.benchmarks.kernel_report import NEMO
from nemo_engine.benchmarks.machine_code import RESULTS, differs
from nemo_engine.model.linear import DenseLinear, Fp8Linear, Linear
from nemo_engine.ops import Ops, Site
from nemo_engine.ops.attention import AttentionMeta
from nemo_engine.ops.cuda.attention import MAX_COLUMNS
from nemo_engine.ops.paged_kv import PagedKV
from nemo_engine.ops.rope import RopeMeta

STORED = RESULTS / "traffic-sm90-cuda.txt"
ROWS = (1, 8, 16, 32, 64, 128, 256, 2048, 8192)
CONTEXT = 4096  # keys of each row that decodes
RUNS = (2, 4, 8)  # rows that are one request's
PAGE_SIZE, DIM, SMS = 64, 128, 132
Launch = dict[str, Any]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True, slots=True)
class Moved:
    """Of one launch: bytes asked for, bytes written, and the pieces of work that the multiprocessors take in turns."""

    read: int
    written: int
    tiles: int


# ---- the arithmetic of each kernel


def small_linear(launch: Launch, rows: int, outputs: int, width: int) -> Moved:
    """Every tile reads its weights; the blocks of a cluster share x, where it is not made by each of them."""
    w_map, x_map = launch["maps"]
    size, tiles = w_map["element_bytes"], ceil_div(outputs, w_map["box"][1])
    readers = 0 if x_map == w_map else ceil_div(tiles, launch["cluster"])
    return Moved((outputs + readers * rows) * width * size, rows * outputs * 2, tiles)


def gemm(launch: Launch, rows: int, outputs: int, width: int, has_residual: bool = False) -> Moved:
    """Every tile reads its rows of x and of w; the tiles of a cluster lie beside one another and share x.

    A tile with the activation behind it, whose box of w has a third dimension, stores half of its outputs.
    """
    x_map, w_map, y_map, _ = launch["maps"]
    row_tiles = ceil_div(rows, x_map["box"][1] * launch["cluster"])
    column_tiles = ceil_div(w_map["sizes"][1], w_map["box"][1])
    read = (row_tiles * outputs + ceil_div(column_tiles, launch["cluster"]) * rows) * width
    written = rows * y_map["sizes"][0] * 2
    return Moved(read + has_residual * written, written, row_tiles * column_tiles)


def norm(launch: Launch, rows: int, width: int, size: int) -> Moved:
    """With a residual, whose sum is written. Every row reads the norm's weight."""
    return Moved(3 * rows * width * 2, rows * width * (2 + size) + (4 * rows if size == 1 else 0), launch["grid"][0])


def elementwise(launch: Launch, rows: int, inputs: int, outputs: int, size: int) -> Moved:
    """bf16 read once, something written, and where that is FP8 a scale a row."""
    return Moved(rows * inputs * 2, rows * outputs * size + (4 * rows if size == 1 else 0), launch["grid"][0])


def decode(launch: Launch, lengths: Sequence[int], heads: int, kv_heads: int, size: int, run: int = 1) -> Moved:
    """Every key and value once, for all query heads of its head and all queries of a run: for as many columns as the
    kernel has. lengths: of each query.
    """
    width = min(run, MAX_COLUMNS * kv_heads // heads)
    keys = sum(max(lengths[first : first + width]) for first in range(0, len(lengths), width))
    return Moved(2 * keys * kv_heads * DIM * size, 0, 0)


def prefill(launch: Launch, queries: int, heads: int, kv_heads: int) -> Moved:
    """Of one prompt. A tile of 128 packed queries reads the pages up to its last query, 2 bytes an element."""
    each, page = 128 * kv_heads // heads, launch["maps"][0]["box"][1]
    ends = [min(first + each, queries) for first in range(0, queries, each)]
    elements = 2 * sum(ceil_div(end, page) * page for end in ends) * kv_heads * DIM
    return Moved(2 * (elements + queries * heads * DIM), queries * heads * DIM * 2, len(ends) * kv_heads)


def rope_moved(launch: Launch, rows: int, heads: int, kv_heads: int, size: int) -> Moved:
    """Every warp reads the angles of its token, 512 bytes; it has four teams of lanes, of one or two heads each."""
    elements, all_heads = DIM * (heads + 2 * kv_heads), heads + 2 * kv_heads
    teams = all_heads if launch["grid"][0] == ceil_div(rows * all_heads, 16) else ceil_div(all_heads, 2)
    written = DIM * (2 * heads + 2 * kv_heads * size)
    return Moved(rows * (2 * elements + 512 * ceil_div(teams, 4)), rows * written, launch["grid"][0])


def gather(launch: Launch, keys: int, kv_heads: int) -> Moved:
    """FP8 read once and written as bf16 once."""
    elements = 2 * ceil_div(keys, PAGE_SIZE) * PAGE_SIZE * kv_heads * DIM
    return Moved(elements, 2 * elements, launch["grid"][0])


# ---- the operations at NeMo's sizes


@dataclass(frozen=True, slots=True)
class Use:
    """An operation as a layer uses it: what launches it, the arithmetic of each of its launches, each byte once."""

    name: str
    run: Callable[[], Any]
    moved: Callable[[Launch], Moved]
    ideal: int
    product: tuple[int, int, int] | None = None  # rows, outputs, width
    weight_bytes: int = 0


def linear_uses(ops: Ops, rows: int, is_fp8: bool) -> Iterator[Use]:
    hidden, inner, qkv = NEMO.hidden_size, NEMO.intermediate_size, NEMO.q_size + 2 * NEMO.kv_size
    shapes = {"qkv": (qkv, hidden), "o": (hidden, NEMO.q_size), "gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    if not is_fp8:
        shapes["lm_head"] = (NEMO.vocab_size, hidden)
    if not is_fp8 and rows > 64:  # cuBLAS
        return
    for name, (outputs, width) in shapes.items():
        dtype = FP8 if is_fp8 else torch.bfloat16
        x, w = empty(rows, width, dtype=dtype), empty(outputs, width, dtype=dtype)

        def run(x: torch.Tensor = x, w: torch.Tensor = w) -> Any:
            return ops.linear_fp8(x, numbers(len(x), 1), w, numbers(len(w), 1)) if is_fp8 else ops.linear(x, w)

        def moved(launch: Launch, shape: tuple[int, int, int] = (rows, outputs, width)) -> Moved:
            return (small_linear if launch["name"] == "small_linear" else gemm)(launch, *shape)

        ideal = x.nbytes + w.nbytes + 2 * rows * outputs
        yield Use(f"linear{'_fp8' if is_fp8 else ''} {name}", run, moved, ideal, (rows, outputs, width), w.nbytes)


def mlp_uses(ops: Ops, rows: int, is_fp8: bool) -> Iterator[Use]:
    """Of more rows than the small linear layers take: norm, gate_up with its activation, quantisation, down."""
    if not is_fp8 or rows <= 64:
        return
    hidden, inner = NEMO.hidden_size, NEMO.intermediate_size
    x, gate_up, down = empty(rows, hidden), empty(2 * inner, hidden, dtype=FP8), empty(hidden, inner, dtype=FP8)
    weights = [(weight, numbers(len(weight), 1), None) for weight in (gate_up, down)]

    def run() -> Any:
        return ops.mlp_fp8(x, x, empty(hidden), 1e-5, *weights)

    def moved(launch: Launch) -> Moved:
        if launch["name"] == "rms_norm_fp8":
            return norm(launch, rows, hidden, 1)
        if launch["name"] == "quantize_tokens":
            return elementwise(launch, rows, inner, inner, 1)
        is_first = len(launch["maps"][1]["box"]) == 3
        return gemm(launch, rows, *(gate_up if is_first else down).shape, has_residual=not is_first)

    yield Use("mlp_fp8", run, moved, gate_up.nbytes + down.nbytes + rows * hidden * 8)


def row_uses(ops: Ops, rows: int, is_fp8: bool) -> Iterator[Use]:
    hidden, inner, size = NEMO.hidden_size, NEMO.intermediate_size, 1 if is_fp8 else 2
    x, weight, gate_up, heads = empty(rows, hidden), empty(hidden), empty(rows, 2 * inner), empty(rows, NEMO.q_size)
    suffix = "_fp8" if is_fp8 else ""
    rms_norm, silu_mul = getattr(ops, f"rms_norm{suffix}"), getattr(ops, f"silu_mul{suffix}")

    def of(inputs: int, outputs: int) -> Callable[[Launch], Moved]:
        return lambda launch: elementwise(launch, rows, inputs, outputs, size)

    ideal = rows * hidden * (6 + size) + 2 * hidden
    yield Use(f"rms_norm{suffix}", lambda: rms_norm(x, weight, 1e-5, x), lambda a: norm(a, rows, hidden, size), ideal)
    yield Use(f"silu_mul{suffix}", lambda: silu_mul(gate_up), of(2 * inner, inner), rows * inner * (4 + size))
    if is_fp8:
        ideal = rows * NEMO.q_size * 3
        yield Use("quantize_tokens", lambda: ops.quantize_tokens(heads), of(NEMO.q_size, NEMO.q_size), ideal)


def paged_kv(is_fp8: bool) -> PagedKV:
    kv_heads = NEMO.num_kv_heads
    cache = empty(8, kv_heads, PAGE_SIZE, DIM, dtype=FP8 if is_fp8 else torch.bfloat16)
    return PagedKV(cache, cache, *[numbers(kv_heads) if is_fp8 else None for _ in "kv"])


def decode_uses(ops: Ops, rows: int, is_fp8: bool, runs: Sequence[int] = RUNS) -> Iterator[Use]:
    """Rows of one query, alone or in runs of one request."""
    heads, kv_heads, size = NEMO.num_heads, NEMO.num_kv_heads, 1 if is_fp8 else 2
    ints, starts, table = (empty(*shape, dtype=torch.int64) for shape in ((rows,), (rows + 1,), (256, 2048)))
    lengths, facts = [CONTEXT] * rows, (heads, kv_heads, size)
    for run in (run for run in runs if rows <= 256 and rows % run == 0):
        meta = AttentionMeta(rows, starts, ints, table, ints, PAGE_SIZE, 2048, 1, run_length=run)
        attend = partial(ops.paged_attention, empty(rows, heads, DIM), paged_kv(is_fp8), meta, 0.1)
        moved = lambda launch, run=run: decode(launch, lengths, *facts, run)  # noqa: E731
        name = f"paged_attention {'decode' if run == 1 else f'runs of {run}'}{' fp8' if is_fp8 else ''}"
        yield Use(name, attend, moved, 2 * rows // run * CONTEXT * kv_heads * DIM * size)


def attention_uses(ops: Ops, rows: int, is_fp8: bool) -> Iterator[Use]:
    """Of a layer whose rows all decode, or are one prompt."""
    heads, kv_heads, size = NEMO.num_heads, NEMO.num_kv_heads, 1 if is_fp8 else 2
    kv = paged_kv(is_fp8)
    q, ints = empty(rows, heads, DIM), empty(rows, dtype=torch.int64)
    k = empty(rows, kv_heads, DIM)
    rope = RopeMeta(numbers(CONTEXT, 2, DIM // 2), ints, ints)
    suffix = " fp8" if is_fp8 else ""
    ideal = rows * DIM * (2 * (2 * heads + 2 * kv_heads) + 2 * kv_heads * size + 4)
    yield Use(
        f"rope_and_append_kv{suffix}", lambda: ops.rope_and_append_kv_(q, k, k, kv, rope),
        lambda launch: rope_moved(launch, rows, heads, kv_heads, size), ideal,
    )  # fmt: skip
    if rows <= 256:
        yield from decode_uses(ops, rows, is_fp8, (1,))
        return
    one, table = empty(1, dtype=torch.int64), empty(1, ceil_div(rows, PAGE_SIZE), dtype=torch.int64)
    meta = AttentionMeta(0, empty(2, dtype=torch.int64), one, table, one, PAGE_SIZE, table.shape[1], rows)

    def of_prompt(launch: Launch) -> Moved:
        is_gather = launch["name"] == "gather_pages"
        return gather(launch, rows, kv_heads) if is_gather else prefill(launch, rows, heads, kv_heads)

    ideal = 2 * rows * kv_heads * DIM * size + 4 * rows * heads * DIM
    yield Use(f"paged_attention prefill{suffix}", lambda: ops.paged_attention(q, kv, meta, 0.1), of_prompt, ideal)


def layer(ops: Ops, rows: int, is_fp8: bool) -> None:
    """What a layer of the model launches while all rows decode, but for their plan, which is made once a step."""
    hidden, inner, qkv = NEMO.hidden_size, NEMO.intermediate_size, NEMO.q_size + 2 * NEMO.kv_size
    x, weight = empty(rows, hidden), empty(hidden)

    def projection(outputs: int, width: int) -> Linear:
        if is_fp8:
            return Fp8Linear(empty(outputs, width, dtype=FP8), numbers(outputs, 1))
        return DenseLinear(empty(outputs, width))

    projection(qkv, hidden).after_norm(x, x, weight, 1e-5, ops)
    for use in attention_uses(ops, rows, is_fp8):
        use.run()
    projection(hidden, NEMO.q_size).plus(x, empty(rows, NEMO.q_size), ops)
    projection(2 * inner, hidden).mlp(projection(hidden, inner), x, x, weight, 1e-5, ops)


# ---- the report


def launches_of(emulator: Any, run: Callable[[], Any]) -> list[Launch]:
    """What ``run`` launches, without the plan of decode attention."""
    emulator.clear_launches()
    emulator.set_dry_run(True)
    try:
        run()
        return [launch for launch in emulator.launches() if launch["name"] != "plan_decode"]
    finally:
        emulator.set_dry_run(False)
        emulator.clear_launches()


@dataclass(frozen=True, slots=True)
class Line:
    """Of an operation at a number of rows; None where it has no meaning."""

    name: str
    rows: int
    ideal: float
    fill: float
    launches: int
    weights: float | None = None
    step: float | None = None  # KiB

    def text(self) -> str:
        parts = [f"{self.name:32} rows {self.rows:5}  L2/ideal {self.ideal:6.2f}"]
        parts.append(f"L2/weights {self.weights:5.2f}" if self.weights is not None else " " * 16)
        parts.append(f"KiB/step {self.step:5.1f}" if self.step is not None else " " * 14)
        return "  ".join([*parts, f"fill {self.fill:4.2f}  launches {self.launches}"])


def line_of(use: Use, rows: int, launches: list[Launch]) -> Line:
    all_moved = [use.moved(launch) for launch in launches]
    read = sum(moved.read for moved in all_moved)
    total = read + sum(moved.written for moved in all_moved)
    tiles, (x, y, z) = all_moved[-1].tiles or SMS, launches[-1]["grid"]
    rounds = max(ceil_div(tiles, x * y * z), ceil_div(tiles, SMS))  # of blocks that stay; or of waves of blocks
    step = None
    if use.product is not None and launches[-1]["name"] == "gemm_fp8":
        m, n, k = use.product
        step = read / 1024 / (m * n * k / (128 * 256 * 128))
    return Line(
        use.name, rows, total / use.ideal, tiles / (rounds * SMS), len(launches),
        read / use.weight_bytes if use.product is not None else None, step,
    )  # fmt: skip


def lines() -> tuple[list[Line], dict[tuple[bool, int], int]]:
    """Of every operation; and by (FP8, rows) the launches of a decode layer."""
    emulated = library.load()
    found, layers = [], {}
    with library.emulated(emulated):
        for is_fp8 in (False, True):
            kv_dtype = FP8 if is_fp8 else torch.bfloat16
            ops = Ops.select(Site.of(NEMO, PAGE_SIZE, torch.bfloat16, torch.device("cpu"), kv_dtype), {"*": "cuda"})
            for rows in ROWS:
                for uses in (linear_uses, mlp_uses, row_uses, attention_uses, decode_uses):
                    for use in uses(ops, rows, is_fp8):
                        found.append(line_of(use, rows, launches_of(emulated.emulator, use.run)))
                if rows <= (256 if is_fp8 else 64):  # beyond it, bf16's products are cuBLAS's, which would run here
                    launches = launches_of(emulated.emulator, lambda ops=ops, n=rows, q=is_fp8: layer(ops, n, q))
                    layers[is_fp8, rows] = len(launches)
    return sorted(found, key=lambda line: (line.name, line.rows)), layers


def report(found: list[Line], layers: dict[tuple[bool, int], int]) -> list[str]:
    """The lines of the stored report, of what ``lines`` returns."""
    texts = [line.text() for line in found]
    for (is_fp8, rows), count in layers.items():
        texts.append(f"decode layer {'FP8' if is_fp8 else 'bf16'}  rows {rows:4}  launches {count}")
    return texts


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; ``--write`` stores it, otherwise the exit status says whether it equals the stored one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"store the report in {STORED.name}")
    return int(differs(STORED, lambda: report(*lines()), parser.parse_args(argv).write))


if __name__ == "__main__":
    sys.exit(main())
