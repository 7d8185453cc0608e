"""``nemo-engine chat``: a conversation on the terminal, or line by line through a pipe.

Answers go to stdout; the prompt sign, counts and messages go to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from nemo_engine.cli import arguments
from nemo_engine.cli.report import summary
from nemo_engine.outputs import RequestOutput
from nemo_engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nemo_engine.engine.engine import Engine

_HELP = """\
/reset               forget the conversation
/system [TEXT]       set the system prompt, or remove it
/params [NAME=VALUE] change a sampling parameter, or show the effective ones
/quit                leave (so does the end of input)
A line that is to start with a slash is written with two."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model; each line of input is a turn.\n\n" + _HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s MODEL [--system TEXT] [options]",
        allow_abbrev=False,
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="the system prompt")
    arguments.add_sampling_arguments(parser)
    arguments.add_engine_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if, through a pipe, a turn failed."""
    options = arguments.sampling_options(args)
    effective_params(options)
    from nemo_engine.engine.engine import Engine

    with Engine(args.model, **arguments.engine_options(args)) as engine:
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            _enable_line_editing()
            print(f"{args.model}, context of {engine.max_model_len} tokens. /help lists the commands.", file=sys.stderr)
        chat = Chat(engine, options, system=args.system)
        for line in _read_lines(is_terminal):
            if not chat.take(line):
                break
        return 1 if chat.has_failed and not is_terminal else 0


class Chat:
    """One conversation: its history, its system prompt and its sampling options."""

    def __init__(self, engine: Engine, options: dict[str, Any], *, system: str = "", out: TextIO | None = None) -> None:
        self._engine = engine
        self._options = dict(options)
        self._system = system
        self._history: list[dict[str, str]] = []
        self._out = sys.stdout if out is None else out
        self.has_failed = False

    def take(self, line: str) -> bool:
        """Do what one line of input says; false when it asks to leave."""
        if line.startswith("/") and not line.startswith("//"):
            return self._command(*line[1:].strip().partition(" ")[::2])
        text = line[1:] if line.startswith("//") else line
        if text.strip():
            self._turn(text)
        return True

    def _command(self, name: str, rest: str) -> bool:
        rest = rest.strip()
        if name == "quit":
            return False
        if name == "reset":
            self._history.clear()
            _say("the conversation is forgotten")
        elif name == "system":
            self._system = rest
            _say("the system prompt is set" if rest else "the system prompt is removed")
        elif name == "params":
            self._params_command(rest)
        elif name == "help":
            _say(_HELP)
        else:
            _say(f"unknown command /{name}; /help lists the commands")
        return True

    def _params_command(self, rest: str) -> None:
        try:
            if rest:
                changed = self._options | arguments.parse_sampling_option(rest)
                effective_params(changed)
                self._options = changed
            params = effective_params(self._options)
            names = (field.name for field in dataclasses.fields(params) if field.name not in arguments.NO_FLAGS)
            shown = ((name, getattr(params, name)) for name in names)
            _say(
                " ".join(f"{name}={value}" for name, value in shown if value not in (None, ()) or name in self._options)
            )
        except ValueError as error:
            _say(f"error: {error}")

    def _turn(self, text: str) -> None:
        """Ask, print the answer as it comes, and keep both; a turn that yields nothing leaves no trace."""
        messages = [*self._history, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self._system}] if self._system else []
        answer = ""
        output: RequestOutput | None = None
        try:
            stream = self._engine.stream_chat([*system, *messages], effective_params(self._options))
            try:
                for output in stream:
                    for completion in output.outputs:
                        answer += completion.text
                        self._out.write(completion.text)
                        self._out.flush()
            except KeyboardInterrupt:
                _say("\n(interrupted)")
            finally:
                stream.close()  # type: ignore[attr-defined]  # a generator: aborts what still runs
        except ValueError as error:
            self.has_failed = True
            _say(f"error: {error}")
            return
        self._out.write("\n")
        self._out.flush()
        if output is not None and output.finished:
            _say(summary(output))
            if output.outputs[0].finish_reason == "error":
                self.has_failed = True
                _say(f"error: {output.outputs[0].error}")
                return
        if answer:
            self._history = [*messages, {"role": "assistant", "content": answer}]


def effective_params(options: dict[str, Any]) -> SamplingParams:
    """The sampling parameters of a turn: ``options``, and for the rest the defaults of a chat."""
    from nemo_engine.engine.input_processor import CHAT_MAX_TOKENS, CHAT_TEMPERATURE

    if options.get("n", 1) != 1:
        raise ValueError(f"n must be 1 in a chat, got {options['n']}")
    return SamplingParams(**({"max_tokens": CHAT_MAX_TOKENS, "temperature": CHAT_TEMPERATURE} | options))


def _read_lines(is_terminal: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> ") if is_terminal else sys.stdin.readline()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            _say("\n(/quit leaves)")
            continue
        if not is_terminal and not line:
            return
        yield line.rstrip("\r\n")


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401  # importing it is what gives input() a history
    except ImportError:
        pass


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
