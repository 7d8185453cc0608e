"""Process groups that end when they should: by their limit, with the run, and also if the run itself is killed.

Standard library only.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

MOST_BYTES = 15 << 20  # of a file that a run leaves
_GRACE_S = 5.0  # to read what a killed process said

# Reads "+group" and "-group" lines; when the writer is gone it kills the groups that are left.
_GUARD = """
import os, signal, sys
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except OSError:
        pass
"""


class Log:
    """One file that all processes' output goes to, cut off at ``MOST_BYTES``."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._lock = threading.Lock()
        self._written = path.stat().st_size

    def write(self, data: bytes) -> None:
        """Add it, as far as there is room."""
        with self._lock:
            kept = data[: max(0, MOST_BYTES - self._written)]
            self._written += len(kept)
            self._file.write(kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class Guard:
    """A process that outlives this one by a moment: whatever groups run when this one is gone, it kills."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD], stdin=subprocess.PIPE, start_new_session=True
        )

    def join(self) -> None:
        """Called in a forked child: its group ends with the process that made this guard.

        The child says so itself, before it becomes another program: its parent may be killed right after the fork.
        """
        self._say(f"+{os.getpid()}")

    def remove(self, group: int) -> None:
        """It has ended."""
        self._say(f"-{group}")

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), f"{line}\n".encode())
        except OSError:
            pass  # it was killed: groups still end by their limits

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Group:
    """A command in a process group of its own, its output in the log, its standard input a pipe."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Log, guard: Guard) -> None:
        self._guard, self._log = guard, log
        log.write(f"$ {' '.join(command)}\n".encode())
        self._process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, bufsize=0, preexec_fn=guard.join,
        )  # fmt: skip
        self._is_open = True
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        while data := self._process.stdout.read(1 << 16):
            self._log.write(data)

    def send(self, line: str) -> None:
        """A line to its standard input, which then ends. A process that is gone already shows by its exit status."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.close()
        except OSError:
            pass

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def end(self) -> int | None:
        """Its exit status, or None if it still ran and was killed. What it started is killed either way."""
        code = self._process.poll()
        self.kill()
        return code

    def kill(self) -> None:
        """End the whole group, and wait until it is gone."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except OSError:
            pass  # nothing of it is left
        self._process.wait()
        self._reader.join(_GRACE_S)
        self._guard.remove(self._process.pid)
