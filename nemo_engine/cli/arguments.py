"""Command-line flags made from the fields of ``EngineConfig`` and ``SamplingParams``: names, types and help texts.

A field ``max_num_seqs`` is the flag ``--max-num-seqs``; its help is what the class's docstring says after the name. A
name that both classes have means the request's, and the engine's is ``--engine-NAME``. A flag that is not given is not
passed on, so defaults are stated once, in the classes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

from nemo_engine.cli.values import ListOf, Several
from nemo_engine.config import EngineConfig
from nemo_engine.option_names import advice
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.server.options import ServerOptions

# Not on the command line: objects, and what only matters to a program that reads the outputs.
NO_FLAGS = {
    "detokenize", "extra_args", "output_kind", "repetition_detection",
    "spaces_between_special_tokens", "stream_interval",
}  # fmt: skip

_SEVERAL_AT_ONCE = {"served_model_name", "allowed_hosts"}  # --served-model-name a b

# In the short help; the others are in --help-all.
_COMMON = {
    "dtype", "device", "quantization", "kv_cache_dtype", "max_model_len", "max_num_seqs", "lora", "tokenizer",
    "revision", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "ignore_eos",
    "repetition_penalty", "host", "port", "uds",
    "served_model_name", "api_key", "api_key_file", "log_requests", "batch_dir",
}  # fmt: skip

_ENGINE_DEST = "engine_option_"
_SAMPLING_DEST = "sampling_option_"
_SERVER_DEST = "server_option_"


def _or_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text == "none" else convert(text)

    parse.__name__ = convert.__name__  # argparse says "invalid int value"
    return parse


def _int_or_auto(text: str) -> int | str | None:
    return text if text == "auto" else _or_none(int)(text)


def _key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise argparse.ArgumentTypeError(f"KEY=VALUE is needed, got {text!r}")
    return key, value


def _bias(text: str) -> tuple[int, float]:
    token_id, bias = _key_value(text)
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"TOKEN_ID=BIAS is needed, got {text!r}") from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"JSON is needed, got {text!r}: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object is needed, got {text!r}")
    return value


_int_or_auto.__name__ = "integer, 'auto' or 'none'"

# How a field of this annotation is written on the command line: the keywords of add_argument.
_FORMS: dict[str, dict[str, Any]] = {
    "bool": {"action": argparse.BooleanOptionalAction},
    "int": {"type": int, "metavar": "N"},
    "int | None": {"type": _or_none(int), "metavar": "N"},
    "int | Literal['auto'] | None": {"type": _int_or_auto, "metavar": "N|auto"},
    "float": {"type": float, "metavar": "X"},
    "float | None": {"type": _or_none(float), "metavar": "X"},
    "str": {"metavar": "NAME"},
    "str | None": {"metavar": "NAME"},
    "dict[str, Any] | None": {"type": _json_object, "metavar": "JSON"},
    "dict[str, str] | None": {"type": _key_value, "action": "append", "metavar": "KEY=VALUE"},
    "str | Sequence[str] | None": {"action": "append", "metavar": "TEXT"},
    "Sequence[str] | None": {"action": "append", "metavar": "TEXT"},
    "Sequence[int] | None": {"type": ListOf(int, "token ids"), "action": Several, "nargs": "+", "metavar": "ID"},
    "Mapping[int, float] | None": {"type": _bias, "action": "append", "metavar": "ID=BIAS"},
    "StructuredOutputsParams | Mapping[str, Any] | None": {"type": _json_object, "metavar": "JSON"},
}


def add_engine_arguments(parser: argparse.ArgumentParser, *, model_nargs: str | None = None) -> None:
    """Add MODEL, ``--verbose`` and one flag per field of ``EngineConfig``."""
    parser.add_argument(
        "model", metavar="MODEL", nargs=model_nargs, help="a checkpoint directory, a Hub repository id, or nemo-tiny"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log what start-up does, and its times and sizes")
    group = parser.add_argument_group("engine options")
    taken = {field.name for field in dataclasses.fields(SamplingParams)}
    helps = field_helps(EngineConfig)
    for field in dataclasses.fields(EngineConfig):
        name = f"engine_{field.name}" if field.name in taken else field.name
        _add(group, name, _ENGINE_DEST + field.name, field, helps)


def add_some_engine_arguments(parser: argparse.ArgumentParser, names: tuple[str, ...], title: str) -> None:
    """Add the flags of ``names``, fields of ``EngineConfig``, for a command that needs no more of them."""
    group = parser.add_argument_group(title)
    helps = field_helps(EngineConfig)
    by_name = {field.name: field for field in dataclasses.fields(EngineConfig)}
    for name in names:
        _add(group, name, _ENGINE_DEST + name, by_name[name], helps)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag per field of ``SamplingParams``, less those in ``NO_FLAGS``."""
    group = parser.add_argument_group("sampling options")
    helps = field_helps(SamplingParams)
    for field in dataclasses.fields(SamplingParams):
        if field.name not in NO_FLAGS:
            _add(group, field.name, _SAMPLING_DEST + field.name, field, helps)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag per field of ``ServerOptions``."""
    add_some_server_arguments(parser, tuple(field.name for field in dataclasses.fields(ServerOptions)))


def add_some_server_arguments(
    parser: argparse.ArgumentParser, names: tuple[str, ...], title: str = "server options"
) -> None:
    """Add the flags of ``names``, fields of ``ServerOptions``."""
    group = parser.add_argument_group(title)
    helps = field_helps(ServerOptions)
    by_name = {field.name: field for field in dataclasses.fields(ServerOptions)}
    for name in names:
        _add(group, name, _SERVER_DEST + name, by_name[name], helps)


def server_options(args: argparse.Namespace) -> dict[str, Any]:
    """The server options that were given, by field name."""
    return _given(args, _SERVER_DEST)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The engine options that were given, by field name."""
    return _given(args, _ENGINE_DEST)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given, by field name."""
    return _given(args, _SAMPLING_DEST)


def parse_sampling_option(text: str) -> dict[str, Any]:
    """``NAME=VALUE`` as one keyword of ``SamplingParams``; raises ``ValueError`` for an unknown name or an ill-formed
    value.
    """
    name, value = _split(text)
    parser = _RaisingParser(add_help=False, allow_abbrev=False)
    add_sampling_arguments(parser)
    field = next((f for f in dataclasses.fields(SamplingParams) if f.name == name and name not in NO_FLAGS), None)
    if field is None:
        hint = advice(name, (field.name for field in dataclasses.fields(SamplingParams) if field.name not in NO_FLAGS))
        raise ValueError(f"unknown sampling option {name!r}" + (f": {hint}" if hint else ""))
    flag = "--" + name.replace("_", "-")
    if field.type != "bool":
        return sampling_options(parser.parse_args([f"{flag}={value}"]))
    if value not in ("true", "false"):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return {name: value == "true"}


def field_helps(cls: type) -> dict[str, str]:
    """What the docstring of dataclass ``cls`` says of each field, as ``name: text`` or ``name, name: text``."""
    names = "|".join(field.name for field in dataclasses.fields(cls))
    text = " ".join((cls.__doc__ or "").split())
    heads = list(re.finditer(rf"(?:(?<=\. )|(?<=^))((?:{names})(?:, (?:{names}))*): ", text))
    helps = {}
    for head, following in zip(heads, [*heads[1:], None], strict=True):
        body = text[head.end() : following.start() if following else len(text)].strip()
        for name in head[1].split(", "):
            helps[name] = body
    return helps


class _RaisingParser(argparse.ArgumentParser):
    """Raises ``ValueError`` where argparse would end the process."""

    def error(self, message: str) -> Any:
        raise ValueError(message.removeprefix("argument "))


def _split(text: str) -> tuple[str, str]:
    try:
        return _key_value(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None


def _add(
    group: argparse._ArgumentGroup, name: str, dest: str, field: dataclasses.Field[Any], helps: dict[str, str]
) -> None:
    form = _FORMS[str(field.type).replace('"', "'")]
    if field.name in _SEVERAL_AT_ONCE:
        form = form | {"type": ListOf(str, "names"), "action": Several, "nargs": "+"}
    default = "" if field.default is None else f" [{str(field.default).lower()}]"
    text = (helps.get(field.name, "") + default).replace("%", "%%")
    flag = "--" + name.replace("_", "-")
    action = group.add_argument(flag, dest=dest, default=argparse.SUPPRESS, help=text, **form)
    action.is_rare = name not in _COMMON  # type: ignore[attr-defined]  # Parser leaves it out of --help


def _given(args: argparse.Namespace, prefix: str) -> dict[str, Any]:
    given = {name.removeprefix(prefix): value for name, value in vars(args).items() if name.startswith(prefix)}
    # A list of pairs is a mapping on the command line.
    return {
        name: dict(value) if isinstance(value, list) and value and isinstance(value[0], tuple) else value
        for name, value in given.items()
    }
