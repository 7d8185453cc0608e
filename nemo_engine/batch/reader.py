"""Batch files as windows of requests: read a piece at a time, such that memory does not grow with the file.

A window is put in the order of its prompts, so that equal beginnings meet in the prefix cache. Which ids a file has
used stands in a temporary database on disk.
"""

from __future__ import annotations

import gzip
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, cast

from nemo_engine.batch.lines import Line, LineError, parse_request

GZIP_MAGIC = b"\x1f\x8b"
_MOST_WINDOW_BYTES = 32 << 20


class BadLine:
    """A line that is no request, with what is told of it."""

    __slots__ = ("code", "custom_id", "message", "number")

    def __init__(self, number: int, error: LineError) -> None:
        self.number = number
        self.custom_id = error.custom_id
        self.code = error.code
        self.message = str(error)


def open_lines(path: str | Path) -> IO[bytes]:
    """A file, or standard input for "-", read as what it holds if that is compressed by gzip. Raises ``OSError``."""
    if str(path) == "-":
        raw = open(0, "rb", closefd=False)
    else:
        raw = open(path, "rb")
    if raw.peek(2)[:2] == GZIP_MAGIC:
        return cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
    return raw


def count_lines(path: Path) -> int:
    """The lines of a file that are not blank at first sight: with or without a last newline."""
    count, last = 0, b"\n"
    with open_lines(path) as file:
        while piece := file.read(1 << 20):
            count += piece.count(b"\n")
            last = piece[-1:]
    return count + (last != b"\n")


class Reader:
    """The requests of ``file`` that are not done.

    is_done: whether the line of a number is. read_json: from bytes to values, or ``LineError``. max_bytes: of a line.
    """

    def __init__(
        self,
        file: IO[bytes],
        *,
        is_done: Callable[[int], bool],
        read_json: Callable[[bytes], Any],
        vocab_size: int,
        max_bytes: int,
    ) -> None:
        self.num_lines = 0  # so far, without blank ones
        self._is_done = is_done
        self._read_json = read_json
        self._vocab_size = vocab_size
        self._max_bytes = max_bytes
        self._lines = self._numbered(file)
        self._ids = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # "": on disk, and gone with us
        self._ids.execute("PRAGMA journal_mode = OFF")
        self._ids.execute("CREATE TABLE ids (id BLOB PRIMARY KEY, line INTEGER) WITHOUT ROWID")

    def window(self, max_lines: int) -> list[Line | BadLine]:
        """The next requests, at most ``most``: those that are none, then the others by their prompts. Empty at the end.

        Raises ``OSError`` or ``ValueError`` for a file that cannot be read on.
        """
        good: list[Line] = []
        bad: list[BadLine] = []
        num_bytes = 0
        while len(good) + len(bad) < max_lines and num_bytes < _MOST_WINDOW_BYTES:
            try:
                number, raw = next(self._lines)
            except StopIteration:
                break
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"the compressed input cannot be read on: {error}") from None
            try:
                line = self._parsed(number, raw)
            except LineError as error:
                if not self._is_done(number):
                    bad.append(BadLine(number, error))
                continue
            if not self._is_done(number):
                num_bytes += len(raw)
                good.append(line)
        good.sort(key=Line.prompt_key)
        return [*bad, *good]

    def _parsed(self, number: int, raw: bytes) -> Line:
        raw = raw.rstrip(b"\r\n")  # or what is said of a place in it speaks of a second line
        if len(raw) > self._max_bytes:
            raise LineError("line_too_long", f"a line must have at most {self._max_bytes} bytes")
        line = parse_request(self._read_json(raw), number, self._vocab_size)
        digest = blake2b(line.custom_id.encode(errors="surrogatepass"), digest_size=16).digest()
        try:
            self._ids.execute("INSERT INTO ids VALUES (?, ?)", (digest, number))
        except sqlite3.IntegrityError:
            ((first,),) = self._ids.execute("SELECT line FROM ids WHERE id = ?", (digest,))
            raise LineError(
                "duplicate_custom_id", f"custom_id {line.custom_id!r} is that of line {first} too", line.custom_id
            ) from None
        except sqlite3.OperationalError as error:
            raise OSError(f"the ids of the lines cannot be kept in a temporary file: {error}") from error
        return line

    def _numbered(self, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
        """Lines that are not blank, with their numbers. Of one that is too long, the first ``max_bytes + 1`` bytes."""
        number = 0
        while raw := file.readline(self._max_bytes + 1):
            number += 1
            rest = raw
            while len(rest) > self._max_bytes and not rest.endswith(b"\n"):
                rest = file.readline(self._max_bytes + 1)
            if raw.strip():
                self.num_lines += 1
                yield number, raw
