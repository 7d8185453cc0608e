"""Jinja for chat templates: transformers' environment, with limits of what a template may cost and no way out of it.

The same filters, functions and tags as transformers has (``raise_exception``, ``strftime_now``, ``tojson`` without HTML escapes, loop controls,
``generation``), less the few that no chat needs and that cost or chance much. Every loop, call and filter takes a step of the ``Meter``,
and what makes text or lists says first how much. Questions that a template asks of texts see through shadows (``shadow``).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import TemplateError, nodes, pass_context, pass_eval_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Namespace

from nemo_engine.text import shadow
from nemo_engine.text.template_meter import TemplateLimitError, check_numbers, meter

_REFUSED_FILTERS = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
_REFUSED_METHODS = ("encode", "maketrans", "translate")
_PADDING_METHODS = ("center", "expandtabs", "ljust", "rjust", "zfill")
_SIZED_FILTERS = ("batch", "center", "indent", "round", "slice", "truncate", "tojson")
_WALKING_FILTERS = ("format", "string", "sum", "tojson")
_MAX_BITS = 1 << 16  # of an integer
_WIDE = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)|\{[^{}]*\d{5}")  # a width of five digits, or one that is an argument
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


class _Generator(CodeGenerator):
    """Comparisons, ``~`` and new lists go through the environment."""

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        if len(node.ops) == 1 and node.ops[0].op in ("eq", "ne", "in", "notin"):
            self.write(f"environment.compare({node.ops[0].op!r}, ")
            self.visit(node.expr, frame)
            self.write(", ")
            self.visit(node.ops[0].expr, frame)
            self.write(")")
        else:
            super().visit_Compare(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        if isinstance(node.node, nodes.EnvironmentAttribute):
            assert isinstance(node.args[0], nodes.Const)
            self.write(f"environment.tick({node.args[0].value})")
        else:
            super().visit_Call(node, frame, forward_caller=forward_caller)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._visit_made(node, node.items, super().visit_List, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        items = node.items if node.ctx == "load" else []
        self._visit_made(node, items, super().visit_Tuple, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._visit_made(node, [pair.value for pair in node.items], super().visit_Dict, frame)

    def _visit_made(self, node: Any, parts: list[Any], visit: Callable[[Any, Frame], None], frame: Frame) -> None:
        is_made = not all(isinstance(part, nodes.Const) for part in parts)
        self.write("environment.made(" if is_made else "")
        visit(node, frame)
        self.write(")" if is_made else "")


class _Dict:
    """``dict`` of templates: nothing but what makes one."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Namespace(Namespace):
    """``namespace`` of templates, without attributes that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as Jinja's, so that namespace(self=...) works
        current, args = args[0], args[1:]
        made = dict(*args, **kwargs)
        for name in made:
            _check_attribute(name)
        Namespace.__init__(current, made)

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

    code_generator_class = _Generator
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
        self.filters = {name: _filter(name, made) for name, made in (FILTERS | _FILTERS).items()}
        for name in _REFUSED_FILTERS:
            del self.filters[name]
        self.tests = TESTS | _TESTS
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
        """``==``, ``!=``, ``in`` and ``not in`` of plain texts."""
        if operator in ("eq", "ne"):
            return shadow.are_equal(left, right) == (operator == "eq")
        return shadow.is_in(left, right) == (operator == "in")

    def joined(self, parts: tuple[Any, ...]) -> str:
        """The parts as one text."""
        meter().charge_value(parts)
        return "".join([shadow.as_text(part) for part in parts])

    def made(self, value: Any) -> Any:
        """A new list, tuple or object. One that holds another twice is as large as both: so none can grow beyond all bounds."""
        meter().charge_value(value)
        return value

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call in a template."""
        meter().step()
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str):
            for current in ("_loop_vars", "_block_vars"):  # Jinja's, for functions that want the context
                kwargs.pop(current, None)
            return _call_of_text(owner, name, function, args, kwargs)
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

    def getitem(self, value: Any, argument: Any) -> Any:
        """``value[argument]``."""
        if type(value) is dict and argument.__hash__ is not None and argument in value:
            return value[argument]
        return super().getitem(value, _key(value, argument) if isinstance(value, dict) else argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operation that may make much of little."""
        if type(left) is str and type(right) is str and operator == "+":  # by far the usual one
            meter().charge(len(left) + len(right))
            return left + right
        if operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            meter().charge(len(left) + len(right))
        elif operator in ("*", "**"):
            _check_product(operator, left, right)
        elif operator == "%" and isinstance(left, str):
            _check_widths(left)
            meter().charge_value((left, right))
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


def _call_of_text(text: str, name: str, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
    made = shadow.call_method(text, name, method, args, kwargs)
    meter().charge(len(made) if isinstance(made, (str, list, tuple)) else 1)
    return made


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        current = meter()
        current.step()
        if name in _SIZED_FILTERS:
            check_numbers(f"the filter {name}", (*args[1:], *kwargs.values()))
        if name in _WALKING_FILTERS:
            current.charge_value((args, kwargs))
        made = function(*args, **kwargs)
        if isinstance(made, (str, list, tuple)):
            current.charge(len(made))
        return made

    return wrapped


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_eval_context
def _join(context: nodes.EvalContext, value: Any, d: str = "", attribute: Any = None) -> Any:
    parts = list(value)
    meter().charge_value((parts, d))
    meter().charge(len(parts) * len(str(d)))
    return FILTERS["join"](context, parts, d, attribute)


def _text_filter(name: str) -> Callable[..., Any]:
    def applied(value: Any, *args: Any) -> Any:
        text = shadow.as_text(value)
        return _call_of_text(text, name, getattr(text, name), args, {})

    return applied


def _title(value: Any) -> str:
    text = shadow.as_text(value)
    return shadow.like(text, FILTERS["title"](shadow.plain(text)))


def _replace(value: Any, old: str, new: str, count: int | None = None) -> Any:
    text = shadow.as_text(value)
    more = () if count is None else (count,)
    return _call_of_text(text, "replace", text.replace, (str(old), str(new), *more), {})


def _trim(value: Any, chars: str | None = None) -> Any:
    text = shadow.as_text(value)
    return _call_of_text(text, "strip", text.strip, () if chars is None else (chars,), {})


def _number(name: str) -> Callable[..., Any]:
    def applied(value: Any, *args: Any, **kwargs: Any) -> Any:
        return FILTERS[name](shadow.plain_value(value), *args, **kwargs)

    return applied


_FILTERS: dict[str, Callable[..., Any]] = {
    "tojson": _tojson,
    "string": shadow.as_text,
    "join": _join,
    "title": _title,
    "replace": _replace,
    "trim": _trim,
    **{name: _text_filter(name) for name in ("capitalize", "lower", "upper")},
    **{name: _number(name) for name in ("int", "float")},
}
_TESTS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("eq", "==", "equalto"), shadow.are_equal),
    **dict.fromkeys(("ne", "!="), lambda left, right: not shadow.are_equal(left, right)),
    "in": shadow.is_in,
    "lower": lambda value: shadow.plain(str(value)).islower(),
    "upper": lambda value: shadow.plain(str(value)).isupper(),
}
