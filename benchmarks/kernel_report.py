"""The machine code of every Triton kernel that the engine would launch for Mistral NeMo 12B, compiled on any machine.

The device half runs on meta tensors, which have shapes and no data, while every launch compiles its kernel for the
target GPU and runs nothing. So the variants are exactly those of the engine, and a step that read a value on the host
would fail here. Prints, per kernel and variant: registers, shared memory, spills, local memory, the instructions that
matter, how many blocks an SM holds at once, and of a dependent launch what it does to global memory before the launch
before it has ended. Its first line has a digest of the other lines and of all that they
depend on, so that whether a stored report is that of these sources is known without compiling them.

    python benchmarks/kernel_report.py --write         # updates benchmarks/results/kernels-sm90.txt
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nemo_engine.benchmarks.machine_code import (
    RESULTS,
    Facts,
    blocks_per_sm,
    count_instructions,
    differs,
    read_usage,
    tool,
)
from nemo_engine.benchmarks.machine_flow import read_flow
from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.kernels import device
from nemo_engine.memory_plan import graph_sizes, wide_graph_sizes
from nemo_engine.model.weights import empty_weights
from nemo_engine.ops import Ops, Site
from nemo_engine.ops.attention import AttentionMeta
from nemo_engine.ops.paged_kv import PagedKV
from nemo_engine.ops.rope import RopeMeta
from nemo_engine.runner.runner import Runner

STORED = RESULTS / "kernels-sm90.txt"
META = torch.device("meta")
TENSOR_PARALLEL = (1, 2, 4, 8)
GPUS = {  # by compute capability: an A100, an L40S, an H100 or H200, a B200
    80: device.Facts(108, 163 << 10),
    89: device.Facts(142, 99 << 10),
    90: device.HOPPER,
    100: device.Facts(148, 227 << 10, True),
}
NEMO = ModelConfig(
    vocab_size=131072,
    hidden_size=5120,
    num_layers=1,  # all layers are alike
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    rope_theta=1_000_000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    max_position_embeddings=131072,
    dtype="bfloat16",
    bos_token_id=1,
    eos_token_ids=(2,),
)


class _Target:
    """Stands in for Triton's driver where there is no GPU: says what to compile for."""

    def __init__(self, capability: int, device: Any = None) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self._device = capability if device is None else device

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> Any:
        return self._device  # kernels are cached per device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compile_only(capability: int) -> Iterator[dict[tuple[str, str], Any]]:
    """Inside, launching a Triton kernel compiles it for ``capability`` (90 for an H100 or H200) and runs nothing.

    Yields {(kernel, variant): compiled kernel}, which fills as kernels are launched.
    """
    compiled: dict[tuple[str, str], Any] = {}
    run = JITFunction.run

    def compile_launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[self.__name__, _variant(self, kernel)] = kernel
        return kernel

    before = driver._active  # None until something asks for it, which needs a GPU
    driver.set_active(_Target(capability))
    JITFunction.run = compile_launch
    device.elsewhere = GPUS[capability]
    try:
        yield compiled
    finally:
        device.elsewhere = device.HOPPER
        JITFunction.run = run
        driver._active = before


@contextlib.contextmanager
def listed(capability: int, wanted: str = "") -> Iterator[set[str]]:
    """Inside ``compile_only``, no kernel but the one of the name ``wanted`` is compiled.

    Yields what Triton would make each of, in words: kernel, dtypes, constants, alignments and options.
    """
    words: set[str] = set()
    compile_one = JITFunction._do_compile

    def list_one(
        self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attrs: Any, warmup: bool
    ) -> Any:
        chosen = {name: value for name, value in vars(options).items() if name != "extern_libs"}  # paths
        words.add(f"{self.__name__} {signature} {constants} {attrs} {chosen}")
        if self.__name__ == wanted:
            return compile_one(self, key, signature, device, constants, options, attrs, warmup)
        kernel = SimpleNamespace(src=self.ASTSource(self, signature, constants, attrs), metadata=options)
        self.device_caches[device][0][key] = kernel
        return kernel

    driver.set_active(_Target(capability, object()))  # type: ignore[arg-type]  # whose cache no other will look into
    JITFunction._do_compile = list_one
    try:
        yield words
    finally:
        JITFunction._do_compile = compile_one


def _variant(function: Any, kernel: Any) -> str:
    """What distinguishes a compiled kernel: dtypes of its pointers, and constants."""
    names = function.arg_names
    types = kernel.src.signature
    pointers = [types[name][1:] for name in names if types[name].startswith("*")]
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items()}
    shown = [f"{name}={value}" for name, value in constants.items() if value is not None]
    kinds = "/".join(dict.fromkeys(pointers))
    return f"{kinds} {' '.join(shown)} warps={kernel.metadata.num_warps} stages={kernel.metadata.num_stages}"


def shard(model: ModelConfig, ranks: int) -> ModelConfig:
    """What one of ``ranks`` tensor-parallel ranks computes."""
    return dataclasses.replace(
        model,
        num_heads=model.num_heads // ranks,
        num_kv_heads=model.num_kv_heads // ranks,
        intermediate_size=model.intermediate_size // ranks,
    )


def select_ops(model: ModelConfig, config: EngineConfig, capability: int) -> Ops:
    """What an engine would choose on a GPU of ``capability``."""
    site = Site.of(model, config.page_size, torch.bfloat16, torch.device("cpu"))
    return Ops.select(
        dataclasses.replace(site, device_type="cuda", capability=divmod(capability, 10)), config.prefer or {}
    )


def meta_runner(model: ModelConfig, config: EngineConfig, capability: int) -> Runner:
    """A device half without data."""
    return Runner(
        model,
        config,
        empty_weights(model, torch.bfloat16, META),
        select_ops(model, config, capability),
        num_pages=4096,
        max_model_len=131072,
        device=META,
        kv_dtype=torch.bfloat16,
    )


def run_engine(capability: int, ranks: int) -> None:
    """Every kind of step that an engine warms up with, so every variant that it uses."""
    config = EngineConfig(device="cpu", enforce_eager=True, speculative_config={"method": "ngram"})
    sizes = graph_sizes(config.max_num_seqs), wide_graph_sizes(config)
    meta_runner(shard(NEMO, ranks), config, capability).warm_up(*sizes)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def run_linear(capability: int, ranks: int) -> None:
    """Our projections: FP8 with each kind of scales, and bf16 for few rows; on each bucket of rows."""
    model = shard(NEMO, ranks)
    fp8, fp32 = torch.float8_e4m3fn, torch.float32
    ops = select_ops(model, EngineConfig(device="cpu", prefer={"linear": "triton"}), capability)
    shapes = (
        (model.q_size + 2 * model.kv_size, model.hidden_size),
        (model.hidden_size, model.q_size),
        (2 * model.intermediate_size, model.hidden_size),
        (model.hidden_size, model.intermediate_size),
    )
    for rows in (16, 32, 64, 128, 256, 4096):
        for out, width in shapes:
            x, w, per_row = _empty(rows, width, dtype=fp8), _empty(out, width, dtype=fp8), _empty(rows, 1, dtype=fp32)
            blocks = [-(-size // 128) for size in (rows, out, width)]
            ops.linear_fp8(x, per_row, w, _empty(dtype=fp32))
            ops.linear_fp8(x, per_row, w, _empty(out, 1, dtype=fp32))
            ops.linear_fp8(x, _empty(rows, blocks[2], dtype=fp32), w, _empty(blocks[1], blocks[2], dtype=fp32))
            if rows <= 64:
                ops.linear(_empty(rows, width), _empty(out, width))


def run_fp8(capability: int, ranks: int) -> None:
    """The other operations on FP8 activations and KV cache."""
    model = shard(NEMO, ranks)
    ops = select_ops(model, EngineConfig(device="cpu"), capability)
    hidden, inner, dim = model.hidden_size, model.intermediate_size, model.head_dim
    for scale in (None, _empty(dtype=torch.float32)):
        ops.rms_norm_fp8(_empty(4, hidden), _empty(hidden), 1e-5, _empty(4, hidden), scale)
        ops.silu_mul_fp8(_empty(4, 2 * inner), scale)
        ops.quantize_tokens(_empty(4, model.q_size), scale)
    ops.quantize_tokens(_empty(4, inner))
    cache = _empty(100, model.num_kv_heads, 64, dim, dtype=torch.float8_e4m3fn)
    scales = _empty(model.num_kv_heads, dtype=torch.float32)
    kv = PagedKV(cache, cache, scales, scales)
    ints = _empty(8, dtype=torch.int64)
    q, k = _empty(8, model.num_heads, dim), _empty(8, model.num_kv_heads, dim)
    ops.rope_and_append_kv_(q, k, k, kv, RopeMeta(_empty(1000, 2, dim // 2, dtype=torch.float32), ints, ints))
    for decodes, run in ((8, 1), (8, 2), (8, 4), (8, 8), (0, 1)):
        table, starts = _empty(9, 2048, dtype=torch.int64), _empty(9, dtype=torch.int64)
        meta = AttentionMeta(decodes, starts, ints, table, ints, 64, 2048, 8, run_length=run)
        ops.paged_attention(q, kv, meta, 0.1)


def read(compiled: Any, name: str, *options: str) -> str:
    """What a tool says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return tool(name, *options, file.name)


def usage_of(compiled: Any) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of a compiled kernel."""
    return read_usage(read(compiled, "cuobjdump", "--dump-resource-usage"))


def inspect(kernel: str, variant: str, compiled: Any) -> Facts:
    """Read a compiled kernel."""
    usage, code = usage_of(compiled), read(compiled, "nvdisasm", "--no-dataflow")
    shared = compiled.metadata.shared
    return Facts(
        kernel=kernel.strip("_"),
        variant=variant,
        registers=usage["REG"],
        shared=shared,
        spills=usage["STACK"] + usage["LOCAL"],
        blocks=blocks_per_sm(usage["REG"], shared, compiled.metadata.num_warps),
        instructions=count_instructions(code),
        flow=f"early {' '.join(read_flow(code).early) or '-'}" if compiled.metadata.launch_pdl else "",
    )


RUNS: tuple[Callable[[int, int], None], ...] = (run_engine, run_linear, run_fp8)


def collect(
    capability: int, ranks: Sequence[int], runs: Sequence[Callable[[int, int], None]]
) -> dict[tuple[str, str], Any]:
    """Compile everything: {(kernel, variant): compiled}."""
    with compile_only(capability) as compiled:
        for number in ranks:
            for run in runs:
                run(capability, number)
    return compiled


def launches(wanted: str = "") -> tuple[str, dict[tuple[str, str], Any]]:
    """A digest of all that the report is made of: the text of the kernels and of what reads their machine code, and
    each launch as Triton tells it from others. And every variant, of which only those of the kernel ``wanted`` are
    compiled.
    """
    with compile_only(90) as variants, listed(90, wanted) as words:
        for number in TENSOR_PARALLEL:
            for run in RUNS:
                run(90, number)
    digest = hashlib.sha256("\n".join(sorted(words)).encode())
    readers = [Path(__file__).with_name(f"{name}.py") for name in ("kernel_report", "machine_code", "machine_flow")]
    for path in [*sorted(Path(device.__file__).parent.glob("*.py")), *readers]:
        digest.update(path.read_bytes())
    return digest.hexdigest(), variants


def titled(digest: str, lines: Sequence[str]) -> list[str]:
    """A report: its first line, and ``lines``."""
    whole = hashlib.sha256("\n".join([digest, *lines]).encode()).hexdigest()
    return [f"triton {triton.__version__}, sm_90a, digest {whole[:16]}", *lines]


def report() -> list[str]:
    """The lines of the stored report, one a variant, sorted."""
    compiled = collect(90, TENSOR_PARALLEL, RUNS)
    lines = sorted(inspect(kernel, variant, code).line() for (kernel, variant), code in compiled.items())
    return titled(launches()[0], lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; ``--write`` stores it, otherwise the exit status says whether it equals the stored one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"store the report in {STORED.name}")
    return int(differs(STORED, report, parser.parse_args(argv).write))


if __name__ == "__main__":
    sys.exit(main())
