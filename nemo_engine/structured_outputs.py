"""What a user may ask of an output's form: a JSON schema, a regular expression, a choice or a grammar.

Names are vLLM's.

Checks shapes and sizes. Whether a grammar can be honoured needs the tokenizer's vocabulary and is decided at admission
(``text.grammar``). Must not know: tokenizers, models, requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from nemo_engine.option_names import refuse_unknown_options

MAX_JSON_NESTING = 64
MAX_JSON_VALUES = 50_000  # keywords, names and values of a schema
MAX_SCHEMA_CHARS = 256 * 1024  # of a schema or a choice as JSON
MAX_GRAMMAR_CHARS = 64 * 1024  # of a regex or a grammar

_KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The form of an output: exactly one of ``json``, ``regex``, ``choice``, ``grammar`` and ``json_object``.

    json: a JSON schema, as a dict or as text, nested at most 64 deep; kept as text. Properties come in its order. Every
        keyword is kept, or refused at admission with its place; annotations and keywords that no draft knows are
        ignored (a table: README.md).
    regex: a regular expression in the syntax of Rust's ``regex`` crate, for the whole output: no look-around, no
        back-references.
    choice: the texts to choose from.
    grammar: Lark as llguidance reads it (rule ``start``; ``%json {...}``, kept as ``json`` is, ``<[token id]>``), or
        GBNF (rule ``root``).
    json_object: True for any JSON object.
    disable_any_whitespace: compact JSON. Otherwise each place where JSON may have white space takes one space, or one
        newline and up to 16 spaces.
    whitespace_pattern: a regular expression for that white space instead.
    disable_additional_properties: objects of the schema have no properties but those that it names, unless it says
        otherwise.
    structural_tag: not supported.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: object | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __new__(cls, *args: Any, **options: Any) -> StructuredOutputsParams:
        """Refuse unknown names by a ``ValueError``, before the constructor would by a ``TypeError``."""
        refuse_unknown_options("StructuredOutputsParams", options, cls.__dataclass_fields__)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        if self.structural_tag is not None:
            raise ValueError("structured_outputs.structural_tag is not supported")
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "json_object" and value is None):
                raise ValueError(f"structured_outputs.{name} must be true or false, got {value!r}")
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(f"structured_outputs needs exactly one of {', '.join(_KINDS)}, got {given or 'none'}")
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None:
                _check_text(f"structured_outputs.{name}", value, MAX_GRAMMAR_CHARS)
        is_json = self.json is not None or bool(self.json_object)
        for name in ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern"):
            if getattr(self, name) and not is_json:
                raise ValueError(f"structured_outputs.{name} needs json or json_object, got it with {given[0]}")
        if self.whitespace_pattern is not None and self.disable_any_whitespace:
            raise ValueError("structured_outputs.whitespace_pattern does not go with disable_any_whitespace")

    @property
    def kind(self) -> str:
        """The name of the one that is given."""
        return next(name for name in _KINDS if getattr(self, name) not in (None, False))

    @classmethod
    def of(cls, value: object) -> StructuredOutputsParams:
        """``value``, which is one already or a mapping with its fields."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"structured_outputs must be a StructuredOutputsParams or a mapping, got {value!r}")
        names = [field.name for field in fields(cls)]
        unknown = [key for key in value if key not in names]
        if unknown:
            raise ValueError(
                f"structured_outputs has unknown keys {sorted(map(str, unknown))}: it takes {', '.join(names)}"
            )
        return cls(**value)


def _check_text(name: str, value: object, limit: int) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {value!r}")
    if len(value) > limit:
        raise ValueError(f"{name} must have at most {limit} characters, got {len(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be valid Unicode: {error}") from None


def _choices(value: object) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not value:
        raise ValueError(f"structured_outputs.choice must be a list of at least one string, got {value!r}")
    total = 0
    for index, text in enumerate(value):
        _check_text(f"structured_outputs.choice[{index}]", text, MAX_SCHEMA_CHARS)
        total += len(text)
    if total > MAX_SCHEMA_CHARS:
        raise ValueError(f"structured_outputs.choice must have at most {MAX_SCHEMA_CHARS} characters, got {total}")
    return tuple(dict.fromkeys(value))


def _schema_text(value: object) -> str:
    """A schema as JSON text, its properties in their order."""
    name = "structured_outputs.json"
    if isinstance(value, str):
        _check_text(name, value, MAX_SCHEMA_CHARS)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a schema (an object), got {str(value)[:200]}")
    _check_size(name, value)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=dict)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    _check_text(name, text, MAX_SCHEMA_CHARS)
    return text


def _check_size(name: str, schema: object) -> None:
    """Refuse what is too deep or too large, cycles among it, without recursion."""
    count = 0
    open_values = [(schema, 1)]
    while open_values:
        value, depth = open_values.pop()
        children = list(value.values()) if isinstance(value, Mapping) else value
        if not isinstance(children, (list, tuple)):
            continue
        if depth > MAX_JSON_NESTING:
            raise ValueError(f"{name} must be nested at most {MAX_JSON_NESTING} deep")
        count += len(children)
        if count > MAX_JSON_VALUES:
            raise ValueError(f"{name} must have at most {MAX_JSON_VALUES} values")
        open_values += [(child, depth + 1) for child in children]
