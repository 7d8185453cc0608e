"""The operations of the model: what each means, what implements it, and which implementation an engine runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from nemo_engine.ops.activation import SILU_MUL, SILU_MUL_FP8
from nemo_engine.ops.attention import PAGED_ATTENTION
from nemo_engine.ops.batch import ADVANCE, BUILD_BATCH
from nemo_engine.ops.blocks import QUANTIZE_TOKEN_BLOCKS
from nemo_engine.ops.draft import ACCEPT, DRAFT
from nemo_engine.ops.embed import EMBED
from nemo_engine.ops.fused import (
    MLP_FP8,
    NORM_LINEAR,
    NORM_LINEAR_FP8,
    QUANTIZE_LINEAR_FP8,
    SILU_MUL_LINEAR,
    SILU_MUL_LINEAR_FP8,
)
from nemo_engine.ops.linear import LINEAR, LINEAR_FP8
from nemo_engine.ops.norm import RMS_NORM, RMS_NORM_FP8
from nemo_engine.ops.op import COMPOSED, SEMANTICS, Choice, Op, Site, select
from nemo_engine.ops.quantize import QUANTIZE_TOKENS
from nemo_engine.ops.rope import ROPE_AND_APPEND_KV
from nemo_engine.ops.sample import SAMPLE, TOP_LOGPROBS

__all__ = ["ALL_OPS", "SEMANTICS", "Choice", "Op", "Ops", "Site", "select"]

ALL_OPS: tuple[Op, ...] = (
    DRAFT,
    BUILD_BATCH,
    EMBED,
    RMS_NORM,
    RMS_NORM_FP8,
    LINEAR,
    LINEAR_FP8,
    NORM_LINEAR,
    NORM_LINEAR_FP8,
    ROPE_AND_APPEND_KV,
    PAGED_ATTENTION,
    SILU_MUL,
    SILU_MUL_FP8,
    SILU_MUL_LINEAR,
    SILU_MUL_LINEAR_FP8,
    MLP_FP8,
    QUANTIZE_LINEAR_FP8,
    QUANTIZE_TOKENS,
    QUANTIZE_TOKEN_BLOCKS,
    SAMPLE,
    TOP_LOGPROBS,
    ADVANCE,
    ACCEPT,
)

EVERY = "*"  # in a preference: every operation that has such an implementation

_logger = logging.getLogger("nemo_engine")


def served_by(name: str | None, site: Site) -> dict[str, str]:
    """A preference for the implementation ``name`` of every operation where it serves ``site``.

    ``ValueError`` if none has it.
    """
    if name is None:
        return {}
    having = {op.name: impl for op in ALL_OPS for impl in op.impls if impl.name == name}
    if not having:
        known = sorted({impl.name for op in ALL_OPS for impl in op.impls})
        raise ValueError(f"prefer[{EVERY!r}] must be one of {', '.join(known)}, got {name!r}")
    return {op: name for op, impl in having.items() if impl.supports(site) is None}


@dataclass(frozen=True, slots=True)
class Ops:
    """The chosen implementations, as plain callables, one for each operation of ``ALL_OPS``."""

    draft_: Callable[..., Any]
    build_batch_: Callable[..., Any]
    embed: Callable[..., Any]
    rms_norm: Callable[..., Any]
    rms_norm_fp8: Callable[..., Any]
    linear: Callable[..., Any]
    linear_fp8: Callable[..., Any]
    norm_linear: Callable[..., Any]
    norm_linear_fp8: Callable[..., Any]
    rope_and_append_kv_: Callable[..., Any]
    paged_attention: Callable[..., Any]
    silu_mul: Callable[..., Any]
    silu_mul_fp8: Callable[..., Any]
    silu_mul_linear: Callable[..., Any]
    silu_mul_linear_fp8: Callable[..., Any]
    mlp_fp8: Callable[..., Any]
    quantize_linear_fp8: Callable[..., Any]
    quantize_tokens: Callable[..., Any]
    quantize_token_blocks: Callable[..., Any]
    sample_: Callable[..., Any]
    top_logprobs: Callable[..., Any]
    advance_: Callable[..., Any]
    accept_: Callable[..., Any]
    choices: tuple[Choice, ...]

    @classmethod
    def select(cls, site: Site, prefer: Mapping[str, str]) -> Ops:
        """Choose every operation for ``site``. Raises ``ValueError`` for a preference that cannot be met.

        ``prefer``: {operation: implementation}; under "*", one that is preferred wherever it serves.
        """
        names = [op.name for op in ALL_OPS]
        for name in prefer:
            if name not in (*names, EVERY):
                raise ValueError(f"prefer must name operations ({', '.join(names)}) or all ({EVERY}), got {name!r}")
        choices = tuple(select(op, site, {**served_by(prefer.get(EVERY), site), **prefer}) for op in ALL_OPS)
        functions = {choice.op: choice.function for choice in choices}
        for op, choice in zip(ALL_OPS, choices, strict=True):
            if choice.chosen == COMPOSED and op.composed is not None:
                functions[op.name] = partial(op.composed, SimpleNamespace(**functions))
        ops = cls(**functions, choices=choices)
        _logger.info("%s", ops.format())
        return ops

    def format(self) -> str:
        """A table: operation, chosen implementation, and the others with the reason against them."""
        width = max(len(choice.op) for choice in self.choices)
        lines = []
        for choice in self.choices:
            against = "; ".join(f"not {name}: {reason}" for name, reason in choice.rejected)
            chosen = choice.chosen + (f": {choice.description}" if choice.description else "")
            lines.append(f"{choice.op.ljust(width)}  {chosen}" + (f"  ({against})" if against else ""))
        return "\n".join(lines)
