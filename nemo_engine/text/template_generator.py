"""``TemplateGenerator``: makes the Python code of a chat template such that the environment sees every operation that
may be costly or unsafe.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame


class TemplateGenerator(CodeGenerator):
    """Comparisons, ``~``, sums and new lists go through the environment."""

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        if len(node.ops) == 1:
            self.write(f"environment.compare({node.ops[0].op!r}, ")
            self.visit(node.expr, frame)
            self.write(", ")
            self.visit(node.ops[0].expr, frame)
            self.write(")")
        else:
            super().visit_Compare(node, frame)  # a < b < c

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        terms: list[nodes.Expr] = [node.right]
        while isinstance(node.left, nodes.Add):
            node = node.left
            terms.append(node.right)
        terms.append(node.left)
        self.write("environment.added(context, (")
        for term in reversed(terms):
            self.visit(term, frame)
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
