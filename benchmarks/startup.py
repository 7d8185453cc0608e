"""``nemo-engine bench startup``: each stage from a new process to the first token, with a fresh process for every
start.

In every round this engine starts with its checkpoint in the page cache ("warm") and without ("cold"), and each peer
starts warm, in turns. For a cold start the kernel is asked to drop the checkpoint's pages and no others: Python's and
torch's own files stay cached, since dropping all takes root's rights. How much of the checkpoint was in the page cache
right before each start is in the results; where the kernel does not drop it, that start is left out. A shape with
random weights has nothing to read, so there are no cold starts.

    nemo-engine bench startup nemo-tiny --rounds 5 --json startup.jsonl
    nemo-engine bench startup nemo-tiny --peers vllm=/path/to/python transformers
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from nemo_engine.benchmarks.common import PeerSetup, Progress, add_common_arguments, engine_config, peer_setups
from nemo_engine.benchmarks.gpu_meter import GpuMeter
from nemo_engine.benchmarks.models import BenchModel, open_model
from nemo_engine.benchmarks.peers import PeerError, PeerProcess, why_missing
from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.benchmarks.report.results import Ratio, Record, Spread

OURS = "nemo_engine"
TOTAL = "to the first token"
MOST_RESIDENT = 0.1  # of the checkpoint may be in the page cache before a cold start
Key = tuple[str, str]  # engine, "cold" or "warm"
Stages = dict[str, float]  # seconds of one start, by stage; TOTAL is all of them
_CHILD = Path(__file__).parent / "startup_child.py"
_WEIGHTS = (".safetensors", ".bin", ".gguf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    add_common_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="starts of each kind [5]")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="starts before them, not counted [1]")
    parser.add_argument("--prompt-len", type=int, default=16, metavar="N", help="tokens of the first prompt [16]")
    parser.add_argument("--no-cold", action="store_true", help="leave the cold starts out")


def run(args: argparse.Namespace) -> int:
    """Measure, print and store; 1 if a start failed."""
    for name, least in (("rounds", 1), ("warmup", 0), ("prompt_len", 1)):
        if (value := getattr(args, name)) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    model = open_model(args.model)
    setups = peer_setups(args)
    setups[0].options.setdefault("skip_tokenizer_init", True)
    engine_config(setups[0].options)  # what is wrong with them is told before anything starts
    prompt = [random.Random(0).randrange(3, model.vocab_size) for _ in range(args.prompt_len)]
    kinds = [(setup, "warm") for setup in setups]
    if not model.is_dummy and not args.no_cold:
        kinds.insert(1, (setups[0], "cold"))
    starts = Starts()
    for setup in setups[1:]:
        if missing := why_missing(setup.name, setup.python):
            starts.failed[setup.name, "warm"] = ("missing", missing)
    with Progress((args.rounds + args.warmup) * len(kinds), "starts") as progress:
        for number in range(args.rounds + args.warmup):
            turn = number % len(kinds)
            for setup, kind in kinds[turn:] + kinds[:turn]:
                starts.start(setup, kind, model, prompt, args.log, is_counted=number >= args.warmup)
                progress.step()
    for setup, kind in kinds:
        if not starts.counted.get((setup.name, kind)):
            starts.failed.setdefault(
                (setup.name, kind), ("missing", "the kernel kept the checkpoint in its page cache at every try")
            )
    for record in records(args, starts):
        print(format_record(record))
        append_record(args.json, record)
    return int(any(status == "failed" for status, _ in starts.failed.values()))


class Starts:
    """Starts by engine and kind: stages of those that count, what of the checkpoint was cached before each, and what
    failed.
    """

    def __init__(self) -> None:
        self.counted: dict[Key, list[Stages]] = {}
        self.cached: dict[Key, list[float]] = {}
        self.versions: dict[str, Record] = {}
        self.failed: dict[Key, tuple[str, str]] = {}

    def start(
        self, setup: PeerSetup, kind: str, model: BenchModel, prompt: Sequence[int], log: Path | None, is_counted: bool
    ) -> None:
        """One more, unless that kind has failed before."""
        key = setup.name, kind
        if key in self.failed:
            return
        resident = prepare(model, kind)
        if kind == "cold" and resident > MOST_RESIDENT:  # another process has it mapped, or the file system keeps it
            return
        try:
            stages, self.versions[setup.name] = _start(setup, model, prompt, log)
        except PeerError as error:
            self.failed[key] = ("failed", str(error))
            self.counted.pop(key, None)
            print(f"{setup.name} ({kind}): FAILED, {error}", file=sys.stderr)
            return
        if is_counted:
            self.counted.setdefault(key, []).append(stages)
            self.cached.setdefault(key, []).append(resident)


# ---- the page cache


def weight_files(model: BenchModel) -> list[Path]:
    """The files with weights."""
    return sorted(path.resolve() for path in model.path.iterdir() if path.suffix in _WEIGHTS)


def prepare(model: BenchModel, kind: str) -> float:
    """Bring the checkpoint into the page cache or out of it; returns the part of it that is there afterwards, 0 to
    1.
    """
    files = weight_files(model)
    for path in files:
        if kind == "warm":
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
        else:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # pages that are still to be written cannot be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
    return resident_part(files)


def resident_part(files: Iterable[Path]) -> float:
    """The part of the files' pages that the page cache holds, 0 to 1; 0 of no files."""
    held = total = 0
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    for path in files:
        size = path.stat().st_size
        if size == 0:
            continue
        pages = -(-size // mmap.PAGESIZE)
        states = (ctypes.c_ubyte * pages)()
        with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as view:
            start = ctypes.c_ubyte.from_buffer(view)
            code = mincore(ctypes.addressof(start), size, states)
            del start  # or the mapping could not be closed
        if code != 0:
            raise OSError(ctypes.get_errno(), f"mincore failed for {path}")
        held += sum(state & 1 for state in states)
        total += pages
    return held / total if total else 0.0


# ---- starts


def _start(setup: PeerSetup, model: BenchModel, prompt: Sequence[int], log: Path | None) -> tuple[Stages, Record]:
    """(seconds of each stage, versions)."""
    if setup.name == OURS:
        return start_ours(setup, model, prompt, log), {}
    begin = time.time()
    peer = PeerProcess(setup.name, str(model.path), setup.options, setup.python, log)
    try:
        first, _ = peer.generate([list(prompt)], [1])
        end = time.time()
        second, _ = peer.generate([list(prompt)], [1])
        imports, load = (float(peer.started[f"{name}_seconds"]) for name in ("import", "load"))
        rest = end - begin - imports - load - first
        stages = {"start a process": rest, "import": imports, "load": load, "first answer": first, TOTAL: end - begin}
        return {**stages, "second answer": second}, peer.versions
    finally:
        peer.close()


def start_ours(setup: PeerSetup, model: BenchModel, prompt: Sequence[int], log: Path | None) -> Stages:
    """One start of this engine in a process of its own."""
    task = json.dumps({"model": str(model.path), "options": setup.options, "prompt": list(prompt)})
    begin = time.time()
    done = subprocess.run([setup.python, "-P", str(_CHILD), task], capture_output=True, text=True)
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write(done.stderr)
    if done.returncode != 0:
        raise PeerError((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    told = json.loads(done.stdout)
    at, rows = told["at"], told["engine"]
    stages = {
        "start the interpreter": at["interpreter"] - begin,
        "import torch": at["torch"] - at["interpreter"],
        "import nemo_engine": at["nemo_engine"] - at["torch"],
    }
    for row in rows:
        stages[row["name"]] = stages.get(row["name"], 0.0) + row["seconds"]
    known = sum(row["seconds"] for row in rows)
    stages["other work of the engine"] = at["engine"] - at["nemo_engine"] - known  # its modules' imports among it
    stages["first answer"] = at["first_token"] - at["engine"]
    stages[TOTAL] = at["first_token"] - begin
    stages["second answer"] = at["second_answer"] - at["first_token"]
    return stages


# ---- results


def records(args: argparse.Namespace, starts: Starts) -> list[Record]:
    """A record for each engine and kind of start."""
    facts = provenance("nemo-engine", "torch")
    if state := GpuMeter().state():
        facts["gpu_state"] = state
    common: Record = {
        "benchmark": "startup",
        "model": args.model,
        "rounds": args.rounds,
        "warmup": args.warmup,
        "prompt_len": args.prompt_len,
    }
    ours = [stages[TOTAL] for stages in starts.counted.get((OURS, "warm"), [])]
    rows = []
    for (name, kind), every in starts.counted.items():
        names = list(dict.fromkeys(stage for stages in every for stage in stages))
        record = {
            **common, "engine": name, "status": "ok", "kind": kind, "options": args.options[name], "versions":
            starts.versions[name], "stages": {stage: [stages[stage] for stages in every] for stage in names}, "total_s":
            [stages[TOTAL] for stages in every], "checkpoint_in_page_cache": starts.cached[name, kind], **facts,
        }  # fmt: skip
        if name != OURS and len(ours) == len(every):
            ratio = Ratio.paired(record["total_s"], ours)
            record["nemo_engine_faster_by"] = {"median": ratio.median, "interval": [ratio.low, ratio.high]}
        rows.append(record)
    for (name, kind), (status, error) in starts.failed.items():
        rows.append(
            {
                **common,
                "engine": name,
                "kind": kind,
                "status": status,
                "error": error,
                "options": args.options[name],
                **facts,
            }
        )
    return rows


def format_record(record: Record) -> str:
    """A table of its stages."""
    head = f"{record['engine']}, {record['kind']}"
    if record["status"] != "ok":
        return f"{head}: {record['status']}, {record['error']}"
    part = statistics.median(record["checkpoint_in_page_cache"])
    lines = [f"{head} (of the checkpoint {part:.0%} in the page cache)"]
    width = max(map(len, record["stages"]))
    lines += [f"  {stage.ljust(width)}  {Spread.of(seconds)} s" for stage, seconds in record["stages"].items()]
    if faster := record.get("nemo_engine_faster_by"):
        low, high = faster["interval"]
        lines.append(f"  nemo_engine is {faster['median']:.2f}x as fast to the first token ({low:.2f} to {high:.2f})")
    return "\n".join(lines)
