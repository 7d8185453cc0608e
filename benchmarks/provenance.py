"""Where and how a number was measured: machine, GPU, versions, commit, command and date; and the one way in which it
becomes a line of a file.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

COMMIT = "NEMO_ENGINE_COMMIT"  # in the environment: the commit of a copy of the tree that has no git
_HERE = Path(__file__).resolve()
_NOT_CODE = (":(exclude,top)benchmarks/results", ":(exclude,top,glob)**/*.md")  # a change there changes no number
# An absolute path at the start of a text or of a value in it; not the //host of an address.
_PATH = re.compile(r"""(^|[=,:;"'\[{( ])(/(?!/)[^\s,;"'\]})/]+/[^\s,;"'\]})]*)""")


def provenance(*packages: str) -> dict[str, object]:
    """Facts of this run, with the installed versions of ``packages``. What the machine does not tell is None."""
    return {
        **_machine(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "commit": commit_of(_HERE),
        "command": command_text(sys.argv),
        "date": _date(),
    }


def append_record(path: Path | None, record: Mapping[str, object]) -> None:
    """Add a line to the results file ``path``, if there is one; its folder is made.

    Of absolute paths in the line the names are kept.

    The line is on the disk when this returns, and is written at once: a process that is killed leaves at most one torn
    line, the last.
    """
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            is_torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
            file.write(b"\n" * is_torn + json.dumps(without_folders(dict(record))).encode() + b"\n")
            os.fsync(file.fileno())


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a results file; lines that a killed process left torn are passed over.

    None if there is no such file.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def without_folders(value: Any) -> Any:
    """A text, or all texts in a list or dictionary, with the name of each absolute path in its place: results tell no
    machine's folders.
    """
    if isinstance(value, str):
        return _PATH.sub(lambda match: match[1] + Path(match[2]).name, value)
    if isinstance(value, dict):
        return {name: without_folders(inner) for name, inner in value.items()}
    return [without_folders(inner) for inner in value] if isinstance(value, list | tuple) else value


def command_text(argv: Sequence[str]) -> str:
    """A command line as a shell takes it, without the keys in it and without this machine's folders: of an absolute
    path the name is kept.
    """
    program = Path(argv[0])
    if program.name == "__main__.py":
        words = ["python", "-m", program.parent.name]
    else:
        words = [program.name if program.is_absolute() else argv[0]]
    for before, word in zip(argv, argv[1:]):
        if before == "--api-key":
            word = "KEY"
        elif word.startswith("--api-key="):
            word = "--api-key=KEY"
        words.append(without_folders(word))
    return shlex.join(words)


@cache
def commit_of(file: Path) -> str:
    """The commit of the checkout that tracks ``file``, with ``-dirty`` if code in it is changed; one answer for a
    process' whole life.
    """
    try:
        # A package installed inside another project's checkout is not tracked there.
        if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
            return os.environ.get(COMMIT, "not a git checkout")
        commit = _git(file.parent, "describe", "--always")
        changes = _git(file.parent, "status", "--porcelain", "--untracked-files=no", "--", ":/", *_NOT_CODE)
    except FileNotFoundError:
        return os.environ.get(COMMIT, "git is not installed")
    return f"{commit}-dirty" if changes else str(commit)


def _git(folder: Path, *args: str) -> str | None:
    done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def _date() -> str:
    """When the first facts of this process were asked for, UTC: all results of one run share it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@cache
def _machine() -> dict[str, object]:
    """cores: of the machine; usable_cores: those that this process may use. memory_gib: of the machine.

    GPU: see ``gpu_facts``.
    """
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (AttributeError, OSError, ValueError):
        memory = None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": os.cpu_count(), "usable_cores": usable, "memory_gib": memory, **gpu_facts()}


def gpu_facts(nvml: Any = None) -> dict[str, object]:
    """Name, driver and clocks in MHz (now, and at most) of the first GPU that this process sees, through nvidia-ml-py;
    None each if it cannot be read.
    """
    facts: dict[str, object] = {"gpu": None, "gpu_driver": None, "gpu_clocks_mhz": None}
    try:
        if nvml is None:
            nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        if visible.isdigit():
            device = nvml.nvmlDeviceGetHandleByIndex(int(visible))
        else:  # GPU-... or MIG-...; an empty list hides all
            device = nvml.nvmlDeviceGetHandleByUUID(visible)
        facts["gpu"] = _text(nvml.nvmlDeviceGetName(device))
        facts["gpu_driver"] = _text(nvml.nvmlSystemGetDriverVersion())
        kinds = {"sm": nvml.NVML_CLOCK_SM, "memory": nvml.NVML_CLOCK_MEM}
        clocks = {name: nvml.nvmlDeviceGetClockInfo(device, kind) for name, kind in kinds.items()}
        highest = {f"most_{name}": nvml.nvmlDeviceGetMaxClockInfo(device, kind) for name, kind in kinds.items()}
        facts["gpu_clocks_mhz"] = clocks | highest
    except Exception:  # the library, the driver or the device is missing, or it does not tell this one
        pass
    return facts


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # older versions of the library give bytes
