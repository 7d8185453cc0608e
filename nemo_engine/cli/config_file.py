"""``serve --config``: a file of options in YAML. Its keys are the names of flags, its values go the way of theirs."""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from nemo_engine.cli import arguments
from nemo_engine.cli.files import read_text
from nemo_engine.option_names import advice


def with_config(args: argparse.Namespace, path: Path) -> argparse.Namespace:
    """``args`` with what the file ``path`` says of flags that were not given.

    Raises ``ValueError`` that names the file and the key, ``ImportError`` without PyYAML.
    """
    data = read_yaml(path)
    parser = _Parser(allow_abbrev=False, add_help=False)
    arguments.add_engine_arguments(parser, model_nargs="?")
    arguments.add_server_arguments(parser)
    flags = {option: action for option, action in parser._option_string_actions.items() if option.startswith("--")}
    merged = vars(args).copy()
    seen: dict[str, str] = {}
    for key, value in data.items():
        name = key.replace("_", "-")
        if name in seen:
            raise ValueError(f"{path}: {key} and {seen[name]} are the same option")
        seen[name] = key
        if name == "model":
            if not isinstance(value, str):
                raise ValueError(f"{path}: model must be a text, got {value!r}")
            merged["model"] = value if args.model is None else args.model
            continue
        action = flags.get(f"--{name}")
        if action is None or name.startswith("no-"):
            known = ["model", *(flag[2:].replace("-", "_") for flag in flags if not flag.startswith("--no-"))]
            hint = advice(name.replace("-", "_"), known)
            raise ValueError(f"{path}: there is no option {key!r}" + (f": {hint}" if hint else ""))
        try:
            parsed = parser.parse_args(list(_words(f"--{name}", action, value)))
        except ValueError as error:
            raise ValueError(f"{path}: {key}: {error}") from None
        if action.dest not in merged or merged[action.dest] is False:  # --verbose is false where it is not given
            merged[action.dest] = getattr(parsed, action.dest)
    return argparse.Namespace(**merged)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file; a key that is given twice is refused."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f"--config needs PyYAML ({error}): pip install 'nemo-engine[server]'") from error

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
            if twice is not None:
                raise ValueError(f"{path}: {twice!r} is given twice")
            mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
            return mapping

    try:
        data = yaml.load(read_text("--config", path), Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    data = {} if data is None else data
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ValueError(f"{path} must hold options, as max-model-len: 8192, got {type(data).__name__}")
    return data


def _words(flag: str, action: argparse.Action, value: Any) -> Iterator[str]:
    """What a command line would say for ``value``. Raises ``ValueError`` for a value that has no such form."""
    if isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, got {value!r}")
        if value or isinstance(action, argparse.BooleanOptionalAction):
            yield flag if value else f"--no-{flag[2:]}"
    elif isinstance(value, bool) or isinstance(value, float) and value != value:
        raise ValueError(f"true and false are for switches, got {value!r}")
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield f"{flag}={name}={_scalar(inner)}"
    elif isinstance(value, list):
        for inner in value:
            yield f"{flag}={_scalar(inner)}"
    else:
        yield f"{flag}={_scalar(value)}"


def _scalar(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"a text or a number is needed, got {value!r}")
    return str(value)


class _Parser(argparse.ArgumentParser):
    """Raises ``ValueError`` where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message.partition(": ")[2] or message)
