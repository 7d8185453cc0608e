"""The machine code of every CUDA kernel, as nvcc compiles it for sm_90a, and how it is launched for Mistral NeMo 12B.

Works without a GPU. How a kernel is launched (threads, shared memory) is asked of the same sources compiled for the
CPU, which launch every operation at NeMo's sizes and run nothing. Prints, per kernel and number of threads: registers,
shared memory (the most), spills, how many blocks an SM holds at once, the instructions that matter, and what
``machine_flow`` reads:

    waits     for products of a warpgroup (WARPGROUP.DEPBAR)
    exps      between products and each wait for all of them: what they overlap with (MUFU.EX2)
    early     accesses to global memory that may come before the kernel before has ended (ACQBULK)
    roles     registers that are used after each setmaxnreg, of those that there are then
    barriers  of a block; 16 where their numbers are computed

    python benchmarks/cuda_kernel_report.py --write         # updates benchmarks/results/kernels-sm90-cuda.txt
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_engine.benchmarks.kernel_report import NEMO, TENSOR_PARALLEL, shard
from nemo_engine.benchmarks.machine_code import (
    RESULTS,
    Facts,
    blocks_per_sm,
    count_instructions,
    differs,
    read_usage,
    tool,
)
from nemo_engine.benchmarks.machine_flow import barriers, read_flow
from nemo_engine.config import ModelConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from csrc import build  # noqa: E402
from nemo_engine.ops import Ops, Site  # noqa: E402
from nemo_engine.ops.attention import AttentionMeta  # noqa: E402
from nemo_engine.ops.paged_kv import PagedKV  # noqa: E402
from nemo_engine.ops.rope import RopeMeta  # noqa: E402
from nemo_engine.ops.sample import SlotParams  # noqa: E402
from tests.emulation import library  # noqa: E402

STORED = RESULTS / "kernels-sm90-cuda.txt"
PAGE_SIZE, PAGES, SLOTS = 64, 100, 256
ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 256, 4096)
RESERVED_SHARED = 1024  # of each block, by CUDA; cuobjdump counts it for kernels that have any of their own
FP8 = torch.float8_e4m3fn
Shape = tuple[str, int, int]  # kernel with its template's arguments, threads of a block, dynamic shared bytes


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Memory of the right size, so that a kernel's arguments are checked as ever; its memory is never touched."""
    return torch.empty(shape, dtype=dtype)


def numbers(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.float32)


def run_rows(ops: Ops, model: ModelConfig, rows: int) -> None:
    """Norm, activation, quantisation and the linear layers, fused and not."""
    hidden, inner, qkv = model.hidden_size, model.intermediate_size, model.q_size + 2 * model.kv_size
    x, residual, norm, gate_up = empty(rows, hidden), empty(rows, hidden), empty(hidden), empty(rows, 2 * inner)
    heads = empty(rows, model.q_size)
    for added in (None, residual):
        ops.rms_norm(x, norm, 1e-5, added)
        ops.rms_norm_fp8(x, norm, 1e-5, added)
    ops.silu_mul(gate_up)
    ops.quantize_token_blocks(heads)
    for scale in (None, numbers(1)[0]):
        ops.silu_mul_fp8(gate_up, scale)
        ops.quantize_tokens(heads, scale)
    shapes = ((qkv, hidden), (hidden, model.q_size), (2 * inner, hidden), (hidden, inner))
    for out, width in shapes:
        if rows <= 64:
            ops.linear(empty(rows, width), empty(out, width))
        w8, x8 = empty(out, width, dtype=FP8), empty(rows, width, dtype=FP8)
        for w_scales in (numbers(1)[0], numbers(out, 1)):
            ops.linear_fp8(x8, numbers(rows, 1), w8, w_scales)
        blocks = -(-width // 128)
        ops.linear_fp8(x8, numbers(rows, blocks), w8, numbers(-(-out // 128), blocks))
    if rows > 64:
        both = empty(2 * inner, hidden, dtype=FP8), empty(hidden, inner, dtype=FP8)
        ops.mlp_fp8(x, residual, norm, 1e-5, *((w8, numbers(len(w8), 1), None) for w8 in both))
        ops.quantize_linear_fp8(heads, empty(hidden, model.q_size, dtype=FP8), numbers(hidden, 1), None, residual)
        return
    ops.linear(x, empty(model.vocab_size, hidden))
    for out in (qkv, 2 * inner):
        ops.norm_linear(x, residual, norm, 1e-5, empty(out, hidden))
        ops.norm_linear_fp8(x, residual, norm, 1e-5, empty(out, hidden, dtype=FP8), numbers(out, 1))
    ops.silu_mul_linear(gate_up, empty(hidden, inner))
    ops.silu_mul_linear_fp8(gate_up, empty(hidden, inner, dtype=FP8), numbers(hidden, 1))
    ops.quantize_linear_fp8(heads, empty(hidden, model.q_size, dtype=FP8), numbers(hidden, 1))


def run_attention(ops: Ops, model: ModelConfig, rows: int, kv_dtype: torch.dtype) -> None:
    """The rotation and the attention of decodes, of runs of them, and of one prompt."""
    dim, kv_heads = model.head_dim, model.num_kv_heads
    q, k = empty(rows, model.num_heads, dim), empty(rows, kv_heads, dim)
    cache = empty(PAGES, kv_heads, PAGE_SIZE, dim, dtype=kv_dtype)
    kv = PagedKV(cache, cache, *[numbers(kv_heads) if kv_dtype == FP8 else None for _ in "kv"])
    ints = empty(rows, dtype=torch.int64)
    ops.rope_and_append_kv_(q, k, k, kv, RopeMeta(numbers(1000, 2, dim // 2), ints, ints))
    table = empty(SLOTS, 2048, dtype=torch.int64)
    for count, decodes, run in ((rows, rows, 1), (rows, rows, 2), (rows, rows, 4), (rows, rows, 8), (1, 0, 1)):
        starts, each = empty(count + 1, dtype=torch.int64), empty(count, dtype=torch.int64)
        meta = AttentionMeta(decodes, starts, each, table, each, PAGE_SIZE, 2048, rows, run_length=run)
        if decodes % run == 0:
            ops.paged_attention(q, kv, meta, 0.1)


def run_sampling(ops: Ops, model: ModelConfig) -> None:
    """The choice of tokens, from logits of both dtypes."""
    params = SlotParams.off(8, model.vocab_size, torch.device("cpu"))
    ints = empty(8, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        ops.sample_(empty(8, model.vocab_size, dtype=dtype), ints, ints, params)


def launched() -> set[Shape]:
    """How the kernels are launched for NeMo and its tensor-parallel shards."""
    emulated = library.load()
    path = emulated.__file__
    emulator = emulated.emulator
    emulator.clear_launches()
    emulator.set_dry_run(True)
    try:
        with library.emulated(emulated):
            for ranks in TENSOR_PARALLEL:
                model = shard(NEMO, ranks)
                run_model(model)
        records = emulator.launches()
    finally:
        emulator.set_dry_run(False)
        emulator.clear_launches()
    symbols = {}
    for line in subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout.splitlines():
        if match := re.match(r"([0-9a-f]+) [tTwW] (.*)", line):
            symbols[int(match[1], 16)] = instance(match[2])
    return {(symbols[each["offset"]], each["threads"], each["shared_bytes"]) for each in records}


def run_model(model: ModelConfig) -> None:
    """Every operation that has a CUDA kernel, at every number of rows."""
    for kv_dtype in (torch.bfloat16, FP8):
        site = Site.of(model, PAGE_SIZE, torch.bfloat16, torch.device("cpu"), kv_dtype)
        ops = Ops.select(site, {"*": "cuda"})
        for rows in ROWS:
            run_attention(ops, model, rows, kv_dtype)
            if kv_dtype == FP8:
                run_rows(ops, model, rows)
    run_sampling(ops, model)


def instance(demangled: str) -> str:
    """``void nemo::decode_kernel<nemo::fp8>(nemo::Decode<nemo::fp8>)`` -> ``decode_kernel<fp8>``."""
    depth, end = 0, len(demangled)
    for index, letter in enumerate(demangled):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0 and not demangled.startswith("(anonymous", index):
            end = index
            break
    name = re.sub(r"\((?:int|bool|nemo::\w+|unsigned int)\)", "", demangled[:end])
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("nemo::", "")
    return re.sub(r"(?<=\d)u\b", "", name).replace(", ", ",").replace("true", "1").replace("false", "0")


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel in the library."""

    usage: Mapping[str, int]
    code: str  # its part of the listing
    barriers: int


@functools.cache
def compiled(nvcc: Path) -> dict[str, Compiled]:
    """Every kernel in the library."""
    path = build.build_gpu(nvcc)
    kernels: dict[str, Compiled] = {}
    with tempfile.TemporaryDirectory() as folder:
        tool("cuobjdump", "--extract-elf", "all", str(path.resolve()), cwd=Path(folder))
        for cubin in Path(folder).glob("*.cubin"):
            kernels |= kernels_of(cubin)
    return kernels


def kernels_of(cubin: Path) -> dict[str, Compiled]:
    """Every kernel in a cubin."""
    mangled = re.findall(r"Function (\w+):\n(.*)", tool("cuobjdump", "--dump-resource-usage", str(cubin)))
    listing = tool("nvdisasm", "--no-dataflow", str(cubin))
    code = dict(re.findall(r"\.text\.(\w+):\n(.*?)(?=\n\s*\.section|\Z)", listing, re.DOTALL))
    names = demangle([name for name, _ in mangled])
    return {
        name: Compiled(read_usage(facts), code[symbol], barriers(listing, symbol))
        for name, (symbol, facts) in zip(names, mangled, strict=True)
    }


def demangle(symbols: Sequence[str]) -> list[str]:
    said = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return [instance(line) for line in said.splitlines()]


def report() -> list[str]:
    """The lines of the stored report, one a kernel and way to launch it, sorted. ``RuntimeError`` without nvcc."""
    nvcc, reason = build.find_nvcc()
    if nvcc is None:
        raise RuntimeError(reason)
    ways: defaultdict[str, dict[int, int]] = defaultdict(dict)
    for name, threads, shared in sorted(launched()):
        ways[name][threads] = shared  # the most
    kernels = compiled(nvcc)
    unknown = set(ways) - set(kernels)
    assert not unknown, f"launched, but not in the library: {unknown}"
    lines = []
    for name, kernel in kernels.items():
        usage, flow = kernel.usage, f"{read_flow(kernel.code).words()}  barriers {kernel.barriers}"
        for threads, dynamic in ways.get(name, {0: 0}).items():
            shared = max(0, usage["SHARED"] - RESERVED_SHARED) + dynamic
            facts: dict[str, Any] = {
                "registers": usage["REG"],
                "shared": shared,
                "spills": usage["STACK"] + usage["LOCAL"],
                "blocks": blocks_per_sm(usage["REG"], shared, threads // 32) if threads else 0,
                "instructions": count_instructions(kernel.code),
                "flow": flow,
            }
            family, _, arguments = name.partition("<")
            variant = (
                f"{arguments.removesuffix('>')} threads={threads}"
                if threads
                else f"{arguments.removesuffix('>')} other sizes"
            )
            lines.append(Facts(kernel=family, variant=variant.strip(), **facts).line())
    version = ".".join(map(str, build.version_of(nvcc)))
    return [f"nvcc {version}, sm_90a", *sorted(lines)]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; ``--write`` stores it, otherwise the exit status says whether it equals the stored one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"store the report in {STORED.name}")
    return int(differs(STORED, report, parser.parse_args(argv).write))


if __name__ == "__main__":
    sys.exit(main())
