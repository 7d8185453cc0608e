"""A batch run without an engine, as a process of its own: ``python -m tests.batch.scripted_run IN OUT SECONDS
[--force]``.

The answer to a line is made of its body alone, after about so many seconds.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path

from nemo_engine.batch.job import BatchJob
from nemo_engine.batch.lines import Line, LineError
from nemo_engine.batch.run import Answer, BatchSummary, answer_all


def read_json(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError as error:
        raise LineError("invalid_json", f"the line is not valid JSON: {error}") from None


class Scripted:
    """Answers lines, and counts those that are open at once."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.num_open = self.most_open = 0
        self.order: list[int] = []

    async def answer(self, line: Line) -> Answer:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        self.order.append(line.number)
        await asyncio.sleep(self.seconds * random.random())
        self.num_open -= 1
        if line.body.get("fails"):
            return Answer(400, f"r-{line.number}", b'{"error":{"message":"it fails"}}', ("planted", "it fails"))
        body = {"text": str(line.body)[::-1] * 3, "line": line.number}
        return Answer(200, f"r-{line.number}", json.dumps(body).encode(), None, 10, 4, 5)


def run(
    source: Path, target: Path, script: Scripted, *, options: dict[str, object] | None = None, force: bool = False,
    max_open: int = 8, max_bytes: int = 1 << 20,
) -> BatchSummary:  # fmt: skip
    with BatchJob(source, target, options or {}, force=force) as job:
        reader = job.reader(read_json, 1000, max_bytes)
        return asyncio.run(answer_all(reader, job.results, script.answer, max_open=max_open))


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), Scripted(float(sys.argv[3])))
