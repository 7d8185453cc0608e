"""What several benchmarks share: their options, the model, the workload, a progress bar."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nemo_engine.benchmarks.models import SHAPES, open_model
from nemo_engine.benchmarks.peers import PEERS
from nemo_engine.config import EngineConfig
from nemo_engine.workload import Item, WorkloadSpec, generate, read_workload

_BAR_AFTER = 2.0  # seconds
_MAKE_WEIGHTS = {"nemo_engine", "vllm", "sglang"}  # engines with an option for random weights


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, peers, options and where results go."""
    parser.add_argument(
        "model", metavar="MODEL",
        help=f"a checkpoint directory, nemo-tiny, or a shape with random weights: {', '.join(SHAPES)}",
    )  # fmt: skip
    parser.add_argument(
        "--peers",
        nargs="*",
        default=[],
        metavar="NAME[=PYTHON]",
        help="what to measure against, and the Python that has it: "
        f"{', '.join(name for name in PEERS if name != 'nemo_engine')}",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="ENGINE.NAME=JSON",
        help="an option of an engine, such as vllm.enforce_eager=true; without its name it is nemo_engine's: "
        "max_num_seqs=64",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to FILE, a line each")
    parser.add_argument("--log", type=Path, metavar="FILE", help="what the engines print goes to FILE")


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """A workload file, or one that is made up."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--workload", type=Path, metavar="FILE", help="a workload file")
    group.add_argument(
        "--synthetic", default="requests=32,input=uniform:16:256,output=128", metavar="NAME=VALUE,...",
        help="a workload that is made up [%(default)s]",
    )  # fmt: skip


def workload_of(args: argparse.Namespace) -> list[Item]:
    """The workload that the options name."""
    if args.workload is not None:
        return list(read_workload(args.workload))
    return list(generate(WorkloadSpec.parse_text(args.synthetic, "--synthetic")))


def workload_facts(args: argparse.Namespace, items: Sequence[Item]) -> dict[str, Any]:
    """What a result says of its workload. ``new_tokens``: of all answers together."""
    facts: dict[str, Any] = {
        "source": str(args.workload or args.synthetic),
        "requests": len(items),
        "turns": sum(len(item.turns) for item in items),
        "new_tokens": sum(item.output_tokens for item in items),
    }
    if all(turn.num_tokens for item in items for turn in item.turns):
        facts["prompt_tokens"] = sum(i.prefix_tokens + sum(turn.num_tokens or 0 for turn in i.turns) for i in items)
    if args.workload is None:
        facts["seed"] = WorkloadSpec.parse_text(args.synthetic, "--synthetic").seed
    return facts


@dataclass(frozen=True, slots=True)
class PeerSetup:
    """An engine to run: its name, its Python, its options."""

    name: str
    python: str
    options: dict[str, Any]


def peer_setups(args: argparse.Namespace) -> list[PeerSetup]:
    """Ours and the peers that the options name; sets ``args.options``. ``ValueError`` for names that are none."""
    pythons = {"nemo_engine": sys.executable}
    for text in args.peers:
        name, _, python = text.partition("=")
        if name not in PEERS or name == "nemo_engine":
            raise ValueError(f"--peers takes {', '.join(n for n in PEERS if n != 'nemo_engine')}, got {name!r}")
        if name in pythons:
            raise ValueError(f"--peers names {name} twice")
        pythons[name] = python or sys.executable
    args.options = {name: {} for name in pythons}
    for text in args.option:
        key, equals, value = text.partition("=")
        engine, dot, option = key.rpartition(".")
        engine = engine if dot else "nemo_engine"
        if not (equals and engine and option):
            raise ValueError(f"--option must be ENGINE.NAME=JSON, or NAME=JSON for nemo_engine, got {text!r}")
        if engine not in pythons:
            raise ValueError(f"--option names {engine!r}, which does not run here: {', '.join(pythons)}")
        try:
            args.options[engine][option] = json.loads(value)
        except ValueError:
            args.options[engine][option] = value
    if args.model in SHAPES:
        for engine in _MAKE_WEIGHTS & args.options.keys():
            args.options[engine].setdefault("load_format", "dummy")
    return [PeerSetup(name, python, args.options[name]) for name, python in pythons.items()]


def engine_config(options: Mapping[str, Any]) -> EngineConfig:
    """The configuration of ours that ``options`` mean. ``ValueError`` for one that is wrong or unknown."""
    known = [field.name for field in fields(EngineConfig)]
    for name in options:
        if name not in known:
            raise ValueError(f"--option names {name!r}, which nemo_engine does not have: it has {', '.join(known)}")
    return EngineConfig(**options)


def resolve_model(model: str) -> tuple[Path, int]:
    """(the checkpoint's directory, its vocabulary's size), for engines that know no bundled model."""
    model_files = open_model(model)
    return model_files.path, model_files.vocab_size


class Progress:
    """A bar on stderr for what takes longer than two seconds; tqdm's, or none where it is not installed."""

    def __init__(self, total: int, unit: str) -> None:
        self._total, self._unit, self._done = total, unit, 0
        self._started = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def step(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._started > _BAR_AFTER and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=self._total, unit=self._unit, initial=self._done, file=sys.stderr)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
