"""``Sequence``: one sequence through a model without an engine, for calibration and verification. It is fed piece by
piece, and every token can have logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_engine.model.nemo import ModelInputs, Nemo, make_kv_cache
from nemo_engine.ops.attention import AttentionMeta, Workspace
from nemo_engine.ops.fused import Sum


class Sequence:
    """Up to ``max_len`` tokens of one request, with a KV cache of its own of ``kv_dtype``."""

    def __init__(self, model: Nemo, max_len: int, page_size: int, kv_dtype: torch.dtype) -> None:
        device = model.weights.embed_tokens.device
        self.model = model
        self.length = 0
        self._page_size = page_size
        num_pages = -(-max_len // page_size)
        # Page 0 is padding, as in the engine. Pages are reversed, so that a kernel that ignores the page table fails.
        self._page_table = torch.arange(num_pages, 0, -1, device=device).unsqueeze(0)
        self.kv_cache = make_kv_cache(model.config, model.weights, num_pages, page_size, kv_dtype)
        self._workspace = Workspace()

    @torch.inference_mode()
    def feed(self, ids: list[int]) -> Tensor:
        """The hidden state after each of ``ids``, as ``logits`` takes it: (T, H) twice, stacked.

        A call with one token computes a decode step.
        """
        device = self._page_table.device
        positions = torch.arange(self.length, self.length + len(ids), device=device)
        self.length += len(ids)
        pages = self._page_table[0, positions // self._page_size]
        meta = AttentionMeta(
            num_decodes=1 if len(ids) == 1 else 0,
            query_start_loc=torch.tensor([0, len(ids)], device=device),
            seq_lens=torch.tensor([self.length], device=device),
            page_table=self._page_table,
            slot_ids=torch.zeros(1, dtype=torch.int64, device=device),
            page_size=self._page_size,
            num_pages=-(-self.length // self._page_size),
            longest=len(ids),
            workspace=self._workspace,
        )
        inputs = ModelInputs(
            torch.tensor(ids, device=device),
            positions,
            pages * self._page_size + positions % self._page_size,
            meta,
        )
        x, residual = self.model.forward(inputs, self.kv_cache)
        return torch.stack((x, torch.zeros_like(x) if residual is None else residual))

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(2, T, H) of ``feed`` -> (T, V) fp32 (fp64 for fp64)."""
        logits = self.model.logits(Sum(*hidden))
        return logits if logits.dtype == torch.float64 else logits.float()
