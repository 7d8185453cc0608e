"""Where and how a number was measured: machine, versions, commit and command, for every line of a results file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
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
