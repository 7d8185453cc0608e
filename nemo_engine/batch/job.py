"""``BatchJob``: one run from IN to OUT, which is checked before a model is loaded; and the bar of its progress."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any

from nemo_engine.batch.reader import Reader, count_lines, open_lines
from nemo_engine.batch.results import Results
from nemo_engine.batch.run import BatchSummary

_SAMPLE = 1 << 20  # bytes at the start and at the end of a file that identify it, with its size


class BatchJob:
    """IN and OUT, opened. Use it as a context manager.

    options: the options of the run. A later run that goes on must have the same ones, unless ``force``.
    """

    def __init__(
        self, source: str | Path, target: str | Path, options: Mapping[str, Any], *, force: bool = False
    ) -> None:
        self.source = Path(source)
        self.total: int | None = None
        target = Path(target)
        if str(source) != "-":
            if not self.source.exists():
                raise ValueError(f"{source} does not exist")
            if self.source.is_dir():
                raise ValueError(f"{source} is a directory, and a file is needed")
            for other in (target, Path(f"{target}.errors"), Path(f"{target}.run")):
                if other.exists() and other.is_file() and other.samefile(self.source):
                    raise ValueError(f"{source} would be written to: it is {other}")
        if self.source.is_file():
            self.total = _total(self.source)
            options = {**options, "the input": _fingerprint(self.source)}
        self._file = open_lines(source)
        try:
            self.results = Results(target, options, force=force)
        except BaseException:
            self._file.close()
            raise

    def reader(self, read_json: Callable[[bytes], Any], vocab_size: int, max_bytes: int) -> Reader:
        """The requests that are not done."""
        done = self.results.done
        return Reader(
            self._file,
            is_done=done.__contains__,
            read_json=read_json,
            vocab_size=vocab_size,
            max_bytes=max_bytes,
        )

    def __enter__(self) -> BatchJob:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write what is held back, and leave the files to another run."""
        self._file.close()
        self.results.close()


def first_model(source: str) -> str:
    """The model that the first line of a file names. ``ValueError`` if it names none."""
    reason = "its first line names no model"
    if source == "-":
        reason = "standard input is not read before there is a model"
    else:
        with open_lines(source) as file:
            try:
                data = json.loads(file.readline(_SAMPLE))
            except ValueError:
                data = None
        body = data.get("body", data) if isinstance(data, dict) else None
        model = body.get("model") if isinstance(body, dict) else None
        if isinstance(model, str) and model:
            return model
    raise ValueError(f"MODEL is needed in front of {source}: {reason}")


def _total(path: Path) -> int | None:
    """The number of lines of a file; None if it cannot be read to its end. The reader reports that error later."""
    try:
        return count_lines(path)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return None


def _fingerprint(path: Path) -> str:
    """The identity of a file: its size, and a hash of its beginning and its end."""
    size = path.stat().st_size
    digest = blake2b(digest_size=8)
    with path.open("rb") as file:
        digest.update(file.read(_SAMPLE))
        file.seek(max(0, size - _SAMPLE))
        digest.update(file.read(_SAMPLE))
    return f"{size} bytes, {digest.hexdigest()}"


class Bar:
    """A tqdm bar on standard error over the lines of a job, with tokens a second; none if that is no terminal."""

    def __init__(self, job: BatchJob) -> None:
        self._bar: Any = None
        if not sys.stderr.isatty():
            return
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return
        done = job.results.num_resumed
        self._bar = tqdm(total=job.total, initial=done, desc="batch", unit="request", smoothing=0.05)

    def update(self, summary: BatchSummary) -> None:
        """One more line is done."""
        if self._bar is not None:
            rate = summary.num_output_tokens / summary.seconds if summary.seconds else 0.0
            self._bar.set_postfix_str(f"{rate:.0f} tokens/s, {summary.num_failed} failed", refresh=False)
            self._bar.update(summary.num_done - self._bar.n)

    def close(self) -> None:
        """End the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
