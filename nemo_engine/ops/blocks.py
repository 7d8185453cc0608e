"""FP8 with a scale per block: of 128 by 128 of a weight, of 128 elements of a token (DeepSeek's format)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_engine.ops.linear import SCALE_BLOCK
from nemo_engine.ops.op import Case, Impl, Op, Site, cuda_runs
from nemo_engine.ops.quantize import quantize_tokens

_VECTOR = 8  # elements of an access of the CUDA kernel, 16 bytes


def quantize_token_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    """``quantize_tokens`` of each 128 elements of a token: (T, K) -> (T, K) FP8 and (T, K / 128) fp32, rounded up; fp64
    as there.
    """
    rows, width = x.shape
    blocks = -(-width // SCALE_BLOCK)
    padded = F.pad(x, (0, -width % SCALE_BLOCK))
    values, scales = quantize_tokens(padded.reshape(rows * blocks, SCALE_BLOCK))
    return values.view(rows, blocks * SCALE_BLOCK)[:, :width].contiguous(), scales.view(rows, blocks)


def quantize_weight_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> (N, K) FP8 and (N / 128, K / 128) fp32, rounded up. A block with NaN or infinity gets the scale NaN."""
    rows, width = weight.shape
    padded = F.pad(weight, (0, -width % SCALE_BLOCK, 0, -rows % SCALE_BLOCK))
    blocks = padded.unflatten(1, (-1, SCALE_BLOCK)).unflatten(0, (-1, SCALE_BLOCK)).transpose(1, 2)  # (n, k, 128, 128)
    values, scales = quantize_tokens(blocks.reshape(-1, SCALE_BLOCK * SCALE_BLOCK))
    values = values.view(blocks.shape).transpose(1, 2).reshape(padded.shape)[:rows, :width].contiguous()
    return values, scales.view(blocks.shape[:2])


def _cases() -> Iterator[Case]:
    for rows, width in ((0, 16), (1, 16), (3, 128), (5, 272), (2, 5120)):

        def make(dtype: torch.dtype, rows: int = rows, width: int = width) -> tuple[Any, ...]:
            generator = torch.Generator().manual_seed(rows * width)
            return ((torch.randn(rows, width, generator=generator) * 5).to(dtype),)

        yield Case(f"{rows}x{width}", make)


def _cuda_supports(site: Site) -> str | None:
    widths = (site.hidden_size, site.intermediate_size, site.num_heads * site.head_dim)
    if any(width % _VECTOR for width in widths):
        return f"rows of multiples of {_VECTOR} elements, these have {', '.join(map(str, widths))}"
    return cuda_runs(site)


def _cost(x: Tensor) -> tuple[int, int]:
    return x.nbytes + x.numel() + 4 * x.shape[0] * -(-x.shape[1] // SCALE_BLOCK), 3 * x.numel()


QUANTIZE_TOKEN_BLOCKS = Op(
    "quantize_token_blocks",
    quantize_token_blocks,
    (Impl("cuda", "nemo_engine.ops.cuda.activation:quantize_token_blocks", _cuda_supports),),
    _cases,
    _cost,
    is_fp8=True,
)
