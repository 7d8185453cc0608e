"""``SchemaGrammar``: a JSON schema as a Lark grammar for llguidance, which keeps to every keyword of the schema.

llguidance has a compiler of its own for JSON schemas, which rounds integers to doubles, lets escapes through patterns
and takes patterns of names that leave nothing; so it gets the parts that it is good at, rules and terminals.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nemo_engine.text.json_pattern import Pattern, Terms
from nemo_engine.text.json_refs import MAX_COUNT, Schema
from nemo_engine.text.json_rules import MAX_RULES, Row, Rules, Symbol, members_rows
from nemo_engine.text.json_schema import Flat, SchemaTerms, Term, item_schemas
from nemo_engine.text.json_strings import (
    FREE,
    holds,
    length_terminal,
    lengths,
    literal,
    literal_json,
    pattern_terminal,
    with_length,
)

_MAX_PATTERNS = 4  # of names in one object
_UNBOUNDED = 1_000_000  # items: more than any output has
_LONGEST_CHECKED = 256  # characters up to which lengths of a pattern are compared with bounds
_PROBES = ("a", "name", "0", "x1", "_", "A", "zz zz", "é", "a-b.c", "-", "qqqqqqqqqqqqqqqqqqqqqqqqq", "")


class SchemaGrammar:
    """The rules for one schema. What cannot be kept raises ``ValueError`` with the keyword and its place."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._schema = SchemaTerms(schema)
        self._rules = Rules()
        self._names: dict[tuple[int, ...], str] = {}
        self._waiting: list[tuple[str, tuple[Schema, ...]]] = []
        self._is_costly = False
        self._start = self._value((schema,))
        while self._waiting:
            name, schemas = self._waiting.pop()
            self._rules.define(name, self._rows(schemas))

    @property
    def doubtful(self) -> dict[str, str]:
        """Terminals of which it is not known whether they match anything, with grammars that say it."""
        return self._rules.doubtful

    @property
    def is_harmless(self) -> bool:
        """Whether it is known to compile at little cost."""
        return not self._is_costly and not self._rules.has_doubts and len(self._rules) <= MAX_RULES // 10

    def lark(self, white_space: str, empty: Iterable[str] = ()) -> str:
        """The grammar; ``white_space`` is a regular expression, "" for none.

        ``empty``: those doubtful terminals that match nothing.

        ``ValueError`` if then no text is left.
        """
        text = self._rules.lark(self._start, set(empty))
        return f'%llguidance {{"ignore_once": true}}\n%ignore /{white_space}/\n{text}' if white_space else text

    # ---- values

    def _value(self, schemas: Iterable[Schema]) -> str:
        """The rule of a value for which all of ``schemas`` hold."""
        parts = tuple({id(schema): schema for schema in schemas if schema is not True}.values())
        key = (-1,) if False in parts else tuple(map(id, parts))
        if key not in self._names:
            self._names[key] = self._rules.rule([])
            if key != (-1,):
                self._waiting.append((self._names[key], parts))
        return self._names[key]

    def _rows(self, schemas: tuple[Schema, ...]) -> list[Row]:
        rows: dict[Row, None] = {}
        scalars: dict[str, None] = {}
        for term in self._schema.terms(schemas):
            values = self._schema.values(term)
            if values is not None:
                for value in values:
                    self._schema.spend()
                    if isinstance(value, (list, dict)):
                        rows[_constant(value)] = None
                    else:
                        scalars[literal_json(value)] = None
                continue
            types = self._schema.types(term)
            for kind, words in (("null", ('"null"',)), ("boolean", ('"true"', '"false"'))):
                if kind in types:
                    scalars |= dict.fromkeys(words)
            if "number" in types:
                scalars |= dict.fromkeys(self._number(term, types["number"]))
            if "string" in types:
                scalars |= dict.fromkeys(self._string(term))
            if "array" in types:
                rows |= dict.fromkeys(self._array(term))
            if "object" in types:
                rows |= dict.fromkeys(self._object(term))
        if scalars:
            rows[self._rules.union(list(scalars)),] = None
        return list(rows)

    # ---- numbers and strings

    def _number(self, term: Term, is_integer: bool) -> list[str]:
        try:
            terminal = self._schema.numbers(term, is_integer).terminal()
        except ValueError as error:
            named = [
                self._schema.index.place(flat, keyword)
                for flat in term
                for keyword in ("multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
                if keyword in flat
            ]
            raise ValueError(f"{', '.join(named)}: {error}") from None
        if terminal is None:
            return []
        self._rules.definitions |= dict.fromkeys(terminal[1])
        return [terminal[0]]

    def _string(self, flats: Sequence[Flat]) -> list[str]:
        """An expression for the strings that ``flats`` allow, none if there are none."""
        least = max([int(flat.get("minLength", 0)) for flat in flats], default=0)
        max_length = min([int(flat["maxLength"]) for flat in flats if "maxLength" in flat], default=None)
        if max_length is not None and least > max_length:
            return []
        patterns = self._schema.patterns(flats)
        if not patterns:
            return [FREE if least == 0 and max_length is None else length_terminal(least, max_length)]
        self._is_costly |= len(patterns) > 1 or any(pattern.is_costly for pattern in patterns)
        wanted = tuple({node: None for pattern in patterns for node in pattern.sure.wanted})
        unwanted = tuple(node for pattern in patterns for node in pattern.sure.unwanted)
        if len(wanted) > 1 or unwanted:
            expression = pattern_terminal(Terms(wanted, unwanted))
            if least or max_length is not None:
                expression += " & " + length_terminal(least, max_length)
            self._rules.terminal(expression, not _is_probed(Terms(wanted, unwanted), least, max_length))
            return [expression]
        (node,) = wanted
        if least == 0 and max_length is None:
            expression = pattern_terminal(Terms((node,)))
            self._rules.terminal(expression, not lengths(node, _LONGEST_CHECKED))
            return [expression]
        cut = with_length(node, least, max_length)
        if cut is not None:
            return [pattern_terminal(Terms((cut,)))] if cut.most is None or cut.least <= cut.most else []
        bound = max_length if max_length is not None else least
        fits = lengths(node, min(bound, _LONGEST_CHECKED)) >> least if bound <= _LONGEST_CHECKED else 0
        expression = pattern_terminal(Terms((node,))) + " & " + length_terminal(least, max_length)
        self._rules.terminal(expression, not fits)
        return [expression]

    # ---- arrays

    def _array(self, term: Term) -> list[Row]:
        least = max([int(flat.get("minItems", 0)) for flat in term], default=0)
        max_items = min([int(flat["maxItems"]) for flat in term if "maxItems" in flat], default=_UNBOUNDED)
        if least > max_items and max_items < _UNBOUNDED:
            return []
        limit = None if max_items >= _UNBOUNDED else max_items
        parts = [item_schemas(flat) for flat in term]
        count = max([len(first) for first, _ in parts], default=0)
        if limit is not None:
            count = min(count, limit)
        items = [
            self._value([first[index] if index < len(first) else rest for first, rest in parts])
            for index in range(count)
        ]
        rows: list[Row] = [(literal("["), literal("]"))] if least == 0 else []
        if limit == 0:
            return rows
        tail: Row = ()
        if limit is None or limit > count:
            other = self._value([rest for _, rest in parts])
            more = None if limit is None else limit - max(count, 1)
            tail = (((literal(","), other), max(0, least - max(count, 1)), more),)
            if not items:
                return [*rows, (literal("["), other, *tail, literal("]"))]
        for index in range(count - 1, 0, -1):
            options: list[Row] = [(literal(","), items[index], *tail)]
            tail = (self._rules.rule([*options, ()] if index >= least else options),)
        return [*rows, (literal("["), items[0], *tail, literal("]"))]

    # ---- objects

    def _object(self, term: Term) -> list[Row]:
        required = {name for flat in term for name in flat.get("required", ())}
        names = list(
            dict.fromkeys(
                [name for flat in term for name in flat.get("properties", ())]
                + [name for flat in term for name in flat.get("required", ())]
            )
        )
        self._schema.spend(len(names) * (1 + len(term)))
        allowed = [flat["propertyNames"] for flat in term if "propertyNames" in flat]
        least = max([int(flat.get("minProperties", 0)) for flat in term], default=0)
        max_members = min([int(flat["maxProperties"]) for flat in term if "maxProperties" in flat], default=MAX_COUNT)
        members: list[tuple[Row, bool]] = []
        for name in names:
            parts = [part for flat in term for part in self._schema.property_schemas(flat, name)]
            is_allowed = all(self._schema.is_valid(name, schema) for schema in allowed)
            value = self._value(parts if is_allowed else [False])
            members.append(((literal_json(name), literal(":"), value), name in required))
        others = self._others(term, names, allowed)
        if least > len(names) + bool(others) and others:
            places = [self._schema.index.place(flat, "minProperties") for flat in term if "minProperties" in flat]
            raise ValueError(
                f"{', '.join(places)}: {least} is more than the required properties and those that are named: names of "
                "others may repeat"
            )
        other = self._rules.rule(others) if others else None
        num_required = len(required)
        if least <= num_required:
            least = 0
        inside = members_rows(self._rules, members, other, least, None if max_members >= MAX_COUNT else max_members)
        return [(literal("{"), *row, literal("}")) for row in inside]

    def _others(self, term: Term, names: list[str], allowed: list[Schema]) -> list[Row]:
        """Members whose names are none of ``names``: for each set of patterns, names that match these and no other."""
        texts = {text: flat for flat in term for text in flat.get("patternProperties", ())}
        if len(texts) > _MAX_PATTERNS:
            raise ValueError(
                f"{self._schema.index.place(list(texts.values())[-1], 'patternProperties')}: at most {_MAX_PATTERNS} "
                "patterns are "
                "supported in one object"
            )
        patterns = {text: self._schema.pattern(flat, text, "patternProperties") for text, flat in texts.items()}
        rows: list[Row] = []
        for bits in range(1 << len(texts)):
            matched = {text for index, text in enumerate(texts) if bits >> index & 1}
            parts: list[Schema] = []
            for flat in term:
                here = [schema for text, schema in flat.get("patternProperties", {}).items() if text in matched]
                parts += here or [flat.get("additionalProperties", True)]
            if False in parts:
                continue
            value = self._value(parts)
            rows += [(name, literal(":"), value) for name in self._other_names(matched, patterns, names, allowed)]
        return rows

    def _other_names(
        self, matched: set[str], patterns: dict[str, Pattern], names: list[str], allowed: list[Schema]
    ) -> list[str]:
        """Terminals of names that match all patterns of ``matched``, no others, and are none of ``names``."""
        terminals = []
        wanted = [patterns[text].sure for text in matched]
        unwanted = [pattern.maybe for text, pattern in patterns.items() if text not in matched]
        taken = [name for name in names if all(holds(patterns[text].maybe, name) for text in matched)]
        exclusions = [f"~({pattern_terminal(rule)})" for rule in unwanted]
        if taken:
            exclusions.append(f"~({' | '.join(map(literal_json, taken))})")
        for term in self._schema.terms(allowed) if allowed else [()]:
            listed = self._schema.values(term)
            if listed is not None:
                fitting = [
                    name for name in listed
                    if isinstance(name, str) and name not in names and all(holds(rule, name) for rule in wanted)
                    and not any(holds(rule, name) for rule in unwanted)
                ]  # fmt: skip
                terminals += [self._rules.union([literal_json(name) for name in fitting])] if fitting else []
                continue
            if "string" not in self._schema.types(term):
                continue
            for expression in self._string(term):
                parts = [expression] if expression != FREE or not (wanted or exclusions) else []
                parts = parts + [pattern_terminal(rule) for rule in wanted]
                parts = (parts or [FREE]) + exclusions
                if len(parts) > 1 and (wanted or unwanted):
                    self._is_costly = True
                is_known = len(parts) == 1 and not self._rules.is_doubtful(parts[0])
                if expression == FREE:
                    is_known = is_known or not (wanted or unwanted) or any(
                        all(holds(rule, text) for rule in wanted) and not any(holds(rule, text) for rule in unwanted)
                        for text in _PROBES if text not in taken
                    )  # fmt: skip
                terminals.append(self._rules.terminal(" & ".join(parts), not is_known))
        return terminals


def _constant(value: Any) -> Row:
    if isinstance(value, list):
        items = [_constant(item) for item in value]
        return (literal("["), *_joined(items), literal("]"))
    if isinstance(value, dict):
        members = [(literal_json(name), literal(":"), *_constant(member)) for name, member in value.items()]
        return (literal("{"), *_joined(members), literal("}"))
    return (literal_json(value),)


def _is_probed(terms: Terms, least: int, most: int | None) -> bool:
    """Whether some short text is known to match."""
    return any(least <= len(text) <= (len(text) if most is None else most) and holds(terms, text) for text in _PROBES)


def _joined(rows: list[Row]) -> Row:
    joined: list[Symbol] = []
    for index, row in enumerate(rows):
        joined += row if index == 0 else (literal(","), *row)
    return tuple(joined)
