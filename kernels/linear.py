"""Linear layers on tensor cores: ``y = x w^T`` of bf16, fp16 and fp32, and of FP8 (e4m3) with scales.

Few rows are bound by reading the weight: it is the left operand there, so that 64 outputs by as few as 16 rows are one
instruction, and K is split until all SMs read; the last program of a tile adds its parts. Many rows: one block an SM,
which goes from tile to tile. How a row is computed depends on N, K, the dtype and the bucket of the number of rows
(``bucket_of``), and on nothing else of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import HOPPER, dependent, facts, wait_for_previous, zeros_of

SCALE_BLOCK = 128  # outputs, and elements of K, that share a scale of kind "block"
BUCKETS = (16, 32, 64, 128, 256)  # rows; all numbers above are one more bucket, MANY
MANY = 0
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_GROUP = tl.constexpr(8)  # rows of tiles that go together
_SUM_ELEMENTS = 32  # of a part that a thread adds at once
_SUM_PARTS = tl.constexpr(4)  # that are on their way at once
_MAX_SPLITS = 16
_MIN_STEPS = 4  # of a split: below, filling the pipeline takes longer than the work
_FILLING = 96  # blocks, three quarters of an H200's multiprocessors
_EPILOGUE_BYTES = 33 << 10  # of shared memory: a tile on its way out, and the barriers


@triton.jit
def _add_step(
    acc, x, w_desc, x_scale, w_scales_ptr, first_output, w_scale_stride, step, SCALES: tl.constexpr, SWAP: tl.constexpr
):
    """``acc`` plus the product of x (M, K) and step ``step`` of the outputs from ``first_output`` on; acc is (N, M) if
    SWAP, else (M, N).

    x_scale: (M,), of this step, and the outputs share one scale, if SCALES is "block".
    """
    K: tl.constexpr = x.shape[1]
    w = w_desc.load([first_output, step * K])
    left, right = (w, tl.trans(x)) if SWAP else (x, tl.trans(w))
    if SCALES == "block":
        scale = x_scale * tl.load(w_scales_ptr + first_output // K * w_scale_stride + step)
        acc += tl.dot(left, right) * (scale[None, :] if SWAP else scale[:, None])
    elif SCALES == "none":
        acc = tl.dot(left, right, acc, input_precision="ieee")
    else:  # Hopper adds FP8 products in some 14 bits: after every K of them, their sum is added in fp32
        acc = tl.dot(left, right, acc, max_num_imprecise_acc=K)
    return acc


@triton.jit
def _store(
    out_ptr, acc, x_scale, w_scales_ptr, m, n, rows, outputs, w_scale_stride, SCALES: tl.constexpr, SWAP: tl.constexpr
):
    """Write rows ``m`` and outputs ``n`` of ``acc``, times their scales unless those are per block."""
    y = tl.trans(acc) if SWAP else acc
    if SCALES == "tensor":
        y *= (x_scale * tl.load(w_scales_ptr))[:, None]
    elif SCALES == "channel":
        w_scale = tl.load(w_scales_ptr + n * w_scale_stride, mask=n < outputs, other=0.0)
        y *= x_scale[:, None] * w_scale[None, :]
    places = m.to(tl.int64)[:, None] * outputs + n[None, :]
    mask = (m < rows)[:, None] & (n < outputs)[None, :]
    tl.store(out_ptr + places, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _corner(tile, rows, outputs, M: tl.constexpr, N: tl.constexpr):
    """The first row and output of a tile.

    Tiles go down _GROUP of them before they go right, so that those which run together share rows and weights in the L2
    cache.
    """
    per_group = _GROUP * tl.cdiv(outputs, N)
    top = tile // per_group * _GROUP
    height = tl.minimum(tl.cdiv(rows, M) - top, _GROUP)
    return (top + tile % per_group % height) * M, tile % per_group // height * N


@triton.jit
def _tile(
    out_ptr, x_desc, w_desc, x_scales_ptr, w_scales_ptr, rows, outputs, x_scale_stride, w_scale_stride, tile,
    first, last, SCALES: tl.constexpr, SWAP: tl.constexpr, HALVES: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One tile of M rows by N outputs, or twice N where HALVES is 2, summed over steps ``first .. last - 1`` of K
    elements each.
    """
    first_row, first_output = _corner(tile, rows, outputs, M, N * HALVES)
    m = first_row + tl.arange(0, M)
    n = first_output + tl.arange(0, N)
    x_scale = tl.zeros((M,), tl.float32)
    if SCALES != "none":
        x_scales_ptr += m.to(tl.int64) * x_scale_stride
    acc = tl.zeros((N, M) if SWAP else (M, N), tl.float32)
    more = tl.zeros((N, M) if SWAP else (M, N), tl.float32)
    tl.assume(first < last)  # no way around the loop, on which sums would be set by other than Hopper's instructions
    for step in tl.range(first, last):
        x = x_desc.load([first_row, step * K])
        if SCALES == "block":
            x_scale = tl.load(x_scales_ptr + step, mask=m < rows, other=0.0)
        acc = _add_step(acc, x, w_desc, x_scale, w_scales_ptr, first_output, w_scale_stride, step, SCALES, SWAP)
        if HALVES == 2:  # a product of its own: one twice as wide has no registers for what FP8 needs besides
            more = _add_step(
                more, x, w_desc, x_scale, w_scales_ptr, first_output + N, w_scale_stride, step, SCALES, SWAP
            )
    if SCALES == "tensor" or SCALES == "channel":
        x_scale = tl.load(x_scales_ptr, mask=m < rows, other=0.0)
    _store(out_ptr, acc, x_scale, w_scales_ptr, m, n, rows, outputs, w_scale_stride, SCALES, SWAP)
    if HALVES == 2:
        _store(out_ptr, more, x_scale, w_scales_ptr, m, n + N, rows, outputs, w_scale_stride, SCALES, SWAP)


@triton.jit(do_not_specialize=["rows", "x_scale_stride"])
def _persistent_kernel(
    out_ptr, x_desc, w_desc, x_scales_ptr, w_scales_ptr, rows, outputs, width, x_scale_stride, w_scale_stride,
    SCALES: tl.constexpr, HALVES: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Every ``num_programs``-th tile, each over all of K."""
    wait_for_previous(DEPENDENT)
    tiles = tl.cdiv(rows, M) * tl.cdiv(outputs, N * HALVES)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        _tile(
            out_ptr, x_desc, w_desc, x_scales_ptr, w_scales_ptr, rows, outputs, x_scale_stride, w_scale_stride, tile, 0,
            tl.cdiv(width, K), SCALES, False, HALVES, M, N, K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "splits", "x_scale_stride"])
def _split_kernel(
    out_ptr, part_ptr, counts_ptr, x_desc, w_desc, x_scales_ptr, w_scales_ptr, rows, outputs, width, x_scale_stride,
    w_scale_stride, splits, SCALES: tl.constexpr, SWAP: tl.constexpr, HALVES: tl.constexpr, ROWS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STEP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One tile over one of ``splits`` ranges of K.

    Parts of more than one lie ROWS rows apart in ``part_ptr``, and the program that is the last to store one of a tile
    adds them, STEP rows at once. ``counts_ptr``: how many parts there are of each tile, 0 before and after.
    """
    wait_for_previous(DEPENDENT)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    steps = tl.cdiv(width, K)
    stored_ptr = out_ptr if part_ptr is None else part_ptr + split.to(tl.int64) * ROWS * outputs
    _tile(
        stored_ptr, x_desc, w_desc, x_scales_ptr, w_scales_ptr, rows, outputs, x_scale_stride, w_scale_stride, tile,
        split * steps // splits, (split + 1) * steps // splits, SCALES, SWAP, HALVES, M, N, K,
    )  # fmt: skip
    if part_ptr is not None:
        tl.debug_barrier()  # all threads have stored
        if tl.atomic_add(counts_ptr + tile, 1, sem="acq_rel") == splits - 1:
            tl.store(counts_ptr + tile, 0)
            _add_parts(out_ptr, part_ptr, rows, outputs, splits, tile, ROWS, M, N * HALVES, STEP)


@triton.jit
def _add_parts(
    out_ptr, part_ptr, rows, outputs, splits, tile,
    ROWS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The parts of one tile of M rows by N outputs, added in order."""
    first_row, first_output = _corner(tile, rows, outputs, M, N)
    n = first_output + tl.arange(0, N)
    wide = tl.zeros((), tl.int64)
    for row in range(first_row, tl.minimum(first_row + M, rows), STEP):
        m = row + tl.arange(0, STEP)
        mask = (m < rows)[:, None] & (n < outputs)[None, :]
        places = m.to(tl.int64)[:, None] * outputs + n[None, :]
        total = tl.zeros((STEP, N), tl.float32)
        for first in range(0, splits, _SUM_PARTS):
            for number in tl.static_range(_SUM_PARTS):
                part = places + (wide + first + number) * ROWS * outputs
                is_part = mask & (first + number < splits)
                total += tl.load(part_ptr + part, mask=is_part, other=0.0, cache_modifier=".cg")
        tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one bucket is computed: tiles of ``rows`` x ``outputs``, ``depth`` of K a step; K is split for at most
    ``blocks`` blocks.

    The outputs come in two halves if ``halves`` is 2. If ``is_swapped``, the weight is the left operand, of which
    Hopper's instruction takes 64 rows.
    """

    rows: int
    outputs: int
    halves: int
    is_swapped: bool
    depth: int
    warps: int
    stages: int
    blocks: int

    def splits(self, bucket: int, outputs: int, width: int) -> int:
        """Into how many parts K is cut so that a bucket fills the device.

        The same on every device, for the same results.
        """
        tiles = triton.cdiv(bucket, self.rows) * triton.cdiv(outputs, self.outputs)
        steps = triton.cdiv(width, self.depth)
        return max(1, min(self.blocks // tiles, steps // _MIN_STEPS, _MAX_SPLITS))


def bucket_of(rows: int) -> int:
    """The bucket of a number of rows: the least of ``BUCKETS`` that holds it, else ``MANY``."""
    return next((bucket for bucket in BUCKETS if rows <= bucket), MANY)


def tiling_of(
    bucket: int, itemsize: int, num_outputs: int, is_block_scaled: bool = False, shared: int = HOPPER.shared
) -> Tiling:
    """The tiling of a bucket for operands of ``itemsize`` bytes on a device with ``shared`` bytes of shared memory a
    block.

    A step is 128 bytes of K, what one swizzled line of shared memory holds. The tiles are the largest whose sums, and
    those of a step that FP8 needs besides, stay in the registers; of 129 to 256 rows they are half as wide where so
    many fill the device with K whole.
    """
    if itemsize == 4:  # not on tensor cores
        return Tiling(min(bucket or 32, 32), 64, 1, False, 32, 4, 3, 264)
    rows, outputs, is_swapped, warps, stages, blocks = {
        16: (16, 128, True, 8, 3, 320),
        32: (32, 128, True, 8, 3, 320),
        64: (64, 128, False, 4, 4, 160),
        128: (128, 256, False, 8, 4, 132),
        256: (128, 256, False, 8, 4, 132),
        MANY: (128, 256, False, 8, 4, 132),
    }[bucket]
    fills_whole = bucket == 256 and _FILLING <= 2 * triton.cdiv(num_outputs, 128) <= blocks
    if is_block_scaled or shared < HOPPER.shared or fills_whole:
        outputs = 128
    halves = 2 if outputs == 256 and itemsize == 1 else 1
    room = (shared - _EPILOGUE_BYTES) // ((rows + outputs) * 128)
    return Tiling(rows, outputs, halves, is_swapped, 128 // itemsize, warps, max(2, min(stages, room)), blocks)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x w^T``. x: (T, K), weight: (N, K) bf16, fp16 or fp32, rows dense and 16-byte aligned (so K is, too) -> (T, N).

    Meant for at most 64 rows, and right for every number. Sums are in fp32.
    """
    assert x.dtype == weight.dtype and x.dtype in _DTYPES, (x.dtype, weight.dtype)
    return _launch(x, weight, None, None, "none", x.dtype)


def linear_fp8(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    w_scales: torch.Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """``(x w^T) * x_scales * w_scales``. x: (T, K), weight: (N, K) FP8 e4m3, rows dense and 16-byte aligned -> (T, N)
    of ``out_dtype``.

    x_scales: (T, 1) fp32. w_scales: fp32, one number of any shape, or (N, 1), or (N / 128, K / 128) rounded up, in
    which case x_scales is (T, K / 128). Sums are in fp32, those of 128 of K in what the tensor cores add in.
    """
    (rows, width), outputs = x.shape, weight.shape[0]
    blocks = (triton.cdiv(outputs, SCALE_BLOCK), triton.cdiv(width, SCALE_BLOCK))
    if w_scales.numel() == 1:
        kind = "tensor"
    else:
        kind = "channel" if w_scales.shape == (outputs, 1) else "block"
    assert kind != "block" or w_scales.shape == blocks, (w_scales.shape, weight.shape)
    assert x_scales.shape == (rows, blocks[1] if kind == "block" else 1), (x_scales.shape, x.shape)
    assert x.dtype == weight.dtype == torch.float8_e4m3fn and x_scales.dtype == w_scales.dtype == torch.float32
    assert kind != "block" or x_scales.stride(1) == w_scales.stride(1) == 1
    return _launch(x, weight, x_scales, w_scales, kind, out_dtype)


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scales: torch.Tensor | None,
    w_scales: torch.Tensor | None,
    kind: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    (rows, width), outputs = x.shape, weight.shape[0]
    assert weight.shape[1] == width and width * x.itemsize % 16 == 0, (x.shape, weight.shape)
    out = torch.empty(rows, outputs, dtype=out_dtype, device=x.device)
    if not rows:
        return out
    gpu = facts(x.device)
    bucket = bucket_of(rows)
    tiling = tiling_of(bucket, x.itemsize, outputs, kind == "block", gpu.shared)
    tiles = triton.cdiv(rows, tiling.rows) * triton.cdiv(outputs, tiling.outputs)
    splits = tiling.splits(bucket, outputs, width) if bucket else 1
    loaded_outputs = tiling.outputs // tiling.halves
    args = (
        _descriptor(x, tiling.rows, tiling.depth), _descriptor(weight, loaded_outputs, tiling.depth), x_scales,
        w_scales, rows, outputs, width, *(0 if s is None or s.dim() == 0 else s.stride(0) for s in (x_scales,
        w_scales)),
    )  # fmt: skip
    options = {
        "SCALES": kind, "HALVES": tiling.halves, "M": tiling.rows, "N": loaded_outputs, "K": tiling.depth,
        "num_warps": tiling.warps, "num_stages": tiling.stages, **dependent(x.device),
    }  # fmt: skip
    if bucket == MANY:
        _persistent_kernel[(min(tiles, gpu.sms),)](out, *args, **options)
        return out
    parts, counts = None, None
    if splits > 1:
        parts = torch.empty(splits, bucket, outputs, dtype=torch.float32, device=x.device)
        counts = zeros_of(weight, tiles)
    step = min(tiling.rows, _SUM_ELEMENTS * 32 * tiling.warps // tiling.outputs)
    _split_kernel[(tiles, splits)](
        out, parts, counts, *args, splits, SWAP=tiling.is_swapped, ROWS=bucket, STEP=step, **options
    )
    return out


def _descriptor(matrix: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """What TMA loads tiles of ``matrix`` by; beyond its edges they are 0."""
    assert matrix.stride(1) == 1, (matrix.shape, matrix.stride())
    stride = matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]  # of a single row it may be anything
    return TensorDescriptor(matrix, list(matrix.shape), [stride, 1], [rows, columns])
