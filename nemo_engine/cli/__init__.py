"""The ``nemo-engine`` command: one module per sub-command, each with ``add_parser`` and ``run``.

Owns exit codes and how errors look: bad input is one line on stderr and exit code 2. Importing it imports no torch.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from nemo_engine.cli import batch, bench, chat, demo, env, generate, info, plan, quantize, serve, simulate, verify
from nemo_engine.cli.parser import EXIT_BAD_INPUT, Parser, PrintCompletion

EXIT_OK = 0
EXIT_FAILED = 1  # a request ended with an error
EXIT_INTERRUPTED = 130

_COMMANDS = (generate, chat, serve, batch, info, plan, simulate, bench, quantize, verify, demo, env)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command; ``args.run`` is the chosen sub-command."""
    parser = Parser(
        prog="nemo-engine",
        description="An inference engine for Mistral NeMo. MODEL is a checkpoint directory, a Hub repository id, or "
        "nemo-tiny,\n"
        "the bundled model: nemo-engine generate nemo-tiny --prompt 'The standard library'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=env.Version, help="show the versions of this engine, torch and CUDA")
    parser.add_argument("--print-completion", action=PrintCompletion, help="print completions for bash, zsh or tcsh")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands).set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = build_parser().parse_args(argv)
    # A stream is None if it was closed by whoever started the command.
    sys.stdin, sys.stderr = sys.stdin or open(os.devnull), sys.stderr or open(os.devnull, "w")
    if sys.stdout is None:
        if args.run is not serve.run:
            print("nemo-engine: error: standard output is closed", file=sys.stderr)
            return EXIT_BAD_INPUT
        sys.stdout = open(os.devnull, "w")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are refused where the text is taken
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter shows "?"
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        handler = _log_to_stderr(getattr(args, "verbose", False))
        try:
            code: int = args.run(args)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # the reader went away (| head): nothing is left to tell it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_FAILED
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return EXIT_INTERRUPTED
        except (ValueError, OSError, ImportError) as error:
            print(f"nemo-engine: error: {' '.join(str(error).split())}", file=sys.stderr)
            return EXIT_BAD_INPUT
        finally:
            logging.getLogger("nemo_engine").removeHandler(handler)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"nemo-engine: warning: {message}", file=sys.stderr)


def _log_to_stderr(is_verbose: bool) -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("nemo-engine: %(message)s"))
    logger = logging.getLogger("nemo_engine")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_verbose else logging.WARNING)
    return handler
