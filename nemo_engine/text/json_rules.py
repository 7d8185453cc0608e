"""``Rules``: rules and terminals of a Lark grammar, from which what matches nothing is taken out before it is
written.
"""

from __future__ import annotations

from collections.abc import Iterable

from nemo_engine.text.grammar_trial import NOTHING
from nemo_engine.text.json_strings import literal

MAX_RULES = 20_000

# A symbol of a rule: a literal, the name of a rule or a terminal, or symbols that repeat.
Symbol = str | tuple[tuple["Symbol", ...], int, int | None]
Row = tuple[Symbol, ...]


class Rules:
    """Collects rules, which are alternatives of rows of symbols, and terminals, which are expressions."""

    def __init__(self) -> None:
        self._rules: dict[str, list[Row]] = {}
        self._shared: dict[tuple[Row, ...], str] = {}
        self._terminals: dict[str, str] = {}  # names by expression
        self._doubtful: set[str] = set()  # terminals that perhaps match nothing
        self.definitions: dict[str, None] = {}  # of terminals that others need

    def __len__(self) -> int:
        return len(self._rules)

    def define(self, name: str, rows: list[Row]) -> None:
        """Give the rule ``name`` its rows."""
        self._rules[name] = rows

    def is_doubtful(self, expression: str) -> bool:
        """Whether the terminal of ``expression`` perhaps matches nothing."""
        return self._terminals.get(expression) in self._doubtful

    def rule(self, rows: list[Row]) -> str:
        """The name of a new rule."""
        name = f"r{len(self._rules)}"
        self._rules[name] = rows
        if len(self._rules) > MAX_RULES:
            raise ValueError(f"it is too complex: it needs more than {MAX_RULES} rules")
        return name

    def terminal(self, expression: str, is_doubtful: bool = False) -> str:
        """The name of the terminal of ``expression``."""
        name = self._terminals.setdefault(expression, f"T{len(self._terminals)}")
        if is_doubtful:
            self._doubtful.add(name)
        return name

    def one(self, rows: list[Row]) -> Row | None:
        """``rows`` as one: itself, or a rule."""
        if not rows:
            return None
        if len(rows) == 1 and len(rows[0]) <= 8:
            return rows[0]
        key = tuple(rows)
        if key not in self._shared:
            self._shared[key] = self.rule(rows)
        return (self._shared[key],)

    def union(self, options: list[str]) -> str:
        """The terminal that is any of ``options``, which are expressions; those in doubt must be terminals of their
        own.
        """
        if len(options) == 1 and options[0] in self._terminals:
            return self._terminals[options[0]]
        return self.terminal(
            " | ".join(options), all(self._terminals.get(option) in self._doubtful for option in options)
        )

    @property
    def doubtful(self) -> dict[str, str]:
        """Terminals of which it is not known whether they match anything, with grammars that say it."""
        definitions = "\n".join(self.definitions)
        used = self._doubtful.intersection(*[[symbol for rows in self._rules.values() for symbol in _flat(rows)]])
        return {
            name: f"start: T\nT: {expression}\n{definitions}\n"
            for expression, name in self._terminals.items()
            if name in used
        }

    @property
    def has_doubts(self) -> bool:
        """Whether there are doubtful terminals."""
        return bool(self._doubtful)

    def lark(self, start: str, empty: set[str]) -> str:
        """The rules that ``start`` needs, without what is ``empty``; ``ValueError`` if then nothing matches."""
        productive = self._productive(empty)
        if start not in productive:
            raise ValueError(NOTHING)
        lines = [f"start: {start}"]
        reached, used, open_rules = {start}, dict[str, None](), [start]
        while open_rules:
            name = open_rules.pop()
            rows = [_without_empty(row, productive) for row in self._rules[name] if _makes(row, productive)]
            lines.append(f"{name}: {' | '.join(map(_text, rows))}")
            for symbol in _flat(rows):
                if symbol in self._rules and symbol not in reached:
                    reached.add(symbol)
                    open_rules.append(symbol)
                elif symbol[0] == "T":
                    used[symbol] = None
        expressions = {name: expression for expression, name in self._terminals.items()}
        lines += [f"{name}: {expressions[name]}" for name in used]
        return "\n".join([*lines, *self.definitions, ""])

    def _productive(self, empty: set[str]) -> set[str]:
        """The rules and terminals that match something."""
        productive = {name for name in self._terminals.values() if name not in empty}
        users: dict[str, list[str]] = {}
        for name, rows in self._rules.items():
            for symbol in _flat(rows):
                users.setdefault(symbol, []).append(name)
        waiting = list(self._rules)
        while waiting:
            name = waiting.pop()
            if name not in productive and any(_makes(row, productive) for row in self._rules[name]):
                productive.add(name)
                waiting += users.get(name, [])
        return productive


def members_rows(
    rules: Rules, members: list[tuple[Row, bool]], other: str | None, least: int, most: int | None
) -> list[Row]:
    """The rows of what stands between braces. ``least`` and ``most`` are counted only where they matter."""
    counts = range(len(members) + 1) if least or most is not None else range(1)
    if len(members) * len(counts) > MAX_RULES:
        raise ValueError(f"it is too complex: counting properties needs more than {MAX_RULES} rules")
    comma = literal(",")
    after: dict[tuple[bool, int], list[Row]] = {}  # by whether a member precedes, and how many
    for is_first in (True, False):
        for count in counts:
            after[is_first, count] = _ends(
                other, is_first, max(0, least - count), None if most is None else most - count
            )
    for position in range(len(members) - 1, -1, -1):
        member, is_required = members[position]
        before: dict[tuple[bool, int], list[Row]] = {}
        reachable = counts if len(counts) == 1 else range(position + 1)
        for count in reachable:
            following = rules.one(after[False, count if len(counts) == 1 else count + 1])
            for is_first in (True, False):
                rows: list[Row] = []
                if following is not None and (most is None or count < most):
                    rows.append((*(() if is_first else (comma,)), *member, *following))
                if not is_required:
                    passed = rules.one(after[is_first, count])
                    rows += [] if passed is None else [passed]
                before[is_first, count] = rows
        after = before
    return after[True, 0]


def _ends(other: str | None, is_first: bool, least: int, most: int | None) -> list[Row]:
    """What may follow the last named member: ``least`` to ``most`` others, of which any number counts as one."""
    rows: list[Row] = [()] if least == 0 and (most is None or most >= 0) else []
    if other is None or least > 1 or most is not None and most < 1:
        return rows
    more = None if most is None else most - 1
    repeated: Symbol = ((literal(","), other), 0, more)
    return [*rows, (other, repeated) if is_first else (literal(","), other, repeated)]


def _flat(rows: Iterable[Row]) -> list[str]:
    symbols: list[str] = []
    for row in rows:
        for symbol in row:
            symbols += [symbol] if isinstance(symbol, str) else _flat([symbol[0]])
    return symbols


def _makes(row: Row, productive: set[str]) -> bool:
    """Whether ``row`` matches something."""
    return all(
        symbol[0] == '"' or symbol in productive
        if isinstance(symbol, str)
        else symbol[1] == 0 or _makes(symbol[0], productive)
        for symbol in row
    )


def _without_empty(row: Row, productive: set[str]) -> Row:
    return tuple(symbol for symbol in row if isinstance(symbol, str) or _makes(symbol[0], productive))


def _text(row: Row) -> str:
    parts = []
    for symbol in row:
        if isinstance(symbol, str):
            parts.append(symbol)
        elif symbol[2] != 0:
            inside, least, most = _text(symbol[0]), symbol[1], symbol[2]
            counts = "*" if (least, most) == (0, None) else f"{{{least},{'' if most is None else most}}}"
            parts.append(f"({inside}){counts}")
    return " ".join(parts) or '""'
