"""What a file of requests costs beside ``generate()`` on the same requests in one list, and how memory grows with it.

``--study throughput``: one engine takes turns, round by round, with an empty prefix cache. ``--study memory``: a file
of ``--mib`` is made and answered by a function in the engine's place; the process's memory is looked at as it goes on.

    python benchmarks/batch_files.py --study memory --mib 1024 --json benchmarks/results/NAME.jsonl
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_engine import Engine, SamplingParams
from nemo_engine.batch.job import BatchJob
from nemo_engine.batch.lines import Line
from nemo_engine.batch.run import Answer, answer_all
from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.benchmarks.report.results import Ratio

ENGINE: dict[str, Any] = {
    "device": "cpu",
    "max_num_seqs": 16,
    "num_kv_pages": 1000,
    "page_size": 16,
    "max_model_len": 512,
}
PREFIX = "You are a careful assistant who answers in few words and names every source. " * 3


def throughput(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens a second of both, round by round, and their ratio."""
    prompts = [f"{PREFIX}def number_{index}(x):" for index in range(args.requests)]
    options = {"max_tokens": args.new_tokens, "temperature": 1.0, "ignore_eos": True}
    source = folder / "in.jsonl"
    source.write_text(
        "\n".join(json.dumps({"prompt": prompt, "seed": index, **options}) for index, prompt in enumerate(prompts))
    )
    params = [SamplingParams(seed=index, **options) for index in range(args.requests)]
    rates: dict[str, list[float]] = {"generate": [], "batch": []}
    with Engine("nemo-tiny", **ENGINE) as engine:
        for round_index in range(args.rounds + 1):
            # The one that comes first changes, as the machine does.
            for name in sorted(rates, reverse=bool(round_index % 2)):
                engine.reset_prefix_cache()
                started = time.perf_counter()
                if name == "generate":
                    total = sum(len(out.outputs[0].token_ids) for out in engine.generate(prompts, params))
                else:
                    summary = engine.batch(source, folder / f"out-{round_index}.jsonl")
                    total = summary.num_output_tokens
                assert total == args.requests * args.new_tokens, total
                if round_index:  # the first warms up
                    rates[name].append(total / (time.perf_counter() - started))
    ratio = Ratio.paired(rates["batch"], rates["generate"])
    return {
        "tokens_per_second": rates,
        "ratio": {"median": ratio.median, "low": ratio.low, "high": ratio.high, "level": ratio.level},
        "prefix_hits": summary.num_cached_tokens / summary.num_prompt_tokens,
    }


def memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Resident MiB at the first line, and at most after every tenth of the file."""
    source, size, number = folder / "in.jsonl", 0, 0
    with source.open("w") as file:
        while size < args.mib << 20:
            size += file.write(json.dumps({"prompt": f"{number} " + "x" * 4000, "max_tokens": 5}) + "\n")
            number += 1
    resident: list[float] = []
    done = 0

    async def answer(line: Line) -> Answer:
        nonlocal done
        if done % 500 == 0:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20)
        done += 1
        await asyncio.sleep(0)
        return Answer(200, f"r-{line.number}", json.dumps({"text": "x" * 300, "line": line.number}).encode())

    with BatchJob(source, folder / "out.jsonl", {}) as job:
        summary = asyncio.run(answer_all(job.reader(json.loads, 1000, 1 << 20), job.results, answer, max_open=512))
    assert summary.num_answered == number, summary
    tenth = max(1, len(resident) // 10)
    tenths = [max(resident[place : place + tenth]) for place in range(0, len(resident), tenth)]
    return {"bytes": size, "lines": number, "open": 512, "seconds": summary.seconds, "resident_mib": tenths}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and append a line to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=("throughput", "memory"), default="throughput")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=1024, help="of the file")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = (throughput if args.study == "throughput" else memory)(args, Path(folder))
    print(found)
    workload = {name: value for name, value in vars(args).items() if name != "json"}
    append_record(args.json, {"benchmark": "batch_files", "workload": workload, **found, **provenance("torch")})


if __name__ == "__main__":
    main()
