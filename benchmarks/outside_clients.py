"""What other people's load generators measured of a server, as lines of results: vLLM's ``bench serve`` and guidellm.

    python benchmarks/outside_clients.py --json NAME.jsonl \\
        --server ours ours-1.json ours-2.json --server vllm==0.26 vllm-1.json vllm-2.json

The files are the generators' own: ``vllm bench serve --save-result``, ``guidellm --output kind=json``. Give several,
measured in turns: those of one generator and one number of requests at a time are the runs whose medians and spread
count. Times in seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.benchmarks.report import tables_engines

Record = dict[str, Any]
_LEVELS = ("p50", "p90", "p95", "p99")


def read(path: Path) -> Iterator[Record]:
    """The measurements in a generator's file. ``ValueError`` naming it if it is neither's."""
    try:
        record = json.loads(path.read_text("utf-8"))
        if "benchmarks" in record:
            yield from map(_of_guidellm, record["benchmarks"])
        else:
            yield _of_vllm(record)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: is no result of vllm bench serve or guidellm: {type(error).__name__}: {error}"
        ) from None


def _of_vllm(record: Record) -> Record:
    def times(name: str) -> dict[str, float]:
        return {level: record[f"{level}_{name}_ms"] / 1e3 for level in _LEVELS}

    return {
        "tool": "vllm bench serve", "concurrency": record["max_concurrency"], "requests": record["completed"], "failed":
        record["failed"], "input_tokens": record["total_input_tokens"], "output_tokens": record["total_output_tokens"],
        "output_tokens_per_second": record["output_throughput"], "ttft_s": times("ttft"), "itl_s": times("itl"),
        "tpot_s": times("tpot"), "e2e_s": times("e2el"),
    }  # fmt: skip


def _of_guidellm(record: Record) -> Record:
    metrics = record["metrics"]

    def times(name: str, unit: float) -> dict[str, float]:
        percentiles = metrics[name]["successful"]["percentiles"]
        return {level: percentiles[level] * unit for level in _LEVELS}

    totals = metrics["request_totals"]
    return {
        "tool": "guidellm", "concurrency": round(metrics["request_concurrency"]["successful"]["max"]),
        "requests": totals["successful"], "failed": totals["errored"],
        "input_tokens": metrics["prompt_token_count"]["successful"]["total_sum"],
        "output_tokens": metrics["output_token_count"]["successful"]["total_sum"],
        "output_tokens_per_second": metrics["output_token_count"]["successful"]["total_sum"] / record["duration"],
        "ttft_s": times("time_to_first_token_ms", 1e-3), "itl_s": times("inter_token_latency_ms", 1e-3),
        "tpot_s": times("time_per_output_token_ms", 1e-3), "e2e_s": times("request_latency", 1.0),
    }  # fmt: skip


def fold(servers: Sequence[Sequence[str]]) -> list[Record]:
    """A result for each server, generator and number of requests at a time: a list with an entry per file, in the order
    of the files.

    servers: for each ``NAME`` or ``NAME==VERSION``, then its files. ``ValueError`` naming a file that is no result, or
    a server without any.
    """
    folded = []
    for name, *files in servers:
        if not files:
            raise ValueError(f"--server {name}: no file follows it")
        server, _, version = name.partition("==")
        groups: dict[tuple[str, int], list[Record]] = {}
        for path in map(Path, files):
            for record in read(path):
                groups.setdefault((record.pop("tool"), record.pop("concurrency")), []).append(record)
        for (tool, concurrency), runs in sorted(groups.items()):
            facts = {"server": server, "server_version": version or None, "tool": tool, "concurrency": concurrency}
            folded.append(facts | _per_run(runs))
    return folded


def _per_run(runs: Sequence[Any]) -> Any:
    """Lists in the place of numbers, inside of dictionaries too."""
    if isinstance(runs[0], dict):
        return {key: _per_run([run[key] for run in runs]) for key in runs[0]}
    return list(runs)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line per result, and append it to ``--json``; 2 for a file that is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--server",
        required=True,
        action="append",
        nargs="+",
        metavar=("NAME[==VERSION]", "FILE"),
        help="whose server was measured, and what was measured of it; several times, the first is compared with the "
        "others",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="add the results to OUT, a line each")
    args = parser.parse_args(argv)
    facts = provenance("nemo-engine")
    try:
        records = fold(args.server)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    records = [{"benchmark": "outside_clients", **record, **facts} for record in records]
    for record in records:
        append_record(args.json, record)
    for table in tables_engines.outside_clients(records):
        print(table.markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
