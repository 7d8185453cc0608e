"""Results as Markdown tables: what each benchmark's lines say, a row per measurement; ratios within one run only."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_engine.benchmarks.results import Ratio, Record, Spread, blaming, ratio, same_run
from nemo_engine.workload import WorkloadSpec

OURS = "nemo_engine"
# Fields of every line that say where it comes from, not what was found.
PROVENANCE = ("benchmark", "file", "line", "cpu", "cores", "usable_cores", "memory_gib", "gpu", "gpu_driver",
              "gpu_clocks_mhz", "python", "torch", "triton", "nemo-engine", "commit", "command", "date")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Table:
    """A title, columns and rows, and what is to be said below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """As GitHub shows it: the title in bold, the first column to the left, the others to the right."""
        lines = [f"**{self.title}**", "", _line(self.columns), "|---|" + "---:|" * (len(self.columns) - 1)]
        lines += [_line(row) for row in self.rows]
        for note in self.notes:
            lines += ["", _cell(note)]
        return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# ---- numbers and names


def number(value: float | None) -> str:
    """Three significant digits, and all digits before the point; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: Iterable[float]) -> str:
    """Median, and the least to the greatest if they are several."""
    found = list(values)
    of = Spread.of(found)
    return number(of.median) + (f" ({number(of.low)} to {number(of.high)})" if len(found) > 1 else "")


def times(of: Ratio) -> str:
    """Of a ratio with its interval: ``4.6x (3.8 to 5.0)``."""
    digits = 1 if of.median >= 3 else 2
    return f"{of.median:.{digits}f}x ({of.low:.{digits}f} to {of.high:.{digits}f})"


def percentile_pair(values: dict[str, float], scale: float = 1e3) -> str:
    """The 50th and the 99th percentile, in milliseconds if they are seconds."""
    return f"{number(values['p50'] * scale)} / {number(values['p99'] * scale)}" if values else "–"


def engine_name(record: Record) -> str:
    """With the version of what computes, where the line says it."""
    engine = str(record["engine"])
    for package, version in record.get("versions", {}).items():
        if package != "torch":
            return engine if engine == OURS else f"{engine} {version}"
    return engine


def model_name(record: Record) -> str:
    """Without the folders of the machine."""
    return Path(str(record["model"])).name


def workload_name(record: Record) -> str:
    """Requests, and tokens in and out; or the name of the workload's file."""
    workload = record["workload"]
    source, requests = str(workload["source"]), int(workload["requests"])
    counted = f"{requests} request{'s' if requests != 1 else ''}"
    try:
        spec = WorkloadSpec.parse_text(source, "")
    except ValueError:
        return f"{counted}, {Path(source).name}"
    words = [counted, f"{_lengths(spec.input)} in", f"{_lengths(spec.output)} out"]
    if spec.prefixes:
        words.append(f"{spec.prefixes} prefixes of {spec.prefix_tokens}")
    if spec.turns.numbers != (1.0,):
        words.append(f"{_lengths(spec.turns)} turns")
    return ", ".join(words)


def _lengths(of: Any) -> str:
    texts = [f"{value:g}" for value in of.numbers]
    if of.kind == "constant":
        return texts[0]
    if of.kind == "uniform":
        return " to ".join(texts)
    return " or ".join(texts) if of.kind == "choice" else f"{of.kind} {texts[0]}"


def runs_of(records: Sequence[Record], key: Callable[[Record], Any]) -> list[list[Record]]:
    """Results of one run and one ``key`` together, in the order of the file."""
    found: dict[Any, list[Record]] = {}
    for record in records:
        with blaming(record):
            found.setdefault((same_run(record), key(record)), []).append(record)
    return list(found.values())


def rows_of(records: Iterable[Record], row: Callable[[Record], tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """A row per result."""
    rows = []
    for record in records:
        with blaming(record):
            rows.append(row(record))
    return tuple(rows)


# ---- the benchmarks


def throughput(records: Sequence[Record]) -> list[Table]:
    """Engines side by side, a run a row; then all of them with what else was found."""
    runs = runs_of(records, lambda record: (model_name(record), workload_name(record)))
    engines = list(dict.fromkeys(str(record["engine"]) for record in records))
    engines.sort(key=lambda name: name != OURS)
    names = {str(record["engine"]): engine_name(record) for record in records}
    names |= {str(record["engine"]): engine_name(record) for record in records if record.get("versions")}
    rows, details = [], []
    notes: dict[str, list[str]] = {}
    for run in runs:
        by_engine = {str(record["engine"]): record for record in run}
        ours = by_engine.get(OURS)
        rows.append((workload_name(run[0]), *(_throughput_cell(by_engine.get(name), ours) for name in engines)))
        details += [_throughput_row(by_engine[name], ours) for name in engines if name in by_engine]
        for record in run:
            if record["status"] != "ok":
                notes.setdefault(_trouble(record), []).append(workload_name(record))
    models = ", ".join(dict.fromkeys(model_name(record) for record in records))
    return [
        Table(
            f"Offline throughput of {models}: output tokens/s, median of the rounds; in brackets, how many times faster {OURS} is, "
            "with a 95 % interval",
            ("workload", *(names[name] for name in engines)),
            tuple(rows),
            tuple(f"{text} ({'; '.join(where)})" for text, where in notes.items()),
        ),
        Table(
            "The same with the spread of the rounds",
            ("workload", "engine", "output tokens/s", f"{OURS} is faster by", "tokens equal before the first difference",
             "options"),
            tuple(details),
        ),
    ]  # fmt: skip


def _throughput_cell(record: Record | None, ours: Record | None) -> str:
    if record is None:
        return "not measured"
    with blaming(record):
        if record["status"] != "ok":
            return str(record["status"])
        text = number(statistics.median(record["tokens_per_second"]))
        if ours is None or record is ours or ours["status"] != "ok":
            return text
        of = ratio(ours, record, "tokens_per_second")
        return f"{text} ({times(of).replace(' (', ': ')}"


def _throughput_row(record: Record, ours: Record | None) -> tuple[str, ...]:
    with blaming(record):
        options = ", ".join(f"{name}={value}" for name, value in record.get("options", {}).items())
        head = (workload_name(record), engine_name(record))
        if record["status"] != "ok":
            return (*head, str(record["status"]), "–", "–", options)
        equal = record.get("equal_before_first_difference")
        compared = ours is not None and record is not ours and ours["status"] == "ok"
        return (
            *head,
            spread(record["tokens_per_second"]),
            times(ratio(ours, record, "tokens_per_second")) if compared and ours is not None else "–",
            "–" if equal is None else f"{equal:.1%}",
            options,
        )


def _trouble(record: Record) -> str:
    return f"{record['engine']} {record['status']}: {record.get('error') or 'no reason is known'}"


def serve(records: Sequence[Record]) -> list[Table]:
    """Servers of one run below one another; ratios are those of the first against the others."""
    rows, notes = [], []
    for run in runs_of(records, lambda record: (workload_name(record), arrivals_name(record), record["route"])):
        for record in run:
            rows += rows_of([record], lambda record, first=run[0]: _serve_row(record, first))
            if record["errors"]:
                first = (record.get("first_errors") or ["no reason is known"])[0]
                notes.append(f"{record['server']} ({arrivals_name(record)}): {record['errors']} failed, first: {first}")
    columns = (
        "workload", "arrivals", "server", "output tokens/s", "the first has more by", "TTFT ms, p50 / p99", "ITL ms, p50 / p99",
        "TPOT ms, p50 / p99", "goodput, requests/s", "failed",
    )  # fmt: skip
    title = (
        "Servers under load, as their clients see them: output tokens/s with the spread of the rounds, and latencies"
    )
    return [Table(title, columns, tuple(rows), tuple(notes))]


def arrivals_name(record: Record) -> str:
    """``16 at a time`` or ``poisson, 8/s``."""
    arrivals = record["arrivals"]
    if arrivals.get("concurrency") is not None:
        return f"{arrivals['concurrency']} at a time"
    if arrivals.get("rate") is None:
        return "as recorded"
    return f"{arrivals.get('arrivals') or 'poisson'}, {arrivals['rate']:g}/s"


def _serve_row(record: Record, first: Record) -> tuple[str, ...]:
    slo = record["slo"]
    limits = [f"{name} {slo[key] * 1e3:g} ms" for key, name in (("ttft_s", "TTFT"), ("itl_s", "ITL")) if slo.get(key)]
    rates = record["output_tokens_per_second"]
    is_compared = record is not first and all(rates) and not record["errors"] and not first["errors"]
    return (
        workload_name(record),
        arrivals_name(record),
        str(record["server"]),
        spread(rates),
        times(ratio(first, record, "output_tokens_per_second")) if is_compared else "–",
        percentile_pair(record["ttft_s"]),
        percentile_pair(record["itl_s"]),
        percentile_pair(record["tpot_s"]),
        f"{spread(record['goodput_requests_per_second'])} within {', '.join(limits)}" if limits else "–",
        str(record["errors"]),
    )


def server_overhead(records: Sequence[Record]) -> list[Table]:
    """The HTTP server against the engine in its process."""

    def row(record: Record) -> tuple[str, ...]:
        work, rates = record["workload"], record["tokens_per_second"]
        return (
            f"{work['concurrency']} at a time, {work['prompt_tokens']} in, {work['new_tokens']} out",
            spread(rates["in process"]),
            spread(rates["over HTTP"]),
            spread(record["ratio"]),
        )

    columns = ("requests", "AsyncEngine in process, tokens/s", "the server over HTTP, tokens/s", "share")
    return [Table("What streaming over HTTP costs", columns, rows_of(records, row))]


def structured(records: Sequence[Record]) -> list[Table]:
    """Grammars; then masks applied to logits."""
    forms = [record for record in records if "form" in record]
    applied = [record for record in records if "rows" in record]
    sizes = ", ".join(dict.fromkeys(text for (text,) in rows_of(records, lambda record: (str(record["vocab_size"]),))))
    tables = []
    if forms:
        rows = rows_of(forms, lambda record: (record["form"], *(number(record[name]) for name in
                       ("mask_us", "mask_p99_us", "accept_us", "first_ms"))))  # fmt: skip
        columns = ("form", "mask, median us", "99th percentile, us", "accept a token, us", "first compilation, ms")
        tables.append(Table(f"Structured outputs over {sizes} tokens, on the host", columns, rows))
    if applied:
        rows = rows_of(applied, lambda record: (str(record["rows"]), number(record["apply_us"])))
        tables.append(Table("Masks applied to logits by the CPU", ("rows", "median us"), rows))
    return tables


def validate_simulator(records: Sequence[Record]) -> list[Table]:
    """Predicted against measured."""
    rows, notes = [], []
    for record in records:
        with blaming(record):
            for work in record["workloads"]:
                measured, predicted = work["measured"], work["predicted"]
                rows.append((
                    f"{work['requests']} requests, {work['workload']}",
                    number(measured["tokens_per_s"]), number(predicted["tokens_per_s"]), f"{work['throughput_error']:+.1%}",
                    number(measured["median_ttft_s"] * 1e3), number(predicted["median_ttft_s"] * 1e3),
                    f"{work['ttft_error']:+.1%}",
                ))  # fmt: skip
            verdict = "within" if record["is_within_limits"] else "NOT within"
            limits = f"{record['most_throughput_error']:.0%} of throughput, {record['most_ttft_error']:.0%} of TTFT under arrivals"
            notes.append(f"{model_name(record)}: {verdict} the limits ({limits})")
    columns = ("unseen workload", "tokens/s", "predicted", "error", "median TTFT, ms", "predicted", "error")
    return [Table("The simulator's predictions against the engine", columns, tuple(rows), tuple(notes))]


def anything(records: Sequence[Record]) -> list[Table]:
    """Every field that is a number or a text, for benchmarks without a table of their own."""
    kept: dict[str, None] = {}
    for record in records:
        kept |= {k: None for k, v in record.items() if k not in PROVENANCE and isinstance(v, str | int | float)}
    names = list(kept)
    rows = rows_of(records, lambda record: tuple(_any_cell(record.get(name)) for name in names))
    return [Table(str(records[0]["benchmark"]), tuple(names), rows)] if names else []


def _any_cell(value: object) -> str:
    if isinstance(value, float):
        return number(value)
    return "–" if value is None or isinstance(value, dict | list) else str(value)


TABLES: dict[str, Callable[[Sequence[Record]], list[Table]]] = {
    "throughput": throughput,
    "serve": serve,
    "server_overhead": server_overhead,
    "structured": structured,
    "validate_simulator": validate_simulator,
}


def tables_of(benchmark: str, records: Sequence[Record]) -> list[Table]:
    """The tables of one benchmark's results, all of one machine and commit; the first is the most telling."""
    return TABLES.get(benchmark, anything)(records)
