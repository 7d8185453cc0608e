"""Results as pictures, PNG and SVG, for what there is data of: one benchmark of one machine and commit in each.

Needs matplotlib (extra ``plot``).
"""

from __future__ import annotations

import math
import re
import statistics
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from nemo_engine.benchmarks.report.results import Record, blaming
from nemo_engine.benchmarks.report.tables import OURS, engine_name, model_name, number, requests, runs_of, workload_name
from nemo_engine.benchmarks.report.tables_engines import arrivals_name, precision_name, stages_of
from nemo_engine.benchmarks.report.tables_parts import scheduler_name

matplotlib.use("Agg")
from matplotlib import pyplot, ticker  # noqa: E402

# Okabe and Ito's colours, wine for their yellow, which colour-blind people tell apart; markers and hatches tell the
# same in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#882255", "#000000")
MARKERS = "osD^vP*X"
_STYLE: Any = {
    "font.size": 10, "axes.titlesize": 11, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "figure.dpi": 100,
    "svg.fonttype": "none", "svg.hashsalt": "nemo-engine",
}  # fmt: skip

Plot = tuple[str, Any]  # a name for its file, and the figure


def draw(benchmark: str, records: Sequence[Record], where: str, folder: Path) -> list[str]:
    """Write the plots of one benchmark on one machine and commit, which ``where`` names; returns the names of the files
    without their ends.
    """
    names = []
    with pyplot.rc_context(_STYLE):
        for name, figure in PLOTS.get(benchmark, _nothing)(records):
            lines = textwrap.wrap(where, int(11 * figure.get_figwidth()))
            figure.suptitle("\n".join([figure.get_suptitle(), *lines]), fontsize=11)
            slug = re.sub(r"[^a-z0-9]+", "-", f"{name} {where}".lower()).strip("-")
            for kind, facts in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                figure.savefig(folder / f"{slug}.{kind}", dpi=150, metadata=facts)
            pyplot.close(figure)
            names.append(slug)
    return names


def _nothing(records: Sequence[Record]) -> Iterator[Plot]:
    return iter(())


def _figure(rows: int, columns: int, size: tuple[float, float], title: str, **options: Any) -> tuple[Any, list[Any]]:
    """A figure and its axes in a row; ``draw`` adds to the title where it was measured."""
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    figure.suptitle(title)
    return figure, [axis for line in axes for axis in line]


def _shared_legend(figure: Any, axes: Sequence[Any], columns: int = 4) -> None:
    """One legend below all axes, each label once."""
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(columns, len(handles)))


# ---- throughput


def throughput(records: Sequence[Record]) -> Iterator[Plot]:
    """Bars of each engine's tokens per second, a panel for each run; whiskers from the least to the greatest round."""
    runs = runs_of(records, lambda record: (model_name(record), workload_name(record)))
    engines = sorted(dict.fromkeys(str(record["engine"]) for record in records), key=lambda name: name != OURS)
    names = {str(record["engine"]): engine_name(record) for record in records}
    names |= {str(record["engine"]): engine_name(record) for record in records if record.get("versions")}
    columns = min(3, len(runs))
    lines = math.ceil(len(runs) / columns)
    size = (4.2 * columns + 1.6, (0.42 * len(engines) + 1.1) * lines + 0.9)
    figure, axes = _figure(lines, columns, size, "Offline throughput, median and range of the rounds", sharey=True)
    for axis, run in zip(axes, runs):
        for record in run:
            with blaming(record):
                _throughput_bar(axis, record, engines.index(str(record["engine"])))
        axis.set_title(workload_name(run[0]))
        axis.set_xlabel("output tokens/s")
        axis.set_yticks(range(len(engines)), [names[name] for name in engines])
        axis.grid(visible=False, axis="y")
        axis.margins(x=0.2)
        axis.set_xlim(left=0)
    for axis in axes:
        axis.set_ylim(len(engines) - 0.4, -0.6)
    for axis in axes[len(runs) :]:
        axis.set_axis_off()
    yield "throughput", figure


def _throughput_bar(axis: Any, record: Record, place: int) -> None:
    if record["status"] != "ok":
        axis.text(0, place, f" {record['status']}", va="center", style="italic", color="#555555")
        return
    rates = record["tokens_per_second"]
    median = statistics.median(rates)
    axis.barh(place, median, color=COLOURS[0] if record["engine"] == OURS else "#999999", height=0.65)
    axis.errorbar(median, place, xerr=[[median - min(rates)], [max(rates) - median]], color="black", capsize=3, lw=1)
    axis.annotate(number(median), (max(rates), place), (6, 0), textcoords="offset points", va="center")


# ---- servers


def serve(records: Sequence[Record]) -> Iterator[Plot]:
    """Output tokens per second against median TTFT and ITL: a line for each server, a point for each load; a picture
    for each kind of request.
    """
    kinds: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        with blaming(record):
            kinds.setdefault((workload_name(record).partition(", ")[2], record["route"]), []).append(record)
    # A single load is no line: its numbers are in the table.
    lines = {kind: of_kind for kind, of_kind in kinds.items() if len({_load(record) for record in of_kind}) > 1}
    for index, ((lengths, route), of_kind) in enumerate(lines.items()):
        figure, axes = _figure(
            1, 2, (11, 5), f"Servers under load: {lengths}, {route}; at each point, requests at a time or a second"
        )
        for axis, field, title in zip(axes, ("ttft_s", "itl_s"), ("time to first token", "time between tokens")):
            for place, server in enumerate(dict.fromkeys(str(record["server"]) for record in of_kind)):
                _serve_line(axis, [record for record in of_kind if record["server"] == server], field, place)
            axis.set(xlabel="output tokens/s", ylabel=f"median {title}, ms")
            for low, set_low in ((axis.get_xlim()[1], axis.set_xlim), (axis.get_ylim()[1], axis.set_ylim)):
                set_low(-0.06 * low, 1.05 * low)  # from 0, with room for the labels of low points
        _shared_legend(figure, axes)
        yield f"serve {index + 1}", figure


def _serve_line(axis: Any, records: Sequence[Record], field: str, place: int) -> None:
    points = []
    for record in records:
        with blaming(record):
            if record[field]:
                rate = statistics.median(record["output_tokens_per_second"])
                points.append((_load(record), rate, record[field]["p50"] * 1e3, record))
    points.sort(key=lambda point: point[0])
    if not points:
        return
    style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
    axis.plot([x for _, x, _, _ in points], [y for _, _, y, _ in points], label=points[0][3]["server"], **style)
    beside, side = ((7, -11), "left") if place % 2 == 0 else ((-7, 5), "right")
    for _, x, y, record in points:
        axis.annotate(
            arrivals_name(record).removesuffix(" at a time"), (x, y), beside, textcoords="offset points", fontsize=8,
            ha=side, color=style["color"],
        )  # fmt: skip


def _load(record: Record) -> float:
    arrivals = record["arrivals"]
    return float(arrivals.get("concurrency") or arrivals.get("rate") or 0)


# ---- latency


def latency(records: Sequence[Record]) -> Iterator[Plot]:
    """Milliseconds of a decode step over its context: a line for each batch; dashed, the least by the roofline."""
    decode: dict[str, list[Record]] = {}
    for record in records:
        with blaming(record):
            if record["what"] == "decode" and record["status"] == "ok":
                decode.setdefault(f"{model_name(record)}{precision_name(record)}", []).append(record)
    lines = {name: of_name for name, of_name in decode.items() if len({record["context"] for record in of_name}) > 1}
    for index, (name, of_name) in enumerate(lines.items()):
        figure, (axis,) = _figure(1, 1, (8, 5.5), f"A decode step of {name}")
        for place, batch in enumerate(sorted({record["batch"] for record in of_name})):
            line = sorted((r for r in of_name if r["batch"] == batch), key=lambda record: record["context"])
            colour = COLOURS[place % len(COLOURS)]
            contexts = [record["context"] for record in line]
            steps, least = [record["ms_per_step"] for record in line], [record["roofline_ms"] for record in line]
            label = requests(batch)
            axis.plot(contexts, steps, color=colour, marker=MARKERS[place % len(MARKERS)], label=label)
            axis.plot(contexts, least, color=colour, ls="--", lw=1)
        axis.plot([], [], color="#555555", ls="--", lw=1, label="the least by the roofline")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        _plain_ticks(axis, {record["context"] for record in of_name})
        axis.set(xlabel="context of each request, tokens", ylabel="decode step, ms (median)")
        _shared_legend(figure, [axis])
        yield f"decode {index + 1}", figure


def _plain_ticks(axis: Any, values: set[float]) -> None:
    """Ticks of a logarithmic x axis where something was measured, as plain numbers; y as plain numbers too."""
    axis.set_xticks(
        sorted(values), [f"{value:g}" if value < 10_000 else f"{value / 1024:g}k" for value in sorted(values)]
    )
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


# ---- start-up


def startup(records: Sequence[Record]) -> Iterator[Plot]:
    """A bar for each engine and kind of start, its stages one after another; a picture for each run."""
    for index, run in enumerate(runs_of(records, lambda record: (model_name(record), record["prompt_len"]))):
        figure, (axis,) = _figure(1, 1, (11, 0.6 * len(run) + 2.6), f"Start-up of {model_name(run[0])}, medians")
        looks: dict[str, dict[str, Any]] = {}
        for place, record in enumerate(run):
            with blaming(record):
                _start_bar(axis, record, place, looks)
        axis.set_yticks(range(len(run)), [f"{engine_name(record)}, {record['kind']}" for record in run])
        axis.set_ylim(len(run) - 0.4, -0.6)
        axis.margins(x=0.1)
        axis.set_xlim(left=0)
        axis.grid(visible=False, axis="y")
        axis.set_xlabel("seconds from a new process to the first token")
        _shared_legend(figure, [axis])
        yield f"startup {index + 1}", figure


def _start_bar(axis: Any, record: Record, place: int, looks: dict[str, dict[str, Any]]) -> None:
    if record["status"] != "ok":
        axis.text(0, place, f" {record['status']}", va="center", style="italic", color="#555555")
        return
    stages, totals = stages_of(record), record["total_s"]
    least = 0.02 * sum(stages.values())
    shown = {name: seconds for name, seconds in stages.items() if seconds >= least}
    rest = sum(seconds for seconds in stages.values() if 0 < seconds < least)
    left = 0.0
    for name, seconds in [*shown.items(), *([("stages below 2 % together", rest)] if rest else [])]:
        kind = len(looks)
        hatch = ("", "///", "...", "xxx")[kind // len(COLOURS) % 4]
        look = looks.setdefault(name, {"color": COLOURS[kind % len(COLOURS)], "hatch": hatch, "edgecolor": "white"})
        axis.barh(place, seconds, left=left, height=0.6, label=name, **look)
        left += seconds
    axis.errorbar(
        left,
        place,
        xerr=[[max(0.0, left - min(totals))], [max(0.0, max(totals) - left)]],
        color="black",
        capsize=3,
        lw=1,
    )
    axis.annotate(
        f"{number(statistics.median(totals))} s",
        (max(left, *totals), place),
        (6, 0),
        textcoords="offset points",
        va="center",
    )


# ---- operations


def ops(records: Sequence[Record]) -> Iterator[Plot]:
    """The roofline: operations a second against operations for each byte, below the ceilings that were measured in the
    same run.
    """
    by_ceilings: dict[tuple[float, ...], list[Record]] = {}
    for record in records:
        with blaming(record):
            if record.get("ceilings") and record.get("tflop_per_s") and record.get("gb_per_s"):
                ceilings = record["ceilings"]
                key = tuple(ceilings[name] for name in ("bytes_per_s", "bf16_flops_per_s", "fp8_flops_per_s"))
                by_ceilings.setdefault(key, []).append(record)
    for index, (ceilings, of_machine) in enumerate(by_ceilings.items()):
        names = list(dict.fromkeys(str(record["op"]) for record in of_machine))
        figure, (axis,) = _figure(
            1, 1, (10, max(6.0, 0.24 * len(names) + 1.6)), "Operations below the measured ceilings"
        )
        xs = [record["tflop_per_s"] * 1e3 / record["gb_per_s"] for record in of_machine]
        _ceilings(axis, ceilings, min(xs) / 2, max(max(xs) * 2, 2 * max(ceilings[1:]) / ceilings[0]))
        for record, x in zip(of_machine, xs):
            place = names.index(str(record["op"]))
            colour = COLOURS[place % len(COLOURS)]
            marker = MARKERS[(place + place // len(COLOURS)) % len(MARKERS)]
            fill = "none" if record["is_baseline"] else colour
            axis.scatter(
                x,
                record["tflop_per_s"],
                marker=marker,
                edgecolors=colour,
                facecolors=fill,
                s=34,
                linewidths=1,
                zorder=3,
            )
            axis.scatter([], [], marker=marker, color=colour, label=record["op"])
        axis.scatter([], [], marker="o", edgecolors="#555555", facecolors="none", label="hollow: a baseline")
        axis.set(xscale="log", yscale="log", xlabel="operations for each byte, FLOP/byte", ylabel="TFLOP/s")
        shown = {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
        figure.legend(shown.values(), shown, loc="outside right upper", fontsize=8)
        yield f"roofline {index + 1}", figure


def _ceilings(axis: Any, ceilings: tuple[float, ...], low: float, high: float) -> None:
    bytes_per_s, *rates = ceilings
    for rate, name, style in zip(dict.fromkeys(rates), ("bf16", "FP8"), ("-", "--")):
        label = f"copies {number(bytes_per_s / 1e9)} GB/s,\n{name} products {number(rate / 1e12)} TFLOP/s"
        xs, ys = (low, rate / bytes_per_s, high), (low * bytes_per_s / 1e12, rate / 1e12, rate / 1e12)
        axis.plot(xs, ys, color="black", lw=1.2, ls=style, label=label)


# ---- the scheduler


def scheduler(records: Sequence[Record]) -> Iterator[Plot]:
    """Microseconds of a step over the running requests, a line for each scheduler and page size; whiskers over the
    rounds.
    """
    lines: dict[str, dict[int, Record]] = {}
    for record in records:
        with blaming(record):
            if record.get("status", "ok") == "ok":
                lines.setdefault(scheduler_name(record), {})[record["num_seqs"]] = record  # of several runs, the last
    if not lines:
        return
    figure, (axis,) = _figure(1, 1, (8, 5.5), "Host cost of a decode step")
    for place, (name, points) in enumerate(lines.items()):
        xs = sorted(points)
        medians = [points[x]["median_us"] for x in xs]
        rounds = [points[x].get("round_medians_us") or [points[x]["median_us"]] for x in xs]
        below = [max(0.0, median - min(each)) for median, each in zip(medians, rounds)]
        above = [max(0.0, max(each) - median) for median, each in zip(medians, rounds)]
        style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "capsize": 3}
        axis.errorbar(xs, medians, yerr=[below, above], label=name, **style)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    _plain_ticks(axis, {x for points in lines.values() for x in points})
    axis.set(xlabel="running requests", ylabel="schedule() and commit(), us (median)")
    _shared_legend(figure, [axis], columns=3)
    yield "scheduler", figure


PLOTS: dict[str, Callable[[Sequence[Record]], Iterator[Plot]]] = {
    "throughput": throughput,
    "serve": serve,
    "latency": latency,
    "startup": startup,
    "ops": ops,
    "scheduler": scheduler,
}
