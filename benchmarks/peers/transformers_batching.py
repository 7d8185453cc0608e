"""transformers' continuous batching, ``generate_batch``, its cache sized for what it is given."""

from __future__ import annotations

from importlib.metadata import version

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers_generate import load

_BLOCK = 16


class Peer:
    """dtype: of weights and computation. max_batch_tokens: of a step."""

    def __init__(self, model: str, *, dtype: str = "bfloat16", max_batch_tokens: int = 2048) -> None:
        self._model = load(model, dtype)
        self._max_batch_tokens = max_batch_tokens

    def versions(self) -> dict[str, str]:
        """Of what computes."""
        return {"transformers": version("transformers"), "torch": version("torch")}

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        """Greedy tokens. ``generate_batch`` has one length for all, so prompts of one length are given together, by a manager if they differ."""
        blocks = sum(-(-(len(p) + n) // _BLOCK) + 1 for p, n in zip(prompts, max_tokens))
        on_gpu = torch.cuda.is_available()
        batching = ContinuousBatchingConfig(
            block_size=_BLOCK, num_blocks=blocks, max_batch_tokens=self._max_batch_tokens,
            max_requests_per_batch=len(prompts), use_cuda_graph=on_gpu, use_async_batching=on_gpu,
        )  # fmt: skip
        most = max(max_tokens)
        generation = GenerationConfig(max_new_tokens=most, do_sample=False, eos_token_id=-1, pad_token_id=0)
        if min(max_tokens) == most:
            out = self._model.generate_batch(
                inputs=prompts, generation_config=generation, continuous_batching_config=batching
            )
            in_order = sorted(out.items(), key=lambda item: int(item[0].rsplit("_", 1)[-1]))
            return [list(result.generated_tokens) for _, result in in_order]
        manager = self._model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching
        )
        manager.start()
        try:
            ids = [manager.add_request(p, max_new_tokens=n) for p, n in zip(prompts, max_tokens)]
            found: dict[str, list[int]] = {}
            while len(found) < len(ids):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    found[result.request_id] = list(result.generated_tokens)
        finally:
            manager.stop(block=True)
        return [found[one] for one in ids]

    def close(self) -> None:
        """Free everything."""
        del self._model
