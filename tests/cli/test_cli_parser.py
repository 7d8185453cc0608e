"""The command line itself: lists, times, near names, the short help and the whole, versions, completion."""

from __future__ import annotations

import argparse
import re
import subprocess
from typing import Any

import pytest

from nemo_engine.cli import _COMMANDS, build_parser, main
from nemo_engine.cli.parser import Parser
from nemo_engine.cli.values import ListOf, add_list, seconds


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """``parser`` and the parsers of all its commands."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [below for command in action.choices.values() for below in parsers(command)]
    return found


ALL = parsers(build_parser())


def ending(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str, str]:
    """(exit code, stdout, stderr) of a command line that ends while it is parsed."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    return end.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    "words",
    ["--rate 5 10 x", "--rate 5,10 x", "--rate 5, 10 x", "x --rate 5 10", "x --rate 5 --rate 10", "--rate=5,10 x"],
)
def test_one_syntax_for_lists(words: str) -> None:
    parser = Parser()
    parser.add_argument("model")
    add_list(parser, "--rate", int, "numbers", default=[1])
    assert vars(parser.parse_args(words.split())) == {"model": "x", "rate": [5, 10]}
    assert parser.parse_args(["x"]).rate == [1]


def test_every_list_of_every_command_has_that_syntax() -> None:
    """Whatever takes several words takes commas too, but for what holds paths or JSON."""
    lists = {
        option: action.type
        for parser in ALL
        for action in parser._actions
        for option in action.option_strings
        if action.nargs in ("+", "*")
    }
    assert {option for option, kind in lists.items() if not isinstance(kind, ListOf)} == {"--peers"}
    assert {"--rate", "--concurrency", "--batch", "--gib", "--op", "--num-seqs", "--stop-token-ids"} <= lists.keys()


@pytest.mark.parametrize(("text", "value"), [("30ms", 0.03), ("0.03s", 0.03), ("2 min", 120), ("1e3us", 1e-3)])
def test_times(text: str, value: float) -> None:
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["30", "0.2", "1e3", "", "ms", "-1s", "0s", "inf s", "1e999s", "30 parsecs"])
def test_a_time_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(
        argparse.ArgumentTypeError, match="unit: 30ms or 30s, got '30'" if text == "30" else "is needed|unit"
    ):
        seconds(text)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["genrate"], "invalid choice: 'genrate': did you mean generate?"),
        (["bench", "latencies"], "did you mean latency?"),
        (["zzz"], "invalid choice: 'zzz': choose from generate, chat"),
        (["simulate", "nemo", "--routing", "prefix_aware"], "did you mean prefix-aware?"),
        (["simulate", "nemo", "--generate", "requests=3"], "--generate: it is called --synthetic"),
        (["serve", "m", "--prot", "1"], "unrecognized arguments: --prot: did you mean --port?"),
        (["plan", "nemo", "--gpu", "h200", "--slo-itl", "30"], "--slo-itl: a time needs its unit: 30ms or 30s"),
        (["bench", "serve", "u", "--timeout", "30"], "--timeout: a time needs its unit: 30ms or 30s"),
    ],
)  # fmt: skip
def test_errors_suggest(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = ending(argv, capsys)
    assert code == 2 and message in err and err.count("\n") == 1


def test_help_is_short_and_help_all_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    for parser in ALL:
        rare = [action for action in parser._actions if getattr(action, "is_rare", False)]
        words = parser.prog.split()[1:]
        _, short, _ = ending([*words, "--help"], capsys)
        if not rare:
            continue
        _, whole, _ = ending([*words, "--help-all"], capsys)
        # The flags of a usage line are not those that are explained.
        told, all_told = (set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.M)) for text in (short, whole))
        assert all_told - told == {action.option_strings[0] for action in rare}
        assert f"{len(rare)} more options: {parser.prog} --help-all" in short
        assert short.count("\n") < 90


def test_each_command_is_listed_with_a_help() -> None:
    text = build_parser().format_help()
    for command in _COMMANDS:
        assert re.search(rf"^    {command.__name__.rsplit('.')[-1]} +\w", text, re.M)


def test_env_tells_no_secrets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NEMO_ENGINE_API_KEY", "key-secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert "secret" not in out and "HF_TOKEN is set" in out and "OMP_NUM_THREADS=1" in out
    names = {line.split()[0] for line in out.splitlines()}
    assert {"nemo-engine", "python", "torch", "triton", "driver", "CPU", "cores", "[server]", "[ray]"} <= names
    assert torch.__version__ in out and re.search(r"\[server\] +fastapi \d", out)


def test_completion_knows_commands_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    code, script, _ = ending(["--print-completion", "bash"], capsys)
    assert code == 0 and "--max-model-len" in script and "simulate" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_missing_extra_is_named_quoted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "shtab", None)
    code, _, err = ending(["--print-completion", "bash"], capsys)
    assert code == 2 and "pip install 'nemo-engine[completion]'" in err
