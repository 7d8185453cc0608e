"""The forward pass without an engine: all prompts in one step, over pages in shuffled order."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_engine.model.nemo import ModelInputs, Nemo
from nemo_engine.ops.attention import AttentionMeta
from nemo_engine.ops.paged_kv import PagedKV

PAGE = 16


@torch.inference_mode()
def our_logits(model: Nemo, prompts: list[list[int]], kv_dtype: torch.dtype | None = None) -> list[Tensor]:
    """Logits of every position of several prompts computed in one step, their pages shuffled."""
    config, dtype = model.config, kv_dtype or model.weights.embed_tokens.dtype
    counts = [-(-len(prompt) // PAGE) for prompt in prompts]
    shape = (sum(counts) + 3, config.num_kv_heads, PAGE, config.head_dim)
    cache = [
        PagedKV(*(torch.full(shape, torch.nan).to(dtype) for _ in "kv"), layer.k_scale, layer.v_scale)
        for layer in model.weights.layers
    ]
    order = (1 + torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(1))).tolist()
    table = torch.zeros(len(prompts), max(counts), dtype=torch.int64)
    for row, count in enumerate(counts):
        table[row, :count] = torch.tensor([order.pop() for _ in range(count)])
    own = [torch.arange(len(prompt)) for prompt in prompts]
    mapping = torch.cat([table[row, at // PAGE] * PAGE + at % PAGE for row, at in enumerate(own)])
    lens = torch.tensor([len(prompt) for prompt in prompts])
    starts = torch.cat([lens.new_zeros(1), lens.cumsum(0)])
    meta = AttentionMeta(0, starts, lens, table, torch.arange(len(prompts)), PAGE, max(counts), int(lens.max()))
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    hidden = model.forward(ModelInputs(ids, torch.cat(own), mapping, meta), cache)
    return list(model.logits(hidden).split(lens.tolist()))
