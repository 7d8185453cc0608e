"""The results of a batch: a line each, appended to OUT or OUT.errors as they come, and found there again by the next
run.

What is written survives the process: a line that was cut off is removed, the others count as done. Every line begins
with the number of its request, so a run that goes on needs a bit for each line that is done, and no more. OUT.run says
what the run was asked for.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import stat
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from nemo_engine.batch.reader import GZIP_MAGIC

_HEAD = re.compile(rb'\{"id":"batch_req_(\d{1,15})",')
_END = b"}\n"
_GZIP_BYTES, _GZIP_SECONDS = 1 << 18, 1.0  # of results that become one member of a compressed file
_PIECE = 1 << 20


def head(number: int, custom_id: str | None) -> bytes:
    """How the result of a line begins."""
    return b'{"id":"batch_req_%d","custom_id":%s' % (number, json.dumps(custom_id).encode())


class Numbers:
    """A set of small integers, of a bit each."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, number: int) -> bool:
        byte = number >> 3
        return byte < len(self._bits) and bool(self._bits[byte] >> (number & 7) & 1)

    def add(self, number: int) -> None:
        """Put one in."""
        if number in self:
            return
        byte = number >> 3
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 1 - len(self._bits) + (len(self._bits) >> 3)))
        self._bits[byte] |= 1 << (number & 7)
        self._count += 1


class ResultFile:
    """One file that results are appended to.

    ``is_stream``: a pipe, a device or standard output, of which nothing is read back.
    """

    def __init__(self, path: Path, done: Numbers, fd: int | None = None) -> None:
        """Open ``path``, lock it, and put into ``done`` what is there. Raises ``ValueError`` or ``OSError``.

        ``fd``: an open stream in the place of ``path``.
        """
        self.path = path
        self.count = 0  # of results in it
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666) if fd is None else fd
        self.is_stream = fd is not None or not stat.S_ISREG(os.fstat(self._fd).st_mode)
        self._is_gzip = path.suffix == ".gz" and not self.is_stream
        self._held: list[bytes] = []  # of a compressed file, what is to be its next member
        self._num_held, self._held_since = 0, 0.0
        self._end = 0
        if not self.is_stream:
            try:
                self._recover(done)
            except BaseException:
                self.close()
                raise

    def append(self, line: bytes) -> None:
        """Write the result of one line. ``OSError`` if there is no room, which leaves whole lines."""
        if not self._is_gzip:
            self._write(line)
        else:
            if not self._held:
                self._held_since = time.monotonic()
            self._held.append(line)
            self._num_held += len(line)
            if self._num_held >= _GZIP_BYTES or time.monotonic() - self._held_since >= _GZIP_SECONDS:
                self.flush()
        self.count += 1

    def flush(self) -> None:
        """Write what is held back."""
        if self._held:
            compressor = zlib.compressobj(wbits=31)
            member = compressor.compress(b"".join(self._held)) + compressor.flush()
            self._held, self._num_held = [], 0
            self._write(member)

    def close(self) -> None:
        """Leave the file, and its lock."""
        if self._fd > 2:
            os.close(self._fd)
        self._fd = -1

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            if not self.is_stream:
                os.ftruncate(self._fd, self._end)  # makes no claim on room
            raise OSError(
                error.errno,
                f"{error.strerror}: the results so far are whole, and the same command goes on from there",
                str(self.path),
            ) from error
        self._end += len(data)

    def _recover(self, done: Numbers) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.path} is being written by another run") from None
        for end, lines in self._whole():
            for number, line in enumerate(lines, self.count + 1):
                match = _HEAD.match(line)
                if match is None or not line.endswith(_END):
                    raise ValueError(
                        f"{self.path}: line {number} is no result of a batch: name another file, or remove it"
                    )
                done.add(int(match[1]))
            self.count += len(lines)
            self._end = end
        if self._end < os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, self._end)

    def _whole(self) -> Iterator[tuple[int, list[bytes]]]:
        """(where it ends in the file, lines) of each part of the file that is whole."""
        with io.FileIO(os.dup(self._fd)) as raw:
            raw.seek(0)
            file = io.BufferedReader(raw, _PIECE)
            is_gzip = file.peek(2)[:2] == GZIP_MAGIC
            if is_gzip != self._is_gzip and file.peek(1):
                raise ValueError(
                    f"{self.path} is {'' if is_gzip else 'not '}compressed, unlike what its name says: name another "
                    "file"
                )
            yield from _members(file) if is_gzip else _plain(file)


def _plain(file: IO[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    end = 0
    for line in file:
        if line.endswith(b"\n"):
            end += len(line)
            yield end, [line]


def _members(file: IO[bytes]) -> Iterator[tuple[int, list[bytes]]]:
    """The lines of a file of gzip members, each of which holds whole lines."""
    end, data = 0, b""
    while data := data or file.read(_PIECE):
        inflater, parts, size = zlib.decompressobj(wbits=31), [], 0
        try:
            while not inflater.eof and data:
                parts.append(inflater.decompress(data))
                size += len(data)
                data = b"" if inflater.eof else file.read(_PIECE)
        except zlib.error:
            return
        if not inflater.eof:
            return
        data = inflater.unused_data
        end += size - len(data)
        yield end, b"".join(parts).splitlines(keepends=True)


class Results:
    """OUT and OUT.errors of one run."""

    def __init__(self, path: Path, options: Mapping[str, Any], *, force: bool = False) -> None:
        """Take up what an earlier run left. "-" is standard output, whose failures go to standard error.

        Raises ``ValueError`` if the files are another run's, or if that was asked for other ``options`` and not
        ``force``; ``OSError``.
        """
        self.path = path
        self.done = Numbers()
        self._errors: ResultFile | None = None
        if str(path) == "-":
            sys.stdout.flush()
            self._out = ResultFile(Path("standard output"), self.done, fd=1)
        elif path.exists() and not path.is_file():
            self._out = ResultFile(path, self.done)
        else:
            self._out = self._resumed(options, force)
        self.num_resumed = len(self.done)

    @property
    def errors_path(self) -> Path | None:
        """Where failures go; None if that is standard error."""
        return None if self._out.is_stream else Path(f"{self.path}.errors")

    @property
    def num_answered(self) -> int:
        """Lines that have an answer, of this run and before."""
        return self._out.count

    @property
    def num_failed(self) -> int:
        """Lines that failed, in this run and before."""
        return self._num_failed if self._errors is None else self._errors.count

    _num_failed = 0

    def answered(self, number: int, line: bytes) -> None:
        """Record the result of a line."""
        self._out.append(line)
        self.done.add(number)

    def failed(self, number: int, line: bytes) -> None:
        """Record why a line has none."""
        errors = self.errors_path
        if errors is None:
            sys.stderr.write(line.decode())
            sys.stderr.flush()
            self._num_failed += 1
        else:
            if self._errors is None:
                self._errors = ResultFile(errors, self.done)
            self._errors.append(line)
        self.done.add(number)

    def close(self) -> None:
        """Write what is held back, and leave the files."""
        try:
            self._out.flush()
        finally:
            self._out.close()
            if self._errors is not None:
                self._errors.close()

    def _resumed(self, options: Mapping[str, Any], force: bool) -> ResultFile:
        path, errors, run = self.path, Path(f"{self.path}.errors"), Path(f"{self.path}.run")
        if not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no directory {path.parent}")
        has_results = any(file.exists() and file.stat().st_size > 0 for file in (path, errors))
        if has_results and not run.exists():
            raise ValueError(f"{path} holds something, and no {run.name} says of which run: name another, or remove it")
        if has_results and not force:
            _check_same(path, _read_run(run), options)
        out = ResultFile(path, self.done)
        try:
            if errors.exists():
                self._errors = ResultFile(errors, self.done)
            if not has_results or force:
                _write_whole(run, json.dumps(options, indent=1).encode())
        except BaseException:
            out.close()
            raise
        return out


def _read_run(path: Path) -> dict[str, Any]:
    try:
        options = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} does not say what the run was asked for ({error}): go on with --force") from None
    if not isinstance(options, dict):
        raise ValueError(f"{path} does not say what the run was asked for: go on with --force")
    return options


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    differences = [
        f"{name} was {_shown(before, name)} and is {_shown(now, name)}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise ValueError(
            f"{path} was begun with other options: {'; '.join(differences)}. Give those of then, name another file, or "
            "use --force"
        )


def _shown(options: Mapping[str, Any], name: str) -> str:
    return json.dumps(options[name]) if options.get(name) is not None else "not given"


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all."""
    beside = path.with_name(path.name + ".new")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
