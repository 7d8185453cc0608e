"""Everything that a machine with an NVIDIA GPU is needed for, in one command of some minutes: correctness, headline
numbers, operations, a profile.

    python benchmarks/gpu.py --seconds 510 --out DIR        # with a pack of `make gpu-pack` nothing is compiled
    python benchmarks/gpu.py --seconds 300 --out DIR2 --resume DIR/results.jsonl    # what failed or is missing
    python benchmarks/gpu.py --dry-run --out DIR            # the same on a CPU, at a toy's size
    python benchmarks/gpu.py --summary DIR/results.jsonl    # what is known, after a run that was cut off
    python benchmarks/gpu.py --store DIR/results.jsonl      # into benchmarks/results/, a file for each kind

Stages run one after the other, each in process groups of its own with a limit; one that crashes, hangs or has no memory
costs itself alone. Every number is in DIR/results.jsonl, on the disk, the moment it is there; DIR/log.txt has all
output, DIR/junit.xml the tests. Nothing needs the package installed, git or a network. Exit status: 0 if all that was
wanted is known, 1 if not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if sys.path and Path(sys.path[0] or ".").resolve() == ROOT / "benchmarks":
    del sys.path[0]  # modules of this folder have common names
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import gpu_setup  # noqa: E402
from benchmarks.gpu_processes import MOST_BYTES, Group, Guard, Log  # noqa: E402
from benchmarks.gpu_stages import DRY, NEMO, Sizes, Stage, stages  # noqa: E402
from benchmarks.gpu_summary import failing_implementations, last_by_key, store, summary_lines  # noqa: E402
from benchmarks.provenance import COMMIT, append_record, provenance, read_records  # noqa: E402

_TICK = 0.05
_COLD = 1.8  # times as long as with a pack may a stage take
_HANG_S = 5.0  # limit of a stage with a planted hang
_TEST_SECONDS = {True: 20, False: 60}  # of a test; more where kernels are compiled first
_ASSUMED = {
    "bytes_per_s": 4.3e12,
    "bf16_flops_per_s": 7.88e14,
    "fp8_flops_per_s": 1.5e15,
}  # of an H200, if its own are not known
_PROBE = """
import json, platform, torch
facts = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
facts |= {"gpu": None, "triton": None}
if torch.cuda.is_available():
    facts["gpu"] = torch.cuda.get_device_name()
try:
    import triton, triton.runtime.cache
    from triton.backends.nvidia.compiler import get_ptxas
    facts["ptxas"] = get_ptxas(90).version
    facts["triton"], facts["triton_key"] = triton.__version__, triton.runtime.cache.triton_key()
except Exception as error:
    facts["triton_error"] = repr(error)
print(json.dumps(facts))
"""


class Run:
    """One run: where its files are, how much time is left, and the stages."""

    def __init__(self, args: argparse.Namespace, log: Log, guard: Guard, scratch: Path) -> None:
        self.ends = time.monotonic() + args.seconds
        self.args, self.log, self.guard, self.scratch = args, log, guard, scratch
        self.results: Path = args.out / "results.jsonl"
        self.sizes: Sizes = DRY if args.dry_run else NEMO
        self.pack: Path = args.pack
        self.environment: dict[str, str] = {}
        self.facts: dict[str, Any] = {}
        self.is_warm = False
        self.ready: tuple[Stage, list[Group]] | None = None

    @property
    def seconds_left(self) -> float:
        return self.ends - time.monotonic()

    def say(self, text: str) -> None:
        """To the terminal and the log."""
        print(text, flush=True)
        self.log.write(f"{text}\n".encode())

    def write(self, **record: Any) -> None:
        append_record(self.results, {"benchmark": "gpu", **record, **self.facts})

    # ---- before the stages

    def prepare(self) -> list[Path]:
        """Make the package importable and fill Triton's cache; returns the links that were made in the tree."""
        manifest = gpu_setup.read_manifest(self.pack)
        library = gpu_setup.library_of(self.pack)
        notes = []
        if library is not None and (manifest or {}).get("sources", {}).get("csrc") != gpu_setup.sources()["csrc"]:
            notes.append("the pack's CUDA library is of other sources than this tree, and is not used")
            library = None
        links = [] if gpu_setup.is_installed() else gpu_setup.link_packages(ROOT, library)
        gpu_setup.write_metadata(ROOT, self.scratch / "site")
        environment = gpu_setup.child_environment(ROOT, self.scratch, {
            "GPU_RESULTS": str(self.results), "GPU_SCRATCH": str(self.scratch),
            "GPU_RESUME": "1" if self.args.resume else "",
            COMMIT: (manifest or {}).get("commit") or gpu_setup.commit_text(ROOT),
        })  # fmt: skip
        said = gpu_setup.run_python(_PROBE, environment, 60.0)
        try:
            probe = json.loads(said)
        except ValueError:
            probe = {"error": said, "gpu": None}
        key = gpu_setup.triton_hash(probe.pop("triton_key")) if "triton_key" in probe else None
        here, packed = (key, probe.get("ptxas")), ((manifest or {}).get("triton_key"), (manifest or {}).get("ptxas"))
        self.is_warm = self.args.dry_run or key is not None and here == packed
        if self.is_warm and not self.args.dry_run:
            cache = self.scratch / "triton"
            notes.append(
                f"{gpu_setup.unpack_cache(self.pack / gpu_setup.CACHE, cache)} files of Triton's cache unpacked"
            )
            environment["TRITON_CACHE_DIR"] = str(cache)
        elif not self.args.dry_run:
            notes.append(
                f"kernels are compiled here: triton_key() and ptxas are {here}, the pack was made for {packed}"
            )
        environment["GPU_TEST_SECONDS"] = str(_TEST_SECONDS[self.is_warm] * self.args.patience)
        self.environment = environment
        os.environ[COMMIT] = environment[COMMIT]  # for this process too
        self.facts = provenance() | {"gpu": probe.get("gpu"), "commit": environment[COMMIT]}
        if self.args.dry_run:
            self.facts["gpu"] = None
        self.say(f"{probe}  commit {environment[COMMIT]}  triton_key {key}")
        for note in notes:
            self.say(f"note: {note}")
        if shutil.which("nvidia-smi") and not self.args.dry_run:
            self.log.write(
                subprocess.run(["nvidia-smi"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=30).stdout
            )
        self.write(
            what="run", status="ok", key="run", triton_key=key, is_warm=self.is_warm, notes=notes, versions=probe,
            seconds=self.args.seconds, dry=self.args.dry_run, pack=manifest and manifest.get("commit"),
        )  # fmt: skip
        return links

    # ---- stages

    def started(self, stage: Stage) -> list[Group]:
        """Its processes: those that import and wait, or new ones. ``FileNotFoundError`` for a command that is none."""
        if self.ready is not None and self.ready[0] is stage:
            groups, self.ready = self.ready[1], None
            return groups
        command = (
            [sys.executable, "-m", "nemo_engine.benchmarks.gpu_worker", stage.worker] if stage.worker else stage.command
        )
        environment = {**self.environment, **stage.environment}
        return [Group(command, environment, self.log, self.guard) for _ in stage.told or ((),)]

    def get_ready(self, stage: Stage | None) -> None:
        """Start the next stage's processes while this one measures: they import torch and wait."""
        if stage is not None and stage.worker and self.ready is None:
            self.ready = (stage, self.started(stage))

    def drop_ready(self) -> None:
        """End processes that wait for work that will not come."""
        if self.ready is not None:
            for group in self.ready[1]:
                group.kill()
        self.ready = None

    def tell(self, stage: Stage, groups: list[Group], seconds: float) -> None:
        """Send each process what it is to do, as far as is known by now."""
        records = read_records(self.results)
        ceilings = last_by_key(records).get("ceilings", {}).get("ceilings") or _ASSUMED
        failing = failing_implementations(records, all_failures=self.args.resume is not None)
        smokes = {key: record["status"] for key, record in last_by_key(records).items() if key.startswith("smoke ")}
        is_eager = smokes.get("smoke triton") == "failed" and smokes.get("smoke triton eager") == "ok"
        is_cuda = stage.falls_back and smokes.get("smoke triton eager") == "failed" and smokes.get("smoke cuda") == "ok"
        for group, told in zip(groups, stage.told, strict=True):
            line = {
                **told, "stage": stage.name, "results": str(self.results), "seconds": seconds - 1,
                "device": self.sizes.device, "ceilings": ceilings, "facts": {"commit": self.facts["commit"]},
                "plant": self.args.plant.get(stage.name), "failing": failing, "eager": is_eager,
                "wants": "cuda" if is_cuda else stage.wants,
            }  # fmt: skip
            if is_cuda:
                line["engine"] = {"prefer": {"*": "cuda"}, **told["engine"]}
            group.send(json.dumps(line))

    def run_stage(self, stage: Stage, following: Stage | None) -> str:
        """Run it within its limit; "passed", or what went wrong."""
        limit = min(stage.seconds * self.args.patience * (1.0 if self.is_warm else _COLD), self.seconds_left)
        if self.args.plant.get(stage.name) == "hang":
            limit = min(limit, _HANG_S)
        start = time.monotonic()
        status = "passed"
        groups: list[Group] = []
        try:
            groups = self.started(stage)
            if stage.worker:
                self.tell(stage, groups, limit)
            self.get_ready(following)
            while any(group.is_running for group in groups) and time.monotonic() - start < limit:
                time.sleep(_TICK)
            codes = [group.end() for group in groups]
            if any(code is None for code in codes):
                status = f"ended after {limit:.0f} s"
            elif any(codes):
                status = "failed: " + ", ".join(exit_text(code) for code in codes if code)
        except OSError as error:
            status = f"failed: {error}"
        finally:
            for group in groups:
                group.kill()
        self.write(what="stage", key=f"stage {stage.name}", stage=stage.name, status=status,
                   seconds=round(time.monotonic() - start, 2))  # fmt: skip
        return status

    def run(self, chosen: Sequence[Stage]) -> None:
        """All of ``chosen``, as far as the time goes."""
        for index, stage in enumerate(chosen):
            reason = stage.missing
            if self.seconds_left < stage.needs_seconds and not self.args.dry_run:
                reason = reason or f"{self.seconds_left:.0f} s are left"
            if reason:
                self.say(f"== {stage.name}: not run, {reason}")
                self.write(what="stage", key=f"stage {stage.name}", stage=stage.name, status=f"not run: {reason}")
                continue
            self.say(f"== {stage.name}, {self.seconds_left:.0f} s are left")
            following = next((one for one in chosen[index + 1 :] if not one.missing), None)
            before = time.monotonic()
            self.say(f"   {self.run_stage(stage, following)}, {time.monotonic() - before:.1f} s")
        self.drop_ready()


def exit_text(code: int) -> str:
    """An exit status as people know it."""
    return signal.Signals(-code).name if code < 0 else f"exit {code}"


def choose(args: argparse.Namespace, all_stages: list[Stage], records: Sequence[Mapping[str, Any]]) -> list[Stage]:
    """The stages that ``args`` name; on --resume those of which something is not known yet."""
    chosen = [stage for stage in all_stages if not args.stages or stage.name in args.stages]
    if args.resume is None:
        return chosen
    known = {key for key, record in last_by_key(records).items() if record.get("status") in ("ok", "passed")}
    return [
        stage for stage in chosen
        if f"stage {stage.name}" not in known or not set(stage.expects) <= known
    ]  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. What is wrong with it ends the process with a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=510.0, help="for everything together [510]")
    parser.add_argument("--out", type=Path, help="folder of the results; $OUT if that is set [gpu-out]")
    parser.add_argument(
        "--resume", type=Path, metavar="FILE", help="results of a run before: what it has is not measured again"
    )
    names = [stage.name for stage in stages(NEMO, Path(), Path(), False)]
    parser.add_argument("--stages", nargs="+", choices=names, help="only these")
    parser.add_argument(
        "--pack", type=Path, default=gpu_setup.PACK, help="folder that `make gpu-pack` made [build/gpu-pack]"
    )
    parser.add_argument(
        "--patience", type=float, default=1.0, metavar="N", help="a stage may take N times as long as on an H200 [1]"
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at a toy's size")
    parser.add_argument(
        "--plant", nargs="+", default=[], metavar="STAGE=FAULT", help="of a dry run: crash, hang or oom"
    )
    parser.add_argument("--summary", type=Path, metavar="FILE", help="tell what results say, and measure nothing")
    parser.add_argument(
        "--store", type=Path, metavar="FILE", help="put results into benchmarks/results/, and measure nothing"
    )
    args = parser.parse_args(argv)
    args.out = args.out or Path(os.environ.get("OUT") or "gpu-out")
    args.plant = dict(text.split("=", 1) for text in args.plant if "=" in text)
    if args.plant and not args.dry_run:
        parser.error("--plant is for a --dry-run")
    if not args.seconds > 0:
        parser.error(f"--seconds must be greater than 0, got {args.seconds:g}")
    if not args.patience > 0:
        parser.error(f"--patience must be greater than 0, got {args.patience:g}")
    for name in ("resume", "summary", "store"):
        if (given := getattr(args, name)) is not None and not given.is_file():
            parser.error(f"--{name} {given}: there is no such file")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; print what is known and what is not, also after SIGTERM."""
    args = parse(argv)
    junit = args.out / "junit.xml"
    if args.store is not None:
        return store(args.store, ROOT / "benchmarks" / "results")
    all_stages = stages(
        DRY if args.dry_run else NEMO, args.out.resolve() / "results.jsonl", junit.resolve(), args.dry_run
    )
    if args.summary is not None:
        print(*summary_lines(read_records(args.summary), all_stages), sep="\n")
        return 0
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.jsonl"
    if args.resume is not None and args.resume.resolve() != results:
        for record in read_records(args.resume):
            append_record(results, record)
    signal.signal(signal.SIGTERM, _stop)
    links: list[Path] = []
    with tempfile.TemporaryDirectory(prefix="nemo-gpu-") as scratch, Log(args.out / "log.txt") as log, Guard() as guard:
        run = Run(args, log, guard, Path(scratch))
        chosen: list[Stage] = []
        try:
            links = run.prepare()
            if run.facts["gpu"] is None and not args.dry_run:
                print(
                    "an NVIDIA GPU is needed, and torch finds none (--dry-run tries everything on the CPU)",
                    file=sys.stderr,
                )
                return 2
            chosen = choose(args, all_stages, read_records(results))
            run.run(chosen)
        except (KeyboardInterrupt, SystemExit):
            run.say("stopped")
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            run.drop_ready()
            for link in links:
                link.unlink(missing_ok=True)
            lines = summary_lines(read_records(results), chosen or all_stages)
            if run.facts.get("gpu") or args.dry_run:
                run.say("\n".join(lines))
    if junit.exists() and junit.stat().st_size > MOST_BYTES:
        junit.unlink()
    known = {
        key for key, record in last_by_key(read_records(results)).items() if record.get("status") in ("ok", "passed")
    }
    wanted = {f"stage {stage.name}" for stage in chosen if not stage.missing and not stage.is_extra}
    return int(not chosen or not wanted <= known)


def _stop(*_: Any) -> None:
    raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(main())
