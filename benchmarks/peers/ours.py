"""nemo_engine itself, through ``Engine.generate``."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from nemo_engine import Engine, SamplingParams


class Peer:
    """Options are those of ``Engine``."""

    def __init__(self, model: str, **options: Any) -> None:
        self._engine = Engine(model, skip_tokenizer_init=True, **options)

    def versions(self) -> dict[str, str]:
        """The versions of what computes."""
        return {"nemo_engine": version("nemo-engine"), "torch": version("torch")}

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        """Greedy tokens of every prompt."""
        params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in max_tokens]
        outputs = self._engine.generate([{"prompt_token_ids": ids} for ids in prompts], params)
        return [output.outputs[0].token_ids for output in outputs]

    def forget(self) -> None:
        """Empty the prefix cache."""
        self._engine.reset_prefix_cache()

    def close(self) -> None:
        """Free everything."""
        self._engine.close()
