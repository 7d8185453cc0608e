"""What pyproject.toml cannot say: ``kernels/`` and ``benchmarks/`` lie beside the package in the tree and inside it
when installed; and how the compiled kernels are built.

Those for CPUs, ``nemo_engine._cpu``, are built where there is a C++ compiler; without one, torch computes. Those in
CUDA, ``nemo_engine._C``, are compiled where nvcc is found. NEMO_ENGINE_CUDA=0 leaves them out; NEMO_ENGINE_CUDA=1 makes
their absence an error.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import build as kernels_build  # noqa: E402


class BuildKernels(build_ext):
    """Builds ``nemo_engine._C`` with CMake and nvcc, and ``nemo_engine._cpu`` as setuptools builds any extension."""

    def build_extension(self, ext: Extension) -> None:
        """Compile, and put the library where setuptools wants it."""
        if ext.name != "nemo_engine._C":
            super().build_extension(ext)
            return
        nvcc, _ = kernels_build.find_nvcc()
        assert nvcc is not None
        kernels_build.install_gpu(nvcc, Path(self.get_ext_fullpath(ext.name)).resolve())


# OpenMP is not linked: its symbols are found in the one that torch brings, so that there is one pool of threads and not
# two.
CPU = Extension(
    "nemo_engine._cpu",
    sources=["csrc/cpu/kernels.cpp", "csrc/cpu/module.cpp"],
    depends=["csrc/cpu/draw.h", "csrc/cpu/kernels.h", "csrc/cpu/product.h", "csrc/cpu/rows.h", "csrc/cpu/vector.h"],
    extra_compile_args=[
        "-std=c++20",
        "-O3",
        "-g0",
        "-fopenmp",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wno-psabi",
    ],
    language="c++",
    optional=True,
)


def cuda_extensions() -> list[Extension]:
    """The CUDA kernels, or none, with a line that says why."""
    wanted = os.environ.get("NEMO_ENGINE_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"NEMO_ENGINE_CUDA must be 0, 1 or not set, got {wanted!r}")
    _, reason = (None, "NEMO_ENGINE_CUDA=0") if wanted == "0" else kernels_build.find_nvcc()
    if not reason and kernels_build.missing_tools():
        reason = f"{', '.join(kernels_build.missing_tools())} not installed"
    if not reason:
        return [Extension("nemo_engine._C", sources=[])]
    if wanted == "1":
        raise SystemExit(f"NEMO_ENGINE_CUDA=1, but {reason}")
    if any(command.startswith(("bdist", "editable", "build", "install")) for command in sys.argv[1:]):
        print(f"nemo-engine is built without its CUDA kernels: {reason}", file=sys.stderr)
    return []


setup(
    packages=[
        *find_packages(include=["nemo_engine", "nemo_engine.*"]),
        "nemo_engine.kernels",
        "nemo_engine.benchmarks",
        "nemo_engine.benchmarks.peers",
        "nemo_engine.benchmarks.report",
    ],
    package_dir={
        "nemo_engine": "nemo_engine",
        "nemo_engine.kernels": "kernels",
        "nemo_engine.benchmarks": "benchmarks",
        "nemo_engine.benchmarks.peers": "benchmarks/peers",
        "nemo_engine.benchmarks.report": "benchmarks/report",
    },
    ext_modules=[CPU, *cuda_extensions()],
    cmdclass={"build_ext": BuildKernels},
)
