"""The CUDA kernels compiled for sm_90a on a machine without a GPU: what the library needs, what it refuses, and how
nvcc is found.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from csrc import build

ROOT = Path(__file__).parent.parent
NVCC, WHY_NOT = build.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason=WHY_NOT)


@pytest.fixture(scope="session")
def library() -> Path:
    """The library, compiled where it changed since the last time."""
    assert NVCC is not None
    return build.build_gpu(NVCC)


def run(library: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Python without the packages of this environment, torch among them, and with ``m`` the library."""
    load = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('nemo_engine._C', {str(library)!r})\n"
        "m = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(m)\n"
    )
    return subprocess.run([sys.executable, "-I", "-S", "-c", load + code], capture_output=True, text=True)


@needs_nvcc
def test_the_library_needs_neither_torch_nor_cuda_libraries(library: Path) -> None:
    said = run(library, "assert 'torch' not in sys.modules; print(m.device_type)")
    assert said.stdout == "cuda\n", said.stderr
    linked = subprocess.run(["ldd", str(library)], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0].split("/")[-1] for line in linked.splitlines()}
    allowed = r"linux-vdso|libstdc\+\+|libgcc_s|libc\.|libm\.|libdl|librt|libpthread|ld-linux"
    assert [name for name in names if not re.match(allowed, name)] == []


@needs_nvcc
def test_bad_arguments_are_named(library: Path) -> None:
    """Without a GPU: arguments are looked at first."""
    code = "m.rms_norm(16, 0, 16, 0, 16, 4, 12, 16, 0, 1e-5, 0)"
    assert "ValueError: width must be a multiple of 8, got 12" in run(library, code).stderr
    code = "m.rms_norm(16, 0, 24, 0, 16, 4, 16, 16, 0, 1e-5, 0)"
    assert "ValueError: x must be 16-byte aligned and not null, got 0x18" in run(library, code).stderr


@needs_nvcc
@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="this machine has a GPU, where the launch would run")
def test_a_launch_that_fails_names_its_kernel(library: Path) -> None:
    said = run(library, "m.rms_norm(16, 0, 16, 0, 16, 4, 16, 16, 0, 1e-5, 0)").stderr
    assert "RuntimeError: launch of rms_norm: cudaError" in said and "grid 4x1x1" in said


# ---- machine code


@pytest.fixture(scope="session")
def lines(library: Path) -> list[str]:
    pytest.importorskip("triton")  # which has the disassembler
    from nemo_engine.benchmarks import cuda_kernel_report

    return cuda_kernel_report.report()


@needs_nvcc
def test_the_machine_code_is_the_one_that_was_reviewed(lines: list[str]) -> None:
    from nemo_engine.benchmarks import cuda_kernel_report

    stored = cuda_kernel_report.STORED.read_text().splitlines()
    if stored[0] != lines[0]:
        pytest.skip(f"the stored report is of {stored[0]}, this is {lines[0]}")
    changed = sorted(set(lines) ^ set(stored))
    assert not changed, "run `make kernel-report` and review its difference:\n" + "\n".join(changed)


@needs_nvcc
def test_nothing_spills(lines: list[str]) -> None:
    assert len(lines) > 60
    for line in lines[1:]:
        assert "spills 0 " in line and " LDL:" not in line and " STL:" not in line, line


@needs_nvcc
@pytest.mark.parametrize(
    ("kernel", "wanted", "unwanted"),
    [
        ("gemm_kernel", ["QGMMA", "UTMALDG"], ["HGMMA", "QMMA"]),
        ("small_linear_kernel", ["UTMALDG"], ["HMMA", "QMMA"]),
        ("prefill_kernel", ["HGMMA", "UTMALDG", "STG.E.128"], ["HMMA"]),
        ("decode_kernel", ["HMMA", "LDGSTS"], ["HGMMA", "QMMA"]),
        ("rms_norm_kernel", ["LDG.E.128"], []),
        ("silu_mul_kernel", ["LDG.E.128", "STG.E.128"], []),
        ("rope_kernel", ["LDG.E.128", "STG.E.128"], []),
        ("quantize_rows_kernel", ["LDG.E.128"], []),
        ("sample_kernel", ["LDG.E.128"], []),
    ],
)
def test_instructions_are_those_meant(lines: list[str], kernel: str, wanted: list[str], unwanted: list[str]) -> None:
    found = [line for line in lines if line.split()[0] == kernel]
    assert found
    for line in found:
        assert all(f" {name}:" in line for name in wanted), line
        assert not any(f" {name}:" in line for name in unwanted), line
        if kernel == "small_linear_kernel":
            assert (" QGMMA:" in line) == ("| fp8," in line) and (" HGMMA:" in line) == ("| bf16," in line), line


def word(line: str, name: str) -> str:
    """What stands after a name in a line of the report."""
    found = re.search(rf"\b{name} +(\S+)", line)
    assert found, (name, line)
    return found[1]


@needs_nvcc
def test_weights_of_prefill_are_computed_while_products_run(lines: list[str]) -> None:
    """None of a tile's 66 exponentials (64 weights and two decays) is left for after the wait.

    The first and last waits have none before them.
    """
    (line,) = (line for line in lines if line.split()[0] == "prefill_kernel")
    assert word(line, "exps") == "0,66,66,0" and word(line, "waits") == "6"


# What a kernel may ask for before the kernel before has ended: weights, and constants of the cache.
EARLY = {
    "small_linear_kernel": {"UTMALDG"},
    "gemm_kernel": {"UTMALDG"},
    "rms_norm_kernel": {"LDG"},
    "rope_kernel": {"LDG"},
}


@needs_nvcc
def test_only_weights_are_read_before_the_kernel_before_has_ended(lines: list[str]) -> None:
    for line in lines[1:]:
        kernel, early = line.split()[0], word(line, "early")
        names = set() if early == "-" else {access.split(":")[0] for access in early.split(",")}
        assert names <= EARLY.get(kernel, set()), line
        if (
            kernel in ("rms_norm_kernel", "rope_kernel") and names
        ):  # a vector of the norm's weight each; a head's two scales
            assert int(early.split(":")[1]) <= 4, line
        if kernel == "gemm_kernel":  # the first weights, four at a time and alone; none of x, which is behind the wait
            assert early == "UTMALDG:5", line


@needs_nvcc
def test_every_role_keeps_to_its_registers(lines: list[str]) -> None:
    has_roles = [line for line in lines[1:] if word(line, "roles") != "-"]
    assert {line.split()[0] for line in has_roles} == {"gemm_kernel", "prefill_kernel"}
    for line in has_roles:
        roles = [tuple(map(int, role.split("/"))) for role in word(line, "roles").split(",")]
        assert [had for _, had in roles] == [40, 232] and all(used <= had for used, had in roles), line


@needs_nvcc
def test_a_loop_waits_once_for_its_products(lines: list[str]) -> None:
    for line in lines[1:]:
        if line.split()[0] == "small_linear_kernel":
            assert word(line, "waits") == "1", line
        if line.split()[0] == "gemm_kernel":  # for each 64 rows of its tile
            assert word(line, "waits") == line.split("| ")[1].split(",")[0], line
        assert int(word(line, "barriers")) <= 16, line


@needs_nvcc
def test_registers_are_read_from_the_code(library: Path) -> None:
    """As many as the assembler says, which keeps two for itself, of every kernel whose registers do not change on the
    way.
    """
    pytest.importorskip("triton")
    from nemo_engine.benchmarks import cuda_kernel_report
    from nemo_engine.benchmarks.machine_flow import named_registers

    assert NVCC is not None
    kernels = cuda_kernel_report.compiled(NVCC)
    for name, kernel in kernels.items():
        if "USETMAXREG" not in kernel.code:
            assert kernel.usage["REG"] - named_registers(kernel.code) in (0, 2), name


@needs_nvcc
@pytest.mark.parametrize(("kernel", "blocks"), [("decode_kernel", 2), ("sample_kernel", 2), ("rope_kernel", 8)])
def test_as_many_blocks_share_an_sm_as_meant(lines: list[str], kernel: str, blocks: int) -> None:
    found = [re.search(r"blocks/SM +(\d+)", line) for line in lines if line.split()[0] == kernel]
    assert found and all(match and int(match[1]) >= blocks for match in found), found


def test_the_name_of_an_instance_is_read() -> None:
    pytest.importorskip("triton")
    from nemo_engine.benchmarks.cuda_kernel_report import instance

    name = "void nemo::small_linear_kernel<nemo::fp8, 16, false, (nemo::Input)3>(nemo::SmallLinear, nemo::TensorMap)"
    assert instance(name) == "small_linear_kernel<fp8,16,0,3>"
    assert instance("nemo::plan_decode_kernel(nemo::MakePlan) [clone .cold]") == "plan_decode_kernel"
    assert instance("void nemo::(anonymous namespace)::f<(int)4, true, 2u>(int)") == "f<4,1,2>"


# ---- what ptxas gives up

SERIALISED = """
#include "common/mma.cuh"
namespace nemo {
__global__ void touches_a_sum_too_early(float* out) {
    auto* shared = shared_memory<unsigned char>();
    float d[8] = {};
    wgmma_fence();
    Wgmma<16>::fp8(d, matrix_k_major(shared), matrix_k_major(shared), 0);
    wgmma_commit();
    d[0] += 1.0f;
    wgmma_wait<0>();
    store(out + threadIdx.x, d[0]);
}
}
"""


@needs_nvcc
def test_products_that_ptxas_serialises_fail_the_build(library: Path, tmp_path: Path) -> None:
    source = tmp_path / "serialised.cu"
    source.write_text(SERIALISED)
    target = "--generate-code=arch=compute_90a,code=sm_90a"  # as CMake says it
    compiler = [NVCC, "-std=c++20", target, f"-I{ROOT / 'csrc'}", "-c", source, "-o", tmp_path / "out.o"]
    run = subprocess.run(
        [sys.executable, ROOT / "csrc" / "build.py", "--compile", *compiler], capture_output=True, text=True
    )
    assert run.returncode == 1 and re.search(r"\(C75\d\d\).*touches_a_sum_too_early", run.stdout), run.stdout
    # And this is how CMake compiles every kernel of the library.
    edges = (library.parent / "build.ninja").read_text().split("\nbuild ")
    kernels = [edge for edge in edges if re.match(r"\S+\.cu\.o: ", edge)]
    assert len(kernels) > 5 and all(re.search(r"LAUNCHER = \S+ \S+csrc/build.py --compile ", edge) for edge in kernels)


@pytest.mark.parametrize(
    ("said", "status", "expected"),
    [
        ("ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized", 0, 1),
        ("ptxas info    : (C7517) warpgroup.wait is injected", 0, 1),
        ("ptxas info    : (C7500) something", 3, 3),
        ("ptxas info    : Used 40 registers", 0, 0),
        ("ptxas info    : (C7610) another", 0, 0),
    ],
)
def test_the_compiler_s_words_decide(tmp_path: Path, said: str, status: int, expected: int) -> None:
    compiler = tmp_path / "nvcc"
    compiler.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit {status}\n")
    compiler.chmod(0o755)
    run = subprocess.run(
        [sys.executable, ROOT / "csrc" / "build.py", "--compile", compiler], capture_output=True, text=True
    )
    assert run.returncode == expected and said in run.stdout


# ---- finding nvcc


def make_nvcc(folder: Path, version: str) -> Path:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n")
    path.chmod(0o755)
    return path


def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (make_nvcc(tmp_path / name, "13.0") for name in ("cxx", "home", "path"))
    packaged = make_nvcc(tmp_path / "site" / "nvidia" / "cu13", "13.5")
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build, "USUAL", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setattr(build.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path / "none")})
    assert build.find_nvcc() == (packaged, "")
    monkeypatch.setenv("PATH", str(third.parent))
    assert build.find_nvcc() == (third, "")
    monkeypatch.setenv("CUDA_HOME", str(second.parent.parent))
    assert build.find_nvcc() == (second, "")
    monkeypatch.setenv("CUDACXX", str(first))
    assert build.find_nvcc() == (first, "")


def test_no_nvcc_or_an_old_one_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "nvcc_candidates", lambda: [])
    assert build.find_nvcc()[1].startswith("no nvcc is found, and 12.8 or later is needed")
    old, new = make_nvcc(tmp_path / "old", "12.4"), make_nvcc(tmp_path / "new", "12.8")
    monkeypatch.setattr(build, "nvcc_candidates", lambda: [old])
    assert f"nvcc 12.8 or later is needed, found {old} 12.4" in build.find_nvcc()[1]
    monkeypatch.setattr(build, "nvcc_candidates", lambda: [old, new])
    assert build.find_nvcc() == (new, "")
