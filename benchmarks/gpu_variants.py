"""Compiles, without a GPU, every variant of every Triton kernel that a run on a GPU launches, into Triton's cache.

The device half, the operations of the tests and of the benchmarks run on tensors without data (see kernel_report); what
would be launched is compiled, with the launcher in C that Triton makes for it. With --check nothing should be left to
compile, and what is makes the exit status 1.

    TRITON_CACHE_DIR=folder python -m nemo_engine.benchmarks.gpu_variants
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime import build
from triton.runtime.jit import JITFunction

from nemo_engine.benchmarks.kernel_report import META, NEMO, compile_only
from nemo_engine.benchmarks.ops_sizes import PAGE_SIZE, SCALES, read_shape, sizes_of
from nemo_engine.checkpoint.inventory import planned_inventory
from nemo_engine.checkpoint.quant_config import ONLINE
from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.memory_plan import graph_sizes
from nemo_engine.model.weights import empty_weights
from nemo_engine.ops import ALL_OPS, Ops, Site
from nemo_engine.ops.quantize import FP8
from nemo_engine.runner.launched_step import LaunchedStep
from nemo_engine.runner.runner import Runner

HOPPER = (9, 0)


def meta_runner(
    model: ModelConfig, config: EngineConfig, dtype: torch.dtype, is_fp8: bool, ops: Ops | None = None
) -> Runner:
    """A device half without data, as start-up would make it on a GPU."""
    kv_dtype = FP8 if is_fp8 else dtype
    if ops is None:
        site = Site.of(model, config.page_size, dtype, torch.device("cpu"), kv_dtype)
        ops = Ops.select(dataclasses.replace(site, device_type="cuda", capability=HOPPER), config.prefer or {})
    inventory = planned_inventory(model, None, ONLINE["fp8"] if is_fp8 else None)
    length = config.max_model_len if isinstance(config.max_model_len, int) else model.max_position_embeddings
    return Runner(
        model, config, empty_weights(model, dtype, META, inventory.kind_of), ops,
        num_pages=max(4096, config.max_num_seqs), max_model_len=length, device=META, kv_dtype=kv_dtype,
    )  # fmt: skip


def engine() -> None:
    """NeMo's shape, up to 256 and 1024 rows, bf16 and FP8: every kind of step that an engine warms up with and
    captures.
    """
    for is_fp8 in (False, True):
        for rows in (256, 1024):
            config = EngineConfig(device="cpu", max_num_seqs=rows, max_num_batched_tokens=8192)
            meta_runner(NEMO, config, torch.bfloat16, is_fp8).warm_up(graph_sizes(rows))


def tiny() -> None:
    """nemo-tiny as the smoke stage and tests/test_triton_engine.py start it."""
    model = dataclasses.replace(read_shape("nemo-tiny"), num_layers=1)
    for dtype, is_fp8, options in (
        (torch.bfloat16, False, {"max_num_seqs": 8, "max_model_len": 256}),
        (torch.bfloat16, True, {"max_num_seqs": 8, "max_model_len": 256}),
        (
            torch.float32,
            False,
            {"max_num_seqs": 4, "max_model_len": 128, "page_size": 16, "max_num_batched_tokens": 16},
        ),
    ):
        config = EngineConfig(device="cpu", **{"max_num_batched_tokens": 8192, **options})
        meta_runner(model, config, dtype, is_fp8).warm_up(graph_sizes(config.max_num_seqs))


def runner_tests() -> None:
    """tests/runner/test_graphs.py."""
    from tests.helpers.checkpoints import tiny_config
    from tests.runner import test_graphs

    model = tiny_config(num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64, intermediate_size=48)
    site = Site.of(model, test_graphs.PAGE, torch.float32, torch.device("cpu"))
    triton = [op.name for op in ALL_OPS if any(impl.name == "triton" for impl in op.impls)]
    ops = Ops.select(dataclasses.replace(site, device_type="cuda", capability=HOPPER), dict.fromkeys(triton, "triton"))
    config = EngineConfig(
        device="cpu", page_size=test_graphs.PAGE, max_num_seqs=test_graphs.SLOTS, max_num_batched_tokens=128,
        max_model_len=100,
    )  # fmt: skip
    runner = meta_runner(model, config, torch.float32, False, ops)
    runner.warm_up((1, 2, 4, 7))
    result = LaunchedStep.result
    LaunchedStep.result = lambda self: None  # type: ignore[assignment, method-assign, return-value]
    try:
        test_graphs.play(runner)
    finally:
        LaunchedStep.result = result  # type: ignore[method-assign]


def op_tests() -> None:
    """tests/ops/test_ops.py and test_sample.py: cases as they are proven, and as they are captured."""
    from tests.ops.proofs import amid_poison, mapped
    from tests.ops.test_ops import proofs
    from tests.ops.test_sample import hard_cases

    def poisoned(x: torch.Tensor) -> torch.Tensor:
        return amid_poison(x.to(META))

    for case_of in proofs("cuda"):
        op, impl, case, dtype = case_of.values
        if impl.name != "triton":
            continue
        launch(impl.load(), mapped(case.make(dtype), poisoned, "meta"))
        if dtype is torch.bfloat16:
            launch(impl.load(), mapped(case.make(dtype), lambda x: x.to(META), "meta"))
    sample = next(op for op in ALL_OPS if op.name == "sample_")
    kernel = next(impl for impl in sample.impls if impl.name == "triton").load()
    for case in hard_cases():
        for dtype in (torch.bfloat16, torch.float32):
            launch(kernel, mapped(case.make(dtype), lambda x: x.to(META), "meta"))


def op_benchmarks() -> None:
    """``nemo-engine bench ops`` at NeMo's size."""
    scale = SCALES["nemo"]
    config = EngineConfig(device="cpu", page_size=PAGE_SIZE, max_num_batched_tokens=8192)
    site = select_site(scale.model, config)
    for op in ALL_OPS:
        for impl in op.impls:
            if impl.name != "triton":
                continue
            for size in sizes_of(op, scale, META):
                if impl.supports(dataclasses.replace(site, **size.site)) is None:
                    launch(impl.load(), size.make())


def select_site(model: ModelConfig, config: EngineConfig) -> Site:
    """Where ``model`` would run on an H200."""
    site = Site.of(model, config.page_size, torch.bfloat16, torch.device("cpu"))
    return dataclasses.replace(site, device_type="cuda", capability=HOPPER)


def launch(function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Call it for what it compiles; a definition that reads values in between has none on such tensors."""
    if any(isinstance(arg, torch.Tensor) and arg.device != META for arg in args):
        raise AssertionError("an argument has data")
    function(*args)


GROUPS: dict[str, Callable[[], None]] = {
    function.__name__: function for function in (engine, op_benchmarks, tiny, runner_tests, op_tests)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Compile; say how many variants, what had to be compiled, and how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--check", action="store_true", help="fail if anything had to be compiled")
    args = parser.parse_args(argv)
    build._load_module_from_path = lambda name, path: NotLoaded()
    fresh: list[str] = []
    seconds: dict[str, float] = {}

    def listen(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            taken = sum(value for _, value in times.lowering_stages) / 1e6
            fresh.append(src.name)
            seconds[src.name] = seconds.get(src.name, 0.0) + taken

    knobs.compilation.listener = listen
    kernels: dict[int, Any] = {}
    with compile_only(90), torch.inference_mode():
        run = JITFunction.run

        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            kernel = run(self, *args, **kwargs)
            if id(kernel) not in kernels:
                kernels[id(kernel)] = kernel
                CudaLauncher(kernel.src, kernel.metadata)  # compiles it
            return kernel

        JITFunction.run = noted  # compile_only puts Triton's back
        for name in args.groups:
            start, before = time.monotonic(), len(fresh)
            GROUPS[name]()
            print(f"{name}: {len(fresh) - before} compiled, {time.monotonic() - start:.0f} s", flush=True)
    CudaUtils()  # the module with which Triton loads kernels
    print(f"{len(kernels)} variants, {len(fresh)} of them compiled now")
    for kernel_name, taken in sorted(seconds.items(), key=lambda pair: -pair[1])[:5]:
        print(f"  {kernel_name}: {fresh.count(kernel_name)} variants, {taken:.0f} s")
    return int(args.check and bool(fresh))


class NotLoaded:
    """A module in C that Triton compiled, and that cannot be loaded where the GPU's driver is missing."""

    def __getattr__(self, name: str) -> None:
        return None


if __name__ == "__main__":
    sys.exit(main())
