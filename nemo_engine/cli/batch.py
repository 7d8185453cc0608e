"""``nemo-engine batch``: answer a file of requests into a file of results, to go on from where it was after
anything.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from nemo_engine.cli import arguments

_SERVER_OPTIONS = (
    "served_model_name",
    "system_placement",
    "trust_request_chat_template",
    "request_timeout",
    "max_request_mib",
    "max_completions",
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "batch",
        help="answer a file of requests, and go on from where it was after anything",
        description="Answer the requests of IN, a line of JSON each, into OUT: a line of OpenAI's batches (custom_id, "
        "method, url, body), a "
        'workload\'s, or {"prompt": ...} or {"messages": ...} with any field of the route. Results are appended as '
        "they come; failures go to "
        "OUT.errors, with line and reason. Started again, it answers what is left; remove OUT.errors first to try "
        "failures again. '-' is "
        "standard input or output; gzip is read as what it holds, and written where OUT ends in .gz. Sampling options "
        "are those of lines "
        "that do not set their own.",
        usage="%(prog)s [MODEL] IN OUT [options]",
        allow_abbrev=False,
    )
    arguments.add_engine_arguments(parser, model_nargs="?")
    parser.add_argument(
        "input", metavar="IN", help="a file of requests, or '-'; without MODEL, its first line names that"
    )
    parser.add_argument("output", metavar="OUT", help="a file for results, or '-'")
    add_force(parser)
    arguments.add_some_server_arguments(parser, _SERVER_OPTIONS, "options of requests")
    arguments.add_sampling_arguments(parser)
    return parser


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add ``--force``."""
    parser.add_argument("--force", action="store_true", help="go on although the run was begun with other options")


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if a line failed."""
    return answer_file(args, args.model, arguments.server_options(args))


def answer_file(args: argparse.Namespace, model: str | None, server: dict[str, Any]) -> int:
    """Answer ``args.input`` into ``args.output``; 1 if a line failed."""
    try:
        from nemo_engine.server.batch.answers import batch_options, run_batch
    except ImportError as error:
        raise ImportError(
            f"batches need packages that are not installed ({error}): pip install 'nemo-engine[server]'"
        ) from error
    from nemo_engine.batch.job import BatchJob, first_model

    if model is None:
        model = first_model(args.input)
    sampling, engine = arguments.sampling_options(args), arguments.engine_options(args)
    options = batch_options(model, sampling, engine, server)
    with BatchJob(args.input, args.output, options, force=args.force) as job:
        summary = run_batch(model, job, sampling, engine, server)
    print(f"nemo-engine: {summary}", file=sys.stderr)
    num_failed, errors = job.results.num_failed, job.results.errors_path
    if num_failed and errors is not None:
        print(f"nemo-engine: {num_failed} lines have failed: {errors} says why", file=sys.stderr)
    return 1 if num_failed else 0
