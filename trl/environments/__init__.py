"""Environments: what a policy talks to over many turns, and the tools that it calls.

contract.py  what a user writes: a class of environments, or tools; how it is recognised
running.py   the environments of a batch, side by side
jobs.py      calls of code that may take too long: threads, an event loop, children

The names below load their module on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl.environments.contract import EpisodeError, Reply, Turn, tool
    from trl.environments.running import World

_HOME = {
    "EpisodeError": "contract",
    "Reply": "contract",
    "Turn": "contract",
    "World": "running",
    "tool": "contract",
}

__all__ = ["EpisodeError", "Reply", "Turn", "World", "tool"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
