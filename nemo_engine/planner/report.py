"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from nemo_engine.memory_plan import GIB
from nemo_engine.planner import published
from nemo_engine.planner.efficiency import Efficiencies
from nemo_engine.planner.gpus import Gpu
from nemo_engine.planner.plan import Operating, Plan, alternatives
from nemo_engine.workload import Limits

_GPU_HEADS = (
    "GPU", "GB", "memory", "fits", "KV tokens", "1: tokens/s", "TTFT ms", "at a time", "tokens/s", "requests/s",
    "per million",
)  # fmt: skip
_HEADS = ("batch", "TTFT ms", "ITL ms", "longest ms", "step ms", "roofline ms", "tokens/s", "requests/s")


def verdict(plan: Plan) -> str:
    """The plan in a sentence."""
    ranks = plan.tensor_parallel_size
    what = f"{plan.model.name} on {f'{ranks} x ' if ranks > 1 else ''}{plan.gpu.title}"
    if plan.shortage is not None:
        return f"NO: {what}: {str(plan.shortage).splitlines()[0]}"
    if not plan.points:
        return f"NO: {what}: its KV cache holds no request of {plan.load.input_tokens} + {plan.load.output_tokens}"
    single, best = plan.points[0], plan.best or max(plan.points, key=lambda point: point.tokens_per_s)
    has_limits = plan.load.limits != Limits()
    if has_limits and plan.best is None:
        return f"NO: {what} fits, and the limits are not met even by one request at a time"
    return (
        f"YES: {what}: one request gets {1 / single.itl:,.0f} tokens/s after {single.ttft * 1e3:.0f} ms; "
        f"{best.batch} at a time{' keep the limits and' if has_limits else ''} get {best.tokens_per_s:,.0f} tokens/s, "
        f"{best.requests_per_s:.1f} requests/s"
    )


def accuracy(gpu: str, efficiencies: Efficiencies) -> list[str]:
    """A line on how exact the numbers are."""
    figures = [getattr(efficiencies, field.name) for field in fields(efficiencies)]
    lines = [f"accuracy: {published.error_line(gpu)}"]
    if not any(figure.source.startswith("measured") for figure in figures):
        lines.append(
            "  times are those of a well-tuned engine on this GPU: this engine has not been measured on it yet"
        )
    return lines


def report(plan: Plan, *, verbose: bool = False) -> str:
    """The whole plan in sections. ``verbose`` adds the efficiencies and the published results."""
    ranks = plan.tensor_parallel_size
    per = " per GPU" if ranks > 1 else ""
    count = f"{ranks} x " if ranks > 1 else ""
    lines = [
        verdict(plan),
        "",
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
        *_wide(plan),
        *_limits(plan),
        *accuracy(plan.gpu.name, plan.efficiencies),
    ]
    if not verbose:
        return "\n".join([*lines, "  -v shows the efficiencies and every published result"])
    lines += ["", "efficiencies, of the data sheet or of the ceiling above it", *_figures(plan), ""]
    return "\n".join(
        [
            *lines,
            "published results, output tokens/s; what is called derived above comes from them",
            published.table(published.comparison()),
        ]
    )


def compare(plans: Sequence[tuple[Gpu, Plan | str]]) -> str:
    """A line for each GPU: its plan, or a text that says why there is none."""
    rows: list[tuple[str, ...]] = [_GPU_HEADS]
    notes = []
    for gpu, plan in plans:
        first = (gpu.name, f"{gpu.marketing_gb}", gpu.memory)
        if isinstance(plan, str) or plan.shortage is not None or not plan.points:
            reason = plan if isinstance(plan, str) else verdict(plan).removeprefix("NO: ")
            notes.append(f"{gpu.name}: {reason}")
            rows.append((*first, "no", *["-"] * (len(_GPU_HEADS) - 4)))
            continue
        single, best = plan.points[0], plan.best or max(plan.points, key=lambda point: point.tokens_per_s)
        if plan.load.limits != Limits() and plan.best is None:
            notes.append(f"{gpu.name}: the limits are not met even by one request at a time")
            rows.append((*first, "limits", f"{plan.capacity_tokens:,}", *["-"] * (len(_GPU_HEADS) - 5)))
            continue
        cost = plan.cost_per_million(best)
        rows.append((
            *first, "yes", f"{plan.capacity_tokens:,}", f"{1 / single.itl:,.0f}", f"{single.ttft * 1e3:.0f}",
            f"{best.batch}", f"{best.tokens_per_s:,.0f}", f"{best.requests_per_s:.2f}",
            "-" if cost is None else f"{cost:.3f}",
        ))  # fmt: skip
    return "\n".join([*_aligned(rows), *notes])


def _aligned(rows: Sequence[Sequence[str]], before: str = "") -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [before + "  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]


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
    return _aligned(rows, "  ")


def _wide(plan: Plan) -> list[str]:
    if not plan.wide:
        return []
    widths = [1, *plan.config.widths]
    rows: list[tuple[str, ...]] = [("batch", *(f"{width}: tokens/s" for width in widths), "best", "gain")]
    for batch, rates in plan.wide.items():
        best = max(rates, key=lambda width: rates[width])
        told = [f"{rates[width]:,.0f}" if width in rates else "-" for width in widths]
        rows.append((f"{batch}", *told, f"{best}", f"{rates[best] / rates[1]:.2f}"))
    title = "speculation: output tokens/s of decode steps alone, by tokens that a row computes in a step"
    return [title, *_aligned(rows, "  "), ""]


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
        point = point or max(plan.points, key=lambda candidate: candidate.tokens_per_s)
        cost, unit = plan.cost_per_million(point), f" {load.currency}" if load.currency else ""
        assert cost is not None
        of_all = cost * load.output_tokens / (load.output_tokens + load.input_tokens)
        lines.append(
            f"at {load.price_per_hour:g}{unit} per GPU hour and {point.batch} requests at a time: {cost:.3f}{unit} per "
            f"million output tokens, {of_all:.4f}{unit} per million tokens in and out"
        )
    return [*lines, ""] if lines else []


def _figures(plan: Plan) -> list[str]:
    figures = [(field.name, getattr(plan.efficiencies, field.name)) for field in fields(plan.efficiencies)]
    return [f"  {name:<20}{figure.value:8.3f}  {figure.source}" for name, figure in figures]


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain data, with units in the names."""
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
            "max_num_batched_tokens": plan.config.tokens_per_step,
            "pipeline_depth": plan.config.steps_in_flight("cuda"),
        },
        "load": {
            "input_tokens": load.input_tokens, "output_tokens": load.output_tokens, "slo_ttft": load.limits.ttft_s,
            "slo_itl": load.limits.itl_s, "price_per_hour": load.price_per_hour, "currency": load.currency or None,
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
