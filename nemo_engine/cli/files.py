"""Files that flags name: texts that are read, and results that are written, refused by the flag's name before anything
is computed.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


def read_text(flag: str, path: Path) -> str:
    """The UTF-8 text of a file. Raises ``ValueError`` naming flag and file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag} must be text in UTF-8, and {path} is not: {error}") from None
    except OSError as error:
        raise ValueError(f"{flag} {path} cannot be read: {error.strerror}") from None


def check_writable(flag: str, path: Path | None) -> None:
    """Raise ``ValueError`` if ``path`` is given and cannot become a file."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{flag} must be a file, and {path} is a directory")
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {path}: there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{flag} {path} cannot be written: permission denied")


def check_results(json_path: Path | None, plot_path: Path | None) -> None:
    """Refuse what ``--json`` and ``--plot`` could not write in the end.

    ``ImportError`` if a plot needs what is not installed.
    """
    if plot_path is not None and plot_path.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"--plot must end in .png or .svg, got {plot_path}")
    if plot_path is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'nemo-engine[plot]'")
    check_writable("--json", json_path)
    check_writable("--plot", plot_path)
