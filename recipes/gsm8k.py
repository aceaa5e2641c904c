"""The environment of gsm8k.yaml: a word problem, a worked example and a calculator."""

import ast
import operator
from fractions import Fraction

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
ASK = "Write a call of the calculator for: "
EXAMPLE = ASK + "Tom has 3 bags with 25 nuts each and eats 8. How many nuts are left?"


class Solver:
    """Works one problem out before it asks for that of the data."""

    def reset(self, prompt: list[dict[str, str]]) -> list[dict[str, str]]:
        """Go on from the problem with an example, and ask for it again."""
        answer = "<tool_response>\n67\n</tool_response>"
        again = ASK + prompt[-1]["content"]
        turns = ["Show me one.", EXAMPLE, "calculator(3 * 25 - 8)", answer, "#### 67", again]
        roles = ["assistant", "user"] * 3
        return [{"role": r, "content": text} for r, text in zip(roles, turns, strict=True)]

    def calculator(self, expression: str) -> str:
        """Work out a sum.

        Args:
            expression: Numbers with +, -, *, / and brackets.
        """
        value = _value(ast.parse(expression.strip(), mode="eval").body)
        return str(value.numerator) if value.denominator == 1 else f"{float(value):g}"


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value < 10**9:
        return Fraction(str(node.value))
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    raise ValueError("only numbers with +, -, *, / and brackets can be worked out")
