"""The command line's parser: errors in one line that suggest near names, a short ``--help`` and a whole one, lists of
one syntax, and completion for shells.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from typing import Any, NoReturn

from nemo_engine.cli.values import join_lists
from nemo_engine.option_names import advice

EXIT_BAD_INPUT = 2

_RENAMED = {"--generate": "--synthetic"}
_SHELLS = ("bash", "zsh", "tcsh")
_FILES, _FOLDERS = {"FILE", "IN", "OUT"}, {"DIR"}  # metavars


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line: the flags are many, and ``--help`` lists those that matter
    first.

    An action that has a true attribute ``is_rare`` is in ``--help-all`` alone.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but unknown flags are refused here, by the sub-command that has others like them."""
        self._words = list(sys.argv[1:] if args is None else args)  # which ``error`` looks at
        self._add_help_all()
        words = join_lists(self._words, self._option_string_actions)
        known, unknown = super().parse_known_args(words, namespace)
        flag = next((text.partition("=")[0] for text in unknown if text.startswith("--") and text != "--"), None)
        if flag is not None:
            hint = self._hint(flag)
            self.error(f"unrecognized arguments: {flag}" + (f": {hint}" if hint else ""))
        return known, unknown

    def _hint(self, flag: str) -> str:
        new_name = _RENAMED.get(flag)
        if new_name in self._option_string_actions:
            return f"it is called {new_name}"
        flags = [name[2:].replace("-", "_") for name in self._option_string_actions if name.startswith("--")]
        return advice(flag[2:].replace("-", "_"), flags, as_flags=True)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse's, with the nearest choice."""
        if action.choices is None or value in action.choices:
            return
        names = [str(choice) for choice in action.choices]
        near = difflib.get_close_matches(str(value), names, 1, 0.6)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}"
        raise argparse.ArgumentError(action, f"invalid choice: {value!r}: {hint}")

    def error(self, message: str) -> NoReturn:
        """One line, and the end of the process."""
        if message.startswith("the following arguments are required"):
            takers = [flag for action in self._actions if action.nargs == "+" for flag in action.option_strings]
            for flag in [word for word in self._words if word in takers][-1:]:
                message += f"; {flag} takes all words behind it, so write MODEL first: {self.prog} MODEL {flag} ..."
        self.exit(EXIT_BAD_INPUT, f"nemo-engine: error: {message} ({self.prog} --help lists what it takes)\n")

    def _rare(self) -> list[argparse.Action]:
        return [action for action in self._actions if getattr(action, "is_rare", False)]

    def _add_help_all(self) -> None:
        if self._rare() and "--help-all" not in self._option_string_actions:
            self.add_argument("--help-all", action=_HelpAll, nargs=0, help="show every option and exit")

    def format_help(self) -> str:
        """The common options, and how many more there are."""
        rare = self._rare()
        if not rare:
            return super().format_help()
        self._add_help_all()
        helps = [action.help for action in rare]
        for action in rare:
            action.help = argparse.SUPPRESS
        try:
            text = super().format_help()
        finally:
            for action, help_text in zip(rare, helps):
                action.help = help_text
        return f"{text}\n{len(rare)} more options: {self.prog} --help-all\n"

    def format_help_all(self) -> str:
        """Every option."""
        return super().format_help()


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, Parser)
        sys.stdout.write(parser.format_help_all())
        parser.exit()


class PrintCompletion(argparse.Action):
    """``--print-completion SHELL``: a script that completes commands, flags and files."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, choices=_SHELLS, metavar="SHELL", **options)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, value: Any, option: str | None = None
    ) -> NoReturn:
        try:
            import shtab
        except ImportError:
            parser.error("--print-completion needs shtab: pip install 'nemo-engine[completion]'")
        _name_files(parser, shtab.FILE, shtab.DIRECTORY)
        sys.stdout.write(shtab.complete(parser, shell=value))
        parser.exit()


def _name_files(parser: argparse.ArgumentParser, file: Any, folder: Any) -> None:
    """Say which arguments of ``parser`` and of its commands are files and folders."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in dict.fromkeys(action.choices.values()):
                _name_files(command, file, folder)
        elif action.metavar in _FILES or action.metavar in _FOLDERS or action.metavar == "MODEL":
            action.complete = file if action.metavar in _FILES else folder  # type: ignore[attr-defined]
