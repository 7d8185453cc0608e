"""llama.cpp through its Python binding, on a GGUF file: one sequence after another, for the binding batches none."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama_cpp import Llama


class Peer:
    """gguf: the converted checkpoint, None for the only .gguf in its folder. Further options are those of ``llama_cpp.Llama``."""

    def __init__(self, model: str, *, gguf: str | None = None, context: int = 4096, **options: Any) -> None:
        if gguf is None:
            found = sorted(Path(model).glob("*.gguf"))
            if len(found) != 1:
                raise FileNotFoundError(f"{model} holds {len(found)} .gguf files, and gguf= names none")
            gguf = str(found[0])
        threads = len(os.sched_getaffinity(0))
        defaults = {
            "n_ctx": context,
            "n_threads": threads,
            "n_threads_batch": threads,
            "verbose": False,
            "n_gpu_layers": -1,
        }
        self._llama = Llama(gguf, **(defaults | options))

    def versions(self) -> dict[str, str]:
        """Of what computes."""
        return {"llama-cpp-python": version("llama-cpp-python")}

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        """Greedy tokens of every prompt, one after another."""
        outputs = []
        for ids, count in zip(prompts, max_tokens):
            self._llama.reset()
            tokens = self._llama.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
            outputs.append([next(tokens) for _ in range(count)])
        return outputs

    def close(self) -> None:
        """Free everything."""
        self._llama.close()
