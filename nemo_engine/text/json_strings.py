"""Strings as JSON writes them: terminals of Lark grammars for patterns, lengths and formats, and what they hold."""

from __future__ import annotations

import json
from functools import cache

from nemo_engine.text.json_chars import Ranges, without
from nemo_engine.text.json_pattern import ANY, Alt, Cat, Chars, Node, Pattern, Repeat, Terms

_SHORT = {0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r"}  # control characters with an escape of their own
_RAW = ((0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0xD800, 0xDFFF))  # what may not stand in a string as it is
_CONTROLS = "|".join(f"0{code:x}" if code < 16 else f"{code:02x}" for code in range(32) if code not in _SHORT)
# One character of a free string.
_CHAR = rf'[^"\\\x00-\x1F]|\\(?:["\\bfnrt]|u00(?:{_CONTROLS}))'
FREE = f'/"(?:{_CHAR})*"/'

_HEX = "[0-9a-fA-F]"
_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_LAST_LABEL = "[a-zA-Z](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_HOST = f"(?:{_LABEL}\\.){{0,2}}{_LAST_LABEL}"
_GROUP = f"{_HEX}{{1,4}}"
_IPV6 = "|".join(
    [f"(?:{_GROUP}:){{7}}{_GROUP}", f"(?:{_GROUP}:){{1,7}}:", f":(?::{_GROUP}){{1,7}}", "::"]
    + [f"(?:{_GROUP}:){{1,{7 - after}}}(?::{_GROUP}){{1,{after}}}" for after in range(1, 7)]
)
_PCHAR = f"(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|%{_HEX}{{2}})"
_TIME_PART = "T(?:[0-9]{1,4}H(?:[0-9]{1,4}M(?:[0-9]{1,4}S)?)?|[0-9]{1,4}M(?:[0-9]{1,4}S)?|[0-9]{1,4}S)"
_DAY_PART = "(?:[0-9]{1,4}Y(?:[0-9]{1,4}M(?:[0-9]{1,4}D)?)?|[0-9]{1,4}M(?:[0-9]{1,4}D)?|[0-9]{1,4}D)"
_ATOM = "[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]"

# Formats that are kept: every text is one of the format, though not every one of the format may be written.
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": f"P(?:{_DAY_PART}(?:{_TIME_PART})?|{_TIME_PART}|[0-9]{{1,4}}W)",
    "email": f"{_ATOM}{{1,32}}(?:\\.{_ATOM}{{1,31}})?@{_HOST}",
    "hostname": _HOST,
    "ipv4": f"{_BYTE}(?:\\.{_BYTE}){{3}}",
    "ipv6": _IPV6,
    "uuid": f"{_HEX}{{8}}(?:-{_HEX}{{4}}){{3}}-{_HEX}{{12}}",
    "uri": f"[a-zA-Z][a-zA-Z0-9+.-]{{0,20}}:(?://(?:{_HOST}|{_BYTE}(?:\\.{_BYTE}){{3}})(?::[0-9]{{1,4}})?(?:/{_PCHAR}*)*"
    f"|{_PCHAR}+(?:/{_PCHAR}*)*)(?:\\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?",
}
# Formats without a form of their own, or of what a string stands for elsewhere: annotations, as the standard has them.
FREE_FORMATS = frozenset(
    "binary byte char password path file-path directory-path json-string string text html markdown".split()
)


@cache
def format_pattern(name: str) -> Pattern:
    """The pattern of a format of ``FORMATS``."""
    pattern = Pattern(f"^(?:{FORMATS[name]})$")
    pattern.is_costly = False
    return pattern


# ---- how a text is written


def _class(ranges: Ranges) -> str:
    ends = [f"\\x{{{low:x}}}" + (f"-\\x{{{high:x}}}" if high > low else "") for low, high in ranges]
    return f"[{''.join(ends)}]"


@cache
def _quoted_chars(ranges: Ranges) -> str:
    raw = without(ranges, _RAW)
    options = [_class(raw)] if raw else []
    special = [code for code in (*range(32), 0x22, 0x5C) if any(low <= code <= high for low, high in ranges)]
    short = [f"\\x{{{ord(_SHORT.get(code, chr(code))):x}}}" for code in special if code in _SHORT or code >= 32]
    if short:
        options.append(f"\\\\[{''.join(short)}]")
    long = [f"{code:02x}" for code in special if code < 32 and code not in _SHORT]
    if long:
        options.append(f"\\\\u00(?:{'|'.join(long)})")
    return options[0] if len(options) == 1 else f"(?:{'|'.join(options)})" if options else "[^\\x{0}-\\x{10ffff}]"


def _quoted(node: Node) -> str:
    if isinstance(node, Chars):
        return _quoted_chars(node.ranges)
    if isinstance(node, Cat):
        return "".join([_quoted(part) for part in node.parts])
    if isinstance(node, Alt):
        return f"(?:{'|'.join([_quoted(option) for option in node.options])})"
    assert isinstance(node, Repeat)
    if node is ANY:
        return f"(?:{_CHAR})*"
    return f"(?:{_quoted(node.part)}){{{node.least},{'' if node.most is None else node.most}}}"


def pattern_terminal(terms: Terms) -> str:
    """The JSON strings of the texts of ``terms``, as an expression for a terminal."""
    wanted = [f'/"{_quoted(node)}"/' for node in terms.wanted]
    return " & ".join(wanted + [f'~/"{_quoted(node)}"/' for node in terms.unwanted])


def length_terminal(least: int, most: int | None) -> str:
    """The JSON strings of ``least`` to ``most`` characters."""
    return f'/"(?:{_CHAR}){{{least},{"" if most is None else most}}}"/'


def literal(text: str) -> str:
    """``text`` as a literal of Lark, which may hold no character that could be taken for a control."""
    return json.dumps(text).replace("\x7f", "\\u007f")


def literal_json(value: object) -> str:
    """``value`` as JSON, as a literal of Lark."""
    return literal(json.dumps(value, ensure_ascii=False))


# ---- what is known of a pattern without compiling it


def lengths(node: Node, most: int) -> int:
    """The lengths of the texts of ``node``: bit n is set if one has n characters.

    Lengths over ``most`` are left out.
    """
    every = (1 << (most + 1)) - 1
    if isinstance(node, Chars):
        return 2 & every if node.ranges else 0
    if isinstance(node, Alt):
        bits = 0
        for option in node.options:
            bits |= lengths(option, most)
        return bits
    if isinstance(node, Cat):
        bits = 1
        for part in node.parts:
            bits = _sums(bits, lengths(part, most), every)
        return bits
    assert isinstance(node, Repeat)
    once, bits = lengths(node.part, most), 1
    for _ in range(min(node.least, most + 1)):
        bits = _sums(bits, once, every)
    for _ in range(most + 1 if node.most is None else min(node.most - node.least, most + 1)):
        more = bits | _sums(bits, once, every)
        if more == bits:
            break
        bits = more
    return bits


def _sums(some: int, others: int, every: int) -> int:
    if some == every and others:
        return every & ~((others & -others) - 1)
    bits, shift = 0, 0
    while others:
        zeros = (others & -others).bit_length() - 1
        shift += zeros
        bits |= some << shift
        others >>= zeros + 1
        shift += 1
    return bits & every


def with_length(node: Node, least: int, most: int | None) -> Repeat | None:
    """``node`` cut to a length, where it is a repetition of single characters; None if it is not."""
    while isinstance(node, Cat) and len(node.parts) == 1:
        node = node.parts[0]
    if not isinstance(node, Repeat) or not isinstance(node.part, Chars):
        return None
    high = node.most if most is None else most if node.most is None else min(most, node.most)
    return Repeat(node.part, max(least, node.least), high)


def holds(terms: Terms, text: str) -> bool:
    """Whether ``terms`` hold ``text``. No time beyond the product of both sizes is spent."""
    return all(_matches(node, text) for node in terms.wanted) and not any(
        _matches(node, text) for node in terms.unwanted
    )


def _matches(node: Node, text: str) -> bool:
    return len(text) in _ends(node, text, {0})


def _ends(node: Node, text: str, starts: set[int]) -> set[int]:
    """Where matches of ``node`` may end that start at one of ``starts``."""
    if isinstance(node, Chars):
        return {
            at + 1 for at in starts
            if at < len(text) and any(low <= ord(text[at]) <= high for low, high in node.ranges)
        }  # fmt: skip
    if isinstance(node, Alt):
        return set().union(*[_ends(option, text, starts) for option in node.options])
    if isinstance(node, Cat):
        for part in node.parts:
            starts = _ends(part, text, starts)
        return starts
    assert isinstance(node, Repeat)
    for _ in range(min(node.least, len(text) + 1)):
        starts = _ends(node.part, text, starts)
    reached, new, left = set(starts), starts, None if node.most is None else node.most - node.least
    while new and left != 0:
        new = _ends(node.part, text, new) - reached
        reached |= new
        left = None if left is None else left - 1
    return reached
