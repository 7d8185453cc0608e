"""What one NVIDIA GPU can do at most on Mistral NeMo's shapes: the denominators of every roofline fraction.

Measures, with device events, cold L2 and medians: copy and read-only bandwidth; cuBLAS bf16 and cuBLASLt FP8 (rowwise
and tensorwise scales, fast accumulation on and off) on the five projections at M = 1 .. 8192; causal SDPA prefill at 2k
.. 128k per back end; the cost of one more kernel in a CUDA graph; the SM clock under load. Appends JSON lines with
provenance.

    python benchmarks/gpu_ceilings.py --json benchmarks/results/ceilings-h200.jsonl
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.benchmarks.timing import DeviceTimer, Timer

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SHAPES = {  # projection: (N, K)
    "qkv": (6144, 5120),
    "o": (5120, 4096),
    "gate_up": (28672, 5120),
    "down": (5120, 14336),
    "lm_head": (131072, 5120),
}
ROWS = (1, 8, 16, 64, 128, 256, 1024, 4096, 8192)
CONTEXTS = (2048, 8192, 32768, 131072)
Record = dict[str, Any]


def bandwidth(timer: Timer) -> Iterator[Record]:
    """Copy (bytes read plus written) and read-only (a sum) over 4 GiB."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    for name, call, passes in (
        ("copy", lambda: target.copy_(source), 2),
        ("read", lambda: source.sum(), 1),
    ):
        ms = timer(call)
        yield {"what": name, "ms": ms, "gb_per_s": passes * source.nbytes / ms / 1e6}


def matmuls(timer: Timer) -> Iterator[Record]:
    """``x (M, K) @ w (N, K)^T`` per projection: bf16, then e4m3 with four ways to scale and accumulate."""
    for name, (n, k) in SHAPES.items():
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        w8 = w.to(torch.float8_e4m3fn)
        scale, per_n = torch.ones((), device="cuda"), torch.ones(1, n, device="cuda")
        for m in ROWS:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            yield _matmul_record(name, "bf16 cublas", m, n, k, 2, timer(lambda x=x, w=w: F.linear(x, w)))
            x8, per_m = x.to(torch.float8_e4m3fn), torch.ones(m, 1, device="cuda")
            for kind, scales in (("tensorwise", (scale, scale)), ("rowwise", (per_m, per_n))):
                for fast in (True, False):
                    label = f"fp8 {kind} {'fast' if fast else 'precise'} accumulation"

                    def call(x8: Any = x8, w8: Any = w8, scales: Any = scales, fast: bool = fast) -> object:
                        return torch._scaled_mm(
                            x8,
                            w8.t(),
                            scale_a=scales[0],
                            scale_b=scales[1],
                            out_dtype=torch.bfloat16,
                            use_fast_accum=fast,
                        )

                    try:
                        yield _matmul_record(name, label, m, n, k, 1, timer(call))
                    except RuntimeError as error:  # not every combination exists in every torch release
                        yield {"what": label, "shape": name, "m": m, "error": str(error).splitlines()[0]}


def _matmul_record(name: str, what: str, m: int, n: int, k: int, width: int, ms: float) -> Record:
    num_bytes = width * (n * k + m * k) + 2 * m * n
    return {
        "what": what, "shape": name, "m": m, "n": n, "k": k, "ms": ms,
        "tflop_per_s": 2 * m * n * k / ms / 1e9, "gb_per_s": num_bytes / ms / 1e6,
    }  # fmt: skip


def prefill_attention(timer: Timer) -> Iterator[Record]:
    """Causal SDPA of one bf16 prompt, 32 query and 8 KV heads; 2 * heads * head_dim * S^2 operations."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for length in CONTEXTS:
        q = torch.randn(1, HEADS, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(1, KV_HEADS, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            record: Record = {"what": f"sdpa {backend.name.lower()}", "context": length}
            try:
                with sdpa_kernel(backend):
                    ms = timer(
                        lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                    )
                yield record | {"ms": ms, "tflop_per_s": 2 * HEADS * HEAD_DIM * length**2 / ms / 1e9}
            except RuntimeError as error:
                yield record | {"error": str(error).splitlines()[0]}


def graph_gap(timer: Timer) -> Iterator[Record]:
    """Microseconds that one more dependent tiny kernel adds to a CUDA graph (without programmatic launch)."""
    x = torch.zeros(1024, device="cuda")
    times = {}
    for count in (100, 1100):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                x.add_(1.0)
        times[count] = timer(graph.replay)
    yield {"what": "kernel in a graph", "us": times[1100] - times[100]}  # ms per 1000 kernels


def sm_clock_under_load() -> Iterator[Record]:
    """The SM clock after two seconds of bf16 matrix products."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    end = time.monotonic() + 2.0
    while time.monotonic() < end:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()
    for _ in range(200):
        a @ a
    clock = subprocess.run(
        ["nvidia-smi", "--query-gpu=clocks.sm,power.draw,temperature.gpu", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    torch.cuda.synchronize()
    mhz, watts, celsius = clock.splitlines()[0].split(",")
    yield {"what": "sm clock under load", "mhz": float(mhz), "watts": float(watts), "celsius": float(celsius)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run all measurements, print each, and append them to ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error(f"needs an NVIDIA GPU; torch {torch.__version__} finds none")
    facts = provenance("torch") | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    timer = DeviceTimer(args.rounds)
    for measure in (bandwidth, matmuls, prefill_attention, graph_gap):
        for record in measure(timer):
            _report(record, facts, args.json)
    for record in sm_clock_under_load():
        _report(record, facts, args.json)


def _report(record: Record, facts: Record, path: Path | None) -> None:
    print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items()), flush=True)
    append_record(path, {"benchmark": "gpu_ceilings", **record, **facts})


if __name__ == "__main__":
    main()
