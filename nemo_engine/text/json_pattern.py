"""``Pattern``: the regular expressions of JSON schemas, as expressions over JSON strings as they are written.

ECMA 262's syntax, as far as Python's ``re`` reads it the same way. Where the two disagree (``\\w``, ``\\s``, ``.``),
what must match matches by both, and what must not match does not by either. Every text has one way to be written as a
JSON string here, so intersections and complements of what is written are those of the texts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from nemo_engine.text.json_chars import ALL, SURROGATES, Ranges, both_cases, chars_of, merged, named_set, without

MAX_PATTERN_CHARS = 4096
MAX_NODES = 20_000  # with counted repetitions written out
_MAX_NESTING = 100


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of ``ranges``."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Cat:
    """One part after the other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    """Any one of the options."""

    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """``least`` to ``most`` times ``part``; any number if ``most`` is None."""

    part: Node
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Edge:
    """``^`` or ``$``."""

    is_end: bool


@dataclass(frozen=True, slots=True)
class Look:
    """A look-ahead, ``(?=...)`` or ``(?!...)``."""

    part: Node
    is_negative: bool


Node = Chars | Cat | Alt | Repeat | Edge | Look
ANY = Repeat(Chars(ALL), 0, None)


# ---- reading


class _Reader:
    """Reads one pattern; with ``is_unicode`` for what it may match, else for what it surely matches."""

    def __init__(self, text: str, is_unicode: bool) -> None:
        self._text, self._at, self._is_unicode, self._depth = text, 0, is_unicode, 0
        self._any_case = text.startswith("(?i)")
        if self._any_case:
            self._at = 4

    def read(self) -> Node:
        node = self._options()
        if self._at < len(self._text):
            raise self._error('")" closes nothing')
        return node

    def _error(self, what: str) -> ValueError:
        return ValueError(f"{what}, at character {self._at}")

    def _next(self, text: str) -> bool:
        if self._text.startswith(text, self._at):
            self._at += len(text)
            return True
        return False

    def _options(self) -> Node:
        self._depth += 1
        if self._depth > _MAX_NESTING:
            raise self._error(f"groups are nested more than {_MAX_NESTING} deep")
        options = [self._sequence()]
        while self._next("|"):
            options.append(self._sequence())
        self._depth -= 1
        return options[0] if len(options) == 1 else Alt(tuple(options))

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.append(self._quantified(self._atom()))
        return parts[0] if len(parts) == 1 else Cat(tuple(parts))

    def _quantified(self, node: Node) -> Node:
        counts = self._counts()
        if counts is None:
            return node
        if isinstance(node, (Edge, Look)):
            raise self._error("a quantifier follows an anchor or a look-ahead")
        least, most = counts
        if most is not None and least > most:
            raise self._error(f"{{{least},{most}}} has its counts in the wrong order")
        self._next("?")  # which of several matches is taken does not matter
        if self._text[self._at : self._at + 1] in ("*", "+", "?"):
            raise self._error("a quantifier follows a quantifier")
        return Repeat(node, least, most)

    def _counts(self) -> tuple[int, int | None] | None:
        for sign, counts in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._next(sign):
                return counts
        if not self._text.startswith("{", self._at):
            return None
        inside, closed, _ = self._text[self._at + 1 :].partition("}")
        low, comma, high = inside.partition(",")
        if (
            not closed
            or not (low or comma)
            or not all(part == "" or part.isascii() and part.isdigit() for part in (low, high))
        ):
            return None  # a brace that is a character
        if not low:
            raise self._error("{,n} means different things to different readers")
        self._at += len(inside) + 2
        least = int(low[:9])
        return least, least if not comma else int(high[:9]) if high else None

    def _atom(self) -> Node:
        char = self._text[self._at]
        self._at += 1
        if char == "(":
            return self._group()
        if char == "[":
            return self._class()
        if char == "\\":
            escaped = self._escape(in_class=False)
            return self._chars(((escaped, escaped),)) if isinstance(escaped, int) else Chars(escaped)
        if char in "^$":
            return Edge(char == "$")
        if char == ".":
            return Chars(without(ALL, chars_of("\n") if self._is_unicode else chars_of("\n\r\u2028\u2029")))
        if char in "*+?":
            raise self._error("a quantifier follows nothing")
        return self._chars(((ord(char), ord(char)),))

    def _chars(self, ranges: Ranges) -> Chars:
        return Chars(both_cases(ranges, self._is_unicode) if self._any_case else ranges)

    def _group(self) -> Node:
        look = None
        if self._next("?"):
            if self._next("=") or self._next("!"):
                look = self._text[self._at - 1] == "!"
            elif self._next("<=") or self._next("<!"):
                raise self._error("look-behind is not supported")
            elif self._next("P<") or self._next("<"):
                name, closed, _ = self._text[self._at :].partition(">")
                if not closed or not name.isidentifier():
                    raise self._error("a group has no proper name")
                self._at += len(name) + 1
            elif not self._next(":"):
                raise self._error("(?...) is of a kind that is not supported")
        outer, self._is_unicode = self._is_unicode, self._is_unicode != bool(look)
        node = self._options()
        self._is_unicode = outer
        if not self._next(")"):
            raise self._error("a group is not closed")
        return node if look is None else Look(node, look)

    def _escape(self, in_class: bool) -> int | Ranges:
        """What follows a backslash: a code point, or a set."""
        char = self._text[self._at : self._at + 1]
        self._at += 1
        if char and char in "dDwWsS":
            return named_set(char, self._is_unicode)
        if char and char in "tnrfv":
            return ord("\t\n\r\f\v"["tnrfv".index(char)])
        if char == "b" and in_class:
            return 8
        if char == "0" and not self._text[self._at : self._at + 1].isdigit():
            return 0
        if char == "x":
            return self._hex(2)
        if char == "u":
            code = self._hex(4)
            if 0xD800 <= code < 0xDC00 and self._next("\\u"):
                low = self._hex(4)
                if 0xDC00 <= low < 0xE000:
                    return 0x10000 + (code - 0xD800) * 0x400 + low - 0xDC00
            if 0xD800 <= code < 0xE000:
                raise self._error("half of a surrogate pair is no character")
            return code
        if not char or char.isalnum():
            raise self._error(f"\\{char} is not supported")
        return ord(char)

    def _hex(self, count: int) -> int:
        digits = self._text[self._at : self._at + count]
        if len(digits) < count or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
            raise self._error(f"{count} hexadecimal digits are missing")
        self._at += count
        return int(digits, 16)

    def _class(self) -> Node:
        negated = self._next("^")
        outer, self._is_unicode = self._is_unicode, self._is_unicode != negated
        if self._text.startswith("]", self._at):
            raise self._error("[] means different things to different readers")
        pairs: list[tuple[int, int]] = []
        while not self._next("]"):
            if self._at >= len(self._text):
                raise self._error("unclosed character class")
            if self._text.startswith("[:", self._at):
                raise self._error("[: means different things to different readers")
            low = self._member()
            if self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at):
                self._at += 1
                high = self._member()
                if not isinstance(low, int) or not isinstance(high, int) or low > high:
                    raise self._error("a range of characters has no proper ends")
                pairs.append((low, high))
            else:
                pairs += [(low, low)] if isinstance(low, int) else low
        ranges = merged(pairs)
        if self._any_case:
            ranges = both_cases(ranges, self._is_unicode)
        self._is_unicode = outer
        return Chars(without(ALL if negated else ranges, ranges if negated else SURROGATES))

    def _member(self) -> int | Ranges:
        if self._at >= len(self._text):
            raise self._error("unclosed character class")
        char = self._text[self._at]
        self._at += 1
        return self._escape(in_class=True) if char == "\\" else ord(char)


# ---- what a pattern asks of a whole text


@dataclass(frozen=True, slots=True)
class Terms:
    """A whole text matches all of ``wanted`` and none of ``unwanted``, neither of which has anchors or look-aheads."""

    wanted: tuple[Node, ...]
    unwanted: tuple[Node, ...] = ()


def _has_edges(node: Node) -> bool:
    if isinstance(node, (Edge, Look)):
        return True
    if isinstance(node, Repeat):
        return _has_edges(node.part)
    return any(map(_has_edges, node.parts if isinstance(node, Cat) else node.options if isinstance(node, Alt) else ()))


def _cut(node: Node) -> list[tuple[bool, tuple[Node, ...], bool]]:
    """Alternatives of ``node``: whether each is anchored at the start, what is between, and whether at the end."""
    if not _has_edges(node):
        return [(False, (node,), False)]
    if isinstance(node, Alt):
        return [cut for option in node.options for cut in _cut(option)]
    if isinstance(node, Edge):
        return [(not node.is_end, (), node.is_end)]
    if not isinstance(node, Cat):
        raise ValueError("an anchor or a look-ahead stands in a repetition, or not at the start")
    cuts: list[tuple[bool, tuple[Node, ...], bool]] = [(False, (), False)]
    for part in node.parts:
        joined = []
        for start, middle, end in cuts:
            for more_start, more, more_end in _cut(part):
                if more_start and middle or end and (more or more_start):
                    raise ValueError("an anchor stands in the middle")
                joined.append((start or more_start, middle + more, end or more_end))
        cuts = joined
        if len(cuts) > 64:
            raise ValueError("it has too many alternatives with anchors")
    return cuts


def _whole(node: Node, from_start: bool = False) -> Node:
    """What a text is in which ``node`` is found, at its start if ``from_start``; without anchors."""
    options: list[Node] = []
    for start, middle, end in _cut(node):
        before, after = () if start or from_start else (ANY,), () if end else (ANY,)
        options.append(Cat((*before, *middle, *after)))
    return options[0] if len(options) == 1 else Alt(tuple(options))


def _terms(node: Node) -> Terms:
    parts = node.parts if isinstance(node, Cat) else (node,)
    first = 1 if parts and parts[0] == Edge(False) else 0
    count = first
    while count < len(parts) and isinstance(parts[count], Look):
        count += 1
    looks = [part for part in parts[first:count] if isinstance(part, Look)]
    if looks and not first:
        raise ValueError("a look-ahead is supported right after ^ only")
    rest = _whole(Cat((*parts[:first], *parts[count:])))
    wanted = [_whole(look.part, from_start=True) for look in looks if not look.is_negative]
    unwanted = [_whole(look.part, from_start=True) for look in looks if look.is_negative]
    return Terms((rest, *wanted), tuple(unwanted))


def size(node: Node) -> int:
    """How large ``node`` is with its counted repetitions written out."""
    if isinstance(node, Repeat):
        return 1 + size(node.part) * min(MAX_NODES, max(node.most or 1, node.least, 1))
    return 1 + sum(map(size, node.parts if isinstance(node, Cat) else node.options if isinstance(node, Alt) else ()))


def is_small(text: str) -> bool:
    """Whether the regular expression ``text`` is known to compile at little cost."""
    counts = [int(count[:9]) for count in re.findall(r"[{,]\s*(\d+)", text)]
    return len(text) <= 256 and len(counts) <= 16 and max(counts, default=0) <= 64


class Pattern:
    """A pattern that is looked for in a text. ``sure``: what matches by every reading; ``maybe``: by any."""

    def __init__(self, text: str) -> None:
        """Raises ``ValueError`` for what is no pattern, or not supported."""
        if len(text) > MAX_PATTERN_CHARS:
            raise ValueError(f"it must have at most {MAX_PATTERN_CHARS} characters, got {len(text)}")
        self.is_costly = not is_small(text) or "(?=" in text or "(?!" in text
        self._text = text
        self.sure = _terms(_Reader(text, is_unicode=False).read())
        if sum(map(size, (*self.sure.wanted, *self.sure.unwanted))) > MAX_NODES:
            raise ValueError(f"it is too complex: its repetitions written out have more than {MAX_NODES} parts")

    @cached_property
    def maybe(self) -> Terms:
        """What may match. Made when it is asked for: it may need all of Unicode."""
        return _terms(_Reader(self._text, is_unicode=True).read())
