"""Widths of vectors in csrc/cpu."""

from __future__ import annotations

from nemo_engine.ops.op import compiled_for_cpu


def has_lanes(count: int) -> bool:
    """Whether csrc/cpu is built and takes vectors of ``count`` numbers, which it does from now on."""
    try:
        return compiled_for_cpu().set_lanes(count) is None  # type: ignore[union-attr]
    except (AttributeError, ValueError):
        return False
