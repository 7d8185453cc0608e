"""``make gpu-pack``: all that can be made without a GPU for a run on one, into a folder of some megabytes.

The CUDA library for this interpreter, and Triton's cache: every variant of every kernel that the engine (256 and 1024
rows, bf16 and FP8), the tests for GPUs and the benchmarks launch, with the launchers that Triton compiles in C.
Triton's cache is keyed by Triton's own files, its assembler's version and the kernels' source, so this python must have
the versions of the machine with the GPU; paths do not matter.

    python3.12 benchmarks/gpu_pack.py        # of a python with the torch and Triton of the machine with the GPU

What is packed is tried: a second copy of the tree with the unpacked cache compiles nothing more. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if sys.path and Path(sys.path[0] or ".").resolve() == ROOT / "benchmarks":
    del sys.path[0]  # modules of this folder have common names
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import gpu_setup  # noqa: E402
from csrc import build  # noqa: E402

MOST_BYTES = 40 << 20
# Two processes compile: each takes these groups of gpu_variants.
SHARES = (("engine", "op_benchmarks"), ("tiny", "runner_tests", "op_tests"))
_VERSIONS = """
import json, torch, triton
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.cache import triton_key
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__,
                  "ptxas": get_ptxas(90).version, "key": triton_key()}))
"""


def copy_tree(to: Path) -> None:
    """What a run needs of the checkout, at another place, with links as gpu.py makes them."""
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in ("nemo_engine", "kernels", "benchmarks", "tests", "csrc"):
        shutil.copytree(ROOT / name, to / name, ignore=left_out)
    for name in _links(to):
        name.unlink()  # left by a run that was killed
    gpu_setup.link_packages(to, None)


def _links(tree: Path) -> list[Path]:
    return [path for path in (tree / "nemo_engine").iterdir() if path.is_symlink()]


def stub_driver(folder: Path) -> Path:
    """A library with the name of the GPU's driver and nothing in it, for launchers to be linked with; returns its
    folder.
    """
    folder.mkdir()
    library = folder / "libcuda.so.1"
    command = ["gcc", "-shared", "-o", str(library), f"-Wl,-soname,{library.name}", "-x", "c", "/dev/null"]
    subprocess.run(command, check=True)
    return folder


def variants(tree: Path, cache: Path, stub: Path, options: Sequence[str]) -> subprocess.Popen[str]:
    """gpu_variants in ``tree``, with its cache in ``cache``."""
    extra = {"TRITON_CACHE_DIR": str(cache), "TRITON_LIBCUDA_PATH": str(stub), "OMP_NUM_THREADS": "1"}
    environment = gpu_setup.child_environment(tree, tree, extra)
    command = [sys.executable, "-m", "nemo_engine.benchmarks.gpu_variants", *options]
    return subprocess.Popen(command, cwd=tree, env=environment, text=True, stdout=subprocess.PIPE)


def finish(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Show what they print; ``SystemExit`` if one failed."""
    said = [process.communicate()[0] for process in processes]
    print("".join(said), end="", flush=True)
    if any(process.returncode for process in processes):
        raise SystemExit("not every variant was compiled; the messages are above")


def build_library(to: Path) -> str:
    """The CUDA library for this interpreter; returns the compiler's version, or why there is none."""
    nvcc, reason = build.find_nvcc()
    if nvcc is None or build.missing_tools():
        return reason or f"{', '.join(build.missing_tools())} not installed"
    build.install_gpu(nvcc, to)
    return "nvcc " + ".".join(map(str, build.version_of(nvcc)))


def imports(library: Path) -> str:
    """What the library says of itself in this interpreter, without a GPU."""
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('nemo_engine._C', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.device_type, len(dir(module)))"
    )
    return gpu_setup.run_python(code, os.environ, 60.0, str(library))


def make(pack: Path) -> dict[str, Any]:
    """Fill the folder ``pack``; returns its manifest."""
    start = time.monotonic()
    versions = json.loads(
        subprocess.run([sys.executable, "-c", _VERSIONS], capture_output=True, text=True, check=True).stdout
    )
    key = gpu_setup.triton_hash(versions.pop("key"))
    shutil.rmtree(pack, ignore_errors=True)
    pack.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="gpu-pack-") as scratch:
        work = Path(scratch)
        copy_tree(work / "tree")
        stub = stub_driver(work / "stub")
        cache = work / "cache"
        finish([variants(work / "tree", cache, stub, ("--groups", *share)) for share in SHARES])
        kernels = gpu_setup.pack_cache(cache, pack / gpu_setup.CACHE)
        print(f"Triton: {kernels} variants, {time.monotonic() - start:.0f} s", flush=True)
        copy_tree(work / "other" / "tree")
        files = gpu_setup.unpack_cache(pack / gpu_setup.CACHE, work / "unpacked")
        other = variants(work / "other" / "tree", work / "unpacked", stub, ("--check",))
        finish([other])
        print(
            f"another copy of the tree found all of it in the {files} files of the pack, "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )
    library = pack / f"_C{gpu_setup.library_suffix()}"
    compiler = build_library(library)
    manifest = {
        "commit": gpu_setup.commit_text(ROOT), "python": platform.python_version(), **versions, "triton_key": key,
        "variants": kernels, "compiler": compiler, "sources": gpu_setup.sources(),
        "library": f"{library.name}: {imports(library)}" if library.exists() else None,
        "files": {path.name: path.stat().st_size for path in sorted(pack.iterdir())},
        "seconds": round(time.monotonic() - start),
    }  # fmt: skip
    (pack / gpu_setup.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def main(argv: Sequence[str] | None = None) -> int:
    """Make the pack, print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=gpu_setup.PACK, help="[build/gpu-pack]")
    args = parser.parse_args(argv)
    manifest = make(args.out.resolve())
    size = sum(manifest["files"].values())
    for name, value in manifest.items():
        print(f"{name:11s} {value}")
    print(f"{args.out}: {size / 2**20:.1f} MiB of at most {MOST_BYTES >> 20}")
    return int(size > MOST_BYTES or manifest["library"] is None or "cuda" not in manifest["library"])


if __name__ == "__main__":
    sys.exit(main())
