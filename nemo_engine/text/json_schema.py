"""``SchemaTerms``: what a JSON schema, or several at once, ask of a value, as alternatives without ``$ref``, ``anyOf``
and the like.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from nemo_engine.text.json_numbers import Bound, Numbers, exact, meet
from nemo_engine.text.json_pattern import Pattern
from nemo_engine.text.json_refs import TYPES, Schema, SchemaIndex
from nemo_engine.text.json_strings import FORMATS, FREE_FORMATS, format_pattern, holds

Flat = dict[str, Any]
Term = tuple[
    Flat, ...
]  # schemas that all hold, of which only the keywords beside $ref, allOf, anyOf, oneOf are to be read

MAX_STEPS = 50_000  # of work on one schema
_APPLICATORS = ("$ref", "allOf", "anyOf", "oneOf", "dependentRequired", "dependentSchemas", "dependencies")


@dataclass(frozen=True, slots=True)
class _Own:
    """The keywords of ``schema`` that are no applicators."""

    schema: Flat


Part = Schema | _Own


class SchemaTerms:
    """Takes schemas apart. Everything that it does counts against ``MAX_STEPS``."""

    def __init__(self, root: dict[str, Any]) -> None:
        self.index = SchemaIndex(root)
        self._made: list[Flat] = []  # kept alive: parts are known by identity
        self._steps: dict[int, list[list[Sequence[Part]]]] = {}
        self._patterns: dict[str, Pattern] = {}
        self._listed: dict[int, set[str]] = {}
        self._spent = 0

    def spend(self, steps: int = 1) -> None:
        """Count work; ``ValueError`` when it is too much."""
        self._spent += steps
        if self._spent > MAX_STEPS:
            raise ValueError(f"it is too complex: taking it apart needs more than {MAX_STEPS} steps")

    def terms(self, schemas: Sequence[Schema]) -> Iterator[Term]:
        """The alternatives of a value for which all of ``schemas`` hold."""
        # What is still to be read, a linked list of (schema, the schemas that led to it); and what was.
        todo: Any = None
        for schema in reversed(schemas):
            todo = ((schema, frozenset()), todo)
        stack: list[tuple[Any, Term]] = [(todo, ())]
        while stack:
            todo, done = stack.pop()
            self.spend()
            if todo is None:
                yield done
                continue
            (schema, path), rest = todo
            if schema is True or any(schema is previous for previous in done):
                stack.append((rest, done))
                continue
            if schema is False or id(schema) in path:  # what leads to itself alone holds for nothing
                continue
            if isinstance(schema, _Own):
                stack.append((rest, (*done, schema.schema)))
                continue
            stack += self._unfold(schema, path | {id(schema)}, rest, done)

    def _unfold(self, schema: Flat, path: frozenset[int], rest: Any, done: Term) -> list[tuple[Any, Term]]:
        branches: list[list[Sequence[Part]]] = [[]]
        for choice in self._choices(schema):
            branches = [[*branch, option] for branch in branches for option in choice]
            self.spend(len(branches))
        stack = []
        for branch in reversed(branches):
            todo = rest
            for option in reversed(branch):
                for part in reversed(option):
                    todo = ((part, path), todo)
            stack.append((todo, done))
        return stack

    def _choices(self, schema: Flat) -> list[list[Sequence[Part]]]:
        """What ``schema`` asks for, in the order of its keywords: of each entry one option, which is schemas that all
        hold.
        """
        known = self._steps.get(id(schema))
        if known is not None:
            return known
        self.index.check(schema)
        choices: list[list[Sequence[Part]]] = []
        is_marked = False
        for keyword, value in schema.items():
            if keyword == "$ref":
                choices.append([[self.index.resolve(schema)]])
            elif keyword == "allOf":
                choices += [[[option]] for option in value]
            elif keyword in ("anyOf", "oneOf"):
                choices.append([[option] for option in value])
            elif keyword in _APPLICATORS:
                choices += [self._dependency(schema, name, then) for name, then in value.items()]
            elif not is_marked:
                choices.append([[_Own(schema)]])
                is_marked = True
        self._steps[id(schema)] = choices
        if isinstance(schema.get("oneOf"), list):
            _check_disjoint(self, schema)
        return choices

    def _dependency(self, schema: Flat, name: str, then: Any) -> list[Sequence[Part]]:
        """Either ``name`` is not there, or ``then`` holds, too. What is no object has no properties."""
        absent = self.make({"properties": {name: False}}, schema)
        if isinstance(then, list):
            return [[absent], [self.make({"required": [name, *then]}, schema)]]
        return [[absent], [self.make({"required": [name]}, schema), then]]

    def make(self, flat: Flat, schema: Flat) -> Flat:
        """``made`` as a part that stands where ``schema`` does."""
        self._made.append(flat)
        return self.index.adopt(flat, schema)

    # ---- one term

    def types(self, term: Term) -> dict[str, bool]:
        """The types of values that ``term`` allows, and of "number" whether they must be integers."""
        allowed = dict.fromkeys(TYPES, False)
        for flat in term:
            if "type" in flat:
                names = flat["type"] if isinstance(flat["type"], list) else [flat["type"]]
                if "integer" in names and "number" not in names and "number" in allowed:
                    allowed["number"] = True
                allowed = {
                    name: value for name, value in allowed.items()
                    if name in names or name == "number" and "integer" in names
                }  # fmt: skip
        return allowed

    def values(self, term: Term) -> list[Any] | None:
        """The values that ``term`` lists, None if it lists none."""
        for flat in term:
            if "const" in flat or "enum" in flat:
                listed = [flat["const"]] if "const" in flat else flat["enum"]
                return [value for value in listed if all(self.is_valid(value, constraint) for constraint in term)]
        return None

    def numbers(self, term: Term, is_integer: bool) -> Numbers:
        """What ``term`` asks of a number."""
        low: Bound | None = None
        high: Bound | None = None
        multiples = []
        for flat in term:
            for keyword, value in flat.items():
                if keyword == "multipleOf":
                    multiples.append(exact(value))
                elif keyword in ("minimum", "exclusiveMinimum") and not isinstance(value, bool):
                    is_exclusive = keyword != "minimum" or flat.get("exclusiveMinimum") is True
                    low = meet(low, Bound(exact(value), is_exclusive), is_low=True)
                elif keyword in ("maximum", "exclusiveMaximum") and not isinstance(value, bool):
                    is_exclusive = keyword != "maximum" or flat.get("exclusiveMaximum") is True
                    high = meet(high, Bound(exact(value), is_exclusive), is_low=False)
        return Numbers(is_integer, low, high, tuple(multiples))

    def pattern(self, flat: Flat, text: str, keyword: str = "pattern") -> Pattern:
        """The pattern ``text`` of ``keyword``."""
        if text not in self._patterns:
            self.spend(1 + len(text) // 64)
            try:
                self._patterns[text] = Pattern(text)
            except ValueError as error:
                raise ValueError(f"{self.index.place(flat, keyword)}: {text[:100]!r}: {error}") from None
        return self._patterns[text]

    def patterns(self, flats: Sequence[Flat]) -> list[Pattern]:
        """The patterns that a string must match, formats among them."""
        compiled = [self.pattern(flat, flat["pattern"]) for flat in flats if "pattern" in flat]
        for flat in flats:
            name = flat.get("format")
            if name in FORMATS:
                compiled.append(format_pattern(name))
            elif name is not None and name not in FREE_FORMATS and "pattern" not in flat:
                raise ValueError(
                    f"{self.index.place(flat, 'format')}: {name[:100]!r} is not supported. It may be "
                    f"{', '.join(FORMATS)}, "
                    "or any with a pattern beside it"
                )
        return compiled

    # ---- values

    def is_valid(self, value: Any, schema: Schema, path: frozenset[tuple[int, int]] = frozenset()) -> bool:
        """Whether ``schema`` holds for ``value``, as JSON Schema defines it."""
        self.spend()
        if isinstance(schema, bool):
            return schema
        if (id(schema), id(value)) in path:
            return False
        path |= {(id(schema), id(value))}
        self.index.check(schema)
        if not all(
            any(
                all(not isinstance(member, _Own) and self.is_valid(value, member, path) for member in option)
                for option in choice
            )
            for choice in self._choices_beside_itself(schema)
        ):
            return False
        if ("const" in schema or "enum" in schema) and not self._is_listed(value, schema):
            return False
        kind = _type_of(value)
        allowed = self.types((schema,))
        if kind not in allowed or kind == "number" and allowed[kind] and value != int(value):
            return False
        if kind == "number":
            return self._is_number_valid(value, schema)
        if kind == "string":
            if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
                return False
            self.spend(1 + len(value) // 16)
            return all(holds(pattern.sure, value) for pattern in self.patterns([schema]))
        if kind == "array":
            if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
                return False
            return all(self.is_valid(member, item_schema(schema, index)) for index, member in enumerate(value))
        return kind != "object" or self._is_object_valid(value, schema)

    def _is_listed(self, value: Any, schema: Flat) -> bool:
        """Whether ``value`` equals the ``const`` and one of the ``enum`` of ``schema``."""
        listed = self._listed.get(id(schema))
        if listed is None:
            keys = {_key(member) for member in schema["enum"]} if "enum" in schema else {_key(schema["const"])}
            listed = self._listed[id(schema)] = keys & {_key(schema["const"])} if "const" in schema else keys
        return _key(value) in listed

    def _choices_beside_itself(self, schema: Flat) -> list[list[Sequence[Part]]]:
        return [choice for choice in self._choices(schema) if not isinstance(choice[0][0], _Own)]

    def _is_number_valid(self, value: int | float, schema: Flat) -> bool:
        numbers, number = self.numbers((schema,), False), exact(value)
        for bound, sign in ((numbers.low, 1), (numbers.high, -1)):
            if bound is not None and (
                number == bound.value and bound.is_exclusive or sign * number < sign * bound.value
            ):
                return False
        return all((number / step).denominator == 1 for step in numbers.multiples)

    def _is_object_valid(self, value: dict[str, Any], schema: Flat) -> bool:
        if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", len(value)):
            return False
        if not all(name in value for name in schema.get("required", ())):
            return False
        return all(
            self.is_valid(name, schema.get("propertyNames", True))
            and all(self.is_valid(member, part) for part in self.property_schemas(schema, name))
            for name, member in value.items()
        )

    def property_schemas(self, flat: Flat, name: str) -> list[Schema]:
        """What ``flat`` asks of the property ``name``."""
        schemas: list[Schema] = []
        is_known = False
        if name in flat.get("properties", ()):
            schemas.append(flat["properties"][name])
            is_known = True
        for text, schema in flat.get("patternProperties", {}).items():
            pattern = self.pattern(flat, text, "patternProperties")
            self.spend(1 + len(name) // 16)
            if holds(pattern.maybe, name):
                schemas.append(schema)
                is_known |= holds(pattern.sure, name)
        if not is_known and "additionalProperties" in flat:
            schemas.append(flat["additionalProperties"])
        return schemas


def _check_disjoint(terms: SchemaTerms, schema: Flat) -> None:
    """Refuse a ``oneOf`` of which two options are not known to exclude each other: as a choice it would then allow too
    much.
    """
    beside = {key: value for key, value in schema.items() if key != "oneOf"}
    context: list[Schema] = [terms.make(beside, schema)] if beside else []
    options = [list(terms.terms([*context, option])) for option in schema["oneOf"]]
    listed = [terms.values(term) for option in options for term in option]
    if all(values is not None for values in listed):
        keys = [_key(value) for values in listed for value in values or ()]
        if len(set(keys)) == len(keys):
            return
    for (first, some), (second, others) in combinations(enumerate(options), 2):
        terms.spend()
        if not all(_exclude(terms, left, other, 4) for left in some for other in others):
            raise ValueError(
                f"{terms.index.place(schema, 'oneOf')} is supported where its options exclude each other by their "
                "types or by "
                f"a required property with different values; options {first} and {second} may both hold. anyOf allows "
                "that"
            )


def _exclude(terms: SchemaTerms, some: Term, others: Term, depth: int) -> bool:
    """Whether no value is known to satisfy both."""
    terms.spend()
    shared = set(terms.types(some)) & set(terms.types(others))
    for term, other in ((some, others), (others, some)):
        values = terms.values(term)
        if values is not None:
            return not any(all(terms.is_valid(value, flat) for flat in other) for value in values)
    return all(_exclude_as(terms, kind, some, others, depth) for kind in shared)


def _exclude_as(terms: SchemaTerms, kind: str, some: Term, others: Term, depth: int) -> bool:
    if kind == "number":
        numbers = terms.numbers((*some, *others), False)
        low, high = numbers.low, numbers.high
        return low is not None and high is not None and (
            low.value > high.value or low.value == high.value and (low.is_exclusive or high.is_exclusive)
        )  # fmt: skip
    if kind != "object" or depth == 0:
        return False
    names = {name: None for flat in (*some, *others) for name in flat.get("required", ())}
    for name in names:
        parts = [[one for flat in term for one in terms.property_schemas(flat, name)] for term in (some, others)]
        if all(
            _exclude(terms, one, other, depth - 1) for one in terms.terms(parts[0]) for other in terms.terms(parts[1])
        ):
            return True
    return False


def item_schema(flat: Flat, index: int) -> Schema:
    """What ``flat`` asks of item ``index``."""
    first, rest = item_schemas(flat)
    return first[index] if index < len(first) else rest


def item_schemas(flat: Flat) -> tuple[list[Schema], Schema]:
    """What ``flat`` asks of the first items, and of the others.

    Earlier drafts wrote the first as a list of ``items``.
    """
    if isinstance(flat.get("items"), list):
        return flat["items"], flat.get("additionalItems", True)
    return flat.get("prefixItems", []), flat.get("items", True)


def _key(value: Any) -> str:
    """The same for JSON values that are equal, as 1 and 1.0 are, and true is not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return f"[{','.join(map(_key, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(sorted(f'{json.dumps(name)}:{_key(member)}' for name, member in value.items()))}}}"
    return json.dumps(value)


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    kinds = {type(None): "null", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return kinds[type(value)]
