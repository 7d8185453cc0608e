"""``nemo-engine bench ops``: every implementation of every operation, beside what torch and other libraries offer, and
the roofline.

On a GPU: device time by events with a cold L2, without CUDA graphs. On a CPU: wall-clock time, caches as they are, so
that what lies in a cache passes the roofline. Medians of --rounds. The roofline of a call is the longer of its bytes
over the copy bandwidth and its operations over the rate of large matrix products, both measured in the same run. Each
result is compared with the first baseline's; one that is far off is an error. Exit status 1 if any of ours failed.

    nemo-engine bench ops --op paged_attention linear --json ops.jsonl
    compute-sanitizer python -m nemo_engine bench ops --once
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_engine.benchmarks.gpu_meter import GpuMeter
from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.cli.values import add_list

if TYPE_CHECKING:
    import torch

    from nemo_engine.benchmarks.ops_peers import OpsPeers
    from nemo_engine.benchmarks.ops_sizes import Scale
    from nemo_engine.benchmarks.timing import Row
    from nemo_engine.ops import Op, Site

_SIZES = ("nemo", "nemo-tiny", "tiny")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    add_list(parser, "--op", str, "names", metavar="NAME", help="only these operations")
    parser.add_argument(
        "--device", choices=["auto", "cuda", "cpu"], default="auto", help="[auto: a GPU where there is one]"
    )
    parser.add_argument(
        "--sizes", choices=_SIZES, help="whose sizes [nemo on a GPU, nemo-tiny on a CPU; tiny is for tests]"
    )
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="timed calls of each measurement [20]")
    parser.add_argument("--once", action="store_true", help="run the smallest cases once, untimed")
    parser.add_argument(
        "--fa3", type=Path, metavar="FILE", help="vLLM's _vllm_fa3_C.abi3.so: FlashAttention 3 as a baseline"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to FILE, a line each")


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured, where, and beside what."""

    ops: list[Op]
    scale: Scale
    site: Site
    device: torch.device
    peers: OpsPeers | None


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, store; 1 if an implementation of ours failed."""
    bench = make_bench(args)
    packages = [name for name in ("torch", "triton") if find_spec(name)]
    facts: dict[str, Any] = provenance(*packages) | {
        "device": bench.device.type,
        "sizes": args.sizes or default_sizes(bench.device),
    }
    if bench.device.type == "cuda":
        import torch

        facts["gpu"] = torch.cuda.get_device_name()
    else:
        print("on a CPU: these times mean nothing for GPUs")
    rejected = [(op.name, impl.name, impl.supports(bench.site)) for op in bench.ops for impl in op.impls]
    print("".join(f"{op}: not {impl}: {reason}\n" for op, impl, reason in rejected if reason), end="")
    if bench.peers is not None:
        print("".join(f"baselines: {line}\n" for line in bench.peers.missing()), end="")
    return _run_once(args, bench, facts) if args.once else _run_timed(args, bench, facts)


def default_sizes(device: torch.device) -> str:
    """Whose sizes are measured where none are named."""
    return "nemo" if device.type == "cuda" else "nemo-tiny"


def make_bench(args: argparse.Namespace) -> Bench:
    """What the options say. ``ValueError`` for an operation that is none, or a GPU that is not there."""
    import torch

    from nemo_engine.benchmarks.ops_peers import OpsPeers
    from nemo_engine.benchmarks.ops_sizes import BF16, PAGE_SIZE, SCALES
    from nemo_engine.ops import ALL_OPS, Site

    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    names = [op.name for op in ALL_OPS]
    for name in args.op or []:
        if name not in names:
            raise ValueError(f"--op must be among {', '.join(names)}, got {name!r}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda needs an NVIDIA GPU; torch {torch.__version__} finds none")
    is_cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if is_cuda else "cpu")
    scale = SCALES[args.sizes or default_sizes(device)]
    if args.fa3 is not None and not is_cuda:
        raise ValueError(f"--fa3 {args.fa3} runs on a GPU only, and this is a CPU")
    peers = OpsPeers.find(args.fa3) if is_cuda and not args.once else None
    chosen = [op for op in ALL_OPS if not args.op or op.name in args.op]
    return Bench(chosen, scale, Site.of(scale.model, PAGE_SIZE, BF16, device), device, peers)


def _run_timed(args: argparse.Namespace, bench: Bench, facts: dict[str, Any]) -> int:
    from nemo_engine.benchmarks.ops_sizes import sizes_of
    from nemo_engine.benchmarks.timing import HEADER, measure_ceilings, measure_size, timer_for

    timer, meter = timer_for(bench.device, args.rounds), GpuMeter()
    ceilings = measure_ceilings(timer, bench.device)
    facts["ceilings"] = asdict(ceilings)
    print(
        f"copy {ceilings.bytes_per_s / 1e9:.0f} GB/s, products in bf16 {ceilings.bf16_flops_per_s / 1e12:.2f} and in "
        f"FP8 {ceilings.fp8_flops_per_s / 1e12:.2f} TFLOP/s; * marks baselines\n{HEADER}"
    )

    def rows(op: Op) -> Iterator[Row]:
        for size in sizes_of(op, bench.scale, bench.device):
            with_peers = size if bench.peers is None else bench.peers.added_to(op, size)
            yield from measure_size(op, bench.site, with_peers, timer, ceilings)

    failures = 0
    for index, op in enumerate(bench.ops):
        for row in rows(op):
            failures += _tell(row, args.json, facts | ({"gpu_state": state} if (state := meter.state()) else {}))
        if _is_spoilt(bench, index):
            return _go_on(args, bench, index)
    if failures:
        print(f"{failures} of ours failed")
    return int(failures > 0)


def _run_once(args: argparse.Namespace, bench: Bench, facts: dict[str, Any]) -> int:
    from nemo_engine.benchmarks.timing import run_once

    failures = 0
    for index, op in enumerate(bench.ops):
        for row in run_once(op, bench.site, bench.device):
            failures += _tell(row, args.json, facts)
        if _is_spoilt(bench, index):
            return _go_on(args, bench, index)
    return int(failures > 0)


def _tell(row: Row, path: Path | None, facts: dict[str, Any]) -> bool:
    """Print and store; whether it is a failure of ours."""
    print(row.format(), flush=True)
    append_record(path, {"benchmark": "ops", **asdict(row), **facts})
    return row.error is not None and not row.is_baseline


def _is_spoilt(bench: Bench, index: int) -> bool:
    """Whether operations are left after ``index``, and nothing can run in this process any more."""
    from nemo_engine.benchmarks.timing import is_usable

    return index + 1 < len(bench.ops) and not is_usable(bench.device)


def _go_on(args: argparse.Namespace, bench: Bench, index: int) -> int:
    """Measure what is left in another process; 1, because of what happened in this one."""
    print("the device is not usable any more in this process: another one goes on", flush=True)
    options = [f"--rounds={args.rounds}", f"--device={bench.device.type}", *(["--once"] if args.once else [])]
    options += [f"--{name}={value}" for name in ("sizes", "fa3", "json") if (value := getattr(args, name)) is not None]
    rest = [op.name for op in bench.ops[index + 1 :]]
    subprocess.run([sys.executable, "-m", "nemo_engine", "bench", "ops", *options, "--op", *rest])
    return 1
