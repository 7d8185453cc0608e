"""The rules for the fields of a request, the same at every level of every route.

1. ``null`` is a field left out. So is any value that asks for nothing (false, "", [], {}, or an object or list of such
   alone) of a field
   that a route gives no meaning to.
2. A field that would change the answer, and that this server cannot honour, is refused by its path.
3. Any other field that a route does not know has no effect, and its path is listed in the header ``X-Ignored-Fields``.

Each route checks the fields that it knows; this module has the names that objects inside a body may have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from nemo_engine.server.errors import ApiError
from nemo_engine.text.messages import asks_nothing

MAX_IGNORED = 32  # paths that are listed

REFUSED: Final = object()  # a field of rule 2
# The names that an object may have. The value of a name is None (not looked into), REFUSED, the names of the object
# there, or [the names of each object in the list there].
Names = Mapping[str, Any]

_PART: Names = {"type": None, "text": None, "refusal": None, "image_url": None, "input_audio": None, "file": None}
_CALL: Names = {
    "id": None, "type": None, "index": None, "function": {"name": None, "arguments": None, "parsed_arguments": None},
}  # fmt: skip
MESSAGE: Names = {
    "role": None, "content": [_PART], "name": None, "tool_calls": [_CALL], "tool_call_id": None, "refusal": None,
    "annotations": None, "parsed": None, "prefix": None,
    # Some chat templates read these; where none does, the messages are refused.
    "reasoning": None, "reasoning_content": None, "thinking": None,
    **dict.fromkeys(("audio", "function_call", "images", "reasoning_details", "thinking_blocks"), REFUSED),
}  # fmt: skip
TOOL: Names = {"type": None, "function": {"name": None, "description": None, "parameters": None, "strict": None}}
RESPONSE_FORMAT: Names = {
    "type": None, "json_schema": {"name": None, "schema": None, "strict": None, "description": None},
    # Fields of other servers for the form of an answer; the code that reads them refuses those that the type lacks.
    "schema": None, "grammar": None, "regex": None, "structures": None, "triggers": None,
}  # fmt: skip

# Of /v1/responses
_INPUT_PART: Names = dict.fromkeys(
    (
        "type",
        "text",
        "refusal",
        "annotations",
        "logprobs",
        "parsed",
        "prompt_cache_breakpoint",
        "image_url",
        "file_id",
        "detail",
    )
)
INPUT_ITEM: Names = {
    **dict.fromkeys(("type", "role", "id", "status", "phase", "call_id", "name", "arguments", "parsed_arguments")),
    "content": [_INPUT_PART], "output": [_INPUT_PART],
}  # fmt: skip
INPUT_TOOL: Names = dict.fromkeys(
    (
        "type",
        "name",
        "description",
        "parameters",
        "strict",
        "allowed_callers",
        "defer_loading",
        "async",
        "function",
        "output_schema",
    )
)
TEXT_FORMAT: Names = dict.fromkeys(("type", "name", "schema", "strict", "description"))


class Ignored:
    """The paths of fields that had no effect, each once, and at most ``MAX_IGNORED``."""

    def __init__(self) -> None:
        self.paths: dict[str, None] = {}

    @property
    def is_full(self) -> bool:
        """Whether no further path will be noted."""
        return len(self.paths) >= MAX_IGNORED

    def add(self, path: str) -> None:
        """Note a path."""
        if not self.is_full:
            self.paths[path] = None

    def known_part(self, value: Any, names: Any, path: str, place: str | None = None) -> Any:
        """``value`` without the fields that ``names`` does not have.

        A value of another type is left to the code that reads it.

        path: as in the header, with "[]" for every index. place: the same with the indices, for errors. Raises
        ``ApiError``.
        """
        place = path if place is None else place
        if isinstance(names, list):
            if not isinstance(value, list):
                return value
            return [
                self.known_part(item, names[0], f"{path}[]", f"{place}[{index}]") for index, item in enumerate(value)
            ]
        if not isinstance(names, Mapping) or not isinstance(value, Mapping):
            return value
        known_fields = {}
        for name, inner in value.items():
            known = names.get(name, self)
            if known is self or known is REFUSED:
                if asks_nothing(inner):
                    continue
                if known is REFUSED:
                    raise ApiError(
                        400, f"{place}.{name} is not supported", param=f"{place}.{name}", code="unsupported_parameter"
                    )
                self.add(f"{path}.{name}")
            else:
                known_fields[name] = self.known_part(inner, known, f"{path}.{name}", f"{place}.{name}")
        return known_fields
