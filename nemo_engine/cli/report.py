"""A finished request as a line of counts and rates, and as JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from nemo_engine.outputs import RequestMetrics, RequestOutput


def decode_rate(metrics: RequestMetrics | None) -> float | None:
    """Tokens per second after the first one; None where there is nothing to divide."""
    if metrics is None or metrics.first_token_ts is None or metrics.last_token_ts is None:
        return None
    seconds = metrics.last_token_ts - metrics.first_token_ts
    count = metrics.num_generation_tokens - 1
    return count / seconds if count > 0 and seconds > 0 else None


def ttft_ms(metrics: RequestMetrics | None) -> float | None:
    """Milliseconds from arrival to the first token."""
    latency = None if metrics is None else metrics.first_token_latency
    return None if latency is None else latency * 1e3


def number(value: float | None, digits: int = 0) -> str:
    """``value`` with so many digits, "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def summary(output: RequestOutput) -> str:
    """One line: tokens in (and cached), tokens out, TTFT, rate, and why it ended."""
    metrics = output.metrics
    parts = [f"prompt {len(output.prompt_token_ids)} tokens, {output.num_cached_tokens} cached"]
    if metrics is not None:
        parts.append(f"{metrics.num_generation_tokens} generated")
        parts.append(f"TTFT {number(ttft_ms(metrics))} ms")
        parts.append(f"{number(decode_rate(metrics))} tokens/s")
    reasons = {completion.finish_reason or "unfinished" for completion in output.outputs}
    return f"[{' · '.join(parts)} · {', '.join(sorted(reasons))}]"


def as_json(output: RequestOutput) -> dict[str, Any]:
    """``output`` as plain JSON data, with the effective sampling parameters; numbers that JSON lacks become null."""
    data: dict[str, Any] = _plain(output)
    if data["metrics"] is not None:
        data["metrics"]["first_token_latency"] = output.metrics and output.metrics.first_token_latency
    return data


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "output_kind"}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
