"""What tables of results are made of: a Markdown table, how numbers, engines and workloads are written, and which
results are of one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_engine.benchmarks.report.results import Ratio, Record, Spread, blaming, same_run
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
    numbers = list(values)
    of = Spread.of(numbers)
    return number(of.median) + (f" ({number(of.low)} to {number(of.high)})" if len(numbers) > 1 else "")


def times(of: Ratio) -> str:
    """The text of a ratio with its interval: ``4.6x (3.8 to 5.0)``."""
    digits = 1 if of.median >= 3 else 2
    return f"{of.median:.{digits}f}x ({of.low:.{digits}f} to {of.high:.{digits}f})"


def with_times(text: str, of: Ratio) -> str:
    """A number with a ratio in brackets: ``483 (4.6x: 3.8 to 5.0)``."""
    return f"{text} ({times(of).replace(' (', ': ')}"


def percentile_pair(values: dict[str, float], scale: float = 1e3) -> str:
    """The 50th and the 99th percentile, in milliseconds if they are seconds."""
    return f"{number(values['p50'] * scale)} / {number(values['p99'] * scale)}" if values else "–"


def engine_name(record: Record) -> str:
    """With the version of what computes, where the line says it."""
    engine = str(record["engine"])
    for package, version in record.get("versions", {}).items():
        if package not in ("torch", "python"):
            return engine if engine == OURS else f"{engine} {version}"
    return engine


def model_name(record: Record) -> str:
    """Without the folders of the machine."""
    return Path(str(record["model"])).name


def requests(count: int) -> str:
    """``1 request``, ``2 requests``."""
    return f"{count} request{'s' if count != 1 else ''}"


def workload_name(record: Record) -> str:
    """Requests, and tokens in and out; or the name of the workload's file."""
    workload = record["workload"]
    source, counted = str(workload["source"]), requests(int(workload["requests"]))
    if record.get("concurrency") is not None:  # of bench throughput
        counted += f", {record['concurrency']} at once"
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
    runs: dict[Any, list[Record]] = {}
    for record in records:
        with blaming(record):
            runs.setdefault((same_run(record), key(record)), []).append(record)
    return list(runs.values())


def rows_of(records: Iterable[Record], row: Callable[[Record], tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """A row per result."""
    rows = []
    for record in records:
        with blaming(record):
            rows.append(row(record))
    return tuple(rows)


def profile_table(record: Record, title: str) -> Table:
    """Where the time of a step goes."""
    rows = tuple(
        (str(row["stage"]), number(row["us_per_step"]), f"{row['share']:.1%}", number(row["calls_per_step"]))
        for row in record["profile"]
    )
    with_timers, without = (number(record[f"{name}_us_per_step"]) for name in ("profiled", "unprofiled"))
    note = f"A step takes {with_timers} us with the timers, {without} us without."
    return Table(title, ("stage", "us a step", "share", "calls a step"), rows, (note,))


# ---- what has no table of its own


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
