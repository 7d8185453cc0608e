"""transformers' continuous batching: its manager, with a cache sized for what it is given."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers_generate import load

_PAGE = 16
_HAS_PAGE_SIZE = "page_size" in inspect.signature(ContinuousBatchingConfig).parameters  # from 5.17 on


class Peer:
    """dtype: of weights and computation. max_batch_tokens: of a step. max_requests_per_batch: None for as many as there
    are prompts.

    attn_implementation: "sdpa", "eager" and so on.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "bfloat16",
        max_batch_tokens: int = 2048,
        max_requests_per_batch: int | None = None,
        attn_implementation: str = "sdpa",
    ) -> None:
        self._model = load(model, dtype, attn_implementation)
        self._max_batch_tokens, self._most = max_batch_tokens, max_requests_per_batch
        self._manager: Any = None
        self._holds = 0

    def versions(self) -> dict[str, str]:
        """The versions of what computes."""
        return {"transformers": version("transformers"), "torch": version("torch")}

    def prepare(self, prompts: list[list[int]], max_tokens: list[int]) -> None:
        """Have a started manager whose cache holds what runs at once.

        Left to itself, it would take its size from the machine's memory.
        """
        num_at_once = min(self._most or len(prompts), len(prompts))
        pages = sorted((-(-(len(p) + n) // _PAGE) + 1 for p, n in zip(prompts, max_tokens)), reverse=True)
        needed = sum(pages[:num_at_once])
        if self._manager is not None and needed <= self._holds:
            return
        self.forget()
        on_gpu = torch.cuda.is_available()
        batching = ContinuousBatchingConfig(
            **{"page_size" if _HAS_PAGE_SIZE else "block_size": _PAGE}, num_blocks=needed,
            max_batch_tokens=self._max_batch_tokens, max_requests_per_batch=num_at_once, use_cuda_graph=on_gpu,
            use_async_batching=on_gpu,
        )  # fmt: skip
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        manager = self._model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching
        )
        with torch.inference_mode():  # its thread takes this over
            if on_gpu:
                manager.warmup()
            manager.start()
        self._manager, self._holds = manager, needed

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        """Greedy tokens of every prompt, each of its own length."""
        ids = [self._manager.add_request(p, max_new_tokens=n) for p, n in zip(prompts, max_tokens)]
        outputs: dict[str, list[int]] = {}
        while len(outputs) < len(ids):
            result = self._manager.get_result(timeout=1)
            if result is None:
                if not self._manager.is_running():
                    raise RuntimeError("the manager's thread has ended; its error is in the log")
                continue
            if result.error is not None:
                raise RuntimeError(f"a request failed: {result.error}")
            if result.is_finished():
                outputs[result.request_id] = list(result.generated_tokens)
        return [outputs[request_id] for request_id in ids]

    def forget(self) -> None:
        """End the manager: its cache goes with it, and its thread would wake ten times a second."""
        if self._manager is not None:
            self._manager.stop(block=True)
        self._manager, self._holds = None, 0

    def close(self) -> None:
        """Free everything."""
        self.forget()
        del self._model
