"""``nemo-engine bench report``: a folder of results as tables and plots, and as the section of docs/results.md.

Every ``*.jsonl`` of the folder is read; a line that is no result is refused with its file and number. Results stand
under their machine and commit, and ratios are made within one run only. ``--out`` writes report.md and the plots (PNG
and SVG, needs matplotlib); ``--section`` rewrites what stands between the two marks in a file and touches nothing
else.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_engine.benchmarks.report import tables_engines, tables_parts
from nemo_engine.benchmarks.report.results import Record, read, same_machine, same_place
from nemo_engine.benchmarks.report.tables import Table, anything

BEGIN = "<!-- measured: begin; made by `nemo-engine bench report --section docs/results.md` from benchmarks/results -->"
END = "<!-- measured: end -->"
# What the section shows, in this order: the first table of each, of the newest commit on each machine.
SECTION_SHOWS = (
    "throughput",
    "serve",
    "outside_clients",
    "scheduler",
    "startup",
    "structured",
    "speculation",
    "validate_simulator",
)


TABLES: dict[str, Callable[[Sequence[Record]], list[Table]]] = {
    "throughput": tables_engines.throughput,
    "serve": tables_engines.serve,
    "outside_clients": tables_engines.outside_clients,
    "latency": tables_engines.latency,
    "startup": tables_engines.startup,
    "server_overhead": tables_engines.server_overhead,
    "ops": tables_parts.ops,
    "scheduler": tables_parts.scheduler,
    "structured": tables_parts.structured,
    "speculation": tables_parts.speculation,
    "validate_simulator": tables_parts.validate_simulator,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the report."""
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("benchmarks/results"), metavar="FOLDER",
        help="results, *.jsonl, or one such file [%(default)s]",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.md and plots there (extra plot)")
    parser.add_argument("--section", type=Path, metavar="FILE", help="make the measured section of FILE anew")


def run(args: argparse.Namespace) -> int:
    """Print the tables, and write what is asked for."""
    if args.out is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("bench report --out draws with matplotlib: pip install 'nemo-engine[plot]'")
    records = read(args.folder)
    if not records:
        raise ValueError(f"{args.folder}: there is no *.jsonl with results in it")
    text = report(records)
    written = (
        None if args.section is None else with_section(args.section, section_of(records, args.folder, args.section))
    )
    print(text, end="")
    if args.out is not None:
        from nemo_engine.benchmarks.report.plots import draw

        args.out.mkdir(parents=True, exist_ok=True)
        names = [
            name for group in groups_of(records) for name in draw(group.benchmark, group.records, group.where, args.out)
        ]
        pictures = "".join(f"\n![{name}]({name}.svg)\n" for name in names)
        (args.out / "report.md").write_text(text + ("\n## Plots\n" + pictures if names else ""), encoding="utf-8")
        print(f"\n{args.out / 'report.md'}: {len(names)} plots")
    if written is not None:
        args.section.write_text(written, encoding="utf-8")
        print(f"\n{args.section}: its measured section is up to date")
    return 0


@dataclass(frozen=True, slots=True)
class Group:
    """Results of one benchmark from one machine and one commit."""

    benchmark: str
    records: list[Record]

    @property
    def machine(self) -> str:
        """GPU, CPU, cores and memory in words."""
        first = self.records[0]
        words = [str(first["gpu"])] if first.get("gpu") else []
        cores = str(first.get("cores"))
        if first.get("usable_cores") not in (None, first.get("cores")):
            cores = f"{first['usable_cores']} of {cores}"
        words += [str(first["cpu"]), f"{cores} cores"]
        return ", ".join([*words, *([f"{first['memory_gib']} GiB"] if first.get("memory_gib") else [])])

    @property
    def commit(self) -> str:
        """The commit of the code that was measured."""
        return str(self.records[0]["commit"])

    @property
    def dates(self) -> str:
        """The day, or the first and the last one."""
        days = sorted({str(record["date"])[:10] for record in self.records})
        return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"

    @property
    def newest(self) -> str:
        """When the last of them was measured."""
        return max(str(record["date"]) for record in self.records)

    @property
    def files(self) -> list[str]:
        """Where they stand."""
        return list(dict.fromkeys(str(record["file"]) for record in self.records))

    @property
    def where(self) -> str:
        """Machine, commit and date in a line."""
        return f"{self.machine} · commit {self.commit} · {self.dates}"

    def tables(self) -> list[Table]:
        """What they say; the first is the most telling."""
        return TABLES.get(self.benchmark, anything)(self.records)


def groups_of(records: Sequence[Record]) -> list[Group]:
    """By benchmark, machine and commit; those that the section shows come first, the newest results last."""
    groups: dict[object, Group] = {}
    for record in records:
        key = (record["benchmark"], same_place(record))
        groups.setdefault(key, Group(str(record["benchmark"]), [])).records.append(record)
    order = {name: index for index, name in enumerate(SECTION_SHOWS)}
    return sorted(
        groups.values(), key=lambda group: (order.get(group.benchmark, len(order)), group.benchmark, group.newest)
    )


def report(records: Sequence[Record]) -> str:
    """All tables, as Markdown."""
    parts, last = ["# Measured\n"], None
    for group in groups_of(records):
        if group.benchmark != last:
            parts.append(f"## {group.benchmark}\n")
            last = group.benchmark
        parts.append(f"### {group.where}\n")
        parts.append(f"{', '.join(group.files)}\n")
        parts += [table.markdown() for table in group.tables()]
    return "\n".join(parts)


def section_of(records: Sequence[Record], folder: Path, target: Path) -> str:
    """The results in ``folder``: the first table of each benchmark, from each machine's newest commit."""
    newest: dict[object, Group] = {}
    for group in groups_of(records):
        if group.benchmark in SECTION_SHOWS:
            newest[group.benchmark, same_machine(group.records[0])] = group
    base = os.path.relpath(folder if folder.is_dir() else folder.parent, target.parent)
    parts = []
    for group in newest.values():
        links = ", ".join(f"[{name}]({Path(base).as_posix()}/{name})" for name in group.files)
        parts += [group.tables()[0].markdown(), f"{links} · {group.where}\n"]
    return "\n".join(parts)


def with_section(target: Path, section: str) -> str:
    """The text of file ``target`` with ``section`` between its marks.

    ``ValueError`` if they are not there once each, in order.
    """
    text = target.read_text(encoding="utf-8")
    match = re.fullmatch(f"(.*{re.escape(BEGIN)}\n).*({re.escape(END)}\n.*)", text, re.DOTALL)
    if match is None or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(
            f"{target}: the marks of the measured section must stand there, each once on its line: {BEGIN} and {END}"
        )
    return f"{match[1]}\n{section}\n{match[2]}"
