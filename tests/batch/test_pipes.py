"""Input from a pipe whose other end is slow: what has come is answered, and nobody waits for the rest; standard input."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_engine.batch.job import BatchJob
from nemo_engine.batch.reader import open_lines
from nemo_engine.batch.run import answer_all
from tests.batch.kills import results
from tests.batch.scripted_run import Scripted, read_json, run

PATIENCE = 30.0  # seconds after which a test that would wait for ever gives up
LINE = b'{"prompt":"a"}\n'


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A pipe with a name, and its writing end."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = os.open(path, os.O_RDWR)
    yield path, writer
    os.close(writer)


def test_lines_of_a_slow_pipe_are_answered_before_more_come(tmp_path: Path) -> None:
    source, target = tmp_path / "pipe", tmp_path / "out"
    os.mkfifo(source)
    seen: list[int] = []

    def produce() -> None:
        with source.open("wb", buffering=0) as file:
            for count in (2, 5):
                file.write(LINE * (count - sum(seen)))
                limit = time.monotonic() + PATIENCE
                while len(results(target, is_cut=True)) < count and time.monotonic() < limit:
                    time.sleep(0.01)
                seen.append(len(results(target, is_cut=True)) - sum(seen))

    producer = threading.Thread(target=produce)
    producer.start()
    summary = run(source, target, Scripted(), max_open=64)
    producer.join()
    assert seen == [2, 3] and summary.num_answered == 5


@pytest.mark.parametrize("begin", [b"", LINE, b'{"prompt":'])
def test_a_run_that_is_cancelled_does_not_wait_for_its_pipe(
    begin: bytes, pipe: tuple[Path, int], tmp_path: Path
) -> None:
    source, writer = pipe
    os.write(writer, LINE + begin)  # the first bytes say whether it is compressed
    rescue = threading.Timer(PATIENCE, os.write, (writer, LINE * 100))
    rescue.start()

    async def cancelled(job: BatchJob) -> None:
        reader = job.reader(read_json, 1000, 1 << 20)
        async with asyncio.timeout(0.3):
            await answer_all(reader, job.results, Scripted().answer, max_open=4)

    with BatchJob(source, tmp_path / "out", {}) as job, pytest.raises(TimeoutError):
        asyncio.run(cancelled(job))
    assert rescue.is_alive(), "it waited for the pipe"
    rescue.cancel()
    assert len(results(tmp_path / "out")) == 1 + begin.endswith(b"\n")


def test_standard_input_that_is_closed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="standard input is closed"):
        open_lines("-")


def test_a_pipe_is_read_to_its_end(pipe: tuple[Path, int], tmp_path: Path) -> None:
    source, _ = pipe
    count = 3000  # more than a pipe holds
    lines = "".join(json.dumps({"prompt": f"{index} " + "x" * 100}) + "\n" for index in range(count))
    producer = threading.Thread(target=source.write_text, args=(lines,))
    producer.start()
    with open_lines(source) as file:
        assert b"".join(file.readline() for _ in range(count)).decode() == lines
    producer.join()
