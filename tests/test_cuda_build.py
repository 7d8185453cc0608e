"""The CUDA kernels compiled for sm_90a on a machine without a GPU: what the library needs, what it refuses, and how nvcc is found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from csrc import build
from tests.test_packaging import pip, tree

__all__ = ["tree"]

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


@needs_nvcc
def test_the_wheel_holds_the_library(tree: Path, tmp_path: Path) -> None:  # noqa: F811
    """Of one family, for the sake of time: how it gets into the wheel does not depend on which."""
    for family in (tree / "csrc").iterdir():
        if (family / "bind.cpp").exists() and family.name != "norm":
            (family / "bind.cpp").rename(family / "bind.not")
    assert NVCC is not None
    said = pip(
        "wheel", "-q", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path), ".", cwd=tree, cuda="1"
    )
    (path,) = tmp_path.glob("*.whl")
    assert "py3-none-any" not in path.name and "without its CUDA kernels" not in said
    (name,) = [name for name in zipfile.ZipFile(path).namelist() if re.match(r"nemo_engine/_C\..*so$", name)]
    assert zipfile.ZipFile(path).getinfo(name).compress_size < 8 << 20


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
