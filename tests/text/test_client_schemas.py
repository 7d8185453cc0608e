"""Schemas as clients send them are taken, and what they say is kept."""

from __future__ import annotations

import enum
import json
import random
from datetime import date, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import jsonschema
import pytest
from pydantic import BaseModel, ConfigDict, Field

from nemo_engine.structured_outputs import StructuredOutputsParams
from nemo_engine.text.grammar import GrammarCompiler
from tests.text.walk import EOS, Bytes, walk


class _Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class _Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9, description="how many are left")


class _Dog(BaseModel):
    kind: Literal["dog"]
    name: Annotated[str, Field(pattern=r"^[A-Z][a-z]{1,9}$")]


class _Node(BaseModel):
    model_config = ConfigDict(extra="forbid")
    value: float = Field(gt=0, lt=1)
    children: list[_Node] = Field(default_factory=list, max_length=2)


class _Model(BaseModel):
    """Everything at once."""

    id: UUID
    born: date | None = None
    at: datetime
    colour: _Colour = _Colour.RED
    pet: Annotated[_Cat | _Dog, Field(discriminator="kind")]
    tree: _Node
    tags: dict[str, int]
    price: Annotated[float, Field(multiple_of=0.25, ge=0)]
    pair: tuple[int, str]
    size: int | None = Field(default=None, examples=[3])
    limited: dict[_Colour, bool] = {}


_STRICT = {  # OpenAI's strict mode
    "type": "object",
    "additionalProperties": False,
    "required": ["steps", "answer"],
    "$schema": "http://json-schema.org/draft-07/schema#",
    "properties": {
        "steps": {"type": "array", "items": {"$ref": "#/definitions/step"}, "maxItems": 2},
        "answer": {"anyOf": [{"type": "string"}, {"type": "null"}], "description": "what comes out", "default": None},
    },
    "definitions": {
        "step": {
            "type": "object",
            "properties": {"text": {"type": "string"}},
            "required": ["text"],
            "additionalProperties": False,
        }
    },
}
_ZOD = {  # zod's, as its own converter writes them
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "email": {
            "type": "string",
            "format": "email",
            "pattern": r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
        },
        "safe": {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
        "float": {"type": "number", "minimum": -3.4028234663852886e38, "maximum": 3.4028234663852886e38},
        "double": {"type": "number", "minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308},
        "cuid": {"type": "string", "format": "cuid", "pattern": "^[cC][^\\s-]{8,}$"},
        "kind": {
            "oneOf": [
                {"type": "object", "properties": {"t": {"type": "string", "const": c}}, "required": ["t"]} for c in "ab"
            ]
        },
        "record": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "boolean"}},
    },
    "required": ["email", "safe", "float", "double", "cuid", "kind", "record"],
}
_PROTOBUF = {"type": "object", "properties": {
    "int64": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1, "format": "int64"},
    "uint64": {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
    "exclusive": {"type": "integer", "exclusiveMinimum": -(2**63) - 1, "exclusiveMaximum": 2**63},
    "id": {"enum": [1234567890123456789, 2**53 + 1]}, "one": {"const": 2**63 - 1},
}, "required": ["int64", "uint64", "exclusive", "id", "one"], "additionalProperties": False}  # fmt: skip
_OPENAPI = {
    "type": "object",
    "nullable": True,
    "example": {},
    "xml": {"name": "x"},
    "discriminator": {"propertyName": "k"},
    "properties": {
        "n": {"type": "integer", "format": "int32", "minimum": 0, "exclusiveMinimum": True},
        "secret": {"type": "string", "format": "password", "writeOnly": True},
        "file": {"type": "string", "format": "binary", "contentMediaType": "image/png"},
    },
    "required": ["n", "secret", "file"],
}

SCHEMAS: dict[str, Any] = {
    "pydantic": _Model.model_json_schema(),
    "pydantic, as it is written": _Model.model_json_schema(mode="serialization"),
    "openai strict": _STRICT, "zod": _ZOD, "protobuf": _PROTOBUF, "openapi": _OPENAPI,
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_of_clients_are_kept(name: str) -> None:
    tokenizer = Bytes()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, [EOS])  # type: ignore[arg-type]
    grammar = compiler.compile(StructuredOutputsParams(json=SCHEMAS[name], disable_any_whitespace=True))
    validator = jsonschema.Draft202012Validator if name != "openapi" else jsonschema.Draft4Validator
    rng = random.Random(5)
    texts = [text for text in (walk(tokenizer, grammar, rng) for _ in range(25)) if text is not None]
    assert len(texts) > 5
    for text in texts:
        value = json.loads(text)
        validator(SCHEMAS[name]).validate(value)
        if name == "pydantic":
            _Model.model_validate_json(text)


@pytest.mark.parametrize("number", [-(2**63), 2**63 - 1, 0, 2**53 + 1, -(2**53) - 1, 2**63, -(2**63) - 1, 2**64])
def test_every_64_bit_integer_may_be_written(number: int) -> None:
    tokenizer = Bytes()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, [EOS])  # type: ignore[arg-type]
    for schema, fits in (
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, -(2**63) <= number < 2**63),
        ({"enum": [number]}, True),
        ({"type": "integer", "minimum": number, "maximum": number}, True),
        ({"type": "integer", "exclusiveMinimum": number}, False),
    ):
        grammar = compiler.compile(StructuredOutputsParams(json=schema))
        try:
            for token_id in tokenizer.encode(str(number)):
                grammar.accept(token_id)
            assert bool(grammar.mask()[0] & 1) == fits, schema
        except ValueError:
            assert not fits, schema
