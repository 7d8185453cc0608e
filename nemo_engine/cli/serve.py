"""``nemo-engine serve``: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_engine.cli import arguments
from nemo_engine.cli.config_file import with_config


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP, as OpenAI's API has it",
        description="Serve a model over HTTP, as OpenAI's API has it, until SIGTERM or Ctrl-C.",
        usage="%(prog)s MODEL [--port N] [--config FILE] [options]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", type=Path,
        help="options in YAML, named as the flags are (max-model-len: 8192); model: names MODEL; flags win",
    )  # fmt: skip
    arguments.add_engine_arguments(parser, model_nargs="?")
    arguments.add_server_arguments(parser)
    parser.set_defaults(fail=parser.error)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command until it is told to stop; 1 if the engine failed."""
    from nemo_engine.server.options import ServerOptions

    if args.config is not None:
        args = with_config(args, args.config)
    if args.model is None:
        args.fail("the following arguments are required: MODEL (or model: in --config)")
    options = ServerOptions(**arguments.server_options(args))
    try:
        from nemo_engine.server.run import serve
    except ImportError as error:
        raise ImportError(
            f"the server needs packages that are not installed ({error}): pip install 'nemo-engine[server]'"
        ) from error
    return serve(args.model, options, arguments.engine_options(args))
