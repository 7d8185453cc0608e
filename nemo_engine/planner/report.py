"""A plan as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from nemo_engine.memory_plan import GIB
from nemo_engine.planner.plan import Operating, Plan, alternatives

_HEADS = ("batch", "TTFT ms", "ITL ms", "longest ms", "step ms", "roofline ms", "tokens/s", "requests/s")


def report(plan: Plan) -> str:
    """Everything, a section after the other."""
    ranks = plan.tensor_parallel_size
    per = " per GPU" if ranks > 1 else ""
    count = f"{ranks} x " if ranks > 1 else ""
    lines = [
        f"{plan.model.name} on {count}{plan.gpu.title}: {plan.gpu.marketing_gb} GB as sold, {plan.gpu.memory_gib:g} "
        "GiB by the driver "
        f"({plan.gpu.source})",
        "",
        f"memory{per}",
        plan.memory.format(),
        f"  KV cache: {plan.kv_bytes_per_token:,} bytes per token{per}",
    ]
    if ranks > 1:
        lines.append(f"  for {ranks} GPUs on paper: this version of the engine runs on one GPU")
    if plan.shortage is not None:
        return "\n".join([*lines, "", *_shortage(plan)])
    lines += [
        f"  {plan.num_pages:,} pages of {plan.config.page_size} tokens hold {plan.capacity_tokens:,} tokens: "
        f"{plan.capacity_tokens / plan.max_model_len:.1f} requests of {plan.max_model_len:,}, the whole context, or "
        f"{plan.largest_batch} of {plan.load.input_tokens} + {plan.load.output_tokens}"
        + (" (max_num_seqs)" if plan.largest_batch == plan.config.max_num_seqs else ""),
        "",
        f"{plan.load.input_tokens} tokens in, {plan.load.output_tokens} out, so many requests at a time, no queue",
        *_table(plan.points),
        "  TTFT with half a step of waiting; ITL: mean, steps that compute other prompts included; longest: a step "
        "with one of those",
        "",
        *_limits(plan),
        "efficiencies, of the data sheet or of the ceiling above it",
        *_figures(plan),
    ]
    return "\n".join(lines)


def _shortage(plan: Plan) -> list[str]:
    assert plan.shortage is not None
    text = str(plan.shortage).splitlines()
    others = alternatives(plan)
    instead = f"what would fit instead: {'; '.join(others)}" if others else "nothing else that is known would fit"
    return [text[0], *([text[-1]] if len(text) > 1 else []), instead]


def _table(points: tuple[Operating, ...]) -> list[str]:
    rows: list[tuple[str, ...]] = [_HEADS]
    for point in points:
        times = (point.ttft, point.itl, point.longest_itl, point.step, point.ideal_step)
        rows.append((
            str(point.batch), *(f"{seconds * 1e3:.2f}" for seconds in times), f"{point.tokens_per_s:,.0f}",
            f"{point.requests_per_s:.2f}",
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]


def _limits(plan: Plan) -> list[str]:
    load, lines = plan.load, []
    limits = [
        f"{name} of at most {value * 1e3:g} ms"
        for name, value in (("TTFT", load.limits.ttft_s), ("ITL", load.limits.itl_s))
        if value is not None
    ]
    point = plan.best
    if limits and point is None:
        lines.append(f"{' and '.join(limits)}: not even one request at a time")
    elif point is not None:
        lines.append(
            f"{' and '.join(limits)}: up to {point.batch} requests at a time, {point.requests_per_s:.2f} requests/s, "
            f"{point.tokens_per_s:,.0f} tokens/s"
        )
    if load.price_per_hour is not None and plan.points:
        point = point or max(plan.points, key=lambda one: one.tokens_per_s)
        cost = plan.cost_per_million(point)
        assert cost is not None
        of_all = cost * load.output_tokens / (load.output_tokens + load.input_tokens)
        lines.append(
            f"at {load.price_per_hour:g} per GPU hour and {point.batch} requests at a time: {cost:.3f} per million "
            "output tokens, "
            f"{of_all:.4f} per million tokens in and out"
        )
    return [*lines, ""] if lines else []


def _figures(plan: Plan) -> list[str]:
    found = [(field.name, getattr(plan.efficiencies, field.name)) for field in fields(plan.efficiencies)]
    return [f"  {name:<20}{figure.value:8.3f}  {figure.source}" for name, figure in found]


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain data, units in the names."""
    load = plan.load
    data: dict[str, Any] = {
        "model": plan.model.name,
        "gpu": plan.gpu.name,
        "gpu_source": plan.gpu.source,
        "tensor_parallel_size": plan.tensor_parallel_size,
        "runs_in_this_version": plan.tensor_parallel_size == 1,
        "memory_bytes": asdict(plan.memory) | {"total": plan.memory.total},
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "fits": plan.shortage is None,
        "options": {
            name: getattr(plan.config, name)
            for name in ("dtype", "quantization", "quantize_lm_head", "kv_cache_dtype", "max_model_len", "max_num_seqs",
                         "page_size", "enforce_eager")
        } | {
            "max_num_batched_tokens": plan.config.tokens_per_step("cuda"),
            "pipeline_depth": plan.config.steps_in_flight("cuda"),
        },
        "load": {
            "input_tokens": load.input_tokens, "output_tokens": load.output_tokens, "slo_ttft": load.limits.ttft_s,
            "slo_itl": load.limits.itl_s, "price_per_hour": load.price_per_hour,
        },
        "efficiencies": asdict(plan.efficiencies),
    }  # fmt: skip
    if plan.shortage is not None:
        return data | {
            "missing_gib": plan.shortage.missing / GIB,
            "message": str(plan.shortage),
            "would_fit": alternatives(plan),
        }
    return data | {
        "num_kv_pages": plan.num_pages,
        "capacity_tokens": plan.capacity_tokens,
        "max_model_len": plan.max_model_len,
        "largest_batch": plan.largest_batch,
        "points": [_point(plan, point) for point in plan.points],
        "best": None if plan.best is None else _point(plan, plan.best),
    }


def _point(plan: Plan, point: Operating) -> dict[str, Any]:
    return {
        "batch": point.batch,
        "ttft_s": point.ttft,
        "itl_s": point.itl,
        "longest_itl_s": point.longest_itl,
        "step_s": point.step,
        "roofline_step_s": point.ideal_step,
        "output_tokens_per_s": point.tokens_per_s,
        "requests_per_s": point.requests_per_s,
        "cost_per_million_output_tokens": plan.cost_per_million(point),
    }
