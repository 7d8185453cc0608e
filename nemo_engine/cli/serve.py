"""``nemo-engine serve``: an OpenAI-compatible server."""

from __future__ import annotations

import argparse

from nemo_engine.cli import arguments


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP, as OpenAI's API has it",
        description="Serve a model over HTTP, as OpenAI's API has it, until SIGTERM or Ctrl-C.",
        usage="%(prog)s MODEL [--port N] [options]",
        allow_abbrev=False,
    )
    arguments.add_engine_arguments(parser)
    arguments.add_server_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command until it is told to stop; 1 if the engine failed."""
    from nemo_engine.server.options import ServerOptions

    options = ServerOptions(**arguments.server_options(args))
    try:
        from nemo_engine.server.run import serve
    except ImportError as error:
        raise ImportError(
            f"the server needs packages that are not installed ({error}): pip install nemo-engine[server]"
        ) from error
    return serve(args.model, options, arguments.engine_options(args))
