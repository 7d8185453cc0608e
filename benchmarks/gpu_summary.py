"""What the results of a run on a GPU say: what is known and what is not, which implementations fail, and the files for
benchmarks/results/.

Standard library only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_stages import Stage, stage_of_op
from benchmarks.provenance import append_record, read_records

Record = Mapping[str, Any]
_SHOWN = (
    "kernels_us_per_step",
    "ms_per_step",
    "fraction",
    "tokens_per_s",
    "output_tokens_per_s",
    "prefill_fraction",
    "gb_per_s",
    "tflop_per_s",
)
# What every line of a stored file says of the machine; those of the tests and of the stages leave it to the run's line.
PLACE = ("cpu", "cores", "usable_cores", "memory_gib", "gpu", "gpu_driver", "python", "commit", "command", "date")
_GOOD = ("ok", "passed")


def last_by_key(records: Sequence[Record]) -> dict[str, Record]:
    """The newest record of each key; one that is not of an operation's benchmark has one."""
    last: dict[str, Record] = {}
    for record in records:
        if record.get("benchmark") == "ops":
            key = f"{stage_of_op(str(record.get('op')))} {record.get('op')}"
            record = {"status": "ok", **record}
        else:
            key = str(record.get("key", ""))
        if key:
            last[key] = record
    return last


def failing_implementations(records: Sequence[Record], all_failures: bool) -> dict[str, list[str]]:
    """{operation: implementations that fail}, by the tests: those that crash, hang or spoil the device, or
    ``all_failures``.
    """
    failing: dict[str, set[str]] = {}
    for key, record in last_by_key(records).items():
        is_bad = record.get("status") == "crashed" or all_failures and record.get("status") == "failed"
        if key.startswith("test ") and is_bad and record.get("op"):
            failing.setdefault(record["op"], set()).add(record["impl"])
    return {op: sorted(names) for op, names in failing.items()}


def summary_lines(records: Sequence[Record], stages: Sequence[Stage]) -> list[str]:
    """A table of the stages, the numbers, what fails, and what is not known."""
    last = last_by_key(records)
    lines = ["", f"{'stage':16s} {'seconds':>7s}  result"]
    unknown: list[str] = []
    for stage in stages:
        record = last.get(f"stage {stage.name}")
        status = str(record["status"]) if record else "not run"
        lines.append(f"{stage.name:16s} {record.get('seconds', 0) if record else 0:7.1f}  {status}")
        for key in stage.expects:
            expected = last.get(key)
            if expected is None or expected.get("status") not in _GOOD:
                why = f"{expected.get('status')}: {expected.get('error', '')}" if expected else f"the stage {status}"
                unknown.append(f"  {key}  ({why})")
    lines += ["", "known:"]
    for key, record in last.items():
        shown = [f"{name} {record[name]:.4g}" for name in _SHOWN if isinstance(record.get(name), int | float)]
        if record.get("status") in _GOOD and shown and record.get("what") not in ("stage", "run", "start", None):
            lines.append(f"  {key:48s}  {'  '.join(shown)}")
    lines += test_lines(last)
    measured = Counter(str(record.get("op")) for record in records if record.get("benchmark") == "ops")
    if measured:
        lines.append("  operations: " + ", ".join(f"{op} {count}" for op, count in measured.items()))
    lines += ["not known:", *(unknown or ["  nothing"])]
    return lines


def test_lines(last: Mapping[str, Record]) -> list[str]:
    """How many tests of each implementation passed, and the first error of those that did not."""
    tests = [record for key, record in last.items() if key.startswith("test ")]
    if not tests:
        return []
    counts = Counter(str(record["status"]) for record in tests)
    lines = ["  tests: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))]
    bad: dict[str, list[Record]] = {}
    for record in tests:
        if record["status"] not in ("passed", "skipped"):
            name = f"{record['op']} {record['impl']}" if record.get("op") else str(record["key"])
            bad.setdefault(name, []).append(record)
    for name, failed in sorted(bad.items()):
        lines.append(f"  FAILS: {name}, {len(failed)} tests; {failed[0].get('error', '')[:160]}")
    return lines


def store(file: Path, folder: Path) -> int:
    """Split results into ``folder``/KIND-GPU.jsonl, as the planner, the tables and the README read them.

    Dry runs are refused.
    """
    records = read_records(file)
    gpus = {str(record["gpu"]) for record in records if record.get("gpu")}
    if len(gpus) != 1 or any(record.get("dry") for record in records):
        print(f"{file}: these are results of {', '.join(sorted(gpus)) or 'no GPU'}, and of one GPU they must be")
        return 1
    name = re.sub("[^a-z0-9]+", "-", gpus.pop().lower().replace("nvidia", "")).strip("-")
    counts: Counter[str] = Counter()
    run = next((record for record in records if record.get("key") == "run"), {})
    place = {field: run.get(field) for field in PLACE}
    for record in records:
        record = {**place, **record}
        kind = str(record.get("benchmark", "gpu")).replace("_", "-")
        if record.get("status", "ok") != "partial":
            append_record(folder / f"{kind}-{name}.jsonl", record)
            counts[f"{kind}-{name}.jsonl"] += 1
    print(*(f"{count} lines to {folder.name}/{written}" for written, count in counts.items()), sep="\n")
    return 0
