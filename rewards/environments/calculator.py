"""A calculator as a tool: the policy writes an expression between `<calc>` and `</calc>`, and gets its value."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
LONGEST = 200
"""Characters of an expression."""


class Calculator:
    """Answers every call of the tool. A response without a call is the answer, which must equal the prompt's.

    Args:
        opening, closing: what stands around an expression.
        value: how its value is given; `{value}` is replaced.
    """

    def __init__(self, opening: str = "<calc>", closing: str = "</calc>", value: str = "{value}") -> None:
        self._call = re.compile(f"{re.escape(opening)}(.*?){re.escape(closing)}", re.DOTALL)
        self._value, self._answer = value, ""

    def reset(self, prompt: dict[str, Any]) -> None:
        self._answer = prompt["answer"]

    def step(self, response: str) -> tuple[str | None, float, bool]:
        calls = self._call.findall(response)
        if not calls:
            return None, float(response.strip() == self._answer.strip()), True
        return self._value.format(value=evaluate(calls[-1])), 0.0, False


def evaluate(text: str) -> str:
    """The value of an arithmetic expression, or `error: ...`."""
    try:
        if len(text) > LONGEST:
            raise ValueError(f"more than {LONGEST} characters")
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (ArithmeticError, SyntaxError, ValueError, RecursionError) as error:
        return f"error: {error}"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("only numbers, + - * / // % and brackets")
