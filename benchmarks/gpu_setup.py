"""What makes a checkout run on a machine with a GPU where nothing can be installed: links, versions, and a pack made on
a machine without a GPU.

A pack (benchmarks/gpu_pack.py makes it) is a folder with the CUDA library, Triton's cache, and ``pack.json``, which
says what they were made with and of. Standard library only: this runs before the package can be imported.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT / "build" / "gpu-pack"
MANIFEST, CACHE = "pack.json", "triton-cache.tar.xz"
_BESIDE = ("kernels", "benchmarks")  # packages that lie beside nemo_engine in the tree, and inside it when installed
_PLACE = "@CACHE@"  # stands for the cache's folder in a pack
_KEPT = (".json", ".cubin", ".so")  # of Triton's cache: what a launch needs


def hash_of(folders: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of all files of ``folders`` that are sources."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp"):
                digest.update(f"{path.relative_to(folder.parent)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def sources(root: Path = ROOT) -> dict[str, str]:
    """Hashes of what a pack's parts are made of: {"csrc": ..., "kernels": ...}."""
    return {name: hash_of([root / name]) for name in ("csrc", "kernels")}


def triton_hash(key: str) -> str:
    """A short name of ``triton_key()``, which is long."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def is_installed() -> bool:
    """Whether this interpreter finds the whole package without help."""
    try:
        return all(importlib.util.find_spec(f"nemo_engine.{name}") for name in _BESIDE)
    except ImportError:
        return False


def link_packages(root: Path, library: Path | None) -> list[Path]:
    """Put links into the tree in place of an installation; returns those that were made."""
    package, links = root / "nemo_engine", []
    targets = {name: Path("..") / name for name in _BESIDE}
    if library is not None:
        targets[library.name] = Path(os.path.relpath(library, package))
    for name, target in targets.items():
        link = package / name
        if not link.exists():
            link.unlink(missing_ok=True)  # one that leads nowhere
            link.symlink_to(target)
            links.append(link)
    return links


def write_metadata(root: Path, to: Path) -> None:
    """A dist-info in ``to``, so that the version is known where the package is only on the path."""
    match = re.search(r'__version__ = "([^"]+)"', (root / "nemo_engine" / "__init__.py").read_text())
    version = match[1] if match else "0"
    folder = to / f"nemo_engine-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nemo-engine\nVersion: {version}\n")


def pack_cache(cache: Path, to: Path) -> int:
    """Write what launches need of Triton's cache to the archive ``to``; returns the number of compiled kernels."""
    kernels = 0
    with tarfile.open(to, "w:xz", preset=6) as archive:
        for path in sorted(cache.rglob("*")):
            if not path.is_file() or path.suffix not in _KEPT:
                continue
            data = path.read_bytes()
            if path.name.startswith("__grp__"):
                group = json.loads(data)
                children = group["child_paths"]
                group["child_paths"] = {
                    name: f"{_PLACE}/{Path(place).relative_to(cache)}"
                    for name, place in children.items()
                    if Path(name).suffix in _KEPT
                }
                data = json.dumps(group).encode()
            kernels += path.suffix == ".cubin"
            info = tarfile.TarInfo(str(path.relative_to(cache)))
            info.size, info.mode = len(data), 0o755 if path.suffix == ".so" else 0o644
            archive.addfile(info, io.BytesIO(data))
    return kernels


def unpack_cache(archive: Path, to: Path) -> int:
    """The reverse; returns the number of files. What lies in ``to`` already is kept."""
    count = 0
    to.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "r:xz") as tar:
        tar.extractall(to, filter="data")
        count = len(tar.getnames())
    for path in to.glob("*/__grp__*.json"):
        path.write_text(path.read_text().replace(_PLACE, str(to)))
    return count


def read_manifest(pack: Path) -> dict[str, Any] | None:
    """What a pack says of itself; None where there is none that can be read."""
    try:
        manifest = json.loads((pack / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def child_environment(root: Path, scratch: Path, extra: Mapping[str, str] = {}) -> dict[str, str]:
    """The environment of a process that imports the package of ``root``; ``scratch`` holds what only this run needs."""
    path = os.pathsep.join(filter(None, (str(root), str(scratch / "site"), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, **extra}


def library_suffix() -> str:
    """How the name of a compiled module ends for this interpreter."""
    return importlib.machinery.EXTENSION_SUFFIXES[0]


def library_of(pack: Path) -> Path | None:
    """The pack's CUDA library for this interpreter."""
    path = pack / f"_C{library_suffix()}"
    return path if path.is_file() else None


def commit_text(root: Path) -> str:
    """The commit of a checkout, "-dirty" if tracked files are changed; "unknown" without git."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("describe", "--always") if git("ls-files", "--error-unmatch", "setup.py") else None
    if commit is None:
        return "unknown"
    return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no") else commit


def run_python(code: str, environment: Mapping[str, str], seconds: float, *args: str) -> str:
    """What ``code`` prints in a process of its own, or the last line of its error."""
    command: Sequence[str] = [sys.executable, "-c", code, *args]
    try:
        done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"no answer in {seconds:.0f} s"
    return done.stdout.strip() if done.returncode == 0 else (done.stderr.strip().splitlines() or ["failed"])[-1]
