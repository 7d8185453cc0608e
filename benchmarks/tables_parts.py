"""Tables of parts of the engine: operations, the scheduler, structured outputs, the simulator. Ratios are made within one run only."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_engine.benchmarks.results import Record, blaming
from nemo_engine.benchmarks.tables import Table, model_name, number, rows_of


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


def ops(records: Sequence[Record]) -> list[Table]:
    """A table for each operation: implementations and baselines at each size."""
    found: dict[str, list[Record]] = {}
    for record in records:
        with blaming(record):
            found.setdefault(str(record["op"]), []).append(record)
    columns = ("size", "implementation (* a baseline)", "us", "GB/s", "TFLOP/s", "of the roofline", "against the best baseline",
               "trouble")  # fmt: skip
    return [Table(f"Operation {name}", columns, rows_of(of, _op_row)) for name, of in found.items()]


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
