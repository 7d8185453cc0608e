"""The rows of the embeddings that a step's tokens name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_engine.ops.op import Case, Impl, Op, Site, cpu_runs


def embed(table: Tensor, ids: Tensor) -> Tensor:
    """``table[ids]``. table: (V, H), ids: (T,) int64, each below V -> (T, H)."""
    return table[ids]


def _any(site: Site) -> str | None:
    return None


def _cases() -> Iterator[Case]:
    for tokens, vocab_size, width in ((0, 5, 16), (1, 7, 24), (70, 300, 136)):

        def make(dtype: torch.dtype, shape: tuple[int, int, int] = (tokens, vocab_size, width)) -> tuple[Any, ...]:
            generator = torch.Generator().manual_seed(shape[0])
            table = torch.randn(shape[1:], generator=generator).to(dtype)
            return table, torch.randint(0, shape[1], (shape[0],), generator=generator)

        yield Case(f"{tokens}x{width} of {vocab_size}", make)


def _cost(table: Tensor, ids: Tensor) -> tuple[int, int]:
    return (2 * table.shape[1] * table.itemsize + ids.itemsize) * len(ids), 0


EMBED = Op(
    "embed",
    embed,
    (
        Impl("cpu", "nemo_engine.ops.cpu.compiled:embed", cpu_runs),
        Impl("gather", "nemo_engine.ops.embed:embed", _any),
    ),
    _cases,
    _cost,
)
