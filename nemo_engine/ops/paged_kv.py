"""The keys and values of a layer, in pages: what attention reads, and what is appended to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PagedKV:
    """One layer's cache. An entry of an FP8 cache means its number times its head's factor."""

    k: Tensor  # (pages, Hk, page_size, D)
    v: Tensor  # the same
    k_scale: Tensor | None = None  # (Hk,) fp32 factors of an FP8 cache; None for 1
    v_scale: Tensor | None = None

    @property
    def num_heads(self) -> int:
        """KV heads."""
        return self.k.shape[1]

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.k.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of both caches."""
        return self.k.dtype

    @property
    def caches(self) -> tuple[Tensor, Tensor]:
        """(k, v)."""
        return self.k, self.v
