"""The environment of calculator.yaml: sums with two- and three-digit numbers, and a calculator."""

import ast
import operator
import re

ASK = "Write a call of the calculator for: "
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


class Calculator:
    """Shows one sum that is worked out, and asks for another."""

    def reset(self, question: str) -> list[dict[str, str]]:
        """Go on from the first message, the question of the example."""
        turns = ["calculator(35 + 148)", "<tool_response>\n183\n</tool_response>", "183"]
        roles = ["assistant", "user", "assistant", "user"]
        contents = [*turns, ASK + question]
        return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]

    def calculator(self, expression: str) -> str:
        """Work out a sum.

        Args:
            expression: Whole numbers with +, - or * between them.
        """
        return str(_value(ast.parse(expression.strip(), mode="eval").body))


class Mute(Calculator):
    """The control: its answers say nothing, so that what is right must have come from elsewhere."""

    def calculator(self, expression: str) -> str:
        """Work out a sum.

        Args:
            expression: Whole numbers with +, - or * between them.
        """
        super().calculator(expression)
        return "?"


def _value(node: ast.AST) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 10**9:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    raise ValueError("only whole numbers with +, - and * between them can be worked out")


def right(completions: list[list[dict[str, str]]], answer: list[str]) -> list[float]:
    """Whether the last turn says the right number, once, and nothing else that is a number."""
    return [float(_numbers(chat[-1]) == [a]) for chat, a in zip(completions, answer, strict=True)]


def _numbers(message: dict[str, str]) -> list[str]:
    """The numbers of a turn of the policy, without the commas of thousands; none of another's."""
    if message["role"] != "assistant":
        return []
    return re.findall(r"-?\d+", message["content"].replace(",", ""))
