"""An engine for ``benchmarks/peers/worker.py`` that does what its options say, in tests of what is done about it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Peer:
    """fails: "start", "die", "count", "answers", "error", "hang", "child" or "generate:N", at call N. slow_s: seconds
    of a call.

    calls: a file to which every call is written. The answer to a prompt is its last id, again and again.
    """

    def __init__(self, model: str, *, fails: str = "", slow_s: float = 0.0, calls: str = "", most: int = 0) -> None:
        self._fails, self._slow, self._calls, self._count = fails, slow_s, calls, 0
        self._note(f"start {Path(model).name} {most}")
        if fails == "start":
            raise ValueError("this one\ndoes not start")
        if fails == "child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            self._note(f"child {child.pid}")

    def versions(self) -> dict[str, str]:
        return {"fake": "1.2"}

    def prepare(self, prompts: list[list[int]], max_tokens: list[int]) -> None:
        self._note(f"prepare {len(prompts)}")
        time.sleep(self._slow)

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> Any:
        self._note(f"generate {prompts}")
        self._count += 1
        time.sleep(self._slow)
        if self._fails in ("error", f"generate:{self._count}"):
            raise RuntimeError("out of\nmemory")
        if self._fails == "die":
            print("something terrible", file=sys.stderr, flush=True)
            os._exit(7)
        if self._fails == "hang":
            time.sleep(600)
        print("what an engine prints must not be taken for an answer")
        answers = [[prompt[-1]] * count for prompt, count in zip(prompts, max_tokens)]
        if self._fails == "count":
            answers[-1].pop()
        return answers[:-1] if self._fails == "answers" else answers

    def forget(self) -> None:
        self._note("forget")

    def close(self) -> None:
        self._note("close")

    def _note(self, text: str) -> None:
        if self._calls:
            with open(self._calls, "a") as file:
                file.write(text + "\n")
