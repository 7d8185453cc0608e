"""``PeerProcess``: our end of a peer's process (see ``worker.py``)."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class PeerKind:
    """module: the file here that adapts it. package: what must be importable. what: a line for people."""

    module: str
    package: str
    what: str


PEERS: dict[str, PeerKind] = {
    "nemo_engine": PeerKind("ours", "nemo_engine", "this engine"),
    "transformers": PeerKind("transformers_generate", "transformers", "transformers generate(), one left-padded batch"),
    "transformers-batching": PeerKind("transformers_batching", "transformers", "transformers continuous batching"),
    "vllm": PeerKind("vllm_llm", "vllm", "vLLM, LLM.generate"),
    "sglang": PeerKind("sglang_engine", "sglang", "SGLang, Engine.generate"),
    "llama.cpp": PeerKind("llama_cpp_python", "llama_cpp", "llama.cpp's Python binding, one sequence at a time"),
}


class PeerError(RuntimeError):
    """A peer failed; the text is its own error."""


def why_missing(name: str, python: str) -> str | None:
    """Why the peer cannot run under ``python``, None if it can be tried."""
    package = PEERS[name].package
    code = f"import importlib.util; raise SystemExit(importlib.util.find_spec({package!r}) is None)"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError as error:
        return f"{python} cannot be run: {error.strerror}"
    return None if found.returncode == 0 else f"{package} is not installed under {python}"


class PeerProcess:
    """A peer with ``model`` loaded. Use it as a context manager. Raises ``PeerError`` with the peer's own error."""

    def __init__(
        self,
        name: str,
        model: str,
        options: dict[str, Any] | None = None,
        python: str = sys.executable,
        log: Path | None = None,
    ) -> None:
        self.name = name
        self._log = (log or Path("/dev/null")).open("ab")
        command = [python, str(_HERE / "worker.py"), PEERS[name].module]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, cwd="/"
        )
        self.started = self._ask({"do": "start", "model": model, "options": options or {}})
        self.versions: dict[str, str] = self.started["versions"]

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> tuple[float, list[list[int]]]:
        """(seconds, greedy tokens of every prompt)."""
        answer = self._ask({"do": "generate", "prompts": prompts, "max_tokens": max_tokens})
        return answer["seconds"], answer["outputs"]

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            try:
                self._process.stdin.write('{"do": "stop"}\n')
                self._process.stdin.close()
                self._process.wait(20)
            except (OSError, subprocess.TimeoutExpired):
                self._process.kill()
                self._process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise PeerError(f"its process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise PeerError(answer["error"])
        return answer
