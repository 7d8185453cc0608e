"""transformers' ``generate()``: one left-padded batch, or several of ``batch`` prompts."""

from __future__ import annotations

from importlib.metadata import version

import torch
from transformers import MistralForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()


def load(model: str, dtype: str, attn_implementation: str) -> torch.nn.Module:
    """The checkpoint in transformers, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = MistralForCausalLM.from_pretrained(
        model, dtype=getattr(torch, dtype), attn_implementation=attn_implementation
    )
    return loaded.eval().to(device)


class Peer:
    """dtype: of weights and computation. batch: prompts per call, None for all. attn_implementation: "sdpa", the
    fastest on a CPU, "eager" and so on.
    """

    def __init__(
        self, model: str, *, dtype: str = "bfloat16", batch: int | None = None, attn_implementation: str = "sdpa"
    ) -> None:
        self._model = load(model, dtype, attn_implementation)
        self._batch = batch

    def versions(self) -> dict[str, str]:
        """The versions of what computes."""
        return {"transformers": version("transformers"), "torch": version("torch")}

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        """Greedy tokens.

        A batch runs as long as its longest answer; the shorter ones are cut afterwards, as users do.
        """
        size = self._batch or max(1, len(prompts))
        outputs: list[list[int]] = []
        for first in range(0, len(prompts), size):
            some, limits = prompts[first : first + size], max_tokens[first : first + size]
            longest = max(map(len, some))
            ids = torch.tensor([[0] * (longest - len(p)) + p for p in some], device=self._model.device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in some], device=self._model.device)
            with torch.inference_mode():
                out = self._model.generate(
                    input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max(limits),
                    min_new_tokens=max(limits), pad_token_id=0, eos_token_id=None,
                )  # fmt: skip
            outputs += [row[:count] for row, count in zip(out[:, longest:].tolist(), limits)]
        return outputs

    def close(self) -> None:
        """Free everything."""
        del self._model
