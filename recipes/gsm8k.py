"""The environment of gsm8k.yaml: a word problem, two worked ones before it, and a calculator."""

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
EXAMPLES = [
    ("Tom has 3 bags with 25 nuts each and eats 8. How many nuts are left?", "3 * 25 - 8", "67"),
    (
        "Eva has 34 stamps, and her aunt has 4 times as many. How many do they have together?",
        "34 + 4 * 34",
        "170",
    ),
]
"""A problem, the sum, and what it is."""


class Solver:
    """Works some problems out before it asks for that of the data."""

    def reset(self, prompt: list[dict[str, str]]) -> list[dict[str, str]]:
        """Go on from the problem with examples, and ask for it again."""
        turns = ["Show me how."]
        for problem, term, value in EXAMPLES:
            answer = f"<tool_response>\n{value}\n</tool_response>"
            turns += [ASK + problem, f"calculator({term})", answer, f"#### {value}"]
        turns.append(ASK + prompt[-1]["content"])
        roles = ["assistant", "user"] * (len(turns) // 2)
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
