"""The emulation of a GPU on which the CUDA kernels are proven, against independent formulas."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.emulated

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


@pytest.fixture
def checks(emulated_library: Any) -> Any:
    emulated_library.emulator.seed(0)
    return emulated_library.checks


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def small_integers(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Whose products and sums every format holds exactly."""
    return torch.randint(-3, 4, shape).to(dtype)


# ---- fragments


def a_registers(a: Tensor) -> Tensor:
    """A (16, K) as lane i holds it: register r, bytes 4: row i // 4 + 8 (r % 2), bytes of K 4 (i % 4) + 16 (r // 2)."""
    rows = raw(a).view(16, 32)
    lanes = torch.arange(32)
    registers = [
        torch.stack([rows[lanes // 4 + 8 * (r % 2), 4 * (lanes % 4) + 16 * (r // 2) + byte] for byte in range(4)], 1)
        for r in range(4)
    ]
    return torch.stack(registers, 1).contiguous()


def b_registers(b: Tensor) -> Tensor:
    """B^T (8, K) as lane i holds it: register r: column i // 4, bytes of K 4 (i % 4) + 16 r."""
    columns = raw(b).view(8, 32)
    lanes = torch.arange(32)
    registers = [
        torch.stack([columns[lanes // 4, 4 * (lanes % 4) + 16 * r + byte] for byte in range(4)], 1) for r in range(2)
    ]
    return torch.stack(registers, 1).contiguous()


def matrix_of(d: Tensor) -> Tensor:
    """The (16 W, N) matrix whose fragments the 32 W threads hold as d (32 W, N / 2)."""
    warps, n = d.shape[0] // 32, d.shape[1] * 2
    # thread = (warp, g, t), element = (n // 8, half, pair) -> row = warp * 16 + half * 8 + g, column = 8 j + 2 t + pair
    return d.view(warps, 8, 4, n // 8, 2, 2).permute(0, 4, 1, 3, 2, 5).reshape(warps * 16, n)


@pytest.mark.parametrize(("kind", "dtype"), [(0, BF16), (1, torch.float16)])
def test_products_of_a_warp(checks: Any, kind: int, dtype: torch.dtype) -> None:
    a, b = small_integers(16, 16, dtype=dtype), small_integers(8, 16, dtype=dtype)
    before = torch.randint(-9, 9, (32, 4)).float()
    d = before.clone()
    held = a_registers(a), b_registers(b)
    checks.warp_product(d.data_ptr(), held[0].data_ptr(), held[1].data_ptr(), kind)
    torch.testing.assert_close(matrix_of(d), matrix_of(before) + a.float() @ b.float().T, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["x4", "x4_transposed", "x2", "x2_transposed", "store_x4", "transpose"])
def test_moves_of_matrices(checks: Any, how: str) -> None:
    number = ["x4", "x4_transposed", "x2", "x2_transposed", "store_x4", "transpose"].index(how)
    matrices = torch.randint(0, 2**15, (4, 8, 8), dtype=torch.int16)
    places = torch.randperm(32).int()  # the row of matrix i // 8, i % 8 lies at the 16 bytes `places[i]`
    shared = torch.empty(32, 8, dtype=torch.int16)
    shared[places.long()] = matrices.view(32, 8)
    fragments = matrices.view(4, 8, 4, 2).permute(1, 2, 0, 3).reshape(32, 4, 2)  # lane (g, t), matrix, pair
    transposed = matrices.transpose(1, 2).reshape(4, 8, 4, 2).permute(1, 2, 0, 3).reshape(32, 4, 2)
    if how == "store_x4":
        registers, memory = fragments.clone().contiguous(), torch.zeros_like(shared)
    elif how == "transpose":
        registers, memory = fragments.clone().contiguous(), shared.clone()
    else:
        registers, memory = torch.zeros(32, 4, 2, dtype=torch.int16), shared.clone()
    offsets = places * 16
    checks.move_matrices(registers.data_ptr(), memory.data_ptr(), offsets.data_ptr(), number)
    if how == "store_x4":
        assert memory.equal(shared)
    elif how == "transpose":
        assert registers[:, 0].equal(transposed[:, 0]) and registers[:, 1:].equal(fragments[:, 1:])
    else:
        count = 2 if "x2" in how else 4
        assert registers[:, :count].equal((transposed if "transposed" in how else fragments)[:, :count])


def swizzled(rows: Tensor) -> Tensor:
    """Rows of 128 bytes as a 128-byte swizzle lays them: 16-byte chunk c of row r lies at chunk c ^ (r % 8)."""
    chunks = raw(rows).view(-1, 8, 16)
    out = torch.empty_like(chunks)
    r = torch.arange(chunks.shape[0])
    for chunk in range(8):
        out[r, chunk ^ (r % 8)] = chunks[:, chunk]
    return out.view(-1, 128)


@pytest.mark.parametrize("n", [16, 48, 128, 224])
@pytest.mark.parametrize("operands", ["k_major", "n_major", "a_in_registers", "fp8"])
@pytest.mark.parametrize("k_step", [0, 3])
@pytest.mark.parametrize("keep", [0, 1])
def test_products_of_a_warpgroup(checks: Any, n: int, operands: str, k_step: int, keep: int) -> None:
    dtype = FP8 if operands == "fp8" else BF16
    depth = 128 if operands == "fp8" else 64  # a tile's; the instruction takes a quarter
    a, b = small_integers(64, depth, dtype=dtype), small_integers(n, depth, dtype=dtype)
    step = slice(k_step * depth // 4, (k_step + 1) * depth // 4)
    if operands == "a_in_registers":
        a_held = torch.cat([a_registers(a[16 * warp : 16 * warp + 16, step]) for warp in range(4)])
    else:
        a_held = swizzled(a)
    if operands in ("n_major", "a_in_registers"):  # tiles of 64 columns: a row for each k
        wide = torch.zeros(depth, (n + 63) // 64 * 64, dtype=dtype)
        wide[:, :n] = b.T
        b_held = torch.cat([swizzled(wide[:, i : i + 64]) for i in range(0, wide.shape[1], 64)])
    else:
        b_held = swizzled(b)
    before = torch.randint(-9, 9, (128, n // 2)).float()
    d = before.clone()
    a_held, b_held = a_held.contiguous(), b_held.contiguous()
    checks.group_product(
        d.data_ptr(),
        a_held.data_ptr(),
        b_held.data_ptr(),
        b_held.numel() // 4,
        n,
        ["k_major", "n_major", "a_in_registers", "fp8"].index(operands),
        k_step,
        keep,
    )
    expected = a[:, step].float() @ b[:, step].float().T + (matrix_of(before) if keep else 0)
    torch.testing.assert_close(matrix_of(d), expected, rtol=0, atol=0)


def test_fp8_sums_keep_few_bits_and_bf16_sums_do_not(checks: Any) -> None:
    """2^14 in the accumulator swallows a sum of ones of FP8, 14 bits below it; fp32 would not."""
    for operands, dtype, expected in ((0, BF16, 16), (3, FP8, 0)):
        ones = torch.ones(64, 128 // dtype.itemsize).to(dtype)
        d = torch.full((128, 8), 2.0**14)
        held = swizzled(ones), swizzled(ones[:16])
        checks.group_product(d.data_ptr(), held[0].data_ptr(), held[1].data_ptr(), 512, 16, operands, 0, 1)
        assert (d == 2.0**14 + expected).all()


# ---- the copy engine


@pytest.mark.parametrize("at", [(0, 0, 0), (16, 3, 1), (-8, -2, -1), (56, 9, 2), (200, 50, 9)])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize(("swizzle", "width"), [(0, 64), (1, 16), (2, 32), (3, 64)])
def test_boxes(checks: Any, at: tuple[int, int, int], rank: int, swizzle: int, width: int) -> None:
    tensor = torch.randn(3, 12, 72).to(BF16)
    size = (width, 8, 2 if rank == 3 else 1)
    box = torch.zeros(size[2], 8, width, dtype=BF16)
    for z in range(size[2]):
        for y in range(8):
            for x in range(width):
                c = (at[0] + x, at[1] + y, (at[2] if rank == 3 else 0) + z)
                if 0 <= c[0] < 72 and 0 <= c[1] < 12 and 0 <= c[2] < 3:
                    box[z, y, x] = tensor[c[2], c[1], c[0]]
    got = torch.zeros(box.numel() * 2, dtype=torch.uint8)
    checks.move_box(
        tensor.data_ptr(), (72, 12, 3), (0, 144, 144 * 12), size, rank, 1, swizzle, got.data_ptr(), at, False
    )
    rows = raw(box).view(-1)
    mask = {0: 0, 1: 1, 2: 3, 3: 7}[swizzle]
    address = torch.arange(rows.numel())
    assert got[address ^ ((address >> 7 & mask) << 4)].equal(rows)


@pytest.mark.parametrize("at", [(0, 0, 0), (48, 9, 0), (-8, -2, 0), (80, 3, 0)])
def test_stored_boxes_end_at_the_tensor(checks: Any, at: tuple[int, int, int]) -> None:
    tensor, box = torch.zeros(12, 72, dtype=BF16), torch.randn(8, 64).to(BF16)
    expected = tensor.clone()
    for y in range(8):
        for x in range(64):
            if 0 <= at[0] + x < 72 and 0 <= at[1] + y < 12:
                expected[at[1] + y, at[0] + x] = box[y, x]
    laid = swizzled(box).contiguous()
    checks.move_box(tensor.data_ptr(), (72, 12, 1), (0, 144, 0), (64, 8, 1), 2, 1, 3, laid.data_ptr(), at, True)
    assert tensor.equal(expected)
    with pytest.raises(RuntimeError, match="thread 0 ended before its TMA stores had left shared memory"):
        checks.move_box(tensor.data_ptr(), (72, 12, 1), (0, 144, 0), (64, 8, 1), 2, 1, 3, laid.data_ptr(), at, 2)


def test_where_a_swizzled_box_may_be_stored_from(checks: Any) -> None:
    """On a multiple of what its pattern repeats in: 512 bytes for rows of 64."""
    tensor, box = torch.zeros(12, 72, dtype=BF16), torch.zeros(8, 32, dtype=BF16)
    store = functools.partial(
        checks.move_box, tensor.data_ptr(), (72, 12, 1), (0, 144, 0), (32, 8, 1), 2, 1, 2, box.data_ptr(), (0, 0, 0)
    )
    store(1)
    with pytest.raises(RuntimeError, match="a TMA store of shared memory that is not 512-byte aligned"):
        store(3)  # from 256 bytes on


def test_tensor_maps_the_driver_would_refuse(checks: Any) -> None:
    tensor, out = torch.zeros(64, 64, dtype=BF16), torch.zeros(1 << 16, dtype=torch.uint8)

    def move(base: int = 0, stride: int = 128, box: tuple[int, int, int] = (64, 8, 1)) -> None:
        checks.move_box(
            tensor.data_ptr() + base, (64, 64, 1), (0, stride, 0), box, 2, 1, 3, out.data_ptr(), (0, 0, 0), False
        )

    move()
    for wrong, named in (({"base": 8}, "base"), ({"stride": 120}, "stride"), ({"box": (72, 8, 1)}, "row_bytes")):
        with pytest.raises(ValueError, match=named):
            move(**wrong)
    with pytest.raises(ValueError, match="box"):
        move(box=(64, 257, 1))


# ---- conversions


def test_conversions_to_narrow_formats(checks: Any) -> None:
    """Every number of the format, the middle between neighbours, and what lies just beside the middle."""
    for dtype, bits_of, highest in (
        (BF16, lambda x: checks.pack_bf16(x, 0.0), 0x7F80),
        (torch.float16, lambda x: checks.pack_fp16(x, 0.0), 0x7C00),
    ):
        numbers = torch.arange(0, highest, 7, dtype=torch.int16).view(dtype).float()
        following = torch.arange(1, highest + 1, 7, dtype=torch.int16)[: len(numbers)].view(dtype).float()
        middle = (numbers.double() + following.double()).div(2).float()
        for x in (
            numbers,
            middle,
            middle.nextafter(torch.tensor(0.0)),
            middle.nextafter(torch.tensor(torch.inf)),
            -middle,
        ):
            expected = x.to(dtype).view(torch.int16)
            got = torch.tensor([bits_of(value) & 0xFFFF for value in x.tolist()]).to(torch.int16)
            assert got.equal(expected), dtype
    numbers = torch.arange(0, 127, dtype=torch.uint8).view(FP8).float()
    middle = (numbers[:-1] + numbers[1:]) / 2
    x = torch.cat([numbers, middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(1e9))])
    x = torch.cat([x, -x, torch.tensor([449.0, 1e30, -1e30, torch.inf, -torch.inf])])
    expected = x.clamp(-448, 448).to(FP8).view(torch.uint8)
    got = torch.tensor([checks.pack_fp8(0.0, value) >> 8 for value in x.tolist()], dtype=torch.uint8)
    assert got.equal(expected)
    assert checks.pack_fp8(float("nan"), 0.0) & 0x7F == 0x7F


def test_widening_and_permuting(checks: Any) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    wide = torch.tensor([checks.fp8x2_to_fp16x2(i | (255 - i) << 8) & 0xFFFF for i in range(256)]).to(torch.int16)
    torch.testing.assert_close(
        wide.view(torch.float16).float(), every.view(FP8).float(), rtol=0, atol=0, equal_nan=True
    )
    half = torch.arange(0, 65536, 5)
    got = torch.tensor([checks.fp16_to_float(i) for i in half.tolist()])
    torch.testing.assert_close(got, half.to(torch.int16).view(torch.float16).float(), rtol=0, atol=0, equal_nan=True)
    assert checks.permute_bytes(0x33221100, 0x77665544, 0x6420) == 0x66442200
    assert checks.permute_bytes(0x33221180, 0x77665544, 0x8765) == 0xFF776655
    assert checks.exp2_fast(-150.0) == 0.0 and checks.exp2_fast(-126.0) == 2.0**-126
