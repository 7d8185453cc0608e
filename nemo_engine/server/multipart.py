"""A form with one file, received a piece at a time into a file on disk: what clients of ``/v1/files`` send."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import IO

from nemo_engine.server.errors import ApiError

_BOUNDARY = re.compile(r'multipart/form-data\s*;.*?boundary="?([^";,\s]{1,200})"?', re.IGNORECASE)
_NAME = re.compile(rb'[;\s]name="([^"]*)"', re.IGNORECASE)
_FILENAME = re.compile(rb'filename="([^"]*)"', re.IGNORECASE)
_MOST_HEAD = 16 * 1024  # bytes of the head of a part
_MOST_FIELD = 64 * 1024  # bytes of a part that is not the file


class Form:
    """The fields of a form, and the name of its file; None if there was none."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None


async def receive_form(content_type: str, pieces: AsyncIterator[bytes], file: IO[bytes], most_bytes: int) -> Form:
    """Write the part ``file`` of a form to ``file``.

    Raises ``ApiError`` for a malformed form, and for a file of more than ``most_bytes``.
    """
    match = _BOUNDARY.match(content_type)
    if match is None:
        raise ApiError(400, "the body must be a form, sent as multipart/form-data", code="invalid_form")
    parser = _Parser(b"\r\n--" + match[1].encode("latin-1"), file)
    num_bytes = 0
    async for piece in pieces:
        num_bytes += len(piece)
        if num_bytes > most_bytes:
            raise ApiError(413, f"the file is larger than {most_bytes} bytes", param="file", code="request_too_large")
        parser.feed(piece)
    if not parser.is_over:
        raise _broken("it ends before its last boundary")
    return parser.form


def _broken(why: str) -> ApiError:
    return ApiError(400, f"the body is no form: {why}", code="invalid_form")


class _Parser:
    """Cuts a body at its boundaries. Bytes that may be the beginning of a boundary are held back."""

    def __init__(self, boundary: bytes, file: IO[bytes]) -> None:
        self.form = Form()
        self.is_over = False
        self._boundary = boundary
        self._file = file
        self._held = b"\r\n"  # the first boundary has no line break in front of it
        self._is_in_body = False
        self._is_first = True
        self._name = ""
        self._value = bytearray()

    def feed(self, piece: bytes) -> None:
        """Take the next bytes."""
        self._held += piece
        while not self.is_over and self._advance():
            pass

    def _advance(self) -> bool:
        """Use up to one part of the held bytes; returns whether another call may use more."""
        if self._is_in_body or self._is_first:
            at = self._held.find(self._boundary)
            if at < 0:
                keep = len(self._boundary) - 1
                self._take(self._held[:-keep])
                self._held = self._held[-keep:]
                return False
            if len(self._held) < at + len(self._boundary) + 2:
                return False  # what follows the boundary says whether it is the last
            self._take(self._held[:at])
            self._finish()
            after = self._held[at + len(self._boundary) :]
            self._is_in_body = self._is_first = False
            self.is_over = after.startswith(b"--")
            if not self.is_over and not after.startswith(b"\r\n"):
                raise _broken("a boundary is followed by other text")
            self._held = after[2:]
            return not self.is_over
        head, separator, rest = self._held.partition(b"\r\n\r\n")
        if not separator:
            if len(self._held) > _MOST_HEAD:
                raise _broken(f"the head of a part is longer than {_MOST_HEAD} bytes")
            return False
        self._begin(head)
        self._held = rest
        return True

    def _begin(self, head: bytes) -> None:
        line = next((line for line in head.split(b"\r\n") if line.lower().startswith(b"content-disposition:")), b"")
        name, filename = _NAME.search(line), _FILENAME.search(line)
        if name is None:
            raise _broken("a part has no name")
        self._name = name[1].decode(errors="replace")
        self._is_in_body = True
        if self._name == "file":
            if self.form.filename is not None:
                raise _broken("it has more than one file")
            self.form.filename = filename[1].decode(errors="replace") if filename else ""

    def _take(self, data: bytes) -> None:
        if not self._is_in_body:
            return  # bytes in front of the first boundary mean nothing
        if self._name == "file":
            self._file.write(data)
            return
        self._value += data
        if len(self._value) > _MOST_FIELD:
            raise _broken(f"the field {self._name[:64]} is longer than {_MOST_FIELD} bytes")

    def _finish(self) -> None:
        if self._is_in_body and self._name != "file":
            self.form.fields[self._name] = self._value.decode(errors="replace")
        self._value.clear()
