"""How models write tool calls, and how they are read out of what a policy has written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Call:
    """A tool call that could be read."""

    name: str
    arguments: dict[str, Any]
    id: str = ""
    """What the model calls the call, if it does: Mistral's answers name it."""


@dataclass(frozen=True)
class BadCall:
    """What looks like a tool call and cannot be read."""

    text: str
    """As it was written."""
    problem: str
    """What is wrong, in sentences that a model can act on."""
