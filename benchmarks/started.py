"""Servers that a benchmark starts by a command, waits for, and ends."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from nemo_engine.benchmarks.http_stream import HttpError
from nemo_engine.benchmarks.load import Server


class StartedServer:
    """A server's process, in a session of its own. Use it as a context manager.

    Its output goes to ``log`` in the end, if that is given.
    """

    def __init__(self, server: Server, command: str, log: Path | None) -> None:
        self._server, self._log_path = server, log
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True
        )

    def wait(self, timeout: float) -> None:
        """Until it answers; ``RuntimeError`` with its last words if it ends, or does not within ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        last = ""
        while self._process.poll() is None:
            try:
                asyncio.run(asyncio.wait_for(self._server.first_model(), 5))
                return
            except (HttpError, OSError, TimeoutError) as error:
                last = str(error)
            if time.monotonic() > deadline:
                raise RuntimeError(f"it does not answer after {timeout:g} s: {last}")
            time.sleep(0.2)
        raise RuntimeError(f"it ended with status {self._process.returncode}{self._last_words()}")

    def _last_words(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 400))
        words = " ".join(self._log.read().decode("utf-8", "replace").split())
        return f", after ...{words[-300:]}" if words else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        self._process.wait()
        if self._log_path is not None:
            self._log.seek(0)
            with self._log_path.open("ab") as file:
                file.write(f"==== {self._server.name}\n".encode() + self._log.read())
        self._log.close()
