"""SGLang through ``Engine.generate``."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import sglang


class Peer:
    """Options are those of ``sglang.Engine``; its prefix cache is on, as by default, and emptied between rounds."""

    def __init__(self, model: str, **options: Any) -> None:
        defaults = {"dtype": "bfloat16", "skip_tokenizer_init": True}
        self._engine = sglang.Engine(model_path=model, **(defaults | options))

    def versions(self) -> dict[str, str]:
        """The versions of what computes."""
        return {"sglang": version("sglang"), "torch": version("torch")}

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        """Greedy tokens of every prompt, all at once."""
        params = [{"temperature": 0.0, "max_new_tokens": n, "ignore_eos": True} for n in max_tokens]
        outputs = self._engine.generate(input_ids=prompts, sampling_params=params)
        return [list(output["output_ids"]) for output in outputs]

    def forget(self) -> None:
        """Empty the prefix cache."""
        self._engine.flush_cache()

    def close(self) -> None:
        """Free everything."""
        self._engine.shutdown()
