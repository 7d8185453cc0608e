"""Tables of engines and servers as their users see them: throughput, latencies, start-up.

Ratios are made within one run only.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from nemo_engine.benchmarks.report.results import Record, blaming, ratio
from nemo_engine.benchmarks.report.tables import (
    OURS,
    Table,
    engine_name,
    model_name,
    number,
    percentile_pair,
    profile_table,
    requests,
    rows_of,
    runs_of,
    spread,
    times,
    with_times,
    workload_name,
)  # fmt: skip


def throughput(records: Sequence[Record]) -> list[Table]:
    """Engines side by side, a run a row; then all of them with what else was found."""
    runs = runs_of(records, lambda record: (model_name(record), workload_name(record)))
    engines = list(dict.fromkeys(str(record["engine"]) for record in records))
    engines.sort(key=lambda name: name != OURS)
    names = {str(record["engine"]): engine_name(record) for record in records}
    names |= {str(record["engine"]): engine_name(record) for record in records if record.get("versions")}
    rows, details = [], []
    notes: dict[str, list[str]] = {}
    several = len({model_name(record) for record in records}) > 1
    for run in runs:
        by_engine = {str(record["engine"]): record for record in run}
        ours = by_engine.get(OURS)
        first = f"{model_name(run[0])}: {workload_name(run[0])}" if several else workload_name(run[0])
        rows.append((first, *(_throughput_cell(by_engine.get(name), ours) for name in engines)))
        details += [_throughput_row(by_engine[name], ours) for name in engines if name in by_engine]
        for record in run:
            if record["status"] != "ok":
                notes.setdefault(_trouble(record), []).append(workload_name(record))
    models = ", ".join(dict.fromkeys(model_name(record) for record in records))
    return [
        Table(
            f"Offline throughput of {models}: output tokens/s, median of the rounds; in brackets, how many times "
            f"faster {OURS} is, "
            "with a 95 % interval",
            ("workload", *(names[name] for name in engines)),
            tuple(rows),
            tuple(f"{text} ({'; '.join(where)})" for text, where in notes.items()),
        ),
        Table(
            "The same with the spread of the rounds",
            (
                "workload",
                "engine",
                "output tokens/s",
                f"{OURS} is faster by",
                "tokens equal before the first difference",
                "options",
            ),
            tuple(details),
        ),
    ]


def _throughput_cell(record: Record | None, ours: Record | None) -> str:
    if record is None:
        return "not measured"
    with blaming(record):
        if record["status"] != "ok":
            return str(record["status"])
        text = number(statistics.median(record["tokens_per_second"]))
        if ours is None or record is ours or ours["status"] != "ok":
            return text
        return with_times(text, ratio(ours, record, "tokens_per_second"))


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
        "workload",
        "arrivals",
        "server",
        "output tokens/s",
        "the first has more by",
        "TTFT ms, p50 / p99",
        "ITL ms, p50 / p99",
        "TPOT ms, p50 / p99",
        "goodput, requests/s",
        "failed",
    )
    title = (
        "Servers under load, as their clients see them: output tokens/s with the spread of the rounds, and latencies"
    )
    return [Table(title, columns, tuple(rows), tuple(notes))]


def outside_clients(records: Sequence[Record]) -> list[Table]:
    """Servers of one run below one another, as other people's load generators saw them; ratios are those of the first
    against the others.
    """
    rows: list[tuple[str, ...]] = []
    for run in runs_of(records, lambda record: (record["tool"], record["concurrency"])):
        rows += rows_of(run, lambda record, first=run[0]: _outside_row(record, first))
    columns = (
        "load generator",
        "requests",
        "server",
        "output tokens/s",
        "the first has more by",
        "TTFT ms, p50",
        "TTFT ms, p99",
        "ITL ms, p50",
        "ITL ms, p99",
        "failed",
    )
    title = "Servers under other people's load generators: medians with the least and the greatest of the runs"
    return [Table(title, columns, tuple(rows), ())]


def _outside_row(record: Record, first: Record) -> tuple[str, ...]:
    per_request = sum(record["output_tokens"]) / sum(record["requests"])
    is_comparable = record is not first and not sum(record["failed"]) and not sum(first["failed"])
    version = record.get("server_version")
    return (
        str(record["tool"]),
        f"{record['concurrency']} at a time, {sum(record['input_tokens']) / sum(record['requests']):.0f} in, "
        f"{per_request:.0f} out",
        str(record["server"]) + (f" {version}" if version else ""),
        spread(record["output_tokens_per_second"]),
        times(ratio(first, record, "output_tokens_per_second")) if is_comparable else "–",
        *(spread(1e3 * s for s in record[name][level]) for name in ("ttft_s", "itl_s") for level in ("p50", "p99")),
        str(sum(record["failed"])),
    )


def arrivals_name(record: Record) -> str:
    """``16 at a time`` or ``poisson, 8/s``."""
    arrivals = record["arrivals"]
    if arrivals.get("concurrency") is not None:
        return f"{arrivals['concurrency']} at a time"
    if arrivals.get("rate") is None:
        return "as recorded"
    return f"{arrivals.get('arrivals') or 'poisson'}, {float(arrivals['rate']):g}/s"


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


_NOT_STAGES = (
    "to the first token",
    "second answer",
)  # what stands among the stages and is none: their sum, and what follows


def startup(records: Sequence[Record]) -> list[Table]:
    """From a new process to the first token; then the stages, engines beside one another."""
    runs = runs_of(records, lambda record: (model_name(record), record["prompt_len"]))
    rows, notes = [], []
    tables = []
    for run in runs:
        ours = next(
            (record for record in run if (record["engine"], record["kind"], record["status"]) == (OURS, "warm", "ok")),
            None,
        )
        good = [record for record in run if record["status"] == "ok"]
        rows += rows_of(run, lambda record, ours=ours: _startup_row(record, ours))
        notes += [f"{_trouble(record)} ({record['kind']})" for record in run if record["status"] != "ok"]
        tables.append(_stages_table(good))
    columns = ("model", "engine", "start", "checkpoint in the page cache", "seconds to the first token",
               f"{OURS} is faster by", "the longest stages, seconds")  # fmt: skip
    title = "Start-up: from a new process to the first token, medians with the least and the greatest"
    return [Table(title, columns, tuple(rows), tuple(notes)), *(table for table in tables if table.rows)]


def _startup_row(record: Record, ours: Record | None) -> tuple[str, ...]:
    head = (model_name(record), engine_name(record), str(record["kind"]))
    if record["status"] != "ok":
        return (*head, "–", str(record["status"]), "–", "–")
    compared = ours is not None and record["engine"] != OURS
    longest = sorted(stages_of(record).items(), key=lambda stage: -stage[1])[:3]
    return (
        *head,
        f"{statistics.median(record['checkpoint_in_page_cache']):.0%}",
        spread(record["total_s"]),
        times(ratio(record, ours, "total_s")) if compared and ours is not None else "–",
        ", ".join(f"{name} {number(seconds)}" for name, seconds in longest),
    )


def stages_of(record: Record) -> dict[str, float]:
    """Median seconds of each stage up to the first token, in order."""
    return {name: statistics.median(every) for name, every in record["stages"].items() if name not in _NOT_STAGES}


def _stages_table(records: Sequence[Record]) -> Table:
    of = [stages_of(record) for record in records]
    names = dict.fromkeys(name for stages in of for name in stages)
    rows = tuple((name, *(number(stages.get(name)) for stages in of)) for name in names)
    columns = ("stage, median seconds", *(f"{engine_name(record)}, {record['kind']}" for record in records))
    return Table(f"Stages of a start of {model_name(records[0])}" if records else "", columns, rows)


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


def latency(records: Sequence[Record]) -> list[Table]:
    """Whole requests; decode steps, contexts below and batches beside one another; where the time of a step goes, where
    that was measured.
    """
    kinds: dict[str, list[Record]] = {"start": [], "request": [], "decode": []}
    for record in records:
        with blaming(record):
            kinds[record["what"]].append(record)
    started = tuple(f"{record['engine']} {record['status']}: {record.get('error')}" for record in kinds["start"])
    tables = []
    if kinds["request"]:
        columns = (
            "model",
            "requests",
            "in",
            "out",
            "engine",
            "TTFT, ms",
            "ITL, ms",
            "TPOT, ms",
            "end to end, ms",
            "output tokens/s",
            "of the roofline: prompts, steps",
            f"{OURS} is faster by: TTFT, end to end",
            "J a token",
        )
        title = "Latency of requests that arrive at once: medians, with the least and the greatest median of a round"
        tables.append(
            Table(title, columns, rows_of(kinds["request"], _request_row), (*started, *_failures(kinds["request"])))
        )
    groups: dict[str, list[Record]] = {}
    for record in kinds["decode"]:
        with blaming(record):
            groups.setdefault(f"{model_name(record)}{precision_name(record)}", []).append(record)
    tables += [_decode_table(name, of) for name, of in groups.items()]
    for record in records:
        with blaming(record):
            if record.get("profile"):
                where = (
                    f"at {record['context']} tokens"
                    if record["what"] == "decode"
                    else f"of {record['input']} in, {record['output']} out"
                )
                title = f"Where a decode step of {model_name(record)} goes, {requests(record['batch'])} {where}"
                tables.append(profile_table(record, title))
    return tables


def precision_name(record: Record) -> str:
    """Options that change what is computed, in brackets."""
    options = record["options"]
    shown = [f"{name} {options[name]}" for name in ("dtype", "quantization", "kv_cache_dtype") if options.get(name)]
    return f" ({', '.join(shown)})" if shown else ""


def _failures(records: Sequence[Record]) -> list[str]:
    bad = [record for record in records if record["status"] != "ok"]
    return [
        f"{record['engine']} {record['status']}, {requests(record['batch'])}: {record.get('error')}" for record in bad
    ]


def _request_row(record: Record) -> tuple[str, ...]:
    head = (
        model_name(record) + precision_name(record),
        *(str(record[name]) for name in ("batch", "input", "output", "engine")),
    )
    if record["status"] != "ok":
        return (*head, str(record["status"]), *["–"] * 7)
    fractions = [record.get(name) for name in ("prefill_fraction", "fraction")]
    faster = [record.get(f"nemo_engine_{name}_faster_by") for name in ("ttft", "e2e")]
    return (
        *head,
        *(_summary(record.get(f"{name}_s"), 1e3) for name in ("ttft", "itl", "tpot", "e2e")),
        _summary(record["tokens_per_s"], 1.0),
        ", ".join("–" if each is None else f"{each:.0%}" for each in fractions) if any(fractions) else "–",
        ", ".join("–" if each is None else f"{each['median']:.2f}x" for each in faster) if any(faster) else "–",
        number(record.get("joules_per_token")),
    )


def _summary(of: Record | None, scale: float) -> str:
    if of is None:
        return "–"
    return f"{number(of['median'] * scale)} ({number(of['low'] * scale)} to {number(of['high'] * scale)})"


def _decode_table(name: str, records: Sequence[Record]) -> Table:
    batches = sorted({record["batch"] for record in records})
    cells = {}
    for record in records:
        with blaming(record):
            is_ok = record["status"] == "ok"
            text = f"{number(record['ms_per_step'])} ({record['fraction']:.0%})" if is_ok else str(record["status"])
            cells[record["context"], record["batch"]] = text
    rows = [
        (str(context), *(cells.get((context, batch), "–") for batch in batches))
        for context in sorted({record["context"] for record in records})
    ]
    columns = ("context, tokens", *map(requests, batches))
    title = f"A decode step of {name}: median ms (and the share of the roofline)"
    return Table(title, columns, tuple(rows), tuple(_failures(records)))
