"""Numbers of JSON schemas as regular expressions over their digits: bounds of any size, and multiples."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from nemo_engine.text.json_multiples import MAX_LISTED, multiples

_MORE_DIGITS = 20  # digits that a number may have in a direction without a bound, beyond those of the other bound
_EXACT_DIGITS = 15  # two different decimals with so many digits are different doubles
_LEAST_PLACES = 6  # decimal places that a number with bounds may have at least
_MAX_BOUND_DIGITS = 100
_BEYOND = 10 ** (_MORE_DIGITS + 101)  # larger than every number that is written without bounds
_MAX_PLACES = 6  # decimal places of a multiple


@dataclass(frozen=True, slots=True)
class Bound:
    """An exact bound, and whether it excludes itself."""

    value: Fraction
    is_exclusive: bool


@dataclass(frozen=True, slots=True)
class Numbers:
    """Numbers from ``low`` to ``high``, integers alone if ``is_integer``, that are multiples of ``multiples``."""

    is_integer: bool = False
    low: Bound | None = None
    high: Bound | None = None
    multiples: tuple[Fraction, ...] = ()

    def terminal(self) -> tuple[str, list[str]] | None:
        """An expression for a terminal and the definitions it needs, None if there is no such number.

        Raises ``ValueError`` for a multiple that cannot be followed.
        """
        low = None if self.low is not None and self.low.value <= -_BEYOND else self.low
        high = None if self.high is not None and self.high.value >= _BEYOND else self.high
        if any(bound is not None and _too_long(bound.value) for bound in (low, high)):
            raise ValueError(f"a bound must have at most {_MAX_BOUND_DIGITS} digits")
        if self.multiples:
            step = _common_multiple([*self.multiples, *([Fraction(1)] if self.is_integer else [])])
            listed = _listed(step, low, high)
            if listed is not None:
                return (" | ".join(f'"{_decimal(value)}"' for value in listed), []) if listed else None
            return _stepped(step, low, high)
        regex = _integers(low, high) if self.is_integer else _decimals(low, high)
        return None if regex is None else (f"/{regex}/", [])


def exact(value: int | float) -> Fraction:
    """``value`` as the decimal that was written: 0.1 is exactly a tenth."""
    return Fraction(value) if isinstance(value, int) else Fraction(Decimal(repr(value)))


def meet(some: Bound | None, other: Bound | None, *, is_low: bool) -> Bound | None:
    """The tighter of two bounds."""
    if some is None or other is None:
        return some or other
    if some.value == other.value:
        return some if some.is_exclusive else other
    return some if (some.value > other.value) == is_low else other


def _common_multiple(steps: Iterable[Fraction]) -> Fraction:
    values = list(steps)
    return Fraction(math.lcm(*[v.numerator for v in values]), math.gcd(*[v.denominator for v in values]))


def _inside(low: Bound | None, high: Bound | None, step: Fraction) -> tuple[int | None, int | None]:
    """The first and the last multiple of ``step`` within the bounds, in steps."""
    first = last = None
    if low is not None:
        first = math.ceil(low.value / step)
        first += first * step == low.value and low.is_exclusive
    if high is not None:
        last = math.floor(high.value / step)
        last -= last * step == high.value and high.is_exclusive
    return first, last


def _listed(step: Fraction, low: Bound | None, high: Bound | None) -> list[Fraction] | None:
    first, last = _inside(low, high, step)
    if first is None or last is None or last - first >= MAX_LISTED:
        return None
    return [index * step for index in range(first, last + 1)]


def _too_long(value: Fraction) -> bool:
    return abs(value) >= 10**_MAX_BOUND_DIGITS or value.denominator > 10**_MAX_BOUND_DIGITS


def _decimal(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
    scaled = str(abs(value.numerator) * 10**digits // value.denominator).rjust(digits + 1, "0")
    return f"{'-' if value < 0 else ''}{scaled[:-digits]}.{scaled[-digits:]}"


# ---- integers


def _integers(low: Bound | None, high: Bound | None) -> str | None:
    first, last = _inside(low, high, Fraction(1))
    options = []
    if last is None or last >= 0:
        options.append(_naturals(max(first or 0, 0) if first is not None else 0, last))
    if first is None or first < 0:
        options.append(
            _negated(_naturals(1 if last is None or last >= 0 else -last, None if first is None else -first))
        )
    return _any_of(options)


def _negated(regex: str | None) -> str | None:
    return None if regex is None else f"-(?:{regex})"


def _any_of(options: Iterable[str | None]) -> str | None:
    possible = [option for option in options if option is not None]
    return "|".join(possible) if possible else None


def _naturals(low: int, high: int | None) -> str | None:
    """Integers from ``low``, at least 0, to ``high``; without ``high``, up to some digits more than ``low`` has."""
    if high is None:
        count = len(str(low))
        longer = f"[1-9][0-9]{{{count},{count + _MORE_DIGITS}}}"
        return f"{_naturals(low, 10**count - 1)}|{longer}"
    if low > high:
        return None
    options = []
    while len(str(low)) < len(str(high)):
        options.append(_same_length(str(low), "9" * len(str(low))))
        low = 10 ** len(str(low))
    return "|".join([*options, _same_length(str(low), str(high))])


def _same_length(low: str, high: str) -> str:
    if not low:
        return ""
    if low == "0" * len(low) and high == "9" * len(high):
        return f"[0-9]{{{len(low)}}}"
    if low[0] == high[0]:
        return low[0] + _group(_same_length(low[1:], high[1:]))
    first, last, rest = int(low[0]), int(high[0]), len(low) - 1
    options = []
    if low[1:] != "0" * rest:
        options.append(low[0] + _group(_same_length(low[1:], "9" * rest)))
        first += 1
    if high[1:] != "9" * rest:
        options.append(high[0] + _group(_same_length("0" * rest, high[1:])))
        last -= 1
    if first <= last:
        options.insert(0, f"[{first}-{last}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    return "|".join(options)


def _group(regex: str) -> str:
    return f"(?:{regex})" if "|" in regex else regex


# ---- decimals


def _decimals(low: Bound | None, high: Bound | None) -> str | None:
    if low is None and high is None:
        return rf"-?(?:0|[1-9][0-9]{{0,{_MORE_DIGITS}}})(?:\.[0-9]{{1,{_MORE_DIGITS}}})?(?:[eE][+-]?[0-9]{{1,2}})?"
    num_whole_digits = max(len(str(math.floor(abs(bound.value)))) for bound in (low, high) if bound is not None)
    places = max(_EXACT_DIGITS - num_whole_digits, _LEAST_PLACES)
    low, high = (_inner(bound, places, bound is low) if bound is not None else None for bound in (low, high))
    zero = Bound(Fraction(0), False)
    options = []
    if high is None or high.value > 0 or high == zero:
        options.append(_positive(low if low is not None and low.value >= 0 else zero, high, places))
    if low is None or low.value < 0:
        least = Bound(Fraction(0), True) if high is None or high.value >= 0 else Bound(-high.value, high.is_exclusive)
        options.append(_negated(_positive(least, None if low is None else Bound(-low.value, low.is_exclusive), places)))
    return _any_of(options)


def _inner(bound: Bound, places: int, is_low: bool) -> Bound:
    """``bound``; if it has more digits than doubles tell apart, the next double inside it, as an inclusive bound."""
    digits = len(str(math.floor(abs(bound.value)))) + places
    is_told_apart = digits <= _EXACT_DIGITS and (bound.value * 10**places).denominator == 1
    if not bound.is_exclusive or not bound.value or is_told_apart:
        return bound
    return Bound(exact(math.nextafter(float(bound.value), math.inf if is_low else -math.inf)), False)


def _split(value: Fraction) -> tuple[int, str]:
    """The integer part and the decimal places, without trailing zeros."""
    whole, _, places = _decimal(value).partition(".")
    return int(whole), places


def _positive(low: Bound, high: Bound | None, places: int) -> str | None:
    """Decimals from ``low``, at least 0, with up to ``places`` decimal places, or as many as a bound has."""
    if high is not None and (
        low.value > high.value or low.value == high.value and (low.is_exclusive or high.is_exclusive)
    ):
        return None
    whole, start = _split(low.value)
    least = rf"{whole}{_after(start, low.is_exclusive, places)}"
    any_places = rf"(?:\.[0-9]{{1,{places}}})?"
    if high is None:
        return _any_of([least, f"(?:{_naturals(whole + 1, None)}){any_places}"])
    last, end = _split(high.value)
    if whole == last:
        return _whole_and(whole, _between(start, low.is_exclusive, end, high.is_exclusive, places))
    between = _naturals(whole + 1, last - 1)
    below = _before(end, high.is_exclusive, places)
    options = [least, None if between is None else f"(?:{between}){any_places}"]
    return _any_of([*options, None if below is None else f"{last}{below}"])


def _whole_and(whole: int, rest: str | None) -> str | None:
    """The integer ``whole`` followed by the expression ``rest``; None without that."""
    return None if rest is None else f"{whole}{rest}"


def _fraction(options: list[str], may_be_none: bool) -> str | None:
    if not options:
        return "" if may_be_none else None
    return rf"(?:\.(?:{'|'.join(options)})){'?' if may_be_none else ''}"


def _digits(least: int, most: int) -> str:
    return f"[0-9]{{{least},{most}}}" if most > 0 else ""


def _above(digits: str, is_exclusive: bool, places: int) -> list[str]:
    """One or more decimal places whose value is at least that of ``digits``, or greater if exclusive."""
    if not digits:
        most = max(places - 1, 0)
        return [f"0{{0,{most}}}[1-9]{_digits(0, most)}"] if is_exclusive else [f"[0-9]{{1,{max(places, 1)}}}"]
    first, rest = int(digits[0]), digits[1:]
    options = [f"[{first + 1}-9]{_digits(0, places - 1)}"] if first < 9 else []
    following = _above(rest, is_exclusive, places - 1) if rest or is_exclusive or places > 1 else []
    if following:
        ends = not rest and not is_exclusive
        options.append(f"{first}(?:{'|'.join(following)}){'?' if ends else ''}")
    elif not rest:
        options.append(str(first))
    return options


def _below(digits: str, is_exclusive: bool, places: int) -> list[str]:
    """One or more decimal places whose value is at most that of ``digits``, or less if exclusive."""
    if not digits:
        return [] if is_exclusive else [f"0{{1,{max(places, 1)}}}"]
    first, rest = int(digits[0]), digits[1:]
    options = [f"[0-{first - 1}]{_digits(0, places - 1)}"] if first else []
    following = _below(rest, is_exclusive, places - 1) if rest or places > 1 else []
    may_end = bool(rest) or not is_exclusive
    if following:
        options.append(f"{first}(?:{'|'.join(following)}){'?' if may_end else ''}")
    elif may_end:
        options.append(str(first))
    return options


def _after(digits: str, is_exclusive: bool, places: int) -> str:
    fraction = _fraction(_above(digits, is_exclusive, places), not digits and not is_exclusive)
    assert fraction is not None
    return fraction


def _before(digits: str, is_exclusive: bool, places: int) -> str | None:
    return _fraction(_below(digits, is_exclusive, places), bool(digits) or not is_exclusive)


def _between(low: str, low_exclusive: bool, high: str, high_exclusive: bool, places: int) -> str | None:
    count = max(len(low), len(high))
    options = _within(low.ljust(count, "0"), low_exclusive, high.ljust(count, "0"), high_exclusive, places)
    return _fraction(options, not low and not low_exclusive and (bool(high) or not high_exclusive))


def _within(low: str, low_exclusive: bool, high: str, high_exclusive: bool, places: int) -> list[str]:
    """Decimal places between two of the same length."""
    if not low:
        return []
    if low == high:
        return [low] if not low_exclusive and not high_exclusive else []
    if low[0] == high[0]:
        inner = _within(low[1:], low_exclusive, high[1:], high_exclusive, places - 1)
        alone = not low[1:].strip("0") and not low_exclusive
        return [f"{low[0]}(?:{'|'.join(inner)}){'?' if alone else ''}"] if inner else [low[0]] if alone else []
    first, last = int(low[0]), int(high[0])
    lower = low[1:].rstrip("0")
    options = []
    following = _above(lower, low_exclusive, places - 1) if lower or low_exclusive or places > 1 else []
    ends = not lower and not low_exclusive
    if following:
        options.append(f"{first}(?:{'|'.join(following)}){'?' if ends else ''}")
    elif ends:
        options.append(str(first))
    if first + 1 < last:
        options.append(f"[{first + 1}-{last - 1}]{_digits(0, places - 1)}")
    upper = high[1:].rstrip("0")
    following = _below(upper, high_exclusive, places - 1) if upper or places > 1 else []
    may_end = bool(upper) or not high_exclusive
    if following:
        options.append(f"{last}(?:{'|'.join(following)}){'?' if may_end else ''}")
    elif may_end:
        options.append(str(last))
    return options


# ---- multiples


def _stepped(step: Fraction, low: Bound | None, high: Bound | None) -> tuple[str, list[str]] | None:
    """Multiples of ``step``: one expression for each number of decimal places."""
    options: list[str] = []
    definitions: dict[str, None] = {}
    for places in range(len(_decimal(step).partition(".")[2]) + 1):
        if places > _MAX_PLACES:
            raise ValueError(f"it must have at most {_MAX_PLACES} decimal places")
        here = _common_multiple([step, Fraction(1, 10**places)])
        first, last = _inside(low, high, here)
        if first is not None and last is not None and first > last:
            continue
        if not places:
            parts = [f"/{_integers(low, high)}/"]
        else:
            parts = [rf"/-?(?:0|[1-9][0-9]{{0,{_EXACT_DIGITS - places - 1}}})\.[0-9]{{{places}}}/"]
            if low is not None or high is not None:
                parts.append(f"/{_decimals(low, high)}/")
        factor = here * 10**places
        expressions, needed = multiples(factor.numerator, places)
        options.append(" & ".join(parts + expressions))
        definitions |= dict.fromkeys(needed)
    return (" | ".join(options), list(definitions)) if options else None
