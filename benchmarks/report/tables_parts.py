"""Tables of parts of the engine: operations, the scheduler, structured outputs, the simulator.

Ratios are made within one run only.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from nemo_engine.benchmarks.report.results import Ratio, Record, blaming, ratio
from nemo_engine.benchmarks.report.tables import (
    OURS,
    Table,
    engine_name,
    model_name,
    number,
    profile_table,
    requests,
    rows_of,
    runs_of,
    with_times,
)  # fmt: skip


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


def speculation(records: Sequence[Record]) -> list[Table]:
    """What drafts gain by text and number of streams, in each engine that ran."""
    engines = list(dict.fromkeys(engine for record in records for engine in record["versions"]))

    def row(record: Record) -> tuple[str, ...]:
        cells: list[str] = []
        for engine in engines:
            if engine not in record["versions"]:
                cells += ["not measured"] * 2
                continue
            without, drafting = (record["tokens_per_second"][name] for name in (engine, f"{engine} drafting"))
            gain = Ratio.paired(drafting, without)
            cells += [number(statistics.median(without)), with_times(number(statistics.median(drafting)), gain)]
        return (str(record["text"]), str(record["streams"]), number(record["tokens_per_step"]), *cells)

    names = [f"{engine}, {how}" for engine in engines for how in ("without", "with drafts")]
    title = (
        f"Drafts looked up in a request's own text, {', '.join(dict.fromkeys(map(model_name, records)))}: output "
        "tokens/s, median of the rounds; in brackets, what the same engine gains by them"
    )
    columns = ("text", "streams", f"{OURS}: tokens of a row in a step", *names)
    return [Table(title, columns, rows_of(records, row))]


def validate_simulator(records: Sequence[Record]) -> list[Table]:
    """Predicted against measured."""
    rows, notes = [], []
    for record in records:
        with blaming(record):
            for work in record["workloads"]:
                measured, predicted = work["measured"], work["predicted"]
                rows.append((
                    f"{work['requests']} requests, {work['workload']}", number(measured["tokens_per_s"]),
                    number(predicted["tokens_per_s"]), f"{work['throughput_error']:+.1%}",
                    number(measured["median_ttft_s"] * 1e3), number(predicted["median_ttft_s"] * 1e3),
                    f"{work['ttft_error']:+.1%}",
                ))  # fmt: skip
            verdict = "within" if record["is_within_limits"] else "NOT within"
            limits = (
                f"{record['most_throughput_error']:.0%} of throughput, {record['most_ttft_error']:.0%} of TTFT under "
                "arrivals"
            )
            notes.append(f"{model_name(record)}: {verdict} the limits ({limits})")
    columns = ("unseen workload", "tokens/s", "predicted", "error", "median TTFT, ms", "predicted", "error")
    return [Table("The simulator's predictions against the engine", columns, tuple(rows), tuple(notes))]


def ops(records: Sequence[Record]) -> list[Table]:
    """A table for each operation: implementations and baselines at each size."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        with blaming(record):
            groups.setdefault(str(record["op"]), []).append(record)
    columns = (
        "size",
        "implementation (* a baseline)",
        "us",
        "GB/s",
        "TFLOP/s",
        "of the roofline",
        "against the best baseline",
        "trouble",
    )
    return [Table(f"Operation {name}", columns, rows_of(of, _op_row)) for name, of in groups.items()]


def _op_row(record: Record) -> tuple[str, ...]:
    speedup, fraction = record.get("speedup"), record.get("fraction")
    return (
        str(record["size"]),
        f"{record['implementation']}{' *' if record['is_baseline'] else ''}",
        *(number(record.get(name)) for name in ("us", "gb_per_s", "tflop_per_s")),
        "–" if fraction is None else f"{fraction:.0%}",
        "–" if speedup is None else f"{speedup:.2f}x",
        f"failed: {record['error']}" if record.get("error") else "",
    )


def scheduler(records: Sequence[Record]) -> list[Table]:
    """Running requests below one another, page sizes and vLLM's scheduler beside one another; all percentiles;
    profiles.
    """
    kinds = list(dict.fromkeys(kind for record in records for kind in [_scheduler_kind(record)]))
    kinds.sort(key=lambda kind: kind[0] != OURS)
    names = {_scheduler_kind(record): scheduler_name(record) for record in records}
    names |= {_scheduler_kind(record): scheduler_name(record) for record in records if record.get("versions")}
    rows, notes = [], []
    for run in runs_of(records, lambda record: (record["num_seqs"], record["prompt_len"])):
        by_kind = {_scheduler_kind(record): record for record in run}
        peer = next((record for kind, record in by_kind.items() if kind[0] != OURS), None)
        rows.append((str(run[0]["num_seqs"]), *(_scheduler_cell(by_kind.get(kind), peer) for kind in kinds)))
        notes += [
            f"{record['engine']} {record['status']}, {requests(record['num_seqs'])}: {record.get('error')}"
            for record in run
            if record.get("status", "ok") != "ok"
        ]
    lengths = " or ".join(dict.fromkeys(str(record["prompt_len"]) for record in records))
    is_against = any(kind[0] != OURS for kind in kinds)
    against = "; in brackets, how many times less than vLLM's scheduler, with a 95 % interval" if is_against else ""
    tables = [
        Table(
            f"Host cost of a decode step, prompts of {lengths} tokens: median us of `schedule()` and `commit()` "
            f"together{against}",
            ("running requests", *(names[kind] for kind in kinds)),
            tuple(rows),
            tuple(notes),
        ),
        Table(
            "The same with the spread of the rounds",
            ("running requests", "scheduler", "median us", "90th percentile", "99th percentile", "us for each request"),
            rows_of([record for record in records if record.get("status", "ok") == "ok"], _scheduler_row),
        ),
    ]
    for record in records:
        with blaming(record):
            if record.get("profile"):
                title = f"Where the scheduler's time goes, {requests(record['num_seqs'])}, {scheduler_name(record)}"
                tables.append(profile_table(record, title))
    return tables


def _scheduler_kind(record: Record) -> tuple[str, int]:
    with blaming(record):
        return str(record.get("engine", OURS)), int(record["page_size"])


def scheduler_name(record: Record) -> str:
    """Engine, version and page size. The oldest lines name no engine: they are ours."""
    return f"{engine_name({'engine': OURS, **record})}, pages of {record['page_size']}"


def _scheduler_cell(record: Record | None, peer: Record | None) -> str:
    if record is None:
        return "not measured"
    with blaming(record):
        if record.get("status", "ok") != "ok":
            return str(record["status"])
        text = number(record["median_us"])
        if peer is None or record is peer or peer["status"] != "ok":
            return text
        return with_times(text, ratio(peer, record, "round_medians_us"))


def _scheduler_row(record: Record) -> tuple[str, ...]:
    rounds = record.get("round_medians_us", [])
    between = f" ({number(min(rounds))} to {number(max(rounds))})" if len(rounds) > 1 else ""
    return (
        str(record["num_seqs"]),
        scheduler_name(record),
        number(record["median_us"]) + between,
        number(record["p90_us"]),
        number(record["p99_us"]),
        number(record["median_us"] / record["num_seqs"]),
    )
