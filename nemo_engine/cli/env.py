"""``nemo-engine env``: what a report of a fault needs to say of the machine and the packages, without secrets; and
``--version``.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import runpy
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import Any, NoReturn

from nemo_engine import __version__

_NOT_EXTRAS = {"test", "dev", "docs", "nvcc"}
# Variables that change what is computed or found; their values hold no secrets.
_SHOWN = (
    "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "MKL_NUM_THREADS", "NEMO_ENGINE_CUDA", "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF", "TRITON_INTERPRET",
)  # fmt: skip
_SECRET = ("HF_TOKEN", "NEMO_ENGINE_API_KEY")  # of which it is said that they are set


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    return commands.add_parser(
        "env",
        help="show versions, GPU, CPU and extras, for a report of a fault",
        description="Show versions, GPU, CPU, quota and extras: what a report of a fault needs. Keys and paths are not "
        "shown.",
        allow_abbrev=False,
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    rows = [*_software(), *_machine(), *_extras(), ("variables", ", ".join(_variables()) or "none of interest")]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))
    return 0


class Version(argparse.Action):
    """``--version``: of this engine on the first line, of what it runs on on the second."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"nemo-engine {__version__}\ntorch {version('torch')}, CUDA {torch_cuda()}, commit {_commit()}")
        parser.exit()


def version(package: str) -> str:
    """The installed version of ``package``, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def torch_cuda() -> str:
    """The version of CUDA that torch was built for, or "none"; torch is not imported."""
    spec = util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    return str((file and file.is_file() and runpy.run_path(str(file)).get("cuda")) or "none")


def _commit() -> str:
    from nemo_engine.benchmarks import provenance

    return str(provenance.commit_of(Path(provenance.__file__).resolve()))


def _software() -> Iterator[tuple[str, str]]:
    yield "nemo-engine", f"{__version__}, commit {_commit()}"
    built = {name: util.find_spec(f"nemo_engine.{name}") is not None for name in ("_cpu", "_C")}
    yield "kernels", ", ".join(f"{name} {'built' if is_built else 'not built'}" for name, is_built in built.items())
    yield "python", f"{platform.python_version()} ({sys.implementation.name})"
    yield "system", platform.platform()
    yield "torch", f"{version('torch')}, for CUDA {torch_cuda()}"
    for name in ("triton", "numpy", "safetensors", "tokenizers", "mistral-common", "huggingface_hub"):
        yield name, version(name)


def _machine() -> Iterator[tuple[str, str]]:
    import torch

    from nemo_engine.benchmarks.provenance import provenance
    from nemo_engine.runner.threads import allowed_cores

    facts = provenance()
    yield "driver", str(facts["gpu_driver"] or "none, or nvidia-ml-py is not installed")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / (1 << 30):.1f} GiB"
        yield f"GPU {index}", f"{gpu.name}, {memory}, compute capability {gpu.major}.{gpu.minor}"
    if not count:
        yield "GPU", str(facts["gpu"] or "none") + (", which torch does not see" if facts["gpu"] else "")
    yield "CPU", f"{facts['cpu']}, {torch.backends.cpu.get_cpu_capability()}"
    affinity = f"{facts['cores']} of the machine, {facts['usable_cores']} by affinity"
    yield "cores", f"{affinity}, {allowed_cores()} by affinity and quota"
    yield "memory", f"{facts['memory_gib']} GiB"


def _extras() -> Iterator[tuple[str, str]]:
    """Each extra of this package, and what of it is missing here."""
    packages: dict[str, list[str]] = {}
    try:
        required = metadata.requires("nemo-engine") or []
    except metadata.PackageNotFoundError:
        required = []
    for text in required:
        extra = re.search(r"extra == [\"']([\w-]+)[\"']", text)
        system = re.search(r"platform_system (==|!=) [\"'](\w+)[\"']", text)
        is_for_here = system is None or (system[2] == platform.system()) == (system[1] == "==")
        name = re.match(r"[\w.-]+", text)
        if extra and name and is_for_here and extra[1] not in _NOT_EXTRAS and name[0] != "nemo-engine":
            packages.setdefault(extra[1], []).append(name[0])
    for extra_name, names in packages.items():
        missing = [name for name in names if version(name) == "not installed"]
        present = ", ".join(f"{name} {version(name)}" for name in names if name not in missing)
        told = f"missing {', '.join(missing)}: pip install 'nemo-engine[{extra_name}]'" if missing else ""
        yield f"[{extra_name}]", "; ".join(part for part in (told, present) if part)


def _variables() -> Iterator[str]:
    for name in _SHOWN:
        if name in os.environ:
            yield f"{name}={os.environ[name]}"
    for name in _SECRET:
        if name in os.environ:
            yield f"{name} is set"
