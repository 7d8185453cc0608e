"""What a run on a GPU does, in order of value: stages with their limits, what each makes known, and what their
processes are told.

Standard library only. The seconds are for one H200 with a pack (gpu_pack.py); they add up to less than 510 because a
stage that hangs costs its limit.
"""

from __future__ import annotations

import glob
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# The files whose tests are marked gpu: the others need packages that a machine with a GPU may lack.
TEST_PATHS = (
    "tests/ops/test_ops.py",
    "tests/ops/test_sample.py",
    "tests/runner/test_capture.py",
    "tests/runner/test_graphs.py",
    "tests/runner/test_mixed_graphs.py",
    "tests/test_triton_engine.py",
)
_FP8 = {"quantization": "fp8", "kv_cache_dtype": "fp8"}
_SHARING = (  # operations whose kernels hand data from thread to thread through shared memory
    "rms_norm_fp8", "silu_mul_fp8", "linear", "linear_fp8", "norm_linear_fp8", "silu_mul_linear",
    "paged_attention", "sample_",
)  # fmt: skip
# Those that a step spends its time in first.
_OPS = {
    "ops-linear-fp8": ("linear_fp8", "norm_linear_fp8", "silu_mul_linear_fp8", "mlp_fp8"),
    "ops-attention": ("paged_attention",),
    "ops-linear": ("linear", "norm_linear", "silu_mul_linear"),
    "ops-rest": (
        "rms_norm", "rms_norm_fp8", "silu_mul", "silu_mul_fp8", "quantize_tokens", "rope_and_append_kv_", "sample_",
        "top_logprobs", "build_batch_", "advance_",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stage:
    """Processes that run side by side, with ``seconds`` for all.

    worker: the work of gpu_worker, told by a line of JSON for each process; else ``command``. wants: the implementation
    that the stage is about.
    falls_back: takes the CUDA kernels where Triton's do not even start. needs_seconds: with less left it is not
    started. missing: why it cannot run here. is_extra: a run without it is complete.
    """

    name: str
    seconds: float
    worker: str = ""
    told: tuple[Mapping[str, Any], ...] = ()
    command: tuple[str, ...] = ()
    expects: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    wants: str = ""
    falls_back: bool = False
    needs_seconds: float = 15.0
    missing: str = ""
    is_extra: bool = False


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large everything is: NeMo's on a GPU, a toy's in a dry run on the CPU."""

    model: str
    device: str
    short: int  # context of most decode points
    long: int
    batches: tuple[int, int, int]
    chunk: int
    steps: int
    engine: Mapping[str, Any]
    work: Mapping[str, int]
    long_prefill_s: float


NEMO = Sizes(
    "nemo", "cuda", 1024, 131072, (1, 64, 256), 512, 50, {"max_num_seqs": 256},
    {"requests": 512, "input": 1000, "output": 1000}, 26.0,
)  # fmt: skip
DRY = Sizes(
    "tiny", "cpu", 64, 1024, (1, 2, 4), 32, 4,
    {"max_num_seqs": 4, "kv_cache_gib": 0.01, "max_num_batched_tokens": 256, "enforce_eager": True},
    {"requests": 6, "input": 20, "output": 10}, 1.0,
)  # fmt: skip


def stage_of_op(op: str) -> str:
    """The stage that measures an operation."""
    return next((name for name, names in _OPS.items() if op in names), "ops-rest")


def find_sanitizer() -> str:
    """The path of compute-sanitizer, which is often beside nvcc and not on the PATH; empty without one."""
    places = sorted(glob.glob("/usr/local/cuda*/bin/compute-sanitizer"))
    return shutil.which("compute-sanitizer") or (places[-1] if places else "")


def points(sizes: Sizes, is_first: bool) -> tuple[dict[str, Any], ...]:
    """The headline numbers of one precision and implementation; the most asked for first."""
    single, some, many = sizes.batches
    short, long = sizes.short, sizes.long
    spread = [(short // 4) << (index * 8 // some) for index in range(some)]

    def decode(name: str, contexts: list[int]) -> dict[str, Any]:
        return {"key": f"decode {name}", "what": "decode", "contexts": contexts, "steps": sizes.steps}

    stages = [
        decode(f"{single}x{short}", [short] * single), decode(f"{some}x{short}", [short] * some),
        decode(f"{many}x{short}", [short] * many), decode(f"{single}x{long}", [long] * single),
        decode(f"mixed {some - 1}x{short} and 1x{long}", [long] + [short] * (some - 1)),
        decode(f"mixed {some} of {spread[0]} to {spread[-1]}", spread),
        {"key": f"prefill {2 * short}", "what": "prefill", "tokens": 2 * short, "rounds": 5},
        {"key": f"step {some}x{short} and a chunk of {sizes.chunk}", "what": "mixed", "contexts": [short] * some,
         "chunk": sizes.chunk, "rounds": 10},
    ]  # fmt: skip
    if is_first:
        tokens = sizes.long - 4
        stages.append(
            {
                "key": f"prefill {sizes.long}",
                "what": "prefill",
                "tokens": tokens,
                "rounds": 1,
                "seconds": sizes.long_prefill_s,
            }
        )
    return tuple(stages)


def stages(sizes: Sizes, results: Path, junit: Path, is_dry: bool) -> list[Stage]:
    """All stages, the most valuable first; those from "memcheck" on are for machines with more time."""
    cuda = {} if is_dry else {"prefer": {"*": "cuda"}}
    python = sys.executable

    def engine(name: str, seconds: float, wants: str, options: Mapping[str, Any], first: bool) -> Stage:
        chosen = points(sizes, first)
        told = {"model": sizes.model, "engine": {**sizes.engine, **options}, "points": chosen}
        known = tuple(f"{name} {key}" for key in ("start", *[point["key"] for point in chosen]))
        return Stage(name, seconds, "engine", (told,), expects=known, wants=wants)

    smokes = {
        "smoke triton eager": {"enforce_eager": True}, "smoke triton": {}, "smoke triton fp8": _FP8,
        "smoke cuda": {**cuda}, "smoke cuda fp8": {**cuda, **_FP8},
    }  # fmt: skip
    if is_dry:
        smokes = {"smoke triton": {}}
    bench = (python, "-m", "nemo_engine", "bench")
    ops = (*bench, "ops", "--device", sizes.device, "--json", str(results), "--rounds", "1" if is_dry else "10")
    ops += ("--sizes", "tiny") if is_dry else ()
    work = "{requests}x{input}/{output}".format(**sizes.work)
    single, some, _ = sizes.batches
    profiled = [
        {
            "key": f"profile decode {single}x{sizes.short}",
            "what": "profile",
            "contexts": [sizes.short] * single,
            "steps": 5,
        },
        {
            "key": f"profile decode {some}x{sizes.short}",
            "what": "profile",
            "contexts": [sizes.short] * some,
            "steps": 5,
        },
        {
            "key": f"profile step {some}x{sizes.short} and {sizes.chunk}",
            "what": "profile",
            "contexts": [sizes.short] * some,
            "chunk": sizes.chunk,
            "steps": 3,
        },
    ]
    test_paths = ("tests/runner/test_graphs.py", "-k", "test_graph_sizes") if is_dry else (*TEST_PATHS, "-m", "gpu")
    tests = (
        python, "-m", "pytest", "-q", "--tb=short", "-p", "xdist.plugin", "-p", "nemo_engine.benchmarks.gpu_pytest",
        "-p", "no:cacheprovider", "-n", "1" if is_dry else "8", "--max-worker-restart", "64", f"--junitxml={junit}",
        "-o", "junit_logging=no", *test_paths,
    )  # fmt: skip
    listed = [
        Stage("device", 25, "device", ({},), expects=("ceilings",)),
        Stage(
            "smoke",
            45,
            "smoke",
            tuple({"key": key, "engine": options} for key, options in smokes.items()),
            expects=tuple(smokes),
        ),
        # Other plugins that are installed cost a worker seconds, and a spoilt worker is replaced.
        Stage("tests", 90, command=tests, expects=("tests end",), environment={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}),
        engine("fp8-triton", 80, "triton", _FP8, True),
        engine("bf16-triton", 90, "triton", {}, True),
        engine("fp8-cuda", 55, "cuda", {**_FP8, **cuda}, False),
        engine("bf16-cuda", 55, "cuda", cuda, False),
        Stage(
            "throughput",
            95,
            "throughput",
            ({"model": sizes.model, "engine": {**sizes.engine, **_FP8}, "work": sizes.work},),
            expects=(f"throughput {work}",),
            wants="triton",
            falls_back=True,
            needs_seconds=45,
        ),
        *[
            Stage(
                name,
                35,
                command=(*ops, "--op", *(names[:1] if is_dry else names)),
                expects=tuple(f"{name} {op}" for op in (names[:1] if is_dry else names)),
            )
            for name, names in _OPS.items()
        ],
        Stage(
            "profile",
            40,
            "engine",
            ({"model": sizes.model, "engine": {**sizes.engine, **_FP8}, "points": profiled},),
            expects=tuple(f"profile {point['key']}" for point in profiled),
            wants="triton",
            falls_back=True,
        ),
    ]
    return listed if is_dry else listed + extra_stages(results)


def extra_stages(results: Path) -> list[Stage]:
    """For a machine with more than ten minutes: every ceiling, start-up, throughput at 1024 rows, and the checks of
    memory and races.
    """
    python, here = sys.executable, str(Path(__file__).resolve().parent)
    bench = (python, "-m", "nemo_engine", "bench")
    sanitizer = find_sanitizer()
    absent = "" if sanitizer else "compute-sanitizer is not found"
    checked = ("--error-exitcode", "86", *bench, "ops", "--once", "--device", "cuda")
    work = {"requests": 2048, "input": 1000, "output": 1000}
    json_to = ("--json", str(results))
    # torch's cache of memory would hide an access beyond the end of a tensor.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    listed = [
        Stage(
            "throughput-1024",
            200,
            "throughput",
            ({"model": "nemo", "engine": {"max_num_seqs": 1024, **_FP8}, "work": work},),
            expects=("throughput-1024 2048x1000/1000",),
            wants="triton",
            falls_back=True,
            needs_seconds=120,
        ),
        Stage(
            "memcheck",
            300,
            command=(sanitizer, "--tool", "memcheck", *checked),
            environment=uncached,
            needs_seconds=60,
            missing=absent,
        ),
        Stage(
            "racecheck",
            300,
            command=(sanitizer, "--tool", "racecheck", *checked, "--op", *_SHARING),
            needs_seconds=60,
            missing=absent,
        ),
        Stage("all-ceilings", 360, command=(python, f"{here}/gpu_ceilings.py", *json_to), needs_seconds=60),
        Stage("startup", 300, command=(*bench, "startup", "nemo", *json_to, "--rounds", "2"), needs_seconds=90),
    ]
    return [replace(stage, is_extra=True) for stage in listed]
