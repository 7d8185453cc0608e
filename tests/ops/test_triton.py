"""Triton kernels on a machine without a GPU: run by Triton's interpreter, and compiled for sm_90a."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_engine.ops import ALL_OPS
from tests.ops.proofs import prove

ROOT = Path(__file__).parents[2]

pytest.importorskip("triton")


def test_kernels_equal_their_definitions_in_the_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when it is imported, so the proofs run in an interpreter of their own."""
    expected = 2 * sum(1 for op in ALL_OPS for impl in op.impls if impl.name == "triton" for _ in op.cases())
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", "tests/ops/test_ops.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{expected} passed" in run.stdout


COMPILE = """
import sys, triton
from importlib import import_module
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
for module, name, types, constants, num_warps in eval(sys.argv[1]):
    kernel = getattr(import_module(module), name)
    values = {(kernel.arg_names.index(constant),): value for constant, value in constants.items()}
    source = ASTSource(kernel, {**types, **dict.fromkeys(constants, "constexpr")}, values)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    assert len(compiled.asm["cubin"]) > 1000
    assert ".local" not in compiled.asm["ptx"], f"{name} {types} {constants}: spills"
    print("compiled")
"""


def test_kernels_compile_for_hopper() -> None:
    specs: list[object] = []
    for element in ("*bf16", "*fp32"):
        pointers = dict.fromkeys(("y_ptr", "sum_ptr", "x_ptr", "residual_ptr", "weight_ptr"), element)
        numbers = {"x_stride": "i32", "residual_stride": "i32", "width": "i32", "eps": "fp32"}
        for has_residual in (False, True):
            constants = {"HAS_RESIDUAL": has_residual, "BLOCK": 8192}
            specs.append(("nemo_engine.kernels.norm", "_rms_norm_kernel", pointers | numbers, constants, 16))
        types = {"out_ptr": element, "gate_up_ptr": element, "stride": "i32", "width": "i32"}
        specs.append(("nemo_engine.kernels.activation", "_silu_mul_kernel", types, {"BLOCK": 1024}, 4))
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, repr(specs)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["compiled"] * len(specs)


@pytest.mark.gpu
def test_kernels_equal_their_definitions_on_a_gpu() -> None:
    for op in ALL_OPS:
        for impl in op.impls:
            if impl.name == "triton":
                for case in op.cases():
                    for dtype in (torch.bfloat16, torch.float32):
                        prove(op, impl.load(), case, dtype, "cuda")
