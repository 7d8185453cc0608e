"""What other people's load generators measured of a server, as lines of results: vLLM's ``bench serve`` and guidellm.

    python benchmarks/outside_clients.py --server ours --json benchmarks/results/NAME.jsonl out/vllm-ours-16.json out/guidellm-ours-16.json

The files are the generators' own: ``vllm bench serve --save-result``, ``guidellm --output kind=json``. Times in seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_engine.benchmarks.provenance import append_record, provenance

Record = dict[str, Any]
_LEVELS = ("p50", "p90", "p95", "p99")


def read(path: Path) -> Iterator[Record]:
    """The measurements in a generator's file. ``ValueError`` naming it if it is neither's."""
    try:
        found = json.loads(path.read_text("utf-8"))
        if "benchmarks" in found:
            yield from map(_of_guidellm, found["benchmarks"])
        else:
            yield _of_vllm(found)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: is no result of vllm bench serve or guidellm: {type(error).__name__}: {error}"
        ) from None


def _of_vllm(found: Record) -> Record:
    def times(name: str) -> dict[str, float]:
        return {level: found[f"{level}_{name}_ms"] / 1e3 for level in _LEVELS}

    return {
        "tool": "vllm bench serve", "concurrency": found["max_concurrency"], "requests": found["completed"], "failed": found["failed"],
        "input_tokens": found["total_input_tokens"], "output_tokens": found["total_output_tokens"],
        "output_tokens_per_second": found["output_throughput"],
        "ttft_s": times("ttft"), "itl_s": times("itl"), "tpot_s": times("tpot"), "e2e_s": times("e2el"),
    }  # fmt: skip


def _of_guidellm(found: Record) -> Record:
    metrics = found["metrics"]

    def times(name: str, unit: float) -> dict[str, float]:
        percentiles = metrics[name]["successful"]["percentiles"]
        return {level: percentiles[level] * unit for level in _LEVELS}

    totals = metrics["request_totals"]
    return {
        "tool": "guidellm", "concurrency": round(metrics["request_concurrency"]["successful"]["max"]),
        "requests": totals["successful"], "failed": totals["errored"],
        "input_tokens": metrics["prompt_token_count"]["successful"]["total_sum"],
        "output_tokens": metrics["output_token_count"]["successful"]["total_sum"],
        "output_tokens_per_second": metrics["output_token_count"]["successful"]["total_sum"] / found["duration"],
        "ttft_s": times("time_to_first_token_ms", 1e-3), "itl_s": times("inter_token_latency_ms", 1e-3),
        "tpot_s": times("time_per_output_token_ms", 1e-3), "e2e_s": times("request_latency", 1.0),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line per measurement, and append it to ``--json``; 2 for a file that is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--server", required=True, metavar="NAME", help="whose server was measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to FILE, a line each")
    args = parser.parse_args(argv)
    facts = provenance("nemo-engine")
    try:
        records = [record for path in args.files for record in read(path)]
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    for record in records:
        print(
            f"{record['tool']:18} {args.server:8} {record['concurrency']:>4} at once  {record['output_tokens_per_second']:.0f} tokens/s"
            f"   TTFT {record['ttft_s']['p50'] * 1e3:.1f} ms   ITL {record['itl_s']['p50'] * 1e3:.2f} ms   {record['failed']} failed"
        )
        append_record(args.json, {"benchmark": "outside_clients", "server": args.server, **record, **facts})
    return 0


if __name__ == "__main__":
    sys.exit(main())
