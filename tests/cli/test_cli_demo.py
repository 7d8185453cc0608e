"""The demo's live view and table, over a scripted engine."""

from __future__ import annotations

import io
import re

import pytest
from cli.fake_engine import FakeEngine

from nemo_engine.cli import demo
from nemo_engine.sampling_params import SamplingParams


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(written: str) -> list[str]:
    """The lines that a terminal shows after ``written``: line breaks, cursor up (F) and erase line (2K) are
    understood.
    """
    lines, row = [""], 0
    for part in re.split(r"(\n|\033\[\d*[A-Za-z])", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif match := re.fullmatch(r"\033\[(\d*)([A-Za-z])", part):
            if match[2] == "F":
                row -= int(match[1])
                assert row >= 0
            elif match[2] == "K":
                lines[row] = ""
        else:
            lines[row] += part
    return lines


def test_a_terminal_shows_one_line_per_prompt_and_then_the_whole_texts() -> None:
    out = Terminal()
    engine = FakeEngine("m")
    finished = demo.stream(engine, ["a", "b\nc"], ["a", "b\nc"], SamplingParams(), out)  # type: ignore[arg-type]
    lines = screen(out.getvalue())
    assert lines[:2] == ["+[1] a<a…é🙂>", "+[2] b⏎ c<b⏎ c…é🙂>"]
    assert "\n".join(lines[2:]) == "\n[1] a<a…é🙂>\n\n[2] b\nc<b\nc…é🙂>\n"
    assert [output.request_id for output in finished] == ["0", "1"]


def test_a_pipe_gets_each_piece_as_a_line_with_its_number() -> None:
    out = io.StringIO()
    pieces = demo._Pieces(["t1 ", demo.QUESTIONS[0]], out)
    words = " ".join(f"word{i}" for i in range(30))
    for start in range(0, len(words), 7):
        pieces.add(0, words[start : start + 7], is_done=False)
    pieces.add(1, "the\nanswer", is_done=True)
    pieces.add(0, "", is_done=True)
    pieces.close()
    lines = out.getvalue().splitlines()
    assert "".join(line.removeprefix("[1] ") for line in lines if line.startswith("[1]")) == "t1 " + words
    assert "".join(line.removeprefix("[2] ") for line in lines if line.startswith("[2]")) == (
        demo.QUESTIONS[0] + " -> the⏎ answer"
    )
    assert max(map(len, lines)) <= demo._PIECE + 4
    assert not any("\033" in line for line in lines)


def test_the_table() -> None:
    outputs = FakeEngine("m").generate(["a", "b"], SamplingParams())
    lines = demo.table(outputs, 2.0, 3, 8).splitlines()
    assert lines[0].split("  ")[0].strip() == "prompt"
    assert lines[2].split() == ["1", "3", "2", "3", "500", "4", "length"]
    assert lines[-3].split() == ["all", "6", "4", "6", "3"]
    assert lines[-1] == "2.00 s; KV pages used at the peak: 3 of 8"
    assert len({len(line) for line in lines[:-2]}) == 1


def test_two_prompts_share_more_than_a_page_of_text() -> None:
    sharing = [prompt for prompt in demo.PROMPTS if prompt.startswith(demo._SHARED)]
    assert len(sharing) == 2 and len(set(demo.PROMPTS)) == len(demo.PROMPTS)
    assert len(demo._SHARED) > 400


@pytest.mark.parametrize("width", [20, 80, 200])
def test_lines_never_wrap(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", "24")
    out = Terminal()
    lines = demo._Lines(["t"], out)
    lines.add(0, "x" * 500, is_done=True)
    lines._draw()
    shown = screen(out.getvalue())[0]
    assert len(shown) <= max(width, 28) and shown.endswith("xxx")
