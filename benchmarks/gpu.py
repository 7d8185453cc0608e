"""All that a machine with an NVIDIA GPU is needed for, in one command: environment, CUDA kernels, tests, memory and race checks, ceilings,
benchmarks.

Stages run one after the other, each in processes of its own with a time limit and a log; none stops the others. Logs go to the folder that
the environment variable OUT names, else to benchmarks/results/gpu-logs; results to benchmarks/results/gpu-NAME.jsonl, and a copy to OUT.
Exit status 0 if every stage that ran passed, 1 if not, 2 without a GPU.

    python benchmarks/gpu.py --minutes 30
    python benchmarks/gpu.py --stages tests ops
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_engine.benchmarks.provenance import append_record, provenance

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from csrc import build  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
# Operations whose kernels hand data from thread to thread through shared memory.
_SHARING = (
    "rms_norm_fp8", "silu_mul_fp8", "linear", "linear_fp8", "norm_linear_fp8", "silu_mul_linear", "linear_silu_mul_fp8",
    "paged_attention", "sample_",
)  # fmt: skip
_LEAST_SECONDS = 20.0  # a stage is not started with less of the budget left
_SHOWN_LINES = 15  # of the log of a stage that did not pass

_NAME_OF_GPU = (
    "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "
    "f'torch {torch.__version__} finds none', end=''); raise SystemExit(not torch.cuda.is_available())"
)
_ENVIRONMENT = """
import importlib.util, platform, torch
print("python", platform.python_version(), " torch", torch.__version__, " CUDA", torch.version.cuda,
      " cuDNN", torch.backends.cudnn.version())
print(torch.cuda.get_device_properties(0))
print("triton", __import__("triton").__version__ if importlib.util.find_spec("triton") else "is not installed")
if importlib.util.find_spec("nemo_engine.kernels") is None:
    raise SystemExit("nemo_engine.kernels is not installed (pip install -e .): no kernel of ours would run")
"""


@dataclass(frozen=True, slots=True)
class Stage:
    """Commands that run in order with ``limit_s`` seconds for all; the first that fails ends the stage.

    ``missing``: why it cannot run here. A command whose program is not found is passed over, with a line in the log.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    limit_s: float
    environment: Mapping[str, str]
    missing: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a stage ended: "passed", "failed (exit status)", "timed out", or "skipped: why"."""

    stage: str
    status: str
    seconds: float
    log: str

    @property
    def is_bad(self) -> bool:
        """Whether it ran and did not pass."""
        return not self.status.startswith(("passed", "skipped"))


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer, which is often beside nvcc and not on the PATH."""
    places = sorted(glob.glob("/usr/local/cuda*/bin/compute-sanitizer"))
    return shutil.which("compute-sanitizer") or (places[-1] if places else None)


# Decode steps whose keys and values fit beside the weights on 80 GB: (batches, context).
_DECODES = (("1 8 64 256", 1024), ("1 8 64", 4096), ("1 8", 32768), ("1 2", 131072))
_FP8 = ("--option", "quantization=fp8", "--option", "kv_cache_dtype=fp8")
# Input and output lengths that other engines publish throughput for; so many requests that the last ones do not run alone for long.
_THROUGHPUT = ((128, 128, 2048), (1000, 1000, 1024), (2048, 128, 1024), (20000, 2000, 64))


def stages(results: Path) -> list[Stage]:
    """What is run, the most valuable first; benchmarks append to ``results``."""
    python, here = sys.executable, str(ROOT / "benchmarks")
    bench = (python, "-m", "nemo_engine", "bench")
    json_to = ("--json", str(results))

    def decodes(*options: str) -> tuple[tuple[str, ...], ...]:
        command = (*bench, "latency", "nemo", *json_to, *options)
        return tuple(
            (*command, "--batch", *batches.split(), "--context", str(context)) for batches, context in _DECODES
        )

    prefills = ("--batch", "1", "--input", "2048", "8192", "32768", "131071", "--output", "1", "--rounds", "3")
    throughput = (*bench, "throughput", "nemo", *json_to, *_FP8, "--option", "max_num_seqs=1024", "--rounds", "2")
    throughputs = tuple((*throughput, "--generate", f"requests={n},input={i},output={o}") for i, o, n in _THROUGHPUT)
    sanitizer = find_sanitizer()
    checked = ("--error-exitcode", "86", *bench, "ops", "--once", "--device", "cuda")
    memcheck = (sanitizer or "", "--tool", "memcheck", *checked)
    racecheck = (sanitizer or "", "--tool", "racecheck", *checked, "--op", *_SHARING)
    not_found = None if sanitizer else "compute-sanitizer is not found"
    nvcc, no_nvcc = build.find_nvcc()
    # torch's cache of memory would hide an access beyond the end of a tensor.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Stage("environment", (("nvidia-smi",), ("nvcc", "--version"), (python, "-c", _ENVIRONMENT)), 120, {}),
        Stage("build", ((python, "csrc/build.py"),), 300, {}, None if nvcc else no_nvcc),
        Stage("tests", ((python, "-m", "pytest", "-q", "-m", "gpu", "tests"),), 600, {}),
        Stage("memcheck", (memcheck,), 300, uncached, not_found),
        Stage("ceilings", ((python, f"{here}/gpu_ceilings.py", *json_to),), 360, {}),
        Stage("ops", ((*bench, "ops", "--device", "cuda", *json_to),), 900, {}),
        Stage("decode", decodes(), 900, {}),
        Stage("decode-fp8", decodes(*_FP8), 900, {}),
        Stage("prefill", ((*bench, "latency", "nemo", *json_to, *prefills),), 600, {}),
        Stage("startup", ((*bench, "startup", "nemo", *json_to, "--rounds", "2"),), 600, {}),
        Stage("throughput", throughputs, 1800, {}),
        Stage("racecheck", (racecheck,), 300, {}, not_found),
    ]


def run_stage(stage: Stage, seconds_left: float, logs: Path) -> Outcome:
    """Run ``stage`` in what is left of the budget."""
    log = logs / f"{stage.name}.log"
    if stage.missing is not None:
        return Outcome(stage.name, f"skipped: {stage.missing}", 0.0, "")
    if seconds_left < min(_LEAST_SECONDS, stage.limit_s):
        return Outcome(stage.name, "skipped: the budget is spent", 0.0, "")
    start = time.monotonic()
    deadline = start + min(stage.limit_s, seconds_left)
    status = "passed"
    with log.open("wb") as file:
        for command in stage.commands:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            if shutil.which(command[0]) is None:
                file.write(f"{command[0]} is not found\n".encode())
                continue
            code = _run(command, stage.environment, file.fileno(), deadline - time.monotonic())
            if code != 0:
                status = "timed out" if code is None else f"failed ({code})"
                break
    return Outcome(stage.name, status, time.monotonic() - start, str(log))


def _run(command: Sequence[str], environment: Mapping[str, str], output: int, seconds: float) -> int | None:
    """The exit status, or None if it was ended, with all processes that it started, after ``seconds``."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, **environment},
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(max(0.0, seconds))
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise


def run_all(chosen: Sequence[Stage], minutes: float, logs: Path, results: Path, gpu: str) -> list[Outcome]:
    """Run the stages within the budget; each leaves a line in ``results``, and in a copy if the logs are elsewhere."""
    end = time.monotonic() + 60 * minutes
    facts = provenance("torch") | {"gpu": gpu}
    outcomes = []
    for stage in chosen:
        print(f"== {stage.name}", flush=True)
        outcome = run_stage(stage, end - time.monotonic(), logs)
        outcomes.append(outcome)
        print(f"   {outcome.status}, {outcome.seconds:.0f} s  {outcome.log}", flush=True)
        if outcome.is_bad:
            lines = Path(outcome.log).read_text(errors="replace").splitlines()
            print(*(f"   | {line}" for line in lines[-_SHOWN_LINES:]), sep="\n", flush=True)
        record = {
            "benchmark": "gpu",
            "stage": stage.name,
            "status": outcome.status,
            "seconds": outcome.seconds,
            **facts,
        }
        append_record(results, record)
        if not logs.resolve().is_relative_to(results.parent.resolve()):
            shutil.copy(results, logs)
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages and print a table of how they ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in stages(RESULTS)]
    parser.add_argument("--minutes", type=float, default=45.0, help="budget of all stages together")
    parser.add_argument("--stages", nargs="*", choices=names, help="only these")
    args = parser.parse_args(argv)
    probe = subprocess.run([sys.executable, "-c", _NAME_OF_GPU], capture_output=True, text=True)
    if probe.returncode != 0:
        reason = probe.stdout or (probe.stderr.splitlines() or ["python failed"])[-1]
        print(f"make gpu needs an NVIDIA GPU: {reason}", file=sys.stderr)
        return 2
    gpu = probe.stdout
    logs = Path(os.environ.get("OUT") or RESULTS / "gpu-logs")
    logs.mkdir(parents=True, exist_ok=True)
    results = RESULTS / f"gpu-{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.jsonl"
    chosen = [stage for stage in stages(results) if not args.stages or stage.name in args.stages]
    print(f"{gpu}; {args.minutes:g} minutes; results in {results}")
    outcomes = run_all(chosen, args.minutes, logs, results, gpu)
    print(f"\n{'stage':12s}  {'seconds':>7s}  result")
    for outcome in outcomes:
        print(f"{outcome.stage:12s}  {outcome.seconds:7.0f}  {outcome.status}")
    return int(any(outcome.is_bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
