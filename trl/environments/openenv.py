"""Environments of OpenEnv: behind a server, through the package `openenv`.

echo = partial(OpenEnv, "http://127.0.0.1:8000", action="message", told="echoed_message")
trl.train(model, 64, environment=echo)
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any

from trl.config.errors import needed, refuse
from trl.environments.contract import Turn

__all__ = ["OpenEnv"]


class OpenEnv:
    """An environment behind a server of OpenEnv, as a game: what the policy writes is an action.

    Each has a session of its own on the server, which must allow as many as there are rows in a
    batch (`max_concurrent_envs` there). For an environment of several tools, or actions of several
    fields, write a class with a method for each around the client of the environment.

    Args:
        base_url: Of the server.
        action: The field of an action that gets what the policy wrote in a turn.
        told: The field of an observation that the policy is told; None: all of it, as JSON.
        columns: Columns of the rows that the server's `reset` gets, besides the seed.

    Raises:
        ImportError: if the package `openenv` is not there.
    """

    def __init__(
        self,
        base_url: str,
        *,
        action: str = "message",
        told: str | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        make = needed("openenv", "OpenEnv").GenericEnvClient
        self._client = make(base_url=base_url)
        self._action, self._field, self._columns = action, told, tuple(columns)

    async def reset(self, seed: int, **row: Any) -> str | None:
        """Begin an episode, and return what is observed."""
        if missing := [name for name in self._columns if name not in row]:
            refuse("columns", "be columns of the rows", missing, f"there are {list(row)}")
        given = {name: row[name] for name in self._columns}
        return self._told(await self._client.reset(seed=seed, **given))

    async def step(self, text: str) -> Turn:
        """Send the text of a turn as an action."""
        result = await self._client.step({self._action: text})
        return Turn(self._told(result), float(result.reward or 0.0), bool(result.done))

    async def close(self) -> None:
        """End the session."""
        ended = self._client.close()
        if inspect.isawaitable(ended):
            await ended

    def _told(self, result: Any) -> str | None:
        """Return what the policy is told of a result."""
        seen = result.observation
        if self._field is not None:
            if self._field not in seen:
                refuse("told", "be a field of the observation", self._field, f"one of {list(seen)}")
            seen = seen[self._field]
        is_text = seen is None or isinstance(seen, str)
        return seen if is_text else json.dumps(seen, ensure_ascii=False)
