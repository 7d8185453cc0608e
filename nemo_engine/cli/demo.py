"""``nemo-engine demo``: text for several prompts at once out of the bundled model, and a table of what it took.

On a terminal each prompt has a line that grows; elsewhere each piece of text is a line with its prompt's number.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from nemo_engine.cli.report import decode_rate, number, ttft_ms
from nemo_engine.outputs import RequestOutput
from nemo_engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nemo_engine.engine.engine import Engine

_SHARED = """\
The :mod:`json` module exposes an API familiar to users of the standard library :mod:`marshal` and :mod:`pickle`
modules. It encodes basic Python object hierarchies as text, and decodes text back into objects. Strings, integers,
floating point numbers, lists and dictionaries are supported, and a caller can extend the encoder to recognise other
objects. Be cautious when parsing data from untrusted sources: a malicious string may cause the decoder to consume
considerable resources.

"""

# Two prompts share their first pages, which the second one finds in the cache.
PROMPTS = (
    _SHARED + ".. function:: dump(obj, fp)\n\n   Serialize",
    _SHARED + ".. function:: load(fp)\n\n   Deserialize",
    "A list is a mutable sequence. It is often used to",
    "The :class:`Thread` class represents an activity that",
    "def read_lines(path):\n    ",
)
QUESTIONS = ("Hello, who are you?", "How do I sort a list in Python?")

_PIECE = 60  # characters of a line if the output is not a terminal


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "demo",
        help="stream text for several prompts at once out of the bundled model",
        description="Stream text for several prompts at once out of nemo-tiny, the bundled model, and show what it "
        "took.",
        allow_abbrev=False,
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log what start-up does, and its times and sizes")
    parser.add_argument("--max-tokens", type=int, default=96, metavar="N", help="tokens per prompt [96]")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if a request ended with an error."""
    params = SamplingParams(temperature=0.6, top_p=0.9, repetition_penalty=1.1, seed=7, max_tokens=args.max_tokens)
    print("Starting nemo-tiny: a small model of NeMo's architecture, trained on Python's documentation.", flush=True)
    start = time.monotonic()
    from nemo_engine.engine.engine import Engine
    from nemo_engine.text import render_chat

    with Engine("nemo-tiny") as engine:
        print(
            f"Ready after {time.monotonic() - start:.1f} s. {len(PROMPTS) + len(QUESTIONS)} prompts at once:\n",
            flush=True,
        )
        assert engine.tokenizer is not None
        chats = [render_chat(engine.tokenizer, [{"role": "user", "content": text}]) for text in QUESTIONS]
        prompts: list[Any] = [*PROMPTS, *({"prompt_token_ids": ids} for ids in chats)]
        titles = [text.replace(_SHARED, "(...) ") for text in PROMPTS]
        start = time.monotonic()
        finished = stream(engine, prompts, [*titles, *QUESTIONS], params, sys.stdout)
        seconds = time.monotonic() - start
        print("\n" + table(finished, seconds, engine.stats().peak_used_pages, engine.stats().num_pages))
    return 1 if any(c.finish_reason == "error" for output in finished for c in output.outputs) else 0


def stream(
    engine: Engine, prompts: Sequence[Any], titles: Sequence[str], params: SamplingParams, out: TextIO
) -> list[RequestOutput]:
    """Run all prompts at once and show their text; returns the last output of each, in order."""
    view = _Lines(titles, out) if out.isatty() else _Pieces(titles, out)
    finished: dict[int, RequestOutput] = {}
    for output in engine.stream(list(prompts), params):
        index = int(output.request_id)
        if output.finished:
            finished[index] = output
        view.add(index, "".join(completion.text for completion in output.outputs), output.finished)
    view.close()
    return [finished[index] for index in range(len(prompts))]


def table(outputs: Sequence[RequestOutput], seconds: float, peak_pages: int, num_pages: int) -> str:
    """A table of each request, and of all together in ``seconds``."""
    heads = ("prompt", "prompt tokens", "cached tokens", "new tokens", "TTFT ms", "tokens/s", "ended by")
    rows = [
        (
            f"{index}",
            f"{len(output.prompt_token_ids)}",
            f"{output.num_cached_tokens}",
            f"{output.metrics.num_generation_tokens if output.metrics else 0}",
            number(ttft_ms(output.metrics)),
            number(decode_rate(output.metrics)),
            output.outputs[0].finish_reason or "-",
        )
        for index, output in enumerate(outputs, 1)
    ]
    new = sum(int(row[3]) for row in rows)
    total = ("all", f"{sum(int(row[1]) for row in rows)}", f"{sum(int(row[2]) for row in rows)}", f"{new}", "",
             f"{new / seconds:.0f}", "")  # fmt: skip
    widths = [max(len(row[column]) for row in [heads, *rows, total]) for column in range(len(heads))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *rows, total]
    ]
    rule = "-" * len(lines[0])
    lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
    return "\n".join(lines) + f"\n\n{seconds:.2f} s; KV pages used at the peak: {peak_pages} of {num_pages}"


class _Lines:
    """On a terminal: one line per prompt, redrawn in place, showing the end of its text; the whole texts at the end."""

    def __init__(self, titles: Sequence[str], out: TextIO) -> None:
        self._titles = titles
        self._texts = ["" for _ in titles]
        self._is_done = [False for _ in titles]
        self._out = out
        self._drawn = 0.0
        out.write("\n" * len(titles))

    def add(self, index: int, text: str, is_done: bool) -> None:
        self._texts[index] += text
        self._is_done[index] = is_done
        now = time.monotonic()
        if now - self._drawn > 0.03:  # as often as an eye can follow
            self._drawn = now
            self._draw()

    def close(self) -> None:
        self._draw()
        for index, (title, text) in enumerate(zip(self._titles, self._texts, strict=True), 1):
            self._out.write(f"\n\033[1m[{index}] {title}\033[0m{_joint(title)}{text.rstrip()}\n")
        self._out.flush()

    def _draw(self) -> None:
        width = max(shutil.get_terminal_size().columns - 8, 20)
        self._out.write(f"\033[{len(self._titles)}F")
        for index, (title, text) in enumerate(zip(self._titles, self._texts, strict=True), 1):
            line = _one_line(title + _joint(title) + text)
            sign = "+" if self._is_done[index - 1] else " "
            self._out.write(f"\033[2K{sign}[{index}] {line if len(line) <= width else '…' + line[1 - width :]}\n")
        self._out.flush()


class _Pieces:
    """Where the output is not a terminal: a line for every so many characters of a prompt's text, as they come."""

    def __init__(self, titles: Sequence[str], out: TextIO) -> None:
        self._out = out
        self._pending = [title + _joint(title) for title in titles]

    def add(self, index: int, text: str, is_done: bool) -> None:
        self._pending[index] += text
        while len(line := _one_line(self._pending[index])) > _PIECE or is_done and line.strip():
            cut = _PIECE if len(line) <= _PIECE else line.rfind(" ", 1, _PIECE) + 1 or _PIECE
            self._out.write(f"[{index + 1}] {line[:cut]}\n")
            self._pending[index] = line[cut:]
        self._out.flush()

    def close(self) -> None:
        self._out.flush()


def _joint(title: str) -> str:
    """The text between a title and its text: an arrow after a question."""
    return " -> " if title in QUESTIONS else ""


def _one_line(text: str) -> str:
    return text.replace("\n", "⏎ ")
