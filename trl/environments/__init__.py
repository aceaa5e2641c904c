"""Environments: what a policy talks to over many turns, and the tools that it calls.

contract.py  what a user writes: a class of environments, or tools; how it is recognised
running.py   the environments of a batch, side by side
calls.py     how models write calls of tools
turns.py     how turns follow one another in the tokens of a chat template
episodes.py  a sampler whose responses are whole conversations
scorer.py    what environments gave, as scores
openenv.py   environments behind a server of OpenEnv
jobs.py      calls of code that may take too long: threads, an event loop, children

The names below load their module on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl.environments.contract import EpisodeError, Reply, Turn, tool
    from trl.environments.episodes import Episodes, episode_figures, episodes_of
    from trl.environments.openenv import OpenEnv
    from trl.environments.running import World
    from trl.environments.scorer import EnvironmentReward

_HOME = {
    "EnvironmentReward": "scorer",
    "EpisodeError": "contract",
    "Episodes": "episodes",
    "OpenEnv": "openenv",
    "Reply": "contract",
    "Turn": "contract",
    "World": "running",
    "episode_figures": "episodes",
    "episodes_of": "episodes",
    "tool": "contract",
}

__all__ = [
    "EnvironmentReward",
    "EpisodeError",
    "Episodes",
    "OpenEnv",
    "Reply",
    "Turn",
    "World",
    "episode_figures",
    "episodes_of",
    "tool",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
