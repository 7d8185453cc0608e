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
    flash, is_3 = importlib.import_module(library.module), library is FLASH_ATTENTION_3
    pages, lens, query_starts, key_starts, is_decode = meta.once("flash_attn", lambda: _indices(meta))
    # Its pages are (tokens, heads, D), ours (heads, tokens, D): it takes strides.
    k, v = kv.k.transpose(1, 2), kv.v.transpose(1, 2)
    how, table = {"softmax_scale": scale, "causal": True}, "page_table" if is_3 else "block_table"
    decodes = meta.num_decodes
    decoded = q[:0]
    if decodes:
        rows = {"cache_seqlens": lens[:decodes], table: pages[:decodes]}
        decoded = flash.flash_attn_with_kvcache(q[:decodes].unsqueeze(1), k, v, **rows, **how).squeeze(1)
    if decodes == len(meta.seq_lens):
        return decoded
    how |= {"cu_seqlens_q": query_starts, "max_seqlen_q": max(decodes, meta.longest), table: pages[decodes:]}
    out: Tensor
    if is_3:
        out = flash.flash_attn_with_kvcache(q, k, v, cache_seqlens=lens[decodes:], **how)
    else:
        max_keys = meta.num_pages * meta.page_size
        out = flash.flash_attn_varlen_func(q, k, v, cu_seqlens_k=key_starts, max_seqlen_k=max_keys, **how)
    out[:decodes] = torch.where(is_decode, decoded, out[:decodes])
    return out


def _indices(meta: AttentionMeta) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """In int32: pages (S, P) and lengths (S,) of S sequences, and where queries and keys of those after the decode rows
    begin (S - decodes + 1,); and which of the first queries are of a decode row (decodes, 1, 1).

    The first sequence after the decode rows is all queries of these again, without keys: so the others begin where
    they are, however many decode rows are empty, and the host need not know.
    """
    decodes = meta.num_decodes
    slots, lens = (torch.cat((x[:decodes], x.new_zeros(1), x[decodes:])) for x in (meta.slot_ids, meta.seq_lens))
    query_starts, key_starts = (
        torch.nn.functional.pad(x, (1, 0)) for x in (meta.query_start_loc[decodes:], lens[decodes:].cumsum(0))
    )
    pages = meta.page_table[:, : meta.num_pages][slots]
    is_decode = torch.arange(decodes, device=lens.device) < meta.query_start_loc[decodes]
    indices = [x.to(torch.int32) for x in (pages, lens, query_starts, key_starts)]
    return indices[0], indices[1], indices[2], indices[3], is_decode.view(-1, 1, 1)
