"""Lines of results files: where and how each number was measured: machine, versions, commit and command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path


def provenance(*packages: str) -> dict[str, object]:
    """Facts of this run, with the installed versions of ``packages``."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    try:
        describe = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
        commit = describe.stdout.strip() or "not a git checkout"
    except FileNotFoundError:
        commit = "git is not installed"
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "commit": commit,
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
    }


def append_record(path: Path | None, record: Mapping[str, object]) -> None:
    """Add a line to the results file ``path``, if there is one."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
