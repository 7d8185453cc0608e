"""The primitives of csrc/common, assembled for sm_90a: all of them, those that no kernel uses yet too, into the
instructions that are meant.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from csrc import build

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "primitives.cu"
NVCC, WHY_NOT = build.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason=WHY_NOT)
COLUMNS = (16, 32, 40, 48, 64, 80, 96, 112, 128, 160, 176, 192, 224, 256)
SOME = 0  # or more, where the compiler has a choice
# Kernel of primitives.cu -> instructions by prefix -> how many.
EXPECTED: dict[str, dict[str, int]] = {
    "barriers": {"BAR.SYNC": 2, "BAR.ARV": 1},
    "phase_barriers": {
        "SYNCS.EXCH.64": 1,
        "SYNCS.ARRIVE.TRANS64.A1T0": 1,
        "SYNCS.ARRIVE.TRANS64": 2,
        "FENCE.VIEW.ASYNC.S": 2,
        "FENCE.VIEW.ASYNC.G": 1,
        "SYNCS.PHASECHK.TRANS64.TRYWAIT": 3,
    },
    "dependent_launch": {"PREEXIT": 1, "ACQBULK": 1},
    "registers_of_roles": {"USETMAXREG.DEALLOC": 1, "USETMAXREG.TRY_ALLOC": 1},
    "ordinary_memory": {"LDG.E.128": 1, "STG.E.128": 1},
    "streamed_memory": {"LDG.E.NA.128": 1},  # beside L1; the policy is an operand
    "published_memory": {"LDG.E.STRONG.GPU": 1, "STG.E.STRONG.GPU": 1, "MEMBAR.SC.GPU": 1, "MEMBAR.ALL.GPU": 1},
    "ordered_atomic": {"ATOMG.E.ADD.S32.STRONG.GPU": 1, "MEMBAR.ALL.GPU": 1},
    "atomics": {"ATOMG.E.ADD": 1, "ATOMG.E.MAX": 1, "ATOMG.E.MIN": 1},
    "copies": {"LDGSTS.E.BYPASS.LTC128B.128": 2, "LDGDEPBAR": 1, "DEPBAR.LE": 1, "ARRIVES.LDGSTSBAR.64": 1},
    "prefetch": {"CCTL.E.PF2": 1},
    "copy_engine": {
        "UTMACCTL.PF": 1,
        "UTMALDG.2D": 2,
        "UTMALDG.3D": 1,
        "UBLKCP.S.G": 1,
        "UTMASTG.2D": 1,
        "UTMACMDFLUSH": 1,
        "DEPBAR.LE": 2,
    },
    "clusters": {
        "UCGABAR_ARV": 2,
        "UCGABAR_WAIT": 2,
        "MEMBAR.ALL.GPU": 1,  # of the barrier that is not relaxed
        "UTMALDG.2D.MULTICAST": 1,
        "UPRMT": SOME,  # the address in another block
        "SYNCS.ARRIVE.TRANS64.RED": 1,
    },
    "matrix_moves": {
        "LDSM.16.M88.4": 1,
        "LDSM.16.MT88.4": 1,
        "LDSM.16.M88.2": 1,
        "LDSM.16.MT88.2": 1,
        "STSM.16.M88.4": 2,
        "MOVM.16.MT88": 1,
    },
    "warp_products": {"HMMA.16816.F32.BF16": 1, "HMMA.16816.F32": 2},
    **{
        f"group_products_{n}": {
            f"HGMMA.64x{n}x16.F32.BF16": 4,
            f"QGMMA.64x{n}x32.F32.E4M3.E4M3": 1,
            "WARPGROUP.ARRIVE": 1,
            "WARPGROUP.DEPBAR.LE": 1,
        }
        for n in COLUMNS
    },
    "overlapped": {"MUFU.EX2": 2, "WARPGROUP.DEPBAR.LE": 1},
    "lanes": {"SHFL.IDX": SOME, "SHFL.BFLY": SOME, "SHFL.UP": 1, "VOTE.ANY": 1, "POPC": 1},
    "conversions": {
        "F2FP.BF16.F32.PACK_AB": 2,
        "F2FP.F16.F32.PACK_AB": 1,
        "F2FP.SATFINITE.E4M3.F32": 2,
        "F2FP.F16.E4M3.UNPACK_B": 2,
        "PRMT": SOME,
    },
    "arithmetic": {
        "MUFU.EX2": 1,
        "MUFU.LG2": 1,
        "MUFU.RSQ": SOME,
        "MUFU.RCP": SOME,
        "FMUL": SOME,
        "FADD": SOME,
        "FFMA": SOME,
    },
}


def primitives() -> set[str]:
    """Names of all device functions of csrc/common that are written in PTX or in CUDA's intrinsics."""
    found: set[str] = set()
    for name in ("barrier", "cluster", "memory", "mma", "numbers", "tma", "warp"):
        text = (ROOT / "csrc" / "common" / f"{name}.cuh").read_text()
        found |= set(re.findall(r"^__device__ __forceinline__ [^()]*?\b(\w+)\(", text, re.MULTILINE))
        found |= set(re.findall(r"^NEMO_MMA\((\w+),", text, re.MULTILINE))
        found |= {f"GROUP_PRODUCTS({columns})" for columns in re.findall(r"^NEMO_WGMMA\((\d+),", text, re.MULTILINE)}
    return found


def test_every_primitive_is_assembled() -> None:
    text = SOURCE.read_text()
    used = set(re.findall(r"\w+", text)) | set(re.findall(r"GROUP_PRODUCTS\(\d+\)", text))
    # Those that others of them are made of.
    inner = {"shared_address", "cache_policy", "low_bf16", "high_bf16"}
    assert len(primitives()) > 80 and primitives() - used - inner == set()
    assert set(EXPECTED) == set(re.findall(r"^KERNEL\((\w+)\)", text, re.MULTILINE)) | {
        f"group_products_{n}" for n in COLUMNS
    } | {"registers_of_roles", "copy_engine", "clusters", "overlapped"}  # fmt: skip


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernels of primitives.cu, by name."""
    pytest.importorskip("triton")  # which has the disassembler
    from nemo_engine.benchmarks.cuda_kernel_report import kernels_of

    cubin = tmp_path_factory.mktemp("primitives") / "primitives.cubin"
    assert NVCC is not None
    options = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", "-arch=sm_90a", "-cubin")
    run = subprocess.run([NVCC, *options, "-o", cubin, SOURCE], capture_output=True, text=True)
    assert run.returncode == 0 and not build.GIVEN_UP.search(run.stdout + run.stderr), run.stdout + run.stderr
    return kernels_of(cubin)


@needs_nvcc
@pytest.mark.parametrize("name", EXPECTED)
def test_a_primitive_becomes_the_instructions_meant(kernels: Any, name: str) -> None:
    words = Counter(instructions(kernels[name].code))
    for prefix, count in EXPECTED[name].items():
        got = sum(number for word, number in words.items() if word == prefix or word.startswith(f"{prefix}."))
        assert got == count if count != SOME else got > 0, (prefix, words)
    assert not any(word.startswith(("LDL", "STL")) for word in words) and kernels[name].usage["STACK"] == 0


def instructions(code: str) -> list[str]:
    """Names of the instructions of a kernel, as they stand in the listing."""
    return re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", code, re.MULTILINE)


@needs_nvcc
def test_roles_and_overlap_of_the_primitives(kernels: Any) -> None:
    from nemo_engine.benchmarks.machine_flow import read_flow

    assert [had for _, had in read_flow(kernels["registers_of_roles"].code).roles] == [40, 232]
    names = instructions(kernels["overlapped"].code)
    assert "MUFU.EX2" not in names[names.index("WARPGROUP.DEPBAR.LE") :]
