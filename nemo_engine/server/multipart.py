"""A form with one file, received a piece at a time into a file on disk: what clients of ``/v1/files`` send."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from nemo_engine.server.errors import ApiError

_MOST_FIELD = 64 * 1024  # bytes of a part that is no file
_MOST_PARTS = 20


class Form:
    """The fields of a form, and the name of its file; None if there was none."""

    def __init__(self) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None


async def receive_form(content_type: str, pieces: AsyncIterator[bytes], file: IO[bytes], most_bytes: int) -> Form:
    """Write the part ``file`` of a form to ``file``.

    Raises ``ApiError`` for what is no form, or larger than ``most_bytes``.
    """
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise ApiError(400, "the body must be a form, sent as multipart/form-data", code="invalid_form")
    parts = _Parts(file)
    num_bytes = 0
    try:
        callbacks = {name: getattr(parts, name) for name in dir(parts) if name.startswith("on_")}
        parser = MultipartParser(options[b"boundary"], callbacks)  # type: ignore[arg-type]
        async for piece in pieces:
            num_bytes += len(piece)
            if num_bytes > most_bytes:
                message = f"the file is larger than {most_bytes} bytes"
                raise ApiError(413, message, param="file", code="request_too_large")
            parser.write(piece)
    except FormParserError as error:
        raise _broken(str(error)) from None
    if not parts.is_over:
        raise _broken("it ends before its last boundary")
    return parts.form


def _broken(why: str) -> ApiError:
    return ApiError(400, f"the body is no form: {why}", code="invalid_form")


class _Parts:
    """Takes what the parser finds, by the names of its callbacks: the file goes to disk, other fields are kept."""

    def __init__(self, file: IO[bytes]) -> None:
        self.form = Form()
        self.is_over = False
        self._file = file
        self._num_parts = 0

    def on_part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MOST_PARTS:
            raise _broken(f"it has more than {_MOST_PARTS} parts")
        self._head = self._text = self._disposition = self._value = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._head += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._text += data[start:end]

    def on_header_end(self) -> None:
        if self._head.lower() == b"content-disposition":
            self._disposition = self._text
        self._head = self._text = b""

    def on_headers_finished(self) -> None:
        options = parse_options_header(self._disposition)[1]
        if b"name" not in options:
            raise _broken("a part has no name")
        self._name = options[b"name"].decode(errors="replace")
        if self._name == "file":
            if self.form.filename is not None:
                raise _broken("it has more than one file")
            self.form.filename = options.get(b"filename", b"").decode(errors="replace")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._file.write(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > _MOST_FIELD:
            raise _broken(f"the field {self._name[:64]} is longer than {_MOST_FIELD} bytes")

    def on_part_end(self) -> None:
        if self._name != "file":
            self.form.fields[self._name] = self._value.decode(errors="replace")

    def on_end(self) -> None:
        self.is_over = True
