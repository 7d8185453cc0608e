"""Results as a table, a run a line, and as plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_engine.simulator.results import Results
from nemo_engine.simulator.statistics import Sketch
from nemo_engine.workload import Limits

_KEEPS_UP = 0.8  # arrivals take that part of a run at least: the last requests end after the last arrival
_GOOD = 0.99  # of the requests

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
    rows = [(label, *_HEADS), *(_row(name, results) for name, results in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    for name, results in runs:
        if results.num_refused:
            lines.append(f"{name}: {results.num_refused} requests refused, the first: {results.first_refusal}")
    steps, wall = sum(results.num_steps for _, results in runs), sum(results.wall_s for _, results in runs)
    virtual = sum(results.duration_s for _, results in runs)
    lines.append(f"{virtual:,.0f} s in {wall:.1f} s: {steps:,} steps, {steps / wall if wall else 0:,.0f} a second")
    return "\n".join(lines)


def _row(name: str, results: Results) -> tuple[str, ...]:
    return (
        name, f"{results.requests_per_s:.2f}", f"{results.output_tokens_per_s:,.0f}",
        f"{results.good_requests_per_s:.2f}", f"{results.good_fraction:.1%}",
        _ms(results.ttft, 0.5), _ms(results.ttft, 0.99), _ms(results.itl, 0.5), _ms(results.itl, 0.99),
        _ms(results.tpot, 0.99), f"{results.peak_kv_used:.1%}", f"{results.mean_running:.1f}",
        f"{results.prefix_hit_rate:.1%}", f"{results.num_preemptions}", f"{results.busy_fraction:.1%}",
    )  # fmt: skip


def _ms(sketch: Sketch, q: float) -> str:
    value = sketch.quantile(q)
    return "-" if math.isnan(value) else f"{value * 1e3:.2f}"


def verdict(label: str, runs: Sequence[tuple[float, Results]], limits: Limits) -> str:
    """What the runs say, in a sentence."""
    best = max(runs, key=lambda run: run[1].output_tokens_per_s)
    full = f"{best[1].requests_per_s:.2f} requests/s and {best[1].output_tokens_per_s:,.0f} tokens/s"
    kept = [x for x, results in runs if results.good_fraction >= _GOOD]
    parts = []
    if label == "rate":
        rate = saturation(runs)
        kept_up = [x for x, results in runs if not _is_burst(results)]
        if rate is not None:
            parts.append(f"saturates near {rate:.3g} requests/s")
        else:
            parts.append(
                f"keeps up with {max(kept_up):g} requests/s" if kept_up else "too few requests to judge a rate"
            )
    parts.append(f"at most {full}")
    if limits != Limits():
        parts.append(f"{_GOOD:.0%} of requests keep the limits up to {label} {max(kept):g}" if kept else
                     f"{_GOOD:.0%} of requests keep the limits at no {label} that was tried")  # fmt: skip
    return "; ".join(parts)


def saturation(runs: Sequence[tuple[float, Results]]) -> float | None:
    """Requests per second that are served where more arrive; None if every rate was kept up with."""
    beyond = [
        results.requests_per_s
        for _, results in runs
        if not _is_burst(results) and results.arrival_span_s < _KEEPS_UP * results.duration_s
    ]
    return max(beyond, default=None)


def _is_burst(results: Results) -> bool:
    """Whether everything arrived before the first answers were there, which says nothing of a rate."""
    return results.e2e.count > 0 and results.arrival_span_s < results.e2e.quantile(0.1)


def plot(label: str, runs: Sequence[tuple[float, Results]], limits: Limits, path: Path) -> None:
    """Latencies and goodput over ``label``, the KV cache and the batch over time; of a single run, its numbers as a
    table. PNG or SVG by the name of ``path``.

    Needs matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    unit = {"rate": "rate, requests/s", "concurrency": "concurrency, requests at a time"}.get(label, label)
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    figure.suptitle(verdict(label, runs, limits))
    if len(runs) > 1:
        _draw_latencies(axes[0], unit, runs, limits)
        _draw_rates(axes[0][2], label, unit, runs)
        _draw_tokens(axes[1][0], label, runs)
    else:
        for axis in (*axes[0], axes[1][0]):
            axis.remove()
        axis = figure.add_subplot(axes[0][0].get_gridspec()[0, :])
        axis.set_axis_off()
        cells = list(zip((label, *_HEADS), _row(f"{runs[0][0]:g}", runs[0][1])))
        axis.table([list(pair) for pair in cells], loc="center", cellLoc="left", colWidths=[0.2, 0.2])
    for x, results in runs:
        for axis, name in ((axes[1][1], "kv_used"), (axes[1][2], "running")):
            series = results.series[name]
            axis.plot([when for when, _ in series], [value for _, value in series], label=f"{x:g}")
    axes[1][1].set(title="first replica", xlabel="time, s", ylabel="KV cache in use, fraction", ylim=(0, 1))
    axes[1][2].set(title="first replica", xlabel="time, s", ylabel="running requests", ylim=(0, None))
    axes[1][2].legend(title=unit, fontsize=7)
    figure.savefig(path)
    pyplot.close(figure)


def _draw_latencies(axes: Sequence[Any], unit: str, runs: Sequence[tuple[float, Results]], limits: Limits) -> None:
    for axis, name, limit in ((axes[0], "ttft", limits.ttft_s), (axes[1], "itl", limits.itl_s)):
        for q in (0.5, 0.9, 0.99):
            values = [getattr(results, name).quantile(q) * 1e3 for _, results in runs]
            axis.plot([x for x, _ in runs], values, marker="o", label=f"p{q * 100:g}")
        if limit is not None:
            axis.axhline(limit * 1e3, color="grey", linestyle="--", label="limit")
        axis.set(xlabel=unit, ylabel=f"{name.upper()}, ms", yscale="log")
        axis.legend()


def _draw_rates(axis: Any, label: str, unit: str, runs: Sequence[tuple[float, Results]]) -> None:
    xs = [x for x, _ in runs]
    axis.plot(xs, [results.requests_per_s for _, results in runs], marker="o", label="served")
    axis.plot(xs, [results.good_requests_per_s for _, results in runs], marker="o", label="within the limits")
    axis.set(xlabel=unit, ylabel="requests/s", xlim=(0, 1.05 * max(xs)), ylim=(0, None))
    if label == "rate":
        highest = max(results.requests_per_s for _, results in runs)
        axis.plot([0, max(xs)], [0, max(xs)], color="grey", linestyle=":", label="y = x: as many as come")
        axis.set_ylim(0, 1.15 * max(highest, min(max(xs), 1.5 * highest)))
        rate = saturation(runs)
        if rate is not None:
            axis.axhline(rate, color="grey", linestyle="--")
            axis.annotate(f"saturates near {rate:.3g}/s", (0.98, rate), (0, 4), ha="right", va="bottom",
                          xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
    axis.legend(loc="lower right")


def _draw_tokens(axis: Any, label: str, runs: Sequence[tuple[float, Results]]) -> None:
    points = [
        (results.output_tokens_per_s, results.tpot.quantile(0.5) * 1e3, x) for x, results in runs if results.tpot.count
    ]
    axis.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o")
    axis.set(xlabel="output tokens/s", ylabel="median TPOT, ms", xlim=(0, None), ylim=(0, None))
    axis.margins(0.15)
    middle = sum(axis.get_xlim()) / 2
    for x, y, value in points:  # inside the axes: to the left of points on the right
        is_right = x > middle
        axis.annotate(f"{label} {value:g}", (x, y), (-6 if is_right else 6, -10), textcoords="offset points",
                      ha="right" if is_right else "left", fontsize=8)  # fmt: skip
