"""``nemo-engine chat`` over a scripted engine: history, commands, errors, interrupts."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from cli.fake_engine import FakeEngine, install

from nemo_engine.cli import main


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    return install(monkeypatch)


def chat(monkeypatch: pytest.MonkeyPatch, *lines: str, argv: tuple[str, ...] = ()) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return main(["chat", "m", *argv])


def asked(fake: type[FakeEngine]) -> list[list[tuple[str, str]]]:
    return [[(message["role"], message["content"]) for message in call[1]] for call in fake.calls]


def test_each_line_is_a_turn_and_history_is_kept(
    fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "hello", "", "again") == 0
    out, err = capsys.readouterr()
    assert out == "<hello…é🙂>\n<again…é🙂>\n"
    assert err.count("2 cached") == 2
    assert asked(fake) == [
        [("user", "hello")],
        [("user", "hello"), ("assistant", "<hello…é🙂>"), ("user", "again")],
    ]


def test_reset_system_and_quit(
    fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["one", "/system be brief", "two", "/reset", "three", "/system", "four", "/quit", "never"]
    assert chat(monkeypatch, *lines, argv=("--system", "be kind")) == 0
    assert [turn[0] for turn in asked(fake)] == [
        ("system", "be kind"),
        ("system", "be brief"),
        ("system", "be brief"),
        ("user", "three"),
    ]
    assert [len(turn) for turn in asked(fake)] == [2, 4, 2, 3]


def test_params_are_shown_and_changed(
    fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/params", "/params top_p=0.5", "/params top_p=7", "/params nonsense", "hi", "/params n=2"]
    assert chat(monkeypatch, *lines, argv=("--max-tokens", "9")) == 0
    err = capsys.readouterr().err.splitlines()
    assert "temperature=0.3" in err[0] and "max_tokens=9" in err[0] and "top_p=1.0" in err[0]
    assert "top_p=0.5" in err[1]
    assert err[2] == "error: top_p must be in (0, 1], got 7.0"
    assert err[3] == "error: KEY=VALUE is needed, got 'nonsense'"
    assert err[-1] == "error: n must be 1 in a chat, got 2"
    params = fake.calls[0][2]
    assert (params.temperature, params.top_p, params.max_tokens) == (0.3, 0.5, 9)


def test_defaults_of_a_chat(fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    assert chat(monkeypatch, "hi", argv=("--temperature", "0.9")) == 0
    params = fake.calls[0][2]
    assert (params.temperature, params.max_tokens) == (0.9, 1024)


def test_unknown_commands_and_escaped_slashes(
    fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "/nonsense", "//path", "/help") == 0
    assert asked(fake) == [[("user", "/path")]]
    err = capsys.readouterr().err
    assert "unknown command /nonsense" in err and "/reset " in err


def test_a_refused_turn_leaves_no_trace(
    fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "one", "too long", "two") == 1
    assert "error: the prompt has 5000 tokens, max_model_len is 4096" in capsys.readouterr().err
    assert [content for _, content in asked(fake)[-1]] == ["one", "<one…é🙂>", "two"]


def test_a_failed_answer_leaves_no_trace(
    fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.error = "the step failed"
    assert chat(monkeypatch, "one", "two") == 1
    assert "error: the step failed" in capsys.readouterr().err
    assert asked(fake)[-1] == [("user", "two")]


@pytest.mark.parametrize(("after", "kept"), [(1, ["one", "<one", "two"]), (0, ["two"])])
def test_an_interrupt_ends_the_answer_and_not_the_chat(
    fake: type[FakeEngine],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    after: int,
    kept: list[str],
) -> None:
    fake.interrupt_after = after
    assert chat(monkeypatch, "one", "two") == 0
    assert capsys.readouterr().err.count("(interrupted)") == 2
    assert [content for _, content in asked(fake)[-1]] == kept


def test_bad_sampling_option_is_found_before_the_model_loads(
    fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, "hi", argv=("--n", "2")) == 2
    assert "n must be 1 in a chat, got 2" in capsys.readouterr().err
    assert fake.options == {}


def test_on_a_terminal(
    fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed: list[Any] = ["hello", KeyboardInterrupt, "too long", EOFError]

    def read(prompt: str) -> str:
        value = typed.pop(0)
        if isinstance(value, str):
            return value
        raise value

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", "m"]) == 0
    out, err = capsys.readouterr()
    assert out == "<hello…é🙂>\n"
    assert "context of 4096 tokens" in err and "(/quit leaves)" in err and "error: the prompt has" in err
