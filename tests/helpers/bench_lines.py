"""Lines of results with known numbers, as the benchmarks write them."""

from __future__ import annotations

from typing import Any

from nemo_engine.benchmarks.report.results import Record

PLACE = {
    "cpu": "Some CPU", "cores": 2, "usable_cores": 2, "memory_gib": 24, "gpu": None, "commit": "abc1234", "command":
    "bench", "date": "2026-11-25T13:00:00Z", "file": "r.jsonl", "line": 1,
}  # fmt: skip


def throughput(engine: str, rates: list[float] | None = None, **fields: Any) -> Record:
    """A line of ``bench throughput``; failed without rates."""
    found = (
        {"status": "ok", "tokens_per_second": rates} if rates else {"status": "failed", "error": "it | died\nat once"}
    )
    workload = {"source": "requests=16,input=uniform:16:256,output=128", "requests": 16, "new_tokens": 2048}
    return {
        "benchmark": "throughput",
        "model": "nemo-tiny",
        "workload": workload,
        "engine": engine,
        **found,
        **PLACE,
        **fields,
    }


def serve(server: str, concurrency: int, rates: list[float], **fields: Any) -> Record:
    """A line of ``bench serve``."""
    times = {"p50": 0.01 * concurrency, "p90": 0.03, "p95": 0.04, "p99": 0.05}
    return {
        "benchmark": "serve", "server": server, "workload": {"source": "requests=8,input=64,output=32", "requests": 8},
        "arrivals": {"concurrency": concurrency, "rate": None, "arrivals": None, "burstiness": 1.0}, "route":
        "completions", "output_tokens_per_second": rates, "ttft_s": times, "itl_s": times, "tpot_s": times, "e2e_s":
        times, "slo": {"ttft_s": None, "itl_s": None}, "goodput_requests_per_second": [1.0], "errors": 0,
        "first_errors": [], **PLACE, **fields,
    }  # fmt: skip


def decode(batch: int, context: int) -> Record:
    """A line of ``bench latency``."""
    return {
        "benchmark": "latency", "what": "decode", "batch": batch, "context": context, "engine": "nemo_engine", "status":
        "ok", "model": "nemo", "options": {"kv_cache_dtype": "fp8"}, "ms_per_step": 6.0 + batch * context / 1e5,
        "roofline_ms": 5.0, "fraction": 0.8, **PLACE,
    }  # fmt: skip


def step_cost(engine: str, num_seqs: int, page_size: int, rounds: list[float], **fields: Any) -> Record:
    """A line of ``bench scheduler``."""
    percentiles = {
        "median_us": sorted(rounds)[len(rounds) // 2],
        "p90_us": 90.0,
        "p99_us": 99.0,
        "round_medians_us": rounds,
    }
    point = {"benchmark": "scheduler", "num_seqs": num_seqs, "page_size": page_size, "prompt_len": 1024, "status": "ok"}
    return {**point, **percentiles, "engine": engine, **PLACE, **fields}


def scheduler_run() -> list[Record]:
    """Ours with two page sizes beside vLLM's, which failed at 64 requests."""
    failed = {
        "benchmark": "scheduler",
        "num_seqs": 64,
        "page_size": 16,
        "prompt_len": 1024,
        "engine": "vllm",
        "status": "failed",
    }
    return [
        step_cost("vllm", 8, 16, [100.0, 100.0, 120.0], versions={"vllm": "0.32", "torch": "2"}),
        step_cost("nemo_engine", 8, 64, [5.0, 4.0, 6.0]),
        step_cost("nemo_engine", 8, 16, [10.0, 10.0, 10.0]),
        step_cost("nemo_engine", 64, 64, [50.0]),
        {**failed, "error": "it died", **PLACE},
    ]


def start(engine: str, kind: str, totals: list[float], **fields: Any) -> Record:
    """A line of ``bench startup``."""
    stages = {
        "import torch": [0.8] * len(totals),
        "load weights": [0.1] * len(totals),
        "look up": [0.001] * len(totals),
    }
    stages |= {"to the first token": totals, "second answer": [9.0] * len(totals)}
    record = {
        "benchmark": "startup",
        "model": "nemo-tiny",
        "prompt_len": 16,
        "engine": engine,
        "kind": kind,
        "status": "ok",
    }
    times = {"stages": stages, "total_s": totals, "checkpoint_in_page_cache": [1.0 if kind == "warm" else 0.0]}
    return {**record, **times, "versions": {}, **PLACE, **fields}


def op(name: str, implementation: str, **fields: Any) -> Record:
    """A line of ``bench ops``: 2 FLOP for each byte."""
    rates = {"us": 2.0, "gb_per_s": 1000.0, "tflop_per_s": 2.0, "fraction": 0.5, "speedup": 1.5}
    ceilings = {"bytes_per_s": 4e12, "bf16_flops_per_s": 8e14, "fp8_flops_per_s": 1.5e15}
    row = {
        "benchmark": "ops",
        "op": name,
        "size": "8 rows",
        "implementation": implementation,
        "is_baseline": False,
        "error": None,
    }
    return {**row, **rates, "ceilings": ceilings, **PLACE, **fields}
