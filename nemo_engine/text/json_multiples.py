"""Multiples of an integer as regular expressions over digits: twos and fives by the last digits, other primes by
remainders.
"""

from __future__ import annotations

MAX_LISTED = 1000  # multiples in a range that are written out
_MAX_FACTOR = 13  # beside twos and fives: the expression of its remainders has the size of its cube


def multiples(step: int, places: int) -> tuple[list[str], list[str]]:
    """Digits, with a point before the last ``places``, of multiples of ``step``: expressions, and their definitions."""
    tail, rest = 1, step
    for prime in (2, 5):
        while rest % prime == 0:
            tail, rest = tail * prime, rest // prime
    expressions = [f"/{_tails(tail, places)}/"] if tail > 1 else []
    definitions: list[str] = []
    for factor in _coprime_powers(rest):
        if factor > _MAX_FACTOR:
            raise _too_large(factor)
        expression, more = _remainders(factor)
        expressions.append(expression)
        definitions += more
    return expressions, definitions


def _too_large(factor: int) -> ValueError:
    return ValueError(f"multiples of {factor} cannot be followed where bounds leave more than {MAX_LISTED} of them")


def _tails(tail: int, places: int) -> str:
    """Digits of which the last say that they are a multiple of ``tail``, a product of twos and fives."""
    count = 1
    while 10**count % tail:
        count += 1
    if 10**count // tail > MAX_LISTED:
        raise _too_large(tail)

    def written(value: int, width: int) -> str:
        digits = str(value).rjust(width, "0")
        return rf"{digits[:-places]}\.{digits[-places:]}" if 0 < places <= width else digits

    short = [written(value, places + 1) for value in range(0, 10**count, tail)]
    ends = [written(value, count) for value in range(0, 10**count, tail)]
    return rf"-?(?:{'|'.join(short)}|[1-9][0-9.]*(?:{'|'.join(ends)})|0\.[0-9]*(?:{'|'.join(ends)}))"


def _coprime_powers(value: int) -> list[int]:
    powers, prime = [], 3
    while prime * prime <= value and prime <= _MAX_FACTOR:
        power = 1
        while value % prime == 0:
            power, value = power * prime, value // prime
        powers += [power] if power > 1 else []
        prime += 2
    return powers + ([value] if value > 1 else [])


def _remainders(factor: int) -> tuple[str, list[str]]:
    """Digits, and a point among them, of multiples of ``factor``: remainders are states, which are removed from the
    last on, as Kleene did.
    """
    edges: dict[tuple[int, int], str] = {}
    for state in range(factor):
        for digit in range(10):
            target = (10 * state + digit) % factor
            edges[state, target] = edges.get((state, target), "") + str(digit)
    ways: dict[tuple[int, int], str] = {ends: rf"/[{digits}]\.?/" for ends, digits in edges.items()}
    definitions: list[str] = []
    for gone in range(factor - 1, 0, -1):
        around = f"({ways[gone, gone]})*" if (gone, gone) in ways else ""
        shorter: dict[tuple[int, int], str] = {}
        for start in range(gone):
            for end in range(gone):
                options = [ways[start, end]] if (start, end) in ways else []
                if (start, gone) in ways and (gone, end) in ways:
                    options.append(f"{ways[start, gone]} {around} {ways[gone, end]}")
                if options:
                    name = f"MOD{factor}X{len(definitions)}"
                    definitions.append(f"{name}: {' | '.join(options)}")
                    shorter[start, end] = name
        ways = shorter
    return f'("-"? ({ways[0, 0]})+)', definitions
