"""Results as a table, a run a line, and as plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from nemo_engine.simulator.results import Results
from nemo_engine.simulator.statistics import Sketch
from nemo_engine.workload import Limits

_HEADS = (
    "requests/s",
    "tokens/s",
    "good/s",
    "good",
    "TTFT p50",
    "p99 ms",
    "ITL p50",
    "p99 ms",
    "TPOT p99",
    "KV peak",
    "running",
    "prefix hits",
    "preempted",
    "busy",
)


def report(label: str, runs: Sequence[tuple[str, Results]]) -> str:
    """A table; ``label`` says what the first column is."""
    rows = [(label, *_HEADS)]
    for name, found in runs:
        rows.append((
            name, f"{found.requests_per_s:.2f}", f"{found.output_tokens_per_s:,.0f}",
            f"{found.good_requests_per_s:.2f}", f"{found.good_fraction:.1%}", _ms(found.ttft, 0.5), _ms(found.ttft,
            0.99), _ms(found.itl, 0.5), _ms(found.itl, 0.99), _ms(found.tpot, 0.99), f"{found.peak_kv_used:.1%}",
            f"{found.mean_running:.1f}", f"{found.prefix_hit_rate:.1%}", f"{found.num_preemptions}",
            f"{found.busy_fraction:.1%}",
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    for name, found in runs:
        if found.num_refused:
            lines.append(f"{name}: {found.num_refused} requests refused, the first: {found.first_refusal}")
    steps, wall = sum(found.num_steps for _, found in runs), sum(found.wall_s for _, found in runs)
    virtual = sum(found.duration_s for _, found in runs)
    lines.append(f"{virtual:,.0f} s in {wall:.1f} s: {steps:,} steps, {steps / wall if wall else 0:,.0f} a second")
    return "\n".join(lines)


def _ms(sketch: Sketch, q: float) -> str:
    value = sketch.quantile(q)
    return "-" if math.isnan(value) else f"{value * 1e3:.2f}"


def plot(label: str, runs: Sequence[tuple[float, Results]], limits: Limits, path: Path) -> None:
    """Latencies and goodput over ``label``, the KV cache and the batch over time; PNG or SVG by the name of ``path``.

    Needs matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    xs = [x for x, _ in runs]
    for axis, name, limit in ((axes[0][0], "ttft", limits.ttft_s), (axes[0][1], "itl", limits.itl_s)):
        for q in (0.5, 0.9, 0.99):
            values = [getattr(found, name).quantile(q) * 1e3 for _, found in runs]
            axis.plot(xs, values, marker="o", label=f"p{q * 100:g}")
        if limit is not None:
            axis.axhline(limit * 1e3, color="grey", linestyle="--", label="limit")
        axis.set(title=f"{name.upper()}, ms", xlabel=label, yscale="log")
        axis.legend()
    axis = axes[0][2]
    axis.plot(xs, [found.requests_per_s for _, found in runs], marker="o", label="requests/s")
    axis.plot(xs, [found.good_requests_per_s for _, found in runs], marker="o", label="within the limits")
    axis.set(title="requests per second", xlabel=label)
    axis.legend()
    axes[1][0].plot(
        [found.output_tokens_per_s for _, found in runs],
        [found.tpot.quantile(0.5) * 1e3 if found.tpot.count else math.nan for _, found in runs],
        marker="o",
    )
    axes[1][0].set(title="median TPOT, ms, over tokens per second", xlabel="output tokens/s")
    for x, found in runs:
        for axis, name in ((axes[1][1], "kv_used"), (axes[1][2], "running")):
            series = found.series[name]
            axis.plot([when for when, _ in series], [value for _, value in series], label=f"{x:g}")
    axes[1][1].set(title="KV cache in use (first replica)", xlabel="seconds", ylim=(0, 1))
    axes[1][2].set(title="running requests (first replica)", xlabel="seconds")
    axes[1][2].legend(title=label, fontsize=7)
    figure.savefig(path)
    pyplot.close(figure)
