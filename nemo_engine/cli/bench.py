"""``nemo-engine bench``: measures engines and servers; the programs are in ``benchmarks/``."""

from __future__ import annotations

import argparse
from importlib import import_module

_BENCHMARKS = {
    "throughput": "whole workloads offline, ours and its peers in turns",
    "latency": "time to first token and between tokens, over a grid of batches, inputs and outputs",
    "serve": "an OpenAI-compatible server under load, as its clients see it",
    "report": "a folder of results as tables and plots, and the README's section of them",
    "ops": "every implementation of every operation, beside other libraries and the roofline",
    "scheduler": "host cost of a step by number of running requests, ours beside vLLM's",
    "startup": "each stage from a new process to the first token",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser("bench", help="measure engines and servers", allow_abbrev=False)
    kinds = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    for name, what in _BENCHMARKS.items():
        module = import_module(f"nemo_engine.benchmarks.{name}")
        kind = kinds.add_parser(
            name,
            help=what,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(kind)
        kind.set_defaults(benchmark=module.run, help_command=f"{kind.prog} --help")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    try:
        code: int = args.benchmark(args)
    except ValueError as error:
        raise ValueError(f"{error} ({args.help_command} lists what it takes)") from error
    return code
