"""Filters, tests and methods of texts as chat templates have them: Jinja's, with limits, of the plain texts behind
shadows.

What they make keeps the shadows: so a text of a user stays that, whatever a template does with it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from jinja2 import Environment, nodes, pass_environment, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS

from nemo_engine.text import shadow
from nemo_engine.text.template_meter import check_numbers, meter

_REFUSED_FILTERS = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
_REFUSED_METHODS = ("encode", "maketrans", "translate")
_PADDING_METHODS = ("center", "expandtabs", "ljust", "rjust", "zfill")
_SIZED_FILTERS = ("batch", "center", "indent", "round", "slice", "truncate", "tojson")
_WALKING_FILTERS = ("format", "string", "sum", "tojson")


def call_of_text(text: str, name: str, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``text.name(*args)``, with limits."""
    if name in _REFUSED_METHODS:
        raise SecurityError(f"the method {name} of texts is not available")
    if name in _PADDING_METHODS:
        check_numbers(name, (*args, *kwargs.values()))
    elif name == "join" and args:
        args = (list(args[0]), *args[1:])
        meter().charge_value(args)
        meter().charge(len(text) * len(args[0]))
    elif name == "replace" and len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
        meter().charge(len(text) + len(args[1]) * (shadow.plain(text).count(shadow.plain(args[0]))))
    result = shadow.call_method(text, name, method, args, kwargs)
    meter().charge(len(result) if isinstance(result, (str, list, tuple)) else 1)
    return result


def made_filters() -> dict[str, Callable[..., Any]]:
    """All filters of templates, by name."""
    filters = {name: _filter(name, function) for name, function in (FILTERS | _OUR_FILTERS).items()}
    return {name: function for name, function in filters.items() if name not in _REFUSED_FILTERS}


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        current = meter()
        current.step()
        if name in _SIZED_FILTERS:
            check_numbers(f"the filter {name}", (*args[1:], *kwargs.values()))
        if name in _WALKING_FILTERS:
            current.charge_value((args, kwargs))
        result = function(*args, **kwargs)
        if isinstance(result, (str, list, tuple)):
            current.charge(len(result))
        return result

    return wrapped


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return shadow.from_escapes(text) if ensure_ascii else text


def are_equal(left: Any, right: Any) -> bool:
    """``left == right`` of the plain texts in them."""
    meter().step()
    if isinstance(left, (list, tuple)) and type(left) is type(right):
        return left == right or (len(left) == len(right) and all(map(are_equal, left, right)))
    if isinstance(left, dict) and isinstance(right, dict):
        return left == right or (left.keys() == right.keys() and all(are_equal(left[key], right[key]) for key in left))
    return shadow.are_equal(left, right)


def _ordered(name: str, num_before: int) -> Callable[..., Any]:
    """A filter that orders or compares elements, by their plain texts; ``attribute`` follows ``num_before`` other
    arguments.
    """

    @pass_environment
    def applied(environment: Environment, value: Any, *args: Any, attribute: Any = None, **kwargs: Any) -> Any:
        if len(args) > num_before:
            attribute = args[num_before]
        wanted = ",".join(f"0.{name_part}" for name_part in str(attribute).split(",")) if attribute is not None else 0
        items = list(value)
        meter().charge_value(items)
        pairs = [(shadow.plain_value(element), element) for element in items]
        result = FILTERS[name](environment, pairs, *args[:num_before], attribute=wanted, **kwargs)
        if name in ("min", "max"):
            return result[1] if isinstance(result, tuple) else result
        return [element for _, element in result]

    return applied


def _escape(value: Any) -> Any:
    """``value`` for HTML."""
    text = shadow.as_text(value)
    if hasattr(value, "__html__") or not shadow.has_shadow(text):
        return FILTERS["escape"](value)
    meter().charge(6 * len(text))
    return FILTERS["safe"](
        "".join([FILTERS["escape"](plain) if (plain := shadow.plain(char)) in "&<>\"'" else char for char in text])
    )


def _urlencode(value: Any) -> Any:
    """Texts with % in them, in which what stays as it is keeps its shadow."""
    if not isinstance(value, str):
        return FILTERS["urlencode"](value)
    meter().charge(12 * len(value))
    quoted = [(char, FILTERS["urlencode"](shadow.plain(char))) for char in value]
    return "".join([char if len(quoted_char) == 1 else quoted_char for char, quoted_char in quoted])


@pass_eval_context
def _join(context: nodes.EvalContext, value: Any, d: str = "", attribute: Any = None) -> Any:
    parts = list(value)
    meter().charge_value((parts, d))
    meter().charge(len(parts) * len(str(d)))
    return FILTERS["join"](context, parts, d, attribute)


def _text_filter(name: str) -> Callable[..., Any]:
    def applied(value: Any, *args: Any) -> Any:
        text = shadow.as_text(value)
        return call_of_text(text, name, getattr(text, name), args, {})

    return applied


def _title(value: Any) -> str:
    text = shadow.as_text(value)
    return shadow.like(text, FILTERS["title"](shadow.plain(text)))


def _replace(value: Any, old: str, new: str, count: int | None = None) -> Any:
    text = shadow.as_text(value)
    more = () if count is None else (count,)
    return call_of_text(text, "replace", text.replace, (str(old), str(new), *more), {})


def _trim(value: Any, chars: str | None = None) -> Any:
    text = shadow.as_text(value)
    return call_of_text(text, "strip", text.strip, () if chars is None else (chars,), {})


def _number(name: str) -> Callable[..., Any]:
    def applied(value: Any, *args: Any, **kwargs: Any) -> Any:
        return FILTERS[name](shadow.plain_value(value), *args, **kwargs)

    return applied


_OUR_FILTERS: dict[str, Callable[..., Any]] = {
    "tojson": _tojson,
    "string": shadow.as_text,
    "join": _join,
    "title": _title,
    "replace": _replace,
    "trim": _trim,
    "urlencode": _urlencode,
    **dict.fromkeys(("e", "escape"), _escape),
    "forceescape": lambda value: _escape(str(value)),
    "sort": _ordered("sort", 2),
    **{name: _ordered(name, 1) for name in ("unique", "min", "max")},
    **{name: _text_filter(name) for name in ("capitalize", "lower", "upper")},
    **{name: _number(name) for name in ("int", "float")},
}
OUR_TESTS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("eq", "==", "equalto"), are_equal),
    **dict.fromkeys(("ne", "!="), lambda left, right: not are_equal(left, right)),
    "in": shadow.is_in,
    "lower": lambda value: shadow.plain(str(value)).islower(),
    "upper": lambda value: shadow.plain(str(value)).isupper(),
}
