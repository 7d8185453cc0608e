"""The kernels of csrc/cpu, for models in bf16 or fp32 on a CPU: their tensors are checked here and passed on as
addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_engine.ops import sample
from nemo_engine.ops.attention import AttentionMeta
from nemo_engine.ops.cpu.attention import prefill_
from nemo_engine.ops.draft import LONGEST_MATCH, SHORTEST_MATCH
from nemo_engine.ops.op import compiled_for_cpu
from nemo_engine.ops.paged_kv import PagedKV
from nemo_engine.ops.rope import RopeMeta
from nemo_engine.ops.sample import SampleFacts, SlotParams
from nemo_engine.step import TOKEN_ALL_MASKED, TOKEN_NOT_DRAFTED, TOKEN_NOT_FINITE, TOKEN_NOT_TAKEN

_SDPA_FROM = 1024  # keys; where the two meet for heads of 128 in bf16

_cpu: Any = compiled_for_cpu()


def check(dtype: torch.dtype, *others: Tensor) -> None:
    """The kernels see addresses alone: an FP8 cache, or weights of another dtype, would be read as what they are
    not.
    """
    for x in others:
        if x.dtype != dtype or not x.is_contiguous():
            raise TypeError(f"must be contiguous {dtype}, got {x.dtype} of strides {x.stride()}")


def build_batch_(
    token_ids: Tensor,
    num_computed: Tensor,
    page_table: Tensor,
    slots: Tensor,
    starts: Tensor,
    new_index: Tensor,
    new_page: Tensor,
    page_size: int,
    num_tokens: int,
    longest: int,
    ahead: Tensor | None = None,
    width: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``batch.build_batch_``; a row repeats the one before it if both compute the same place of the same slot."""
    rows = slots.shape[0]
    ids, positions, places = (slots.new_empty(num_tokens) for _ in range(3))
    lengths = slots.new_empty(rows)
    _cpu.build_batch(
        token_ids.data_ptr(), num_computed.data_ptr(), page_table.data_ptr(), slots.data_ptr(), starts.data_ptr(),
        new_index.data_ptr(), new_page.data_ptr(), 0 if ahead is None else ahead.data_ptr(), ids.data_ptr(),
        positions.data_ptr(), places.data_ptr(), lengths.data_ptr(), rows, token_ids.stride(0), page_table.stride(0),
        page_size, 0 if ahead is None else len(ahead),
    )  # fmt: skip
    return ids, positions, places, lengths


def advance_(
    token_ids: Tensor, num_computed: Tensor, slots: Tensor, seq_lens: Tensor, sampled: Tensor, tokens: Tensor
) -> None:
    """See ``batch.advance_``."""
    _cpu.advance(
        token_ids.data_ptr(), num_computed.data_ptr(), slots.data_ptr(), seq_lens.data_ptr(), sampled.data_ptr(),
        tokens.data_ptr(), slots.shape[0], sampled.shape[0], token_ids.stride(0),
    )  # fmt: skip


def draft_(
    token_ids: Tensor, num_computed: Tensor, draft_until: Tensor, slots: Tensor, width: int, max_drafts: int
) -> Tensor:
    """See ``draft.draft_``."""
    ahead = slots.new_empty(len(slots))
    _cpu.draft(
        token_ids.data_ptr(), num_computed.data_ptr(), draft_until.data_ptr(), slots.data_ptr(), ahead.data_ptr(),
        len(slots) // width, width, max_drafts, token_ids.stride(0), LONGEST_MATCH, SHORTEST_MATCH,
    )  # fmt: skip
    return ahead


def accept_(
    token_ids: Tensor, num_computed: Tensor, slots: Tensor, seq_lens: Tensor, tokens: Tensor, width: int
) -> None:
    """See ``draft.accept_``."""
    _cpu.accept(
        token_ids.data_ptr(), num_computed.data_ptr(), slots.data_ptr(), seq_lens.data_ptr(), tokens.data_ptr(),
        len(slots) // width, width, token_ids.stride(0), TOKEN_NOT_TAKEN, TOKEN_NOT_DRAFTED,
    )  # fmt: skip


def embed(table: Tensor, ids: Tensor) -> Tensor:
    """See ``embed.embed``."""
    table = table.contiguous()
    y = table.new_empty(ids.shape[0], table.shape[1])
    is_bf16 = table.dtype == torch.bfloat16
    _cpu.embed(is_bf16, table.data_ptr(), ids.data_ptr(), y.data_ptr(), y.shape[0], y.shape[1])
    return y


def sample_(
    logits: Tensor, slot_ids: Tensor, positions: Tensor, params: SlotParams, facts: SampleFacts | None = None
) -> Tensor:
    """See ``sample.sample_``, which penalises: the logits of all rows are copied then."""
    if logits.dtype not in (torch.bfloat16, torch.float32):
        return sample.sample_(logits, slot_ids, positions, params, facts)
    facts = SampleFacts.of(slot_ids, params, logits.shape[1]) if facts is None else facts
    if not facts.penalised.shape[0]:
        return choose(logits, slot_ids, positions, params)
    penalised, slots = sample.penalised(logits.float(), slot_ids, params, facts)
    tokens = choose(penalised, slot_ids, positions, params)
    tokens.masked_fill_(~(logits.amax(dim=1) < torch.inf), TOKEN_NOT_FINITE)  # penalties have made them finite
    sample.count_(tokens, slots, params, facts)
    return tokens


def choose(logits: Tensor, slot_ids: Tensor, positions: Tensor, params: SlotParams) -> Tensor:
    """``sample_`` of rows of which none is penalised; logits in bf16 or fp32."""
    logits = logits.contiguous()
    rows, width = logits.shape
    tokens = slot_ids.new_empty(rows)
    by_slot = (params.temperature, params.min_p, params.top_p, params.top_k, params.seed_keys)
    _cpu.sample(
        logits.dtype == torch.bfloat16, logits.data_ptr(), slot_ids.data_ptr(), positions.data_ptr(),
        *[values.data_ptr() for values in by_slot], tokens.data_ptr(), rows, width, TOKEN_NOT_FINITE, TOKEN_ALL_MASKED,
    )  # fmt: skip
    return tokens


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``norm.rms_norm``."""
    x = x.contiguous()
    check(x.dtype, weight)
    y = torch.empty_like(x)
    rows, width = x.shape
    if residual is None:
        total = x
        addresses = (x.data_ptr(), 0, weight.data_ptr(), y.data_ptr(), 0)
    else:
        residual = residual.contiguous()
        check(x.dtype, residual)
        total = torch.empty_like(x)
        addresses = (x.data_ptr(), residual.data_ptr(), weight.data_ptr(), y.data_ptr(), total.data_ptr())
    _cpu.rms_norm(x.dtype == torch.bfloat16, *addresses, rows, width, eps)
    return y, total


def silu_mul(gate_up: Tensor) -> Tensor:
    """See ``activation.silu_mul``."""
    gate_up = gate_up.contiguous()
    rows, width = gate_up.shape
    y = gate_up.new_empty(rows, width // 2)
    _cpu.silu_mul(gate_up.dtype == torch.bfloat16, gate_up.data_ptr(), y.data_ptr(), rows, width // 2)
    return y


def rope_and_append_kv_(q: Tensor, k: Tensor, v: Tensor, kv: PagedKV, meta: RopeMeta) -> Tensor:
    """See ``rope.rope_and_append_kv_``; the scales are None."""
    q, k, v = (x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous() for x in (q, k, v))
    check(q.dtype, *kv.caches)
    tokens, heads, dim = q.shape
    rotated = q.new_empty(q.shape)
    _cpu.rope_and_append_kv(
        q.dtype == torch.bfloat16, q.data_ptr(), k.data_ptr(), v.data_ptr(), rotated.data_ptr(), meta.table.data_ptr(),
        meta.positions.data_ptr(), meta.slot_mapping.data_ptr(), kv.k.data_ptr(), kv.v.data_ptr(),
        tokens, heads, kv.num_heads, dim, kv.page_size, q.stride(0), k.stride(0), v.stride(0),
    )  # fmt: skip
    return rotated


def paged_attention(q: Tensor, kv: PagedKV, meta: AttentionMeta, scale: float) -> Tensor:
    """See ``attention.paged_attention``; the scales are None.

    Every query is a row of its own to the kernel, but for long prompts.
    """
    q = q.contiguous()
    check(q.dtype, *kv.caches)
    out = torch.empty_like(q)
    rows: QueryRows = meta.once("query rows", lambda: _query_rows(meta))
    _, heads, dim = q.shape
    _cpu.query_attention(
        q.dtype == torch.bfloat16, q.data_ptr(), out.data_ptr(), kv.k.data_ptr(), kv.v.data_ptr(),
        meta.page_table.data_ptr(), rows.slot_ids.data_ptr(), rows.num_keys.data_ptr(),
        len(q), heads, kv.num_heads, dim, kv.page_size, meta.page_table.stride(0), scale,
    )  # fmt: skip
    if rows.long:
        prefill_(out, rows.long, q, kv, meta, scale)
    return out


@dataclass(frozen=True, slots=True, eq=False)
class QueryRows:
    """The queries of a step one by one; the same for all its layers."""

    slot_ids: Tensor  # (T,) int64: whose pages each reads
    num_keys: Tensor  # (T,) int64: how many keys it sees; 0 for those of ``long``
    long: list[int]  # rows of the step that SDPA computes


def _query_rows(meta: AttentionMeta) -> QueryRows:
    num_prefills = len(meta.seq_lens) - meta.num_decodes
    if num_prefills == 0:
        return QueryRows(meta.slot_ids, meta.seq_lens, [])
    starts, counts = meta.query_start_loc[:-1], meta.query_start_loc.diff()
    is_long = (meta.seq_lens > _SDPA_FROM) & (counts > 1)
    first = meta.seq_lens - counts + 1 - starts  # of a row's queries, query t sees t + first keys
    num_keys = torch.arange(int(meta.query_start_loc[-1])) + first.repeat_interleave(counts)
    num_keys.masked_fill_(is_long.repeat_interleave(counts), 0)
    long = is_long.nonzero().flatten().tolist()
    return QueryRows(meta.slot_ids.repeat_interleave(counts), num_keys, long)
