"""FlashAttention 2 and 3 as they are installed: called as they document, proved against the definition by modules that
keep to their contracts, chosen and refused with reasons.
"""

from __future__ import annotations

import dataclasses
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_engine.ops import Site, attention, flash_attn, select
from nemo_engine.ops.attention import paged_attention
from tests.ops.test_ops import site


def attend_paged(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, lens: Tensor, table: Tensor, scale: float | None, causal: bool
) -> Tensor:
    """softmax(scale q k^T) v of each sequence, whose causal mask is aligned to the bottom right. k, v: (pages,
    page_size, heads, D).
    """
    assert causal and q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and q.dim() == 3 and k.dim() == 4
    assert {x.dtype for x in (q_starts, lens, table)} == {torch.int32} and table.dim() == 2
    assert q_starts[0] == 0 and q_starts[-1] == len(q) and len(q_starts) - 1 == len(lens) == len(table)
    out = torch.empty_like(q)
    for row, length in enumerate(lens.tolist()):
        queries = q[q_starts[row] : q_starts[row + 1]].float()
        pages = table[row, : -(-length // k.shape[1])].long()
        keys, values = (
            x[pages].flatten(0, 1)[:length].float().repeat_interleave(q.shape[1] // x.shape[2], 1) for x in (k, v)
        )
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * (q.shape[2] ** -0.5 if scale is None else scale)
        later = torch.arange(length) > torch.arange(len(queries))[:, None] + length - len(queries)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1).nan_to_num(0.0)
        out[q_starts[row] : q_starts[row + 1]] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out


def kvcache_2(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False,
) -> Tensor:  # fmt: skip
    """FlashAttention 2's ``flash_attn_with_kvcache``: q (B, S, H, D)."""
    assert q.dim() == 4 and cache_seqlens is not None and block_table is not None and k_cache.shape[1] % 256 == 0
    starts = torch.arange(len(q) + 1, dtype=torch.int32) * q.shape[1]
    out = attend_paged(q.flatten(0, 1), k_cache, v_cache, starts, cache_seqlens, block_table, softmax_scale, causal)
    return out.view_as(q)


def varlen_2(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """FlashAttention 2's ``flash_attn_varlen_func``: with a block table, k and v are pages of 256 tokens."""
    assert block_table is not None and k.shape[1] % 256 == 0 and type(max_seqlen_q) is type(max_seqlen_k) is int
    assert cu_seqlens_k.dtype == torch.int32 and cu_seqlens_k[0] == 0 and not (dropout_p or return_attn_probs)
    lens = cu_seqlens_k.diff()
    assert cu_seqlens_q.diff().max() <= max_seqlen_q and lens.max() <= max_seqlen_k <= block_table.shape[1] * k.shape[1]
    return attend_paged(q, k, v, cu_seqlens_q, lens, block_table, softmax_scale, causal)


def kvcache_3(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    qv: Tensor | None = None, rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | None = None, cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None, rotary_seqlens: Tensor | None = None, q_descale: Tensor | None = None,
    k_descale: Tensor | None = None, v_descale: Tensor | None = None, softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:  # fmt: skip
    """FlashAttention 3's: q as in FlashAttention 2, or (total, H, D) with ``cu_seqlens_q`` and ``max_seqlen_q``."""
    assert cache_seqlens is not None and page_table is not None
    if cu_seqlens_q is None:
        starts = torch.arange(len(q) + 1, dtype=torch.int32) * q.shape[1]
    else:
        assert max_seqlen_q is not None and cu_seqlens_q.diff().max() <= max_seqlen_q
        starts = cu_seqlens_q
    flat = q if cu_seqlens_q is not None else q.flatten(0, 1)
    return attend_paged(flat, k_cache, v_cache, starts, cache_seqlens, page_table, softmax_scale, causal).view_as(q)


MODULES = {
    "flash_attn": {"flash_attn_with_kvcache": kvcache_2, "flash_attn_varlen_func": varlen_2, "__version__": "2.8.3"},
    "flash_attn_interface": {"flash_attn_with_kvcache": kvcache_3},
}


def stand_in(name: str, **changed: Any) -> types.ModuleType:
    """That module, its members replaced by the given ones, or removed by None."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for member, value in {**MODULES[name], **changed}.items():
        if value is not None:
            setattr(module, member, value)
    return module


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """install(name, member=...): that module is there, see ``stand_in``."""

    def put(name: str, **changed: Any) -> None:
        monkeypatch.setitem(sys.modules, name, stand_in(name, **changed))
        flash_attn.choose.cache_clear()

    flash_attn.choose.cache_clear()
    yield put
    flash_attn.choose.cache_clear()


FLASH_ROWS = (
    [(1, 1)],
    [(1, 255), (1, 256), (1, 257), (1, 700)],
    [(256, 256), (257, 257), (1, 1)],
    [(1, 300), (1, 0), (5, 261), (17, 17), (2, 770)],
    [(1, 300), (1, 5), *[(0, 0)] * 4, (5, 261), (0, 0), (17, 17), (0, 0), (2, 2)],
    [*[(0, 0)] * 3, (9, 9)],
)


@pytest.mark.parametrize(("name", "page_size"), [("flash_attn", 256), ("flash_attn_interface", 64)])
@pytest.mark.parametrize("rows", FLASH_ROWS, ids=str)
def test_flash_attn_is_called_as_it_documents(
    install: Callable[..., None], name: str, page_size: int, rows: list[tuple[int, int]]
) -> None:
    install(name)
    args = attention.attention_inputs(rows, 8, 2, 64, page_size, torch.bfloat16)
    torch.testing.assert_close(flash_attn.paged_attention(*args), paged_attention(*args), rtol=8e-3, atol=1e-3)


def flash_site(capability: tuple[int, int] = (8, 0), **changed: Any) -> Site:
    return dataclasses.replace(site(torch.bfloat16, "cuda"), capability=capability, page_size=256, **changed)


def chosen_library(here: Site) -> str:
    """What is chosen if flash_attn is asked for; or why it cannot serve."""
    try:
        choice = select(attention.PAGED_ATTENTION, here, {"paged_attention": "flash_attn"})
    except ValueError as error:
        return str(error)
    assert choice.function is flash_attn.paged_attention and choice.description is not None
    return choice.description


def test_which_flash_attn_serves(install: Callable[..., None]) -> None:
    absent = "FlashAttention 3 (flash_attn_interface) is not installed; FlashAttention 2 (flash_attn) is not installed"
    assert absent in chosen_library(flash_site())
    install("flash_attn")
    for capability in ((8, 0), (8, 9), (9, 0)):
        assert chosen_library(flash_site(capability)) == "FlashAttention 2 (flash_attn 2.8.3)"
    install("flash_attn_interface")
    assert chosen_library(flash_site((9, 0))) == "FlashAttention 3 (flash_attn_interface)"
    assert chosen_library(flash_site((8, 9))) == "FlashAttention 2 (flash_attn 2.8.3)"
    assert chosen_library(dataclasses.replace(flash_site((9, 0)), page_size=64)).startswith("FlashAttention 3")


@pytest.mark.parametrize(
    ("changed", "members", "reason"),
    [
        ({"page_size": 64}, {}, "pages of 256 tokens and multiples, these are of 64: set page_size=256"),
        ({"capability": (7, 5)}, {}, "FlashAttention 2 needs an NVIDIA GPU of compute capability 8.0, this is (7, 5)"),
        ({"head_dim": 100}, {}, "head_dim must be a multiple of 8 and at most 256, this is 100"),
        ({"num_heads": 6, "num_kv_heads": 4}, {}, "query heads must be a multiple of KV heads, these are 6 and 4"),
        ({"dtype": torch.float32}, {}, "computes in bfloat16 or float16, the model is float32"),
        ({"kv_dtype": torch.float8_e4m3fn}, {}, "reads no FP8 keys and values"),
        ({}, {"flash_attn_varlen_func": None}, "the installed flash_attn has no flash_attn_varlen_func"),
        (
            {},
            {"flash_attn_with_kvcache": lambda q, k_cache, v_cache, cache_seqlens: q},
            "flash_attn_with_kvcache of the installed flash_attn does not take block_table, softmax_scale, causal",
        ),
    ],
)
def test_flash_attn_is_refused_with_the_reason(
    install: Callable[..., None], changed: dict[str, Any], members: dict[str, Any], reason: str
) -> None:
    install("flash_attn", **members)
    assert reason in chosen_library(dataclasses.replace(flash_site(), **changed))


def test_a_flash_attn_that_cannot_be_imported_says_why(
    install: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "FlashAttention 2 (flash_attn) cannot be imported: undefined symbol: _ZN3c10" in chosen_library(flash_site())
