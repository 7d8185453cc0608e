"""Building the CUDA kernels: finding nvcc, and one way to call CMake, for setup.py and for the tests.

Standard library only.

    python csrc/build.py            # builds nemo_engine/_C for this interpreter, in this checkout
    python csrc/build.py --which    # prints the nvcc that would be used
    python csrc/build.py --compile NVCC ARGUMENTS...    # as CMake does: fails where ptxas gives up what is asked for

Works without a GPU and without torch.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_NVCC = (12, 8)  # the first that knows all that is used; 13.0 and 13.5 are tested
USUAL = "/usr/local/cuda/bin/nvcc"
TOOLS = ("cmake", "ninja", "pybind11")
# What ptxas says when it serialises wgmma or puts waits of its own between them: the code is right and slow, and nvcc
# succeeds.
GIVEN_UP = re.compile(r"\(C75\d\d\)")


def nvcc_candidates() -> list[Path]:
    """Where nvcc may be, in order: $CUDACXX, $CUDA_HOME, the PATH, the usual place, and the packages of the extra
    ``nvcc``.
    """
    found = [os.environ["CUDACXX"]] if os.environ.get("CUDACXX") else []
    found += [
        os.path.join(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)
    ]
    found += [path for path in (shutil.which("nvcc"), USUAL) if path]
    for folder in dict.fromkeys([*sys.path, sysconfig.get_paths()["purelib"]]):
        found += sorted(map(str, Path(folder).glob("nvidia/cu*/bin/nvcc")), reverse=True)
    return [Path(path) for path in dict.fromkeys(found) if os.access(path, os.X_OK)]


def version_of(nvcc: Path) -> tuple[int, int]:
    """(major, minor); (0, 0) if it does not say."""
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:
        said = ""
    match = re.search(r"release (\d+)\.(\d+)", said)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def find_nvcc() -> tuple[Path | None, str]:
    """The first nvcc that is new enough, or None and why."""
    candidates = nvcc_candidates()
    for path in candidates:
        if version_of(path) >= OLDEST_NVCC:
            return path, ""
    oldest = ".".join(map(str, OLDEST_NVCC))
    if candidates:
        found = ", ".join(f"{path} {'.'.join(map(str, version_of(path)))}" for path in candidates)
        return None, f"nvcc {oldest} or later is needed, found {found} (pip install 'nemo-engine[nvcc]' brings one)"
    return None, f"no nvcc is found, and {oldest} or later is needed (pip install 'nemo-engine[nvcc]' brings one)"


def _tool(name: str) -> str:
    """cmake or ninja: beside this interpreter, from their packages, or on the PATH."""
    beside = Path(sys.executable).parent / name
    if beside.exists():
        return str(beside)
    found = shutil.which(name)
    if found:
        return found
    module = importlib.import_module(name)  # of an isolated build, whose scripts are not on the PATH
    folder = Path(getattr(module, "CMAKE_BIN_DIR", None) or module.BIN_DIR)
    return str(folder / name)


def missing_tools() -> list[str]:
    """Of cmake, ninja and pybind11, what is not installed."""
    return [
        name
        for name in TOOLS
        if importlib.util.find_spec(name) is None and not (name != "pybind11" and shutil.which(name))
    ]


def cmake_build(folder: Path, *options: str, source: Path = ROOT) -> None:
    """Configure and compile what changed in ``folder``, of ``source``'s CMakeLists.txt.

    Raises ``RuntimeError`` with the compiler's words.
    """
    configure = [_tool("cmake"), "-S", str(source), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}", *options]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of another process that builds here
        for command in (configure, [_tool("cmake"), "--build", str(folder)]):
            run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if run.returncode:
                raise RuntimeError(f"$ {' '.join(command)}\n{run.stdout[-8000:]}")


def compile_strictly(command: Sequence[str]) -> int:
    """Run a compiler, whose output is passed on; its exit status, or 1 if its output has a message C75xx of ptxas."""
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sys.stdout.write(run.stdout)
    if run.returncode == 0 and GIVEN_UP.search(run.stdout):
        print("error: ptxas gives up the overlap of products (messages C75xx above)")
        return 1
    return run.returncode


def build_gpu(nvcc: Path, folder: Path | None = None) -> Path:
    """Compile the kernels for sm_90a with ``nvcc``; returns the library.

    ``folder``: build/cuda-... of this interpreter if None.
    """
    folder = folder or ROOT / "build" / f"cuda-{sysconfig.get_config_var('SOABI')}"
    cmake_build(folder, f"-DCMAKE_CUDA_COMPILER={nvcc}")
    return folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def install_gpu(nvcc: Path, to: Path) -> None:
    """Compile, and put the library at ``to`` without its symbols of debugging."""
    library = build_gpu(nvcc)
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = to.with_suffix(".new")  # renamed: a process that has the old one loaded keeps it
    shutil.copy(library, temporary)
    if shutil.which("strip"):
        subprocess.run(["strip", "--strip-unneeded", str(temporary)], check=True)
    temporary.rename(to)


def main() -> int:
    """Build in this checkout."""
    if sys.argv[1:2] == ["--compile"]:
        return compile_strictly(sys.argv[2:])
    nvcc, reason = find_nvcc()
    if nvcc is None:
        print(reason, file=sys.stderr)
        return 1
    if "--which" in sys.argv[1:]:
        print(nvcc)
        return 0
    lacking = missing_tools()
    if lacking:
        print(f"pip install {' '.join(lacking)}: needed to build", file=sys.stderr)
        return 1
    to = ROOT / "nemo_engine" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    install_gpu(nvcc, to)
    print(f"{to}, {to.stat().st_size / 2**20:.1f} MiB, by {nvcc} {'.'.join(map(str, version_of(nvcc)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
