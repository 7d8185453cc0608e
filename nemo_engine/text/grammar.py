"""``GrammarCompiler``: structured outputs into ``Grammar`` objects, which say token by token what may come next.

Owns llguidance, an optional library, and its view of the tokenizer's vocabulary. Knows no requests and no tensors.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

from nemo_engine.structured_outputs import StructuredOutputsParams
from nemo_engine.text.grammar_trial import (
    UntriedError,
    matcher,
    on_large_stack,
    plain_error,
    try_compile,
)
from nemo_engine.text.tokenizer import Tokenizer

JSON_WHITE_SPACE = r" |\n {0,16}"  # where JSON may have some: nothing, one space, or a line with its indentation
_BOUNDED = {"whitespace_pattern": JSON_WHITE_SPACE}
MAX_CACHED = 32  # compiled grammars, and refusals

# Not in the trial's hands: what costs little, whatever it says. `format` intersects expressions only beside these three.
_HARMLESS_JSON_CHARS = 32 * 1024
_HARMLESS_REGEX_CHARS = 256
_HARMLESS_REFS = 64
_COSTLY = ('"pattern"', '"patternProperties"', '"allOf"', '"multipleOf"')
_MEETS = ('"anyOf"', '"oneOf"', '"$ref"')
_NAMED = ("properties", "patternProperties", "$defs", "definitions")  # keywords that map names to schemas
_VALUES = ("enum", "const", "default", "examples")  # keywords with values, not schemas


class Grammar:
    """Where one completion stands in its grammar. A broken one raises ``ValueError``, and goes on doing so."""

    __slots__ = ("_matcher", "_num_bytes")

    def __init__(self, made: Any, num_bytes: int) -> None:
        self._matcher = made
        self._num_bytes = num_bytes

    def mask(self) -> bytes:
        """The tokens that may come next: bit i of the little-endian 32-bit words is token i; an end token where the text may end."""
        bits: bytes = _guarded(self._matcher.compute_bitmask)
        self._check()
        return bits[: self._num_bytes]

    def accept(self, token_id: int) -> None:
        """Take in the next token, an end token too."""
        if not _guarded(self._matcher.consume_token, token_id):
            self._check()
            raise ValueError(f"token {token_id} does not fit the grammar")

    @property
    def is_finished(self) -> bool:
        """Whether nothing may follow but an end token, or one has come."""
        return bool(self._matcher.is_stopped())

    def copy(self) -> Grammar:
        """Another completion, at the same place."""
        return Grammar(_guarded(self._matcher.deep_copy), self._num_bytes)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(plain_error(self._matcher.get_error()))


def _guarded(function: Any, *args: Any) -> Any:
    """Call into llguidance; a panic there, which is no ``Exception``, becomes a ``ValueError``."""
    try:
        return function(*args)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"llguidance panicked: {str(error)[:200]}") from None


class GrammarCompiler:
    """Compiles for one tokenizer and one model's vocabulary. Thread-safe; compiling may take up to some seconds, and holds no lock.

    llguidance and the vocabulary are loaded at the first use. Of ``vocab_size`` ids, those that the tokenizer does not know are
    never allowed, nor are control tokens where a grammar does not name them by id, but for ``eos_token_ids`` at the end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = sorted(token_id for token_id in eos_token_ids if token_id < vocab_size) or [tokenizer.eos_id]
        self._vocabulary: Any = None
        self._loading = threading.Lock()
        self._known: OrderedDict[StructuredOutputsParams, Grammar | str] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """The start of what ``params`` ask for, for one completion.

        Raises ``ValueError`` that names the field and what in it cannot be honoured.
        """
        vocabulary = self._load()
        with self._lock:
            found = self._known.get(params)
            if found is not None:
                self._known.move_to_end(params)
        if found is None:
            try:
                found = Grammar(self._compile(vocabulary, params), -(-self._vocab_size // 32) * 4)
            except UntriedError as error:
                raise ValueError(f"structured_outputs.{params.kind}: {error}") from None
            except ValueError as error:
                found = f"structured_outputs.{params.kind}: {error}"
            with self._lock:
                self._known[params] = found
                while len(self._known) > MAX_CACHED:
                    self._known.popitem(last=False)
        if isinstance(found, str):
            raise ValueError(found)
        return found.copy()

    def _compile(self, vocabulary: Any, params: StructuredOutputsParams) -> Any:
        spec = _spec(params)
        if not _is_harmless(spec):
            try_compile(spec)
        return on_large_stack(lambda: _guarded(matcher, vocabulary, spec))

    def _load(self) -> Any:
        with self._loading:
            if self._vocabulary is None:
                if self._eos[0] >= self._vocab_size:
                    raise ValueError(
                        f"structured_outputs needs an end-of-sequence token that the model has: it has {self._vocab_size} ids, and none is named"
                    )
                if find_spec("llguidance") is None:
                    raise ValueError('structured_outputs needs llguidance: pip install "nemo-engine[structured]"')
                from llguidance import LLTokenizer, TokenizerWrapper

                words = TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size, self._eos))
                self._vocabulary = _guarded(lambda: LLTokenizer(words, eos_token=self._eos))
            return self._vocabulary


class _Vocabulary:
    """A tokenizer as llguidance wants it: bytes of each id, control tokens, and text into ids where a text is forced."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> None:
        known = min(vocab_size, tokenizer.vocab_size)
        eos = set(eos_token_ids)
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = eos_token_ids[0]
        self.special_token_ids = [i for i in range(vocab_size) if i >= known or i in eos or tokenizer.is_special(i)]
        self.tokens = [tokenizer.token_bytes(i, skip_special_tokens=False) for i in range(known)]
        self.tokens += [f"<id {i}>".encode() for i in range(known, vocab_size)]
        special = set(self.special_token_ids)
        self._longest = max(map(len, self.tokens))
        self._ids = {data: i for i, data in enumerate(self.tokens) if data and i not in special}
        self._tokenizer = tokenizer
        self._special = special

    def __call__(self, data: bytes) -> list[int]:
        """The tokenizer's own ids of ``data``, or where they are not exactly its bytes, the longest tokens that fit."""
        try:
            ids = self._tokenizer.encode(data.decode(), bos=False)
        except UnicodeDecodeError:
            ids = []
        if ids and all(i < len(self.tokens) and i not in self._special for i in ids):
            if b"".join([self.tokens[i] for i in ids]) == data:
                return ids
        return self._greedy(data)

    def _greedy(self, data: bytes) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(data):
            for end in range(min(len(data), start + self._longest), start, -1):
                token_id = self._ids.get(data[start:end])
                if token_id is not None:
                    ids.append(token_id)
                    start = end
                    break
            else:
                return ids  # what cannot be written is not forced
        return ids


def tool_call_grammar(
    tool_calls_id: int, schema: Mapping[str, Any], otherwise: Mapping[str, Any] | None = None
) -> StructuredOutputsParams:
    """An output that is a tool call: the token [TOOL_CALLS], and after it JSON of ``schema`` (see ``tool_call_schema``).

    With ``otherwise`` it may be JSON of that schema instead.
    """
    calls = f"calls: %json {json.dumps({'x-guidance': _BOUNDED, **schema})}\n"
    if otherwise is None:
        return StructuredOutputsParams(grammar=f"start: <[{tool_calls_id}]> calls\n{calls}")
    _check_schema(dict(otherwise))
    answer = f"answer: %json {json.dumps({'x-guidance': _BOUNDED, **otherwise})}\n"
    return StructuredOutputsParams(grammar=f"start: <[{tool_calls_id}]> calls | answer\n{calls}{answer}")


def _forced_schema(grammar: str) -> str | None:
    """The JSON in what ``tool_call_grammar`` writes; None for any other grammar."""
    found = re.fullmatch(r"start: <\[\d{1,7}\]> calls\ncalls: %json (\{.*\})\n", grammar)
    if found is None:
        return None
    try:
        return found[1] if json.loads(found[1]).get("x-guidance") == _BOUNDED else None
    except (ValueError, RecursionError):
        return None


def _spec(params: StructuredOutputsParams) -> dict[str, Any]:
    """What ``grammar_trial.matcher`` takes."""
    if params.json is None and not params.json_object:
        text = json.dumps(params.choice) if params.choice is not None else params.regex or params.grammar
        return {"kind": params.kind, "text": text}
    text = '{"type":"object"}'
    if params.json is not None:
        assert isinstance(params.json, str)
        schema = json.loads(params.json)
        _check_schema(schema)
        if params.disable_additional_properties:
            _close_objects(schema)
        text = json.dumps(schema, ensure_ascii=False)
    space = "" if params.disable_any_whitespace else params.whitespace_pattern or JSON_WHITE_SPACE
    return {"kind": "json", "text": text, "whitespace": space, "whitespace_pattern": params.whitespace_pattern}


def _is_harmless(spec: Mapping[str, Any]) -> bool:
    """Whether ``spec`` is known to compile at little cost."""
    kind, text = spec["kind"], spec["text"]
    schema = text if kind == "json" else _forced_schema(text) if kind == "grammar" else None
    if schema is not None:
        meets = '"format"' in schema and any(word in schema for word in _MEETS)
        is_small = len(schema) <= _HARMLESS_JSON_CHARS and schema.count('"$ref"') <= _HARMLESS_REFS
        has_own_space = kind == "json" and spec["whitespace_pattern"]
        return is_small and not meets and not has_own_space and not any(word in schema for word in _COSTLY)
    if kind == "regex":
        counts = [int(count[:9]) for count in re.findall(r"[{,]\s*(\d+)", text)]
        return len(text) <= _HARMLESS_REGEX_CHARS and len(counts) <= 16 and max(counts, default=0) <= 64
    return kind == "choice" and len(text) <= _HARMLESS_JSON_CHARS


def _subschemas(schema: Any) -> Iterable[dict[str, Any]]:
    """Every schema in ``schema``, itself first; what an ``enum`` or a ``const`` holds is none."""
    open_values = [schema]
    while open_values:
        value = open_values.pop()
        if isinstance(value, list):
            open_values += value
        elif isinstance(value, dict):
            yield value
            for key, child in value.items():
                if key in _NAMED and isinstance(child, dict):
                    open_values += child.values()
                elif key not in _VALUES:
                    open_values.append(child)


def _check_schema(schema: dict[str, Any]) -> None:
    """Refuse what llguidance would take and not honour."""
    if "x-guidance" in schema:
        raise ValueError("x-guidance is not supported: use whitespace_pattern or disable_any_whitespace")
    for one in _subschemas(schema):
        least = one.get("minProperties")
        required = one.get("required")
        num_required = len(required) if isinstance(required, list) else 0
        if isinstance(least, (int, float)) and least > max(1, num_required):
            raise ValueError(f"minProperties {least} is more than the required properties: names of others may repeat")


def _close_objects(schema: dict[str, Any]) -> None:
    for one in _subschemas(schema):
        if isinstance(one.get("properties"), dict) and not {"additionalProperties", "patternProperties"} & set(one):
            one["additionalProperties"] = False
