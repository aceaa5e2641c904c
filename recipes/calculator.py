"""The environment of calculator.yaml: a sum with two- and three-digit numbers, and a calculator."""

import ast
import operator
import re

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def calculator(expression: str) -> str:
    """Work out a sum.

    Args:
        expression: Numbers with +, - or * between them.
    """
    return str(_value(ast.parse(expression.strip(), mode="eval").body))


def unreadable(expression: str) -> str:
    """Work out a sum.

    Args:
        expression: Numbers with +, - or * between them.
    """
    calculator(expression)
    return "?"


def _value(node: ast.AST) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 10**9:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    raise ValueError("only whole numbers with +, - and * between them")


def right(environments_messages=None, completions=None, answer=None, **columns):
    """Whether the last turn, which calls no tool, has the right number and no other."""
    return [float(_said(messages) == [number]) for messages, number in zip(completions, answer, strict=True)]


def _said(messages):
    """The numbers of an answer, without the commas of thousands."""
    last = messages[-1]
    if last["role"] != "assistant" or "<tool_call>" in last["content"]:
        return None
    return re.findall(r"-?\d+", last["content"].replace(",", ""))
