"""``nemo-engine generate`` over a scripted engine: what it prints, in which order, and its exit codes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli.fake_engine import FakeEngine, install

from nemo_engine.cli import main


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    return install(monkeypatch)


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_one_prompt_prints_its_text_alone(fake: type[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "m", "--prompt", "hello", "--max-tokens", "5", "--max-num-seqs", "4"]) == 0
    assert capsys.readouterr() == ("<hello…é🙂>\n", "")
    kind, prompts, params = fake.calls[0]
    assert (kind, prompts, params.max_tokens) == ("stream", ["hello"], 5)
    assert fake.options == {"max_num_seqs": 4}


def test_several_prompts_are_shown_in_order(fake: type[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "m", "--prompt", "a", "--prompt", "b", "--n", "2", "--stats"]) == 0
    out, err = capsys.readouterr()
    expected = [f"==> prompt {p}, completion {c} <==\n<{t}…é🙂>\n" for p, t in ((1, "a"), (2, "b")) for c in (1, 2)]
    assert out == "".join(expected)
    assert err.count("\n") == 2
    assert err.startswith("[prompt 3 tokens, 2 cached · 3 generated · TTFT 500 ms · 4 tokens/s · length]")


def test_prompts_from_files_and_stdin(
    fake: type[FakeEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes("two\nlines\u2028é\r\n".encode())
    pipe(monkeypatch, "from stdin\n\n")
    assert main(["generate", "m", "--prompt-file", str(path), "--prompt", "p", "--prompt-file", "-"]) == 0
    assert fake.calls[0][1] == ["p", "two\nlines\u2028é", "from stdin\n"]
    pipe(monkeypatch, "one\n\n  \ntwo\u2028 still two\r\nthree")
    assert main(["generate", "m"]) == 0
    assert fake.calls[1][1] == ["one", "two\u2028 still two", "three"]


@pytest.mark.parametrize(
    ("text", "warns"), [('{"prompt": "a"}\n{"prompt": "b"}\n', True), ('{"a": 1}\nplain\n', False), ("1\n[2]\n", False)]
)
def test_lines_of_json_on_stdin_are_prompts_with_a_warning(
    fake: type[FakeEngine],
    text: str,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipe(monkeypatch, text)
    assert main(["generate", "m"]) == 0
    assert fake.calls[0][1] == text.splitlines()
    assert ("looks like JSON lines" in capsys.readouterr().err) is warns


def test_json_is_one_object_a_line(fake: type[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["generate", "m", "--prompt", "a", "--prompt", "b", "--json", "--temperature", "0.5", "--stop", "x"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    first, second = (json.loads(line) for line in lines)
    assert (first["prompt"], second["prompt"]) == ("a", "b")
    assert first["outputs"][0]["text"] == "<a…é🙂>"
    assert "é🙂" in lines[0]
    assert first["outputs"][0]["finish_reason"] == "length"
    assert first["num_cached_tokens"] == 2
    assert first["sampling_params"]["temperature"] == 0.5
    assert first["sampling_params"]["stop"] == ["x"]
    assert first["metrics"]["first_token_latency"] == pytest.approx(0.5)


@pytest.mark.parametrize("argv", [[], ["--json"]])
def test_a_failed_request_is_exit_code_1(
    fake: type[FakeEngine], capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    fake.error = "the model's logits are not finite"
    assert main(["generate", "m", "--prompt", "a", *argv]) == 1
    assert capsys.readouterr().err == "nemo-engine: error: the model's logits are not finite\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "m", "--prompt", "a", "--top-p", "0"], "top_p must be in (0, 1], got 0.0"),
        (["generate", "m", "--prompt", "a", "--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
        (["generate", "missing", "--prompt", "a"], "'missing' is neither a directory"),
        (["generate", "m", "--prompt-file", "/no/such/file"], "/no/such/file"),
        (["generate", "m"], "stdin holds no line of text"),
        (["generate", "m", "--bogus"], "unrecognized arguments: --bogus"),
        (["generate"], "the following arguments are required: MODEL"),
        (
            ["serve", "--served-model-name", "a", "m"],
            "write MODEL first: nemo-engine serve MODEL --served-model-name ...",
        ),
        (["serve", "--allowed-hosts", "a", "m", "--port", "1"], "--allowed-hosts takes all words behind it"),
        (["generate", "m", "--n", "two"], "invalid int value: 'two'"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    fake: type[FakeEngine],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    pipe(monkeypatch, "\n")
    try:
        code = main(argv)
    except SystemExit as exit:
        code = exit.code  # type: ignore[assignment]
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("nemo-engine: error: ") and err.count("\n") == 1


def test_no_prompt_on_a_terminal(
    fake: type[FakeEngine], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert main(["generate", "m"]) == 2
    assert "--prompt TEXT" in capsys.readouterr().err


def test_a_prompt_file_that_is_not_text(
    fake: type[FakeEngine], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "binary"
    path.write_bytes(b"ok\xff")
    assert main(["generate", "m", "--prompt-file", str(path)]) == 2
    error = capsys.readouterr().err
    assert "--prompt-file must be text in UTF-8" in error and "invalid start byte" in error


@pytest.mark.parametrize(
    ("argv", "data", "place"),
    [
        (["--prompt", "ok", "--prompt", "a\udcffb"], b"", "--prompt must be Unicode text: character 1"),
        ([], b"ok\n\nab\xff\n", "line 3 of standard input must be Unicode text: character 2"),
        (["--prompt-file", "-"], b"ok\xff", "standard input must be Unicode text: character 2"),
        (["--prompt", "ok", "--stop", "\ud800"], b"", "stop must be Unicode text: character 0"),
    ],
)
def test_text_that_is_not_text_is_refused_by_its_place(
    fake: type[FakeEngine],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    data: bytes,
    place: str,
) -> None:
    for errors in ("strict", "surrogateescape"):  # of the locale
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8", errors))
        assert main(["generate", "m", *argv]) == 2
        out, error = capsys.readouterr()
        assert out == "" and place in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("redirections", "status", "message"),
    [
        ("generate nemo-tiny --prompt a >&-", 2, "error: standard output is closed"),
        ("info nemo-tiny >&-", 2, "error: standard output is closed"),
        ("generate nemo-tiny <&-", 2, "error: no prompt: stdin holds no line of text"),
        ("chat nemo-tiny --device cpu --num-kv-pages 4 --max-model-len 64 <&-", 0, None),
        ("info nemo-tiny >/dev/full", 2, "error: [Errno 28] No space left on device"),
    ],
)
def test_closed_streams_end_in_one_line(redirections: str, status: int, message: str | None) -> None:
    run = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m nemo_engine {redirections}"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert run.returncode == status and run.stdout == ""
    assert run.stderr == ("" if message is None else f"nemo-engine: {message}\n")


def test_warnings_are_one_line(fake: type[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "m", "--prompt", "a", "--temperature", "0.001"]) == 0
    assert capsys.readouterr().err.startswith("nemo-engine: warning: temperature 0.001 is raised to 0.01")


def test_interrupt_is_exit_code_130(fake: type[FakeEngine], capsys: pytest.CaptureFixture[str]) -> None:
    fake.interrupt_after = 1
    assert main(["generate", "m", "--prompt", "a"]) == 130
    assert capsys.readouterr().out == "<a"


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["info"], ["demo"]])
def test_help_and_version_need_no_torch(command: list[str]) -> None:
    code = (
        "import sys\nfrom nemo_engine.cli import main\n"
        f"try: main({[*command, '--help']!r})\nexcept SystemExit as e: assert not e.code\nassert 'torch' not in "
        "sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stderr
    assert "usage: nemo-engine" in run.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("nemo-engine 0.")
