"""The run on a GPU, without one: all of it on the CPU at a toy's size, faults in its stages, ends at any moment, and
what it tells afterwards.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import gpu_setup, gpu_summary
from benchmarks.gpu_stages import _OPS, DRY, NEMO, TEST_PATHS, stages
from benchmarks.provenance import append_record, read_records
from nemo_engine.benchmarks import gpu_worker
from nemo_engine.benchmarks.common import engine_config, peer_setups
from nemo_engine.cli import build_parser
from nemo_engine.ops import ALL_OPS

ROOT = Path(__file__).parents[2]
GPU = [sys.executable, str(ROOT / "benchmarks" / "gpu.py")]
# What the machine with the GPU has, and what these need.
THERE = {
    "torch", "triton", "numpy", "safetensors", "pytest", "pytest-xdist", "cmake", "ninja", "pybind11", "setuptools",
    "iniconfig", "pluggy", "packaging", "pygments", "execnet", "typing_extensions", "typing-extensions", "sympy",
    "mpmath", "jinja2", "markupsafe", "networkx", "filelock", "fsspec",
}  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}


def processes_of(mark: str) -> list[psutil.Process]:
    """The processes that run and have ``mark`` in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("GPU_TEST_MARK") == mark:
                found.append(process)
        except psutil.Error:
            pass
    return found


def wait_for_none(mark: str) -> list[psutil.Process]:
    ends = time.monotonic() + 120
    while (left := processes_of(mark)) and time.monotonic() < ends:
        time.sleep(0.05)
    return left


def test_without_a_gpu_nothing_is_done(tmp_path: Path) -> None:
    done = subprocess.run([*GPU, "--out", str(tmp_path)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("an NVIDIA GPU is needed, and torch finds none")
    assert not (ROOT / "nemo_engine" / "kernels").is_symlink()


def test_a_dry_run_with_faults_in_three_stages(tmp_path: Path) -> None:
    """Every kind of work runs on the CPU; a crash, a hang and a stage without memory cost themselves alone.

    Then the run goes on from its file.
    """
    mark = str(tmp_path)
    chosen = ["device", "smoke", "tests", "fp8-triton", "bf16-triton", "throughput", "profile"]
    plants = {"smoke": "crash", "bf16-triton": "oom", "throughput": "hang"}
    command = [*GPU, "--dry-run", "--patience", "30", "--seconds", "3000", "--out", str(tmp_path), "--stages"]
    planted = ["--plant", *[f"{stage}={fault}" for stage, fault in plants.items()]]
    done = subprocess.run(
        [*command, *chosen, *planted], env=environment(GPU_TEST_MARK=mark), capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    records = read_records(tmp_path / "results.jsonl")
    last = gpu_summary.last_by_key(records)
    status = {stage: str(last[f"stage {stage}"]["status"]) for stage in chosen}
    assert status["smoke"] == "failed: SIGSEGV" and status["bf16-triton"] == "failed: exit 1"
    assert status["throughput"] == "ended after 5 s"
    assert {status[stage] for stage in chosen if stage not in plants} == {"passed"}, done.stdout
    assert "memory" in last["bf16-triton planted"]["error"]
    found = [stage for stage in stages(DRY, Path(), Path(), True) if stage.name in chosen]
    for stage in found:
        known = {key for key in stage.expects if last.get(key, {}).get("status") == "ok"}
        assert known == (set() if stage.name in plants else set(stage.expects)), stage.name
    unknown = done.stdout.split("not known:\n")[1]
    assert all(f"  {key}  (" in unknown for stage in found if stage.name in plants for key in stage.expects)
    assert sum(record.get("benchmark") == "gpu_tests" and record["status"] == "passed" for record in records) == 9
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["junit.xml", "log.txt", "results.jsonl"]
    assert all(path.stat().st_size < 16 << 20 for path in files)
    assert not wait_for_none(mark)
    told = subprocess.run([*GPU, "--summary", str(tmp_path / "results.jsonl")], capture_output=True, text=True).stdout
    assert told.split("known:\n")[1].startswith(done.stdout.split("known:\n")[1].split("\n")[0])
    again = tmp_path / "again"
    command[command.index("--out") + 1] = str(again)
    resume = ["smoke", "device", "--resume", str(tmp_path / "results.jsonl")]
    done = subprocess.run([*command, *resume], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and "== device" not in done.stdout and "== smoke" in done.stdout, done.stdout
    assert gpu_summary.last_by_key(read_records(again / "results.jsonl"))["smoke triton"]["status"] == "ok"


# A run whose stages take no time to start: each starts a process that would outlive it, and writes numbers as fast as
# it can.
QUICK = """
import sys
from pathlib import Path
from benchmarks import gpu
from benchmarks.gpu_stages import Stage

WORK = '''
import subprocess, sys
sys.path.insert(0, {root!r})
from benchmarks.provenance import append_record
from pathlib import Path
subprocess.Popen(["sleep", "600"])
for number in range({count}):
    append_record(Path({results!r}), {{"key": f"{name} {{number}}", "status": "ok", "text": "x" * 3000}})
'''

def stages(sizes, results, junit, is_dry):
    def stage(name, count):
        code = WORK.format(root=str(gpu.ROOT), results=str(results), name=name, count=count)
        return Stage(name, 60.0, command=(sys.executable, "-S", "-c", code))
    return [stage("device", 20), stage("smoke", 10**9)]

def prepare(run):
    run.environment, run.is_warm, run.facts = dict(gpu.os.environ), True, {"gpu": None, "commit": "none"}
    return []

gpu.stages, gpu.Run.prepare = stages, prepare
sys.exit(gpu.main(["--dry-run", "--out", sys.argv[1], "--seconds", "100"]))
"""


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4])
def test_a_run_that_is_killed_leaves_readable_results_and_no_process(tmp_path: Path, number: int) -> None:
    """SIGKILL at a random moment after the first numbers; once SIGTERM, after which the run still says what is
    known.
    """
    mark = str(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", QUICK, str(tmp_path)], cwd=ROOT, env=environment(GPU_TEST_MARK=mark), text=True,
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    results = tmp_path / "results.jsonl"
    ends = time.monotonic() + 600
    while not (results.exists() and results.read_bytes().count(b"\n") > 2) and time.monotonic() < ends:
        time.sleep(0.01)
    time.sleep(random.Random(number).uniform(0.0, 0.5))
    if number:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == (-signal.SIGKILL if number else 1)
    assert number or "stopped" in said and "not known:" in said
    assert not wait_for_none(mark)
    lines = results.read_bytes().split(b"\n")
    keys = [json.loads(line)["key"] for line in lines[:-1]]  # the last may be torn
    assert keys[:3] == ["device 0", "device 1", "device 2"] and len(read_records(results)) >= len(keys)
    with results.open("ab") as file:  # a line that a kill tore
        file.write(b'{"key": "to')
    append_record(results, {"key": "next"})
    assert [record["key"] for record in read_records(results)][-1] == "next"


# A run that is killed between the fork of a stage's process and its first word to the guard.
KILLED_AT_THE_FORK = """
import os, signal, sys, time
from pathlib import Path
from benchmarks.gpu_processes import Group, Guard, Log

class LateGuard(Guard):
    def join(self):
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(0.2)
        super().join()

with Log(Path(sys.argv[1])) as log, LateGuard() as guard:
    Group(["sleep", "600"], os.environ, log, guard)
"""


def test_a_run_that_is_killed_while_it_starts_a_process_leaves_none(tmp_path: Path) -> None:
    mark = str(tmp_path)
    command = [sys.executable, "-c", KILLED_AT_THE_FORK, str(tmp_path / "log.txt")]
    done = subprocess.run(command, cwd=ROOT, env=environment(GPU_TEST_MARK=mark))
    assert done.returncode == -signal.SIGKILL
    assert not wait_for_none(mark)


def test_the_tests_for_gpus_collect_where_other_packages_are_missing() -> None:
    code = f"""
import importlib.metadata, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        of = [found.lower() for found in INSTALLED.get(name, [])]
        if of and not {THERE!r} & set(of):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

INSTALLED = importlib.metadata.packages_distributions()
for ours in ("nemo_engine", "tests", "csrc", "benchmarks", "kernels"):
    INSTALLED.pop(ours, None)
assert "hypothesis" in INSTALLED and "mistral_common" in INSTALLED and "scipy" in INSTALLED
sys.meta_path.insert(0, Missing())
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *{list(TEST_PATHS)!r}]))
"""
    unloaded = environment(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=unloaded, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(re.findall(r"(\d+)/\d+ tests collected", done.stdout)[0]) > 300


def test_every_file_with_tests_for_gpus_is_named() -> None:
    marked = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)
              and "pytest.mark.gpu" in path.read_text()}  # fmt: skip
    assert marked == set(TEST_PATHS)


# ---- the stages


def test_stages_fit_into_ten_minutes_and_their_commands_are_taken() -> None:
    found = stages(NEMO, Path("r.jsonl"), Path("j.xml"), False)
    names = [stage.name for stage in found]
    assert len(set(names)) == len(names)
    assert names.index("tests") < names.index("fp8-triton") < names.index("throughput") < names.index("ops-attention")
    commands = [stage.command for stage in found if "bench" in stage.command]
    assert {command[command.index("bench") + 1] for command in commands} == {"ops", "startup"}
    for command in commands:
        args = build_parser().parse_args(command[command.index("bench") :])
        if hasattr(args, "option"):
            engine_config(peer_setups(args)[0].options)
    for stage in found:
        for told in stage.told:
            if "engine" in told:
                engine_config({name: value for name, value in told["engine"].items()})
    ops = [op for names in _OPS.values() for op in names]
    assert len(set(ops)) == len(ops) and {op.name for op in ALL_OPS} - set(ops) == {
        "quantize_linear_fp8", "quantize_token_blocks", "embed", "draft_", "accept_",
    }  # fmt: skip


def test_what_fails_is_not_used_again() -> None:
    def swap(wants: str, **failing: list[str]) -> dict[str, Any]:
        return gpu_worker.swapped({"max_num_seqs": 4}, wants, failing, False)

    assert swap("triton", rope_and_append_kv_=["cuda"], linear=["triton"]) == {"max_num_seqs": 4}
    assert swap("triton", paged_attention=["triton"])["prefer"] == {"paged_attention": "cuda"}
    both = swap("triton", paged_attention=["triton", "cuda"])
    assert both["prefer"] == {"paged_attention": "semantics"} and both["enforce_eager"] is True
    assert swap("cuda", norm_linear=["cuda"])["prefer"] == {"norm_linear": "composed"}
    assert gpu_worker.swapped({}, "triton", {}, True) == {"enforce_eager": True}


def line(op: str, impl: str, status: str, case: str = "a") -> dict[str, Any]:
    return {
        "benchmark": "gpu_tests",
        "key": f"test x[{op}-{impl}-{case}]",
        "status": status,
        "op": op,
        "impl": impl,
        "error": "why",
    }


def test_a_first_run_avoids_what_crashes_and_a_resumed_one_what_fails() -> None:
    records = [
        line("linear", "cuda", "crashed"),
        line("sample_", "triton", "failed"),
        line("rms_norm", "cuda", "failed"),
        line("rms_norm", "cuda", "passed"),
        line("silu_mul", "cuda", "passed"),
    ]
    assert gpu_summary.failing_implementations(records, all_failures=False) == {"linear": ["cuda"]}
    assert gpu_summary.failing_implementations(records, all_failures=True) == {
        "linear": ["cuda"],
        "sample_": ["triton"],
    }
    lines = gpu_summary.test_lines(gpu_summary.last_by_key(records))
    assert "  FAILS: linear cuda, 1 tests; why" in lines and "2 passed" in lines[0]


def test_results_become_files_of_a_kind_each(tmp_path: Path) -> None:
    source, folder = tmp_path / "r.jsonl", tmp_path / "results"
    for record in ({"benchmark": "latency", "gpu": "NVIDIA H200"}, {"benchmark": "gpu_ceilings", "gpu": "NVIDIA H200"}):
        append_record(source, record)
    assert gpu_summary.store(source, folder) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["gpu-ceilings-h200.jsonl", "latency-h200.jsonl"]
    append_record(source, {"benchmark": "gpu", "key": "run", "dry": True})
    assert gpu_summary.store(source, tmp_path / "none") == 1 and not (tmp_path / "none").exists()


# ---- the plugin


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "test_it.py").write_text(
        "import os, time, pytest\n"
        "@pytest.mark.parametrize('case', ['linear-cuda-one', 'linear-triton-two', 'linear-cuda-three'])\n"
        "def test_it(case):\n"
        "    if case.endswith('two'): time.sleep(600)\n"
        "    assert not case.endswith('three')\n"
    )
    yield tmp_path


def test_outcomes_are_written_at_once_and_a_test_that_hangs_ends_its_process_alone(folder: Path) -> None:
    results = folder / "results.jsonl"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "xdist.plugin",
        "-p",
        "nemo_engine.benchmarks.gpu_pytest",
        "-n",
        "1",
    ]
    own = environment(GPU_RESULTS=str(results), GPU_SCRATCH=str(folder), GPU_TEST_SECONDS="5",
                      PYTHONPATH=str(ROOT), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")  # fmt: skip
    subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True)
    found = {record["key"].partition("[")[2]: record for record in read_records(results)}
    assert found["linear-cuda-one]"]["status"] == "passed" and found["linear-cuda-one]"]["impl"] == "cuda"
    assert found["linear-triton-two]"]["status"] == "crashed"
    assert found["linear-cuda-three]"]["status"] == "failed" and "assert" in found["linear-cuda-three]"]["error"]
    again = subprocess.run(command, cwd=folder, env={**own, "GPU_RESUME": "1"}, capture_output=True, text=True)
    assert "2 failed" in again.stdout and "passed" not in again.stdout


# ---- the pack


def test_a_cache_is_packed_without_its_folder_and_unpacked_into_another(tmp_path: Path) -> None:
    cache, other = tmp_path / "cache", tmp_path / "other"
    (cache / "KEY").mkdir(parents=True)
    for name in ("k.json", "k.cubin", "k.ttir", "launcher.so"):
        (cache / "KEY" / name).write_text(name)
    children = {name: str(cache / "KEY" / name) for name in ("k.json", "k.cubin", "k.ttir")}
    (cache / "KEY" / "__grp__k.json").write_text(json.dumps({"child_paths": children}))
    assert gpu_setup.pack_cache(cache, tmp_path / "pack.tar.xz") == 1
    assert gpu_setup.unpack_cache(tmp_path / "pack.tar.xz", other) == 4
    group = json.loads((other / "KEY" / "__grp__k.json").read_text())["child_paths"]
    assert group == {name: str(other / "KEY" / name) for name in ("k.json", "k.cubin")}
    assert all(Path(path).read_text() == name for name, path in group.items())


def test_links_stand_in_for_an_installation(tmp_path: Path) -> None:
    for name in ("nemo_engine", "kernels", "benchmarks"):
        (tmp_path / name).mkdir()
    (tmp_path / "nemo_engine" / "__init__.py").write_text('__version__ = "1.2"\n')
    library = tmp_path / "pack" / "_C.so"
    library.parent.mkdir()
    library.touch()
    made = gpu_setup.link_packages(tmp_path, library)
    assert [path.resolve() for path in made] == [tmp_path / "kernels", tmp_path / "benchmarks", library]
    assert gpu_setup.link_packages(tmp_path, library) == []
    gpu_setup.write_metadata(tmp_path, tmp_path / "site")
    code = "import sys; del sys.path[0]; import importlib.metadata; print(importlib.metadata.version('nemo-engine'))"
    said = gpu_setup.run_python(code, {**os.environ, "PYTHONPATH": str(tmp_path / "site")}, 60.0)
    assert said == "1.2"
