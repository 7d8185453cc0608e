"""Other makers' kernels as baselines of ours: FlashAttention 2 and 3, FlashInfer, Liger, each where it is installed and
named where it is not.

A call is made ready when it is first called, outside of what is timed, so that what a library refuses is an error of
that baseline alone. None of this has run yet: the calls follow the libraries' documentation (see GPU_QUEUE.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_engine.benchmarks.timing import Args, Calls, Size
from nemo_engine.ops import Op
from nemo_engine.ops.attention import AttentionMeta
from nemo_engine.ops.paged_kv import PagedKV

PACKAGES = {"flash-attn": "flash_attn", "FlashInfer": "flashinfer", "Liger": "liger_kernel"}
_WORKSPACE_BYTES = 256 << 20  # for FlashInfer's partial results
_FA3_FLAGS = {
    "is_causal": True,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "is_rotary_interleaved": True,
    "num_splits": 0,
    "sm_margin": 0,
    "cp_world_size": 1,
    "cp_rank": 0,
}


@dataclass(frozen=True, slots=True)
class OpsPeers:
    """fa3: the library with FlashAttention 3 out of a vLLM wheel (``_vllm_fa3_C.abi3.so``), None for none."""

    fa3: Path | None = None

    @classmethod
    def find(cls, fa3: Path | None) -> OpsPeers:
        """With ``fa3``, or that of an installed vLLM. ``ValueError`` if ``fa3`` is no file."""
        if fa3 is not None and not fa3.is_file():
            raise ValueError(f"--fa3 must be a library's file, got {str(fa3)!r}")
        spec = None if fa3 is not None else find_spec("vllm")
        for folder in (spec.submodule_search_locations or []) if spec is not None else []:
            fa3 = next(iter(Path(folder).glob("vllm_flash_attn/_vllm_fa3_C*.so")), fa3)
        if fa3 is not None:
            torch.ops.load_library(str(fa3))
        return cls(fa3)

    def missing(self) -> list[str]:
        """A line for each that cannot be a baseline here."""
        lines = [f"{name} is not installed" for name, package in PACKAGES.items() if find_spec(package) is None]
        return lines + ([] if self.fa3 else ["FlashAttention 3 is not there: --fa3 names vLLM's _vllm_fa3_C.abi3.so"])

    def added_to(self, op: Op, size: Size) -> Size:
        """``size`` with these baselines beside its own."""
        makers = {
            "paged_attention": self._attention, "rms_norm": _norms, "silu_mul": _activations,
        }  # fmt: skip
        if op.name not in makers:
            return size

        def baselines(*args: Any) -> Calls:
            return {**size.baselines(*args), **makers[op.name](args)}

        return replace(size, baselines=baselines)

    def _attention(self, args: Args) -> Calls:
        calls: Calls = {}
        if self.fa3 is not None:
            calls["FlashAttention 3"] = _later(lambda: _fa3(*args))
        if find_spec("flash_attn") and args[1].dtype == torch.bfloat16:
            calls["flash-attn"] = _later(lambda: _flash_attn(*args))
        if find_spec("flashinfer"):
            calls["FlashInfer"] = _later(lambda: _flashinfer_attention(*args))
        return calls


def _later(make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """Makes the call ready when it is first called."""
    cached = cache(make)
    return lambda: cached()()


def _fa3(q: Tensor, kv: PagedKV, meta: AttentionMeta, scale: float) -> Callable[[], Any]:
    """Pages as they lie, (pages, page, heads, D) by strides. Arguments go by the names of the library's own schema."""
    forward = torch.ops._vllm_fa3_C.fwd.default
    is_fp8 = kv.dtype != torch.bfloat16
    requests, heads = meta.seq_lens.numel(), kv.num_heads
    descale = torch.ones(requests, heads, device=q.device)
    known: dict[str, Any] = {
        **_FA3_FLAGS, "q": q.to(kv.dtype), "k": kv.k.transpose(1, 2), "v": kv.v.transpose(1, 2),
        "cu_seqlens_q": meta.query_start_loc.int(), "seqused_k": meta.seq_lens.int(), "max_seqlen_q": meta.longest,
        "max_seqlen_k": int(meta.seq_lens.max()), "page_table": meta.page_table[meta.slot_ids].int().contiguous(),
        "softmax_scale": scale, **(dict.fromkeys(("q_descale", "k_descale", "v_descale"), descale) if is_fp8 else {}),
    }  # fmt: skip
    known["causal"], known["block_table"] = True, known["page_table"]
    values = [known.get(argument.name) for argument in forward._schema.arguments]
    return lambda: forward(*values)[0]


def _flash_attn(q: Tensor, kv: PagedKV, meta: AttentionMeta, scale: float) -> Callable[[], Any]:
    """Over contiguous keys, since its pages are of 256 tokens at least."""
    from flash_attn import flash_attn_func, flash_attn_with_kvcache

    pages, keys = meta.page_table[meta.slot_ids], int(meta.seq_lens.max())
    k, v = (x[pages].transpose(2, 3).flatten(1, 2)[:, :keys].contiguous() for x in kv.caches)
    rows = q.view(pages.shape[0], -1, *q.shape[1:])
    if meta.num_decodes:
        lengths = meta.seq_lens.int()
        call = lambda: flash_attn_with_kvcache(rows, k, v, cache_seqlens=lengths, softmax_scale=scale)  # noqa: E731
    else:
        call = lambda: flash_attn_func(rows, k, v, softmax_scale=scale, causal=True)  # noqa: E731
    return lambda: call().flatten(0, 1)


def _flashinfer_attention(q: Tensor, kv: PagedKV, meta: AttentionMeta, scale: float) -> Callable[[], Any]:
    """Pages as they lie (HND), planned once as for all layers of a step."""
    import flashinfer

    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    counts = (meta.seq_lens + meta.page_size - 1) // meta.page_size
    starts = torch.zeros(counts.numel() + 1, dtype=torch.int32, device=q.device)
    starts[1:] = counts.cumsum(0)
    rows = meta.page_table[meta.slot_ids]
    ids = torch.cat([row[:count] for row, count in zip(rows, counts.tolist())]).int()
    last = ((meta.seq_lens - 1) % meta.page_size + 1).int()
    heads, (kv_heads, dim) = q.shape[1], (kv.num_heads, kv.k.shape[3])
    types = {"sm_scale": scale, "q_data_type": q.dtype, "kv_data_type": kv.dtype}
    if meta.num_decodes:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(starts, ids, last, heads, kv_heads, dim, meta.page_size, **types)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        queries = meta.query_start_loc.int()
        wrapper.plan(queries, starts, ids, last, heads, kv_heads, dim, meta.page_size, causal=True, **types)
    return lambda: wrapper.run(q, kv.caches)


def _norms(args: Args) -> Calls:
    """With the residual."""
    x, weight, eps, residual = args
    calls: Calls = {}
    if find_spec("liger_kernel"):

        def liger() -> Callable[[], Any]:
            from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

            return lambda: LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)

        calls["Liger"] = _later(liger)
    if find_spec("flashinfer"):

        def flashinfer() -> Callable[[], Any]:
            from flashinfer.norm import fused_add_rmsnorm

            output, sums = x.clone(), residual.clone()  # it writes into both

            def call() -> Tensor:
                fused_add_rmsnorm(output, sums, weight, eps)
                return output

            return call

        calls["FlashInfer"] = _later(flashinfer)
    return calls


def _activations(args: Args) -> Calls:
    (gate_up,) = args
    calls: Calls = {}
    if find_spec("liger_kernel"):

        def liger() -> Callable[[], Any]:
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction

            gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=1))
            return lambda: LigerSiLUMulFunction.apply(gate, up)

        calls["Liger"] = _later(liger)
    if find_spec("flashinfer"):

        def flashinfer() -> Callable[[], Any]:
            from flashinfer.activation import silu_and_mul

            return lambda: silu_and_mul(gate_up)

        calls["FlashInfer"] = _later(flashinfer)
    return calls
