"""The commands over the real engine and the bundled model."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest

from nemo_engine.cli import main

SMALL = ["--device", "cpu", "--max-model-len", "512", "--num-kv-pages", "32"]


def test_generate_streams_what_json_reports(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "generate",
        "nemo-tiny",
        "--prompt",
        "The heapq module",
        "--prompt",
        "A list is",
        "--temperature",
        "0",
        "--n",
        "1",
    ]
    assert main([*argv, "--max-tokens", "12", *SMALL]) == 0
    streamed = capsys.readouterr().out
    assert main([*argv, "--max-tokens", "12", "--json", *SMALL]) == 0
    texts = [json.loads(line)["outputs"][0]["text"] for line in capsys.readouterr().out.splitlines()]
    assert streamed == "".join(f"==> prompt {i} <==\n{text}\n" for i, text in enumerate(texts, 1))
    assert all(texts)


def test_chat_reuses_the_pages_of_its_history(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What does os.path.join do? " * 12 + "\nAnd os.path.split?\n"))
    assert main(["chat", "nemo-tiny", "--max-tokens", "8", "--seed", "1", *SMALL]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    cached = [int(number) for number in re.findall(r"(\d+) cached", err)]
    assert cached[0] == 0 and cached[1] >= 64


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--max-tokens", "8"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"KV pages used at the peak: [1-9]\d* of \d+", out)
    rows = [line.split() for line in out.splitlines() if re.match(r" +\d+ +\d+ +\d+ +\d+ +\d+", line)]
    assert len(rows) == 7
    assert max(int(row[2]) for row in rows) >= 64  # cached tokens of the prompts that share a beginning


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "nemo-tiny", "--prompt", "a", "--page-size", "24"], "page_size"),
        (["generate", "nemo-tiny", "--prompt", "a", "--max-model-len", "999999999"], "max_model_len"),
        (["generate", "nemo-tiny", "--prompt", "a", "--prefer", "rms_norm=nothing"], "nothing"),
        (["generate", "./no-such-model", "--prompt", "a"], "no-such-model"),
        (["generate", "nemo-tiny", "--prompt", "a", "--stop-token-ids", "99999999"], "stop_token_ids"),
        (["chat", "nemo-tiny", "--kv-cache-dtype", "fp4"], "kv_cache_dtype"),
    ],
)
def test_bad_input_reaches_the_user_as_one_line(
    argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
