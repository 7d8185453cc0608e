"""``PeerProcess``: our end of a peer's process (see ``worker.py``)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_HERE = Path(__file__).parent
_SETTLE_SECONDS = 5.0  # that a peer is given to come to rest
_LOOK_SECONDS = 0.1
_AT_REST = 0.15  # cores; the kernel counts in hundredths of a second


@dataclass(frozen=True, slots=True)
class PeerKind:
    """module: the file here that adapts it. package: what must be importable. what: a line for people.

    concurrency: the option that limits how many requests run at once.
    """

    module: str
    package: str
    what: str
    concurrency: str


PEERS: dict[str, PeerKind] = {
    "nemo_engine": PeerKind("ours", "nemo_engine", "this engine", "max_num_seqs"),
    "transformers": PeerKind(
        "transformers_generate", "transformers", "transformers generate(), left-padded batches", "batch"
    ),
    "transformers-batching": PeerKind(
        "transformers_batching", "transformers", "transformers continuous batching", "max_requests_per_batch"
    ),
    "vllm": PeerKind("vllm_llm", "vllm", "vLLM, LLM.generate", "max_num_seqs"),
    "sglang": PeerKind("sglang_engine", "sglang", "SGLang, Engine.generate", "max_running_requests"),
    "llama.cpp": PeerKind(
        "llama_cpp_python", "llama_cpp", "llama.cpp by its Python binding, continuous batching", "n_seq"
    ),
}


class PeerError(RuntimeError):
    """A peer failed; the text is its own error."""


def why_missing(name: str, python: str) -> str | None:
    """Why the peer cannot run under ``python``, None if it can be tried."""
    package = PEERS[name].package
    code = f"import importlib.util; raise SystemExit(importlib.util.find_spec({package!r}) is None)"
    try:
        finished = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd="/")
    except OSError as error:
        return f"{python} cannot be run: {error.strerror}"
    return None if finished.returncode == 0 else f"{package} is not installed under {python}"


class WorkerProcess:
    """A program here in a process of its own, which answers a command by a line of JSON each.

    Use it as a context manager.

    It has a session of its own, so that the processes it starts end with it. ``timeout``: seconds that it may take to
    answer, None for any time.
    ``log``: a file to which what it printed is added in the end. Raises ``PeerError`` with the program's own error.
    """

    def __init__(
        self, name: str, python: str, *program: str, log: Path | None = None, timeout: float | None = None
    ) -> None:
        self.name = name
        self._timeout, self._log_path = timeout, log
        self._log = tempfile.TemporaryFile()
        command = [python, str(_HERE / program[0]), *program[1:]]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, cwd="/",
            start_new_session=True,
        )  # fmt: skip

    def close(self) -> None:
        """End the process and those that it started."""
        if self._log.closed:
            return
        assert self._process.stdin is not None and self._process.stdout is not None
        if self._process.poll() is None:
            try:
                self._process.stdin.write('{"do": "stop"}\n')
                self._process.stdin.close()
                self._process.wait(20)
            except (OSError, ValueError, subprocess.TimeoutExpired):
                pass
        self._kill()
        self._process.wait()
        self._process.stdout.close()
        if self._log_path is not None:
            self._log.seek(0)
            with self._log_path.open("ab") as file:
                file.write(f"==== {self.name}\n".encode() + self._log.read())
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer to a command, a line of JSON each."""
        assert self._process.stdin is not None and self._process.stdout is not None
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            self._kill()

        timer = None if self._timeout is None else threading.Timer(self._timeout, end)
        if timer is not None:
            timer.start()
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        finally:
            if timer is not None:
                timer.cancel()
        if is_late.is_set():
            raise PeerError(f"it gave no answer to {command['do']!r} within {self._timeout:g} s")
        if not line:
            raise PeerError(f"its process ended with status {self._process.wait()}{self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise PeerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        """The end of what it printed."""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - 400))
        words = " ".join(self._log.read().decode("utf-8", "replace").split())
        self._log.seek(0, os.SEEK_END)
        return f", after ...{words[-300:]}" if words else ""

    def _kill(self) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


class PeerProcess(WorkerProcess):
    """A peer with ``model`` loaded (see ``worker.py``)."""

    def __init__(
        self,
        name: str,
        model: str,
        options: dict[str, Any] | None = None,
        python: str = sys.executable,
        log: Path | None = None,
        timeout: float | None = None,
    ) -> None:
        super().__init__(name, python, "worker.py", PEERS[name].module, log=log, timeout=timeout)
        self.idle_cores = 0.0  # that it still used when it was last waited for
        try:
            self.started = self.ask(do="start", model=model, options=options or {})
        except BaseException:
            self.close()
            raise
        self.versions: dict[str, str] = self.started["versions"]

    def generate(
        self, prompts: Sequence[Sequence[int]], max_tokens: Sequence[int], *, keep: bool = False
    ) -> tuple[float, list[list[int]]]:
        """(seconds, greedy tokens of every prompt).

        With ``keep`` what is in the prefix cache stays there for the next call.

        Returns when the peer's processes rest: vLLM's worker looks for more work for a second, at the cost of whoever
        is measured next.
        """
        answer = self.ask(do="generate", prompts=prompts, max_tokens=max_tokens, keep=keep)
        if not keep:
            self.idle_cores = self._settle()
        return answer["seconds"], answer["outputs"]

    def _settle(self) -> float:
        """Wait until the peer's processes use next to nothing, for at most so long; returns how many cores they use
        then.
        """
        ticks = os.sysconf("SC_CLK_TCK")
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            before, began = self._cpu_ticks(), time.monotonic()
            time.sleep(_LOOK_SECONDS)
            cores = (self._cpu_ticks() - before) / ticks / (time.monotonic() - began)
            if cores <= _AT_REST or time.monotonic() > deadline:
                return cores

    def _cpu_ticks(self) -> int:
        """CPU time of the processes of its group so far; 0 where there is no /proc."""
        total = 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            if int(fields[2]) == self._process.pid:
                total += int(fields[11]) + int(fields[12])
        return total
