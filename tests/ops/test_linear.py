"""Linear layers: what the proofs of every operation do not ask.

Triton's part is run by its interpreter, and compiled for sm_90a.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_engine.ops.linear import linear_fp8
from nemo_engine.ops.quantize import FP8, FP8_MAX, quantize_tokens
from tests.helpers.interpreted import backwards

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
SHARED_BYTES = 227 << 10  # that a block can have on an H100 or H200
PROJECTIONS = ((6144, 5120), (5120, 4096), (28672, 5120), (5120, 14336), (131072, 5120))  # Mistral NeMo's (N, K)


def operands(rows: int, outputs: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (rows, width) bf16, and a weight (outputs, width) FP8 with its scales."""
    generator = torch.Generator().manual_seed(rows + outputs + width)
    x, w = (torch.randn(n, width, generator=generator) for n in (rows, outputs))
    return x.bfloat16(), *quantize_tokens(w)


@pytest.mark.interpreted
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scale", [None, 0.02])
def test_a_bad_row_spoils_itself_alone(bad: float, scale: float | None) -> None:
    from nemo_engine.kernels import linear as kernels
    from nemo_engine.kernels.quantize import quantize_tokens as quantize

    x, w8, w_scales = operands(5, 40, 272)
    static = None if scale is None else torch.tensor(scale)
    clean = kernels.linear_fp8(*quantize(x, static), w8, w_scales)
    x[3, 100] = bad
    got = kernels.linear_fp8(*quantize(x, static), w8, w_scales)
    others = [0, 1, 2, 4]
    assert got[3].isnan().all() and torch.equal(got[others], clean[others])


@pytest.mark.interpreted
def test_quantisation_saturates_and_knows_zero() -> None:
    from nemo_engine.kernels.linear import linear_fp8 as linear
    from nemo_engine.kernels.quantize import quantize_tokens as quantize

    x = torch.tensor([1e4, -1e4, 1.0, 0.0] * 4).bfloat16()[None]
    q, scales = quantize(x, torch.tensor(0.5))
    assert q.float()[0, :4].tolist() == [FP8_MAX, -FP8_MAX, 2.0, 0.0] and scales.tolist() == [[0.5]]
    q, scales = quantize(torch.zeros(2, 16))
    assert not q.float().any() and (scales == torch.finfo(torch.float32).tiny).all()
    _, w8, w_scales = operands(1, 24, 16)
    assert not linear(q, scales, w8, w_scales).any()


@pytest.mark.interpreted
@pytest.mark.parametrize("rows", [16, 200])
def test_a_row_does_not_depend_on_the_rest_of_its_bucket(rows: int) -> None:
    from nemo_engine.kernels import linear as kernels

    x, w8, w_scales = operands(rows, 150, 1024)
    x8, x_scales = quantize_tokens(x)
    bucket, fewer = kernels.bucket_of(rows), rows - 5
    tiling = kernels.tiling_of(bucket, 1, 150)
    assert bucket == kernels.bucket_of(fewer) and tiling.splits(bucket, 150, 1024) == 2
    weight = w8.to(torch.bfloat16)
    whole = kernels.linear_fp8(x8, x_scales, w8, w_scales), kernels.linear(x, weight)
    part = kernels.linear_fp8(x8[:fewer], x_scales[:fewer], w8, w_scales), kernels.linear(x[:fewer], weight)
    assert all(torch.equal(one[:fewer], other) for one, other in zip(whole, part, strict=True))


@pytest.mark.interpreted
def test_parts_are_added_in_order_whichever_is_the_last() -> None:
    from nemo_engine.kernels import device
    from nemo_engine.kernels import linear as kernels

    x, w8, w_scales = operands(5, 200, 3072)
    x8, x_scales = quantize_tokens(x)
    tiling = kernels.tiling_of(16, 1, 200)
    assert tiling.splits(16, 200, 3072) == 6  # two rounds of loads, the second not full
    product = kernels.linear_fp8(x8, x_scales, w8, w_scales)
    with backwards():
        assert torch.equal(kernels.linear_fp8(x8, x_scales, w8, w_scales), product)
    assert not device.zeros_of(w8, 2).any() and device.zeros_of(w8, 2) is device.zeros_of(w8, 2)


@pytest.mark.interpreted
def test_result_in_fp32() -> None:
    from nemo_engine.kernels.linear import linear_fp8 as linear

    x, w8, w_scales = operands(3, 40, 272)
    x8, x_scales = quantize_tokens(x)
    got = linear(x8, x_scales, w8, w_scales, torch.float32)
    torch.testing.assert_close(got, linear_fp8(x8, x_scales, w8, w_scales, torch.float32), rtol=1e-5, atol=1e-5)


def test_every_number_of_rows_has_a_bucket() -> None:
    from nemo_engine.kernels.linear import BUCKETS, MANY, bucket_of

    for rows in range(1, 1000):
        bucket = bucket_of(rows)
        assert bucket in BUCKETS and rows <= bucket or bucket == MANY and rows > BUCKETS[-1]
        assert not any(rows <= smaller < bucket for smaller in BUCKETS)


@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_splits_have_work_and_fill_the_device(itemsize: int) -> None:
    from nemo_engine.kernels.linear import BUCKETS, tiling_of

    for bucket in BUCKETS:
        for outputs, width in ((1, 16), (768, 5120), (5120, 512), *PROJECTIONS):
            tiling = tiling_of(bucket, itemsize, outputs)
            splits = tiling.splits(bucket, outputs, width)
            steps = -(-width // tiling.depth)
            assert 1 <= splits <= steps  # none is empty, on which the kernel relies
            tiles = -(-bucket // tiling.rows) * -(-outputs // tiling.outputs)
            assert tiles * splits <= max(tiles, tiling.blocks)
            if (outputs, width) in PROJECTIONS:
                assert tiles * splits >= 96  # of 132 SMs
            if (bucket, outputs) == (256, 6144) and itemsize < 4:
                assert splits == 1  # no parts are written where tiles with K whole fill as much


# On meta tensors, with launches that compile for sm_90a and run nothing: the variants are those that a GPU would run.
COMPILE = r"""
import itertools, json, pathlib, re, subprocess, sys, tempfile, types
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from nemo_engine.kernels.linear import linear, linear_fp8

run, variants = JITFunction.run, {}

def compile_launch(self, *args, grid, warmup, **kwargs):
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    variants[id(kernel)] = kind, self.__name__, str(kwargs), kernel
    return kernel

JITFunction.run = compile_launch
target = GPUTarget("cuda", 90, 32)
driver.set_active(types.SimpleNamespace(
    get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
))

def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

rows_of, shapes, kinds = json.loads(sys.argv[1])
for kind, rows, (n, k) in itertools.product(kinds, rows_of, shapes):
    if kind in ("bfloat16", "float32"):
        linear(*(empty(size, k, dtype=getattr(torch, kind)) for size in (rows, n)))
    else:
        blocks = -(-n // 128), -(-k // 128)
        w_scales = {"tensor": (), "channel": (n, 1), "block": blocks}[kind]
        x8, w8 = (empty(size, k, dtype=torch.float8_e4m3fn) for size in (rows, n))
        linear_fp8(x8, empty(rows, blocks[1] if kind == "block" else 1), w8, empty(*w_scales))

nvdisasm = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
words = ("LDL", "STL", "HGMMA", "QGMMA", "UTMALDG", "WARPGROUP.ARRIVE", "FADD", "FFMA", "LDG.E.128", "STG.E.128", "ATOMG")
for kind, name, variant, kernel in variants.values():
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code = subprocess.run([nvdisasm, file.name], capture_output=True, text=True, check=True).stdout
    counts = {word: len(re.findall(rf"\b{re.escape(word)}\b", code)) for word in words}
    promoted_after = [int(number) for number in re.findall(r"maxNumImpreciseAcc = (\d+)", kernel.asm["ttgir"])]
    print(json.dumps([kind, name, variant, kernel.metadata.shared, counts, promoted_after]))
"""


def compiled(rows: tuple[int, ...], shapes: tuple[tuple[int, int], ...], kinds: tuple[str, ...]) -> list[list[Any]]:
    """Every variant that products of these sizes launch: [kind, kernel, variant, shared memory, instructions,
    promotion].
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps([rows, shapes, kinds])]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_compiled_for_hopper_as_meant() -> None:
    """No spills, TMA, asynchronous tensor core instructions that do not wait for each other, wide stores, and FP8 sums
    in fp32.
    """
    variants = compiled((1, 32, 64, 128, 256, 4096), ((28672, 5120),), ("channel", "block", "bfloat16"))
    variants += compiled((128, 4096), ((6144, 5120),), ("tensor",))
    assert {variant[1] for variant in variants} == {"_split_kernel", "_persistent_kernel"}
    for kind, name, variant, shared, counts, promoted_after in variants:
        what = f"{kind} {name} {variant}: {counts}"
        assert counts["LDL"] == counts["STL"] == 0 and shared <= SHARED_BYTES, what
        assert counts["STG.E.128"], what
        assert bool(counts["LDG.E.128"]) == bool(counts["ATOMG"]), what  # parts are read 16 bytes at a time
        products = counts["HGMMA" if kind == "bfloat16" else "QGMMA"]
        assert products and counts["UTMALDG"] and counts["WARPGROUP.ARRIVE"] <= max(products // 4, 1), what
        if kind in ("channel", "tensor"):
            assert set(promoted_after) == {128} and counts["FADD"] >= 8, what
        elif kind == "block":
            assert counts["FFMA"] >= 8, what


def test_fp32_compiles_for_hopper() -> None:
    for _, _, variant, _, counts, _ in compiled((1, 64, 4096), ((6144, 5120),), ("float32",)):
        assert counts["LDL"] == counts["STL"] == 0, variant


def test_definition_of_block_scales() -> None:
    """Against the sum over blocks, written out."""
    generator = torch.Generator().manual_seed(0)
    x8, w8 = (torch.randn(n, 200, generator=generator).to(FP8) for n in (3, 130))
    x_scales, w_scales = (torch.rand(n, 2, generator=generator, dtype=torch.float64) for n in (3, 2))
    want = torch.zeros(3, 130, dtype=torch.float64)
    for row in range(3):
        for output in range(130):
            for block in range(2):
                at = slice(128 * block, 128 * (block + 1))
                product = (x8[row, at].double() * w8[output, at].double()).sum()
                want[row, output] += product * x_scales[row, block] * w_scales[output // 128, block]
    torch.testing.assert_close(linear_fp8(x8, x_scales, w8, w_scales), want)
