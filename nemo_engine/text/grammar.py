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

from nemo_engine.outputs import GRAMMAR_TOO_COMPLEX
from nemo_engine.structured_outputs import StructuredOutputsParams
from nemo_engine.text.grammar_trial import (
    UntriedError,
    find_empty,
    matcher,
    on_large_stack,
    plain_error,
    try_compile,
)
from nemo_engine.text.json_grammar import SchemaGrammar
from nemo_engine.text.json_pattern import is_small
from nemo_engine.text.tokenizer import Tokenizer

JSON_WHITE_SPACE = r" |\n {0,16}"  # where JSON may have some: nothing, one space, or a line with its indentation
_TOO_COMPLEX = re.compile("too (many|large|complex)|TooComplex|fuel")  # llguidance's words for its limits
MAX_CACHED = 32  # compiled grammars, and refusals

_NAMED = ("properties", "patternProperties", "$defs", "definitions")  # keywords that map names to schemas
_VALUES = ("enum", "const", "default", "examples")  # keywords with values, not schemas
_HARMLESS_CHARS = 32 * 1024  # of a choice or a schema's grammar, that is not compiled by way of trial
# What may stand in front of a %json in a grammar, so that one in a string is not taken for it.
_BEFORE_JSON = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/|%json(?=\s*\{)')
_CALLS = re.compile(r"start: <\[\d{1,7}\]> calls( \| answer)?\ncalls: %json\n(answer: %json\n)?")


class Grammar:
    """Where one completion stands in its grammar. A broken one raises ``ValueError``, and goes on doing so."""

    __slots__ = ("_matcher", "_num_bytes")

    def __init__(self, made: Any, num_bytes: int) -> None:
        self._matcher = made
        self._num_bytes = num_bytes

    def mask(self) -> bytes:
        """The tokens that may come next: bit i of the little-endian 32-bit words is token i; an end token where the
        text may end.
        """
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
            message = plain_error(self._matcher.get_error())
            raise ValueError(f"{GRAMMAR_TOO_COMPLEX} ({message})" if _TOO_COMPLEX.search(message) else message)


def _guarded(function: Any, *args: Any) -> Any:
    """Call into llguidance; a panic there, which is no ``Exception``, becomes a ``ValueError``."""
    try:
        return function(*args)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"llguidance panicked: {str(error)[:200]}") from None


class GrammarCompiler:
    """Compiles for one tokenizer and one model's vocabulary.

    Thread-safe; compiling may take up to some seconds, and holds no lock.

    llguidance and the vocabulary are loaded at the first use. Of ``vocab_size`` ids, those that the tokenizer does not
    know are never allowed, nor are control tokens where a grammar does not name them by id, but for ``eos_token_ids``
    at the end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self._eos = sorted(token_id for token_id in eos_token_ids if token_id < vocab_size) or [*own]
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
            grammar = self._known.get(params)
            if grammar is not None:
                self._known.move_to_end(params)
        if grammar is None:
            try:
                grammar = Grammar(self._compile(vocabulary, params), -(-self._vocab_size // 32) * 4)
            except UntriedError as error:
                raise ValueError(f"structured_outputs.{params.kind}: {error}") from None
            except ValueError as error:
                grammar = f"structured_outputs.{params.kind}: {error}"
            with self._lock:
                self._known[params] = grammar
                while len(self._known) > MAX_CACHED:
                    self._known.popitem(last=False)
        if isinstance(grammar, str):
            raise ValueError(grammar)
        return grammar.copy()

    def _compile(self, vocabulary: Any, params: StructuredOutputsParams) -> Any:
        spec, is_harmless = _spec(params)
        if not is_harmless:
            try_compile(spec)
        return on_large_stack(lambda: _guarded(matcher, vocabulary, spec))

    def _load(self) -> Any:
        with self._loading:
            if self._vocabulary is None:
                if not self._eos or self._eos[0] >= self._vocab_size:
                    raise ValueError(
                        "structured_outputs needs an end-of-sequence token that the model has: it has "
                        f"{self._vocab_size} ids, and none is named"
                    )
                if find_spec("llguidance") is None:
                    raise ValueError("structured_outputs needs llguidance: pip install 'nemo-engine[structured]'")
                from llguidance import LLTokenizer, TokenizerWrapper

                words = TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size, self._eos))
                self._vocabulary = _guarded(lambda: LLTokenizer(words, eos_token=self._eos))
            return self._vocabulary


class _Vocabulary:
    """A tokenizer as llguidance wants it: bytes of each id, control tokens, and text into ids where a text is
    forced.
    """

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
    """An output that is a tool call: the token [TOOL_CALLS], and after it JSON of ``schema`` (see
    ``tool_call_schema``).

    With ``otherwise`` it may be JSON of that schema instead.
    """
    calls = f"calls: %json {json.dumps(schema)}\n"
    if otherwise is None:
        return StructuredOutputsParams(grammar=f"start: <[{tool_calls_id}]> calls\n{calls}")
    answer = f"answer: %json {json.dumps(otherwise)}\n"
    return StructuredOutputsParams(grammar=f"start: <[{tool_calls_id}]> calls | answer\n{calls}{answer}")


def _spec(params: StructuredOutputsParams) -> tuple[dict[str, Any], bool]:
    """What ``grammar_trial.matcher`` takes, and whether it is known to compile at little cost."""
    if params.choice is not None:
        text = json.dumps(params.choice)
        return {"kind": "choice", "text": text}, len(text) <= _HARMLESS_CHARS
    if params.regex is not None:
        return {"kind": "regex", "text": params.regex}, is_small(params.regex)
    if params.grammar is not None:
        return _grammar_spec(params.grammar)
    schema: dict[str, Any] = {"type": "object"}
    if params.json is not None:
        assert isinstance(params.json, str)
        schema = json.loads(params.json)
        if params.disable_additional_properties:
            _close_objects(schema)
    white_space = "" if params.disable_any_whitespace else JSON_WHITE_SPACE
    if params.whitespace_pattern is not None:
        from llguidance import regex_to_lark

        white_space = regex_to_lark(params.whitespace_pattern)
    text, is_harmless = _schema_lark(schema, white_space)
    spec = {"kind": "lark", "text": text, "whitespace_pattern": params.whitespace_pattern}
    return spec, is_harmless and not params.whitespace_pattern


def _schema_lark(schema: dict[str, Any], white_space: str) -> tuple[str, bool]:
    grammar = SchemaGrammar(schema)
    doubtful = grammar.doubtful
    text = grammar.lark(white_space, find_empty(doubtful) if doubtful else ())
    return text, grammar.is_harmless and len(text) <= _HARMLESS_CHARS


def check_schema(schema: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for what in a JSON schema cannot be kept, as far as that shows before it is compiled."""
    SchemaGrammar(dict(schema)).lark(JSON_WHITE_SPACE)


def _grammar_spec(grammar: str) -> tuple[dict[str, Any], bool]:
    """As ``_spec``, of a grammar in which each ``%json {...}`` becomes a grammar of its own."""
    parts, around, at, is_harmless = [], [], 0, True
    while (match := _BEFORE_JSON.search(grammar, at)) is not None:
        if match[0] != "%json":
            parts.append(grammar[at : match.end()])
            around.append(parts[-1])
            at = match.end()
            continue
        start = grammar.index("{", match.end())
        try:
            schema, end = json.JSONDecoder().raw_decode(grammar, start)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"what follows %json is not JSON: {error}") from None
        text, is_small_one = _schema_lark(schema, JSON_WHITE_SPACE)
        parts += [grammar[at : match.start()], f"%lark {{\n{text}}}"]
        around += [grammar[at : match.end()]]
        is_harmless &= is_small_one
        at = end
    parts.append(grammar[at:])
    around.append(grammar[at:])
    is_call = _CALLS.fullmatch("".join(around)) is not None
    return {"kind": "lark" if is_call else "grammar", "text": "".join(parts)}, is_harmless and is_call


def _close_objects(schema: Any) -> None:
    """Objects that name properties have no others, in ``schema`` and all that it holds."""
    open_values = [schema]
    while open_values:
        value = open_values.pop()
        if isinstance(value, list):
            open_values += value
        elif isinstance(value, dict):
            if isinstance(value.get("properties"), dict):
                if not {"additionalProperties", "patternProperties"} & set(value):
                    value["additionalProperties"] = False
            for key, child in value.items():
                if key in _NAMED and isinstance(child, dict):
                    open_values += child.values()
                elif key not in _VALUES:
                    open_values.append(child)
