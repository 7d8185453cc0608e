"""bf16 products on a CPU by torch: by oneDNN, whose weights are kept in the order in which it reads them; in fp32 where
it has no such products.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_engine.ops.op import Site, cpu_runs

# oneDNN compiles a product for every number of rows that it sees: milliseconds, and memory. Prompts have any number, so
# it is rounded up.
_EVERY_COUNT = 64
_ROWS = 32

# Without bf16 products torch multiplies number by number: from so many rows on it costs less to widen the weight, 4 MiB
# at a time.
WIDENED_FROM = 8
_WIDENED = 1 << 20  # numbers at once, so that they stay in a cache


def supports(site: Site) -> str | None:
    """What the packed order needs: bf16 on a CPU for which oneDNN has bf16 products."""
    return _is_bf16_on_a_cpu(site) or (None if _has_products() else "oneDNN has no bf16 products on this CPU")


def supports_widened(site: Site) -> str | None:
    """What ``linear_widened`` is for: bf16 on a CPU for which oneDNN has no bf16 products."""
    return _is_bf16_on_a_cpu(site) or ("oneDNN has bf16 products on this CPU" if _has_products() else None)


def supports_compiled(site: Site) -> str | None:
    """What the products of csrc/cpu need: bf16 on a CPU for which oneDNN has no faster ones, whole pairs in a row, and
    the compiled library.
    """
    widths = (site.hidden_size, site.intermediate_size, site.num_heads * site.head_dim)
    if any(width % 2 for width in widths):
        return f"rows of whole pairs, these have {', '.join(map(str, widths))}"
    reason = _is_bf16_on_a_cpu(site) or cpu_runs(site)
    if reason is None and _has_products() and _has_matrix_units():
        return "oneDNN multiplies matrices at once on this CPU"
    return reason


def _is_bf16_on_a_cpu(site: Site) -> str | None:
    if site.device_type != "cpu":
        return "made for the CPU"
    if site.dtype != torch.bfloat16:
        return f"multiplies bfloat16, the model is {str(site.dtype).removeprefix('torch.')}"
    return None


def _has_products() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _has_matrix_units() -> bool:
    """Whether an instruction of this CPU multiplies matrices: AMX, or what ARM's cores with bf16 have."""
    return platform.machine() not in ("x86_64", "AMD64") or bool(torch.cpu._is_amx_tile_supported())


def pack_weight(weight: Tensor) -> Tensor:
    """(N, K) bf16, copied into an order that only ``linear`` reads; the bytes are the same, but for N and K that oneDNN
    rounds up.
    """
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


def linear_widened(x: Tensor, weight: Tensor) -> Tensor:
    """See ``linear.linear``; many rows are multiplied in fp32 where oneDNN has no bf16 products, and the result is
    rounded once.
    """
    if x.shape[0] < WIDENED_FROM or _has_products():
        return F.linear(x, weight)
    wide = x.float()
    y = x.new_empty(x.shape[0], weight.shape[0])
    outputs = max(1, _WIDENED // weight.shape[1])
    for start in range(0, weight.shape[0], outputs):
        y[:, start : start + outputs] = F.linear(wide, weight[start : start + outputs].float())
    return y
