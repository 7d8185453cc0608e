"""Reads batch files as windows of requests, a piece at a time, so that memory does not grow with the file.

A window is sorted by prompts, so that equal beginnings meet in the prefix cache. The ids that a file has used are kept
in a temporary database on disk.
"""

from __future__ import annotations

import gzip
import io
import os
import select
import sqlite3
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, cast

from nemo_engine.batch.lines import Line, LineError, parse_request

GZIP_MAGIC = b"\x1f\x8b"
_MOST_WINDOW_BYTES = 32 << 20
_STOP_MS = 50  # between two looks whether reading has been stopped


class BadLine:
    """A line that is no request, with the error to report."""

    __slots__ = ("code", "custom_id", "message", "number")

    def __init__(self, number: int, error: LineError) -> None:
        self.number = number
        self.custom_id = error.custom_id
        self.code = error.code
        self.message = str(error)


class Pipe(io.RawIOBase):
    """The bytes of a file descriptor whose other end may be slow. Owns ``file``, which has the descriptor."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._is_stopped = False
        self._poll = select.poll()
        self._poll.register(file.fileno(), select.POLLIN)

    def readable(self) -> bool:
        """Always."""
        return True

    def has_more(self) -> bool:
        """Whether there are bytes, or the end, without waiting."""
        return bool(self._poll.poll(0))

    def stop(self) -> None:
        """From any thread: let whoever waits for bytes find the end instead."""
        self._is_stopped = True

    def readinto(self, buffer: Any) -> int:
        """Wait for bytes, and put them into ``buffer``; returns how many, 0 at the end."""
        while not self._poll.poll(_STOP_MS) and not self._is_stopped:
            pass
        return 0 if self._is_stopped else self._file.readinto(buffer) or 0

    def close(self) -> None:
        """Close the descriptor, if it is not standard input's."""
        self._file.close()
        super().close()


def open_lines(path: str | Path) -> IO[bytes]:
    """Open a file, or standard input for "-"; gzip is decompressed.

    Raises ``OSError``, and ``ValueError`` if standard input is closed.
    """
    if str(path) == "-" and sys.stdin is None:
        raise ValueError("standard input is closed")
    file = io.FileIO(0, closefd=False) if str(path) == "-" else io.FileIO(path)
    is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    raw = io.BufferedReader(file if is_file else Pipe(file))
    if raw.peek(2)[:2] == GZIP_MAGIC:
        return cast("IO[bytes]", gzip.GzipFile(fileobj=raw))
    return cast("IO[bytes]", raw)


def count_lines(path: Path) -> int:
    """The number of lines of a file that are not empty; the last one may lack a newline."""
    count, last = 0, b"\n"
    with open_lines(path) as file:
        while piece := file.read(1 << 20):
            count += piece.count(b"\n")
            last = piece[-1:]
    return count + (last != b"\n")


class Reader:
    """The requests of ``file`` that are not done.

    is_done: says whether the line of a number is done. read_json: parses bytes, or raises ``LineError``. max_bytes: the
    largest line.
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
        self.num_lines = 0  # lines read so far, without blank ones
        self._is_done = is_done
        self._read_json = read_json
        self._vocab_size = vocab_size
        self._max_bytes = max_bytes
        self._lines = self._numbered(file)
        raw = getattr(getattr(file, "fileobj", file), "raw", None)  # below gzip and the buffer
        self._pipe = raw if isinstance(raw, Pipe) else None
        self._error: OSError | ValueError | None = None  # for the window after the last one
        self._ids = sqlite3.connect("", isolation_level=None, check_same_thread=False)  # "": on disk, and gone with us
        self._ids.execute("PRAGMA journal_mode = OFF")
        self._ids.execute("CREATE TABLE ids (id BLOB PRIMARY KEY, line INTEGER) WITHOUT ROWID")

    def window(self, max_lines: int) -> list[Line | BadLine]:
        """The next lines, at most ``max_lines``: bad ones, then requests sorted by prompt. Empty at the end.

        What a slow pipe has brought is a window too. When all lines in front of damage have been returned, raises
        ``OSError`` or ``ValueError``.
        """
        good: list[Line] = []
        bad: list[BadLine] = []
        num_bytes = 0
        while self._error is None and len(good) + len(bad) < max_lines and num_bytes < _MOST_WINDOW_BYTES:
            if (good or bad) and self._pipe is not None and not self._pipe.has_more():
                break
            try:
                number, raw = next(self._lines)
            except StopIteration:
                break
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                self._error = ValueError(f"the compressed input cannot be read on: {error}")
                break
            except OSError as error:
                self._error = error
                break
            try:
                line = self._parsed(number, raw)
            except LineError as error:
                if not self._is_done(number):
                    bad.append(BadLine(number, error))
                continue
            if not self._is_done(number):
                num_bytes += len(raw)
                good.append(line)
        if self._error is not None and not (good or bad):
            raise self._error
        good.sort(key=Line.prompt_key)
        return [*bad, *good]

    def stop(self) -> None:
        """From any thread: end a wait for a slow pipe."""
        if self._pipe is not None:
            self._pipe.stop()

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
        """Lines that are not blank, with their numbers. Too long a line is cut to ``max_bytes + 1`` bytes."""
        number = 0
        while raw := file.readline(self._max_bytes + 1):
            number += 1
            piece = raw
            while len(piece) > self._max_bytes and not piece.endswith(b"\n"):
                piece = file.readline(self._max_bytes + 1)
            if raw.strip():
                self.num_lines += 1
                yield number, raw
