"""Paged attention by FlashAttention, whichever is installed: FlashAttention 3 (``flash_attn_interface``) on Hopper, or
FlashAttention 2 (``flash_attn``), the package on the index, whose pages hold 256 tokens or a multiple.

Whether an installed module can be called is read from its functions' signatures.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_engine.ops.attention import AttentionMeta
from nemo_engine.ops.paged_kv import PagedKV

_HOPPER = (9, 0)
_MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Library:
    """One FlashAttention. ``calls``: the functions that are called, and the arguments that these must take by name."""

    title: str
    module: str
    calls: Mapping[str, tuple[str, ...]]

    def why_not(self, capability: tuple[int, int] | None, page_size: int) -> str | None:
        """Why it cannot serve pages of this size on such a GPU, or is not there; None if it can."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.title} ({self.module}) is not installed"
        if self is FLASH_ATTENTION_3 and capability not in (None, _HOPPER):
            return f"{self.title} is for compute capability 9.0, Hopper, this is {capability}"
        if self is FLASH_ATTENTION_2 and capability is not None and capability < (8, 0):
            return f"{self.title} needs an NVIDIA GPU of compute capability 8.0, this is {capability}"
        if self is FLASH_ATTENTION_2 and page_size % 256:
            return f"{self.title} reads pages of 256 tokens and multiples, these are of {page_size}: set page_size=256"
        try:
            module = importlib.import_module(self.module)
        except Exception as error:  # such as one that was built for another torch
            return f"{self.title} ({self.module}) cannot be imported: {error}"
        for name, wanted in self.calls.items():
            function = getattr(module, name, None)
            if function is None:
                return f"the installed {self.module} has no {name}"
            known = inspect.signature(function).parameters
            absent = [argument for argument in wanted if argument not in known]
            if absent:
                return f"{name} of the installed {self.module} does not take {', '.join(absent)}"
        return None


FLASH_ATTENTION_3 = Library(
    "FlashAttention 3",
    "flash_attn_interface",
    {
        "flash_attn_with_kvcache": (
            *("q", "k_cache", "v_cache", "cache_seqlens", "page_table", "cu_seqlens_q", "max_seqlen_q"),
            *("softmax_scale", "causal"),
        )
    },
)
FLASH_ATTENTION_2 = Library(
    "FlashAttention 2",
    "flash_attn",
    {
        "flash_attn_with_kvcache": (
            *("q", "k_cache", "v_cache", "cache_seqlens", "block_table", "softmax_scale", "causal"),
        ),
        "flash_attn_varlen_func": (
            *("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale"),
            *("causal", "block_table"),
        ),
    },
)


@functools.cache
def choose(capability: tuple[int, int] | None, page_size: int) -> Library | str:
    """The library that serves pages of ``page_size`` tokens, or why none does. ``capability``: the GPU's."""
    reasons = []
    for library in (FLASH_ATTENTION_3, FLASH_ATTENTION_2):
        reason = library.why_not(capability, page_size)
        if reason is None:
            return library
        reasons.append(reason)
    return "; ".join(reasons)


def why_not_heads(num_heads: int, num_kv_heads: int, head_dim: int) -> str | None:
    """Why neither reads heads like these."""
    if head_dim > _MAX_HEAD_DIM or head_dim % 8:
        return f"head_dim must be a multiple of 8 and at most {_MAX_HEAD_DIM}, this is {head_dim}"
    if num_heads % num_kv_heads:
        return f"query heads must be a multiple of KV heads, these are {num_heads} and {num_kv_heads}"
    return None


def describe(capability: tuple[int, int] | None, page_size: int) -> str:
    """The library that is called, with its version where the module tells it."""
    library = choose(capability, page_size)
    if isinstance(library, str):
        return library
    version = getattr(importlib.import_module(library.module), "__version__", None)
    return f"{library.title} ({library.module}{f' {version}' if version else ''})"


def paged_attention(q: Tensor, kv: PagedKV, meta: AttentionMeta, scale: float) -> Tensor:
    """``paged_attention``: one call for the decode rows, one for the others. Not for FP8 caches."""
    assert kv.k_scale is None and kv.v_scale is None and kv.dtype == q.dtype, (kv.dtype, q.dtype)
    library = choose(torch.cuda.get_device_capability(q.device) if q.is_cuda else None, meta.page_size)
    assert isinstance(library, Library), library
    flash = importlib.import_module(library.module)
    serve = _paged_attention_3 if library is FLASH_ATTENTION_3 else _paged_attention_2
    # Its pages are (tokens, heads, D), ours (heads, tokens, D): it takes strides.
    return serve(flash, q, kv.k.transpose(1, 2), kv.v.transpose(1, 2), meta, {"softmax_scale": scale, "causal": True})


def _indices(meta: AttentionMeta) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """In int32: the rows' pages (R, P), their lengths (R,), and where queries and keys of the rows after the decodes
    begin (R - decodes + 1,); and the first query of the latter, for which the host waits if decode rows may be empty.
    """

    def make() -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        decodes = meta.num_decodes
        first = decodes if meta.max_queries is None else int(meta.query_start_loc[decodes])
        key_starts = torch.nn.functional.pad(meta.seq_lens[decodes:].cumsum(0), (1, 0))
        query_starts = meta.query_start_loc[decodes:] - first
        pages, lens, starts, ends = (x.to(torch.int32) for x in (meta.pages, meta.seq_lens, query_starts, key_starts))
        return pages, lens, starts, ends, first

    indices: tuple[Tensor, Tensor, Tensor, Tensor, int] = meta.once("flash_attn", make)
    return indices


def _paged_attention_3(flash: Any, q: Tensor, k: Tensor, v: Tensor, meta: AttentionMeta, how: dict[str, Any]) -> Tensor:
    pages, lens, query_starts, _, first = _indices(meta)
    decodes, out = meta.num_decodes, torch.empty(q.shape, dtype=q.dtype, device=q.device)
    call = flash.flash_attn_with_kvcache
    if decodes:
        out[:decodes] = call(
            q[:decodes].unsqueeze(1), k, v, cache_seqlens=lens[:decodes], page_table=pages[:decodes], **how
        ).squeeze(1)
    if decodes < len(lens):
        out[first:] = call(
            q[first:], k, v, cache_seqlens=lens[decodes:], page_table=pages[decodes:], cu_seqlens_q=query_starts,
            max_seqlen_q=meta.longest, **how,
        )  # fmt: skip
    return out


def _paged_attention_2(flash: Any, q: Tensor, k: Tensor, v: Tensor, meta: AttentionMeta, how: dict[str, Any]) -> Tensor:
    pages, lens, query_starts, key_starts, first = _indices(meta)
    decodes, out = meta.num_decodes, torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if decodes:
        out[:decodes] = flash.flash_attn_with_kvcache(
            q[:decodes].unsqueeze(1), k, v, cache_seqlens=lens[:decodes], block_table=pages[:decodes], **how
        ).squeeze(1)
    if decodes < len(lens):
        out[first:] = flash.flash_attn_varlen_func(
            q[first:], k, v, cu_seqlens_q=query_starts, cu_seqlens_k=key_starts, max_seqlen_q=meta.longest,
            max_seqlen_k=meta.num_pages * meta.page_size, block_table=pages[decodes:], **how,
        )  # fmt: skip
    return out
