"""bf16 products on a CPU by oneDNN, whose weights are kept in the order in which it reads them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_engine.ops.op import Site

# oneDNN compiles a product for every number of rows that it sees: milliseconds, and memory. Prompts have any number, so it is rounded up.
_EVERY_COUNT = 64
_ROWS = 32


def supports(site: Site) -> str | None:
    """What the packed order needs: bf16 on a CPU for which oneDNN has bf16 products."""
    if site.device_type != "cpu":
        return "made for the CPU"
    if site.dtype != torch.bfloat16:
        return f"packs bfloat16, the model is {str(site.dtype).removeprefix('torch.')}"
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return "oneDNN has no bf16 products on this CPU"
    return None


def pack_weight(weight: Tensor) -> Tensor:
    """(N, K) bf16, copied into an order that only ``linear`` reads; the bytes are the same, but for N and K that oneDNN rounds up."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See ``linear.linear``; ``weight`` may be packed."""
    if weight.layout == torch.strided:
        return F.linear(x, weight)
    rows = x.shape[0]
    if rows > _EVERY_COUNT and rows % _ROWS:
        x = F.pad(x, (0, 0, 0, -rows % _ROWS))
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product[:rows]
