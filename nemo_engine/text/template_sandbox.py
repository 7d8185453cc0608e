"""Jinja for chat templates: transformers' environment, with limits of what a template may cost and no way out of it.

The same filters, functions and tags as transformers has (``raise_exception``, ``strftime_now``, ``tojson`` without HTML
escapes, loop controls, ``generation``), less the few that no chat needs and that cost or chance much. Every loop, call
and filter takes a step of the ``Meter``, and what makes text or lists says first how much. Questions that a template
asks of texts see through shadows (``shadow``).
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Namespace

from nemo_engine.text import shadow
from nemo_engine.text.template_filters import OUR_TESTS, are_equal, call_of_text, made_filters
from nemo_engine.text.template_generator import TemplateGenerator
from nemo_engine.text.template_meter import TemplateLimitError, check_numbers, meter

_MAX_BITS = 1 << 16  # of an integer
_DICT_ATTRIBUTES = frozenset(dir(dict))
_TEXT_METHODS = frozenset(name for name in dir(str) if not name.startswith(("_", "format")))
_WIDE = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)|\{[^{}]*\d{5}")  # a width of five digits, or one that is an argument
_QUOTED = re.compile(r"%[^a-zA-Z%]*[ra]")  # what writes a shadow as an escape
_ORDERS: dict[str, Callable[[Any, Any], Any]] = {
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
}
_INNER_FIELD = re.compile(r"\{[^{}]*\{")
_MAX_DATE_FORMAT = 200


class TemplateRefusal(TemplateError):
    """What a template raises by itself: it does not take the conversation."""


class _Generation(Extension):
    """``{% generation %}``, which marks what an assistant wrote: here it is what stands in it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call that returns its content."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Macro) -> str:
        return str(caller())


class _Dict:
    """``dict`` of templates: nothing but what makes one."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    """``namespace`` of templates, without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as Jinja's, so that namespace(self=...) works
        current, args = args[0], args[1:]
        mapping = dict(*args, **kwargs)
        for name in mapping:
            _check_attribute(name)
        Namespace.__init__(current, mapping)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # its values may hold each other many times over


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no attribute that begins with an underscore, got {name!r}")


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment of all chat templates."""

    code_generator_class = TemplateGenerator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        # Constants are not computed while a template is compiled, where no limit would hold.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_Generation, loopcontrols],
            finalize=_finalize,
        )
        self.filters = made_filters()
        self.tests = TESTS | OUR_TESTS
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            raise TemplateLimitError(f"line {node.lineno} reads another file, which a chat template may not")
        counted: Iterable[Any] = tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))
        for block in counted:
            size = sum(len(data.data) for part in block.body for data in _data(part))
            call = nodes.Call(nodes.EnvironmentAttribute("tick"), [nodes.Const(size)], [], None, None)
            block.body.insert(0, nodes.ExprStmt(call, lineno=block.lineno))
        tree.set_environment(self)
        return tree

    def tick(self, num_chars: int) -> None:
        """A turn of a loop or a call of a macro, whose own text has ``num_chars``."""
        current = meter()
        current.step()
        current.charge(num_chars)

    def compare(self, operator: str, left: Any, right: Any) -> bool:
        """Comparisons of plain texts."""
        if operator in ("eq", "ne"):
            return are_equal(left, right) == (operator == "eq")
        if operator in ("in", "notin"):
            return shadow.is_in(left, right) == (operator == "in")
        return bool(_ORDERS[operator](shadow.plain_value(left), shadow.plain_value(right)))

    def joined(self, parts: tuple[Any, ...]) -> str:
        """The parts as one text."""
        meter().charge_value(parts)
        return "".join([shadow.as_text(part) for part in parts])

    def added(self, context: Context, terms: tuple[Any, ...]) -> Any:
        """``a + b + ...``: texts at once, and anything else one after the other."""
        size = 0
        for term in terms:
            if type(term) is not str:
                return functools.reduce(lambda left, right: self.call_binop(context, "+", left, right), terms)
            size += len(term)
        meter().charge(size)
        return "".join(terms)

    def made(self, value: Any) -> Any:
        """A new list, tuple or object.

        One that holds another twice is as large as both: so none can grow beyond all bounds.
        """
        meter().charge_value(value)
        return value

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call in a template."""
        meter().step()
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str):
            for current in ("_loop_vars", "_block_vars"):  # Jinja's, for functions that want the context
                kwargs.pop(current, None)
            return call_of_text(owner, name, function, args, kwargs)
        if isinstance(owner, dict) and name == "get" and args:
            args = (_key(owner, args[0]), *args[1:])
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``format`` of texts, with limits."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None
        text: str = value.__self__

        def wrapped(*args: Any, **kwargs: Any) -> str:
            _check_widths(text)
            if _INNER_FIELD.search(text):
                check_numbers("format", (*args, *kwargs.values()))
            meter().charge_value((text, args, kwargs))
            return inner(*args, **kwargs)

        return wrapped

    def getattr(self, obj: Any, attribute: str) -> Any:
        """``obj.attribute``; what nearly all templates ask for, fields of messages and methods of texts, needs no
        further look.
        """
        if type(obj) is dict and attribute in obj and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute]
        if type(obj) is str and attribute in _TEXT_METHODS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, value: Any, argument: Any) -> Any:
        """``value[argument]``."""
        if type(value) is dict and argument.__hash__ is not None and argument in value:
            return value[argument]
        return super().getitem(value, _key(value, argument) if isinstance(value, dict) else argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operation that may make much of little."""
        if operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            meter().charge(len(left) + len(right))
        elif operator in ("*", "**"):
            _check_product(operator, left, right)
        elif operator == "%" and isinstance(left, str):
            _check_widths(left)
            meter().charge_value((left, right))
            return shadow.from_escapes(left % right) if _QUOTED.search(left) else left % right
        return super().call_binop(context, operator, left, right)


def _data(node: nodes.Node) -> list[nodes.TemplateData]:
    return [node] if isinstance(node, nodes.TemplateData) else list(node.find_all(nodes.TemplateData))


@pass_context
def _finalize(_: Context, value: Any) -> Any:
    """What ``{{ }}`` writes. It takes the context so that nothing is computed while a template is compiled."""
    meter().charge_value(value)
    return shadow.as_text(value) if isinstance(value, (list, dict, tuple)) else value


def _raise(message: object = "") -> None:
    raise TemplateRefusal(shadow.plain(str(message)))


def _strftime_now(form: str) -> str:
    if len(form) > _MAX_DATE_FORMAT or re.search(r"\d\d\d", form):
        raise TemplateLimitError(f"strftime_now takes a format of at most {_MAX_DATE_FORMAT} characters without widths")
    return meter().now.strftime(form)


def _key(owner: dict[Any, Any], key: Any) -> Any:
    return shadow.plain(key) if isinstance(key, str) and key not in owner else key


def _check_widths(text: str) -> None:
    if _WIDE.search(text):
        raise TemplateLimitError(f"a format takes widths of at most 4 digits, got {text[:80]!r}")


def _check_product(operator: str, left: Any, right: Any) -> None:
    if isinstance(right, (str, list, tuple)):
        left, right = right, left
    if isinstance(left, (str, list, tuple)) and isinstance(right, int):
        meter().charge(len(left) * max(0, right))
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MAX_BITS:
            raise TemplateLimitError(f"a number may have at most {_MAX_BITS} bits")
