"""The environments of a batch, side by side."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

from trl.config import check_values
from trl.config.errors import closest, refuse, shown
from trl.config.types import Count, Positive, Whole
from trl.environments.calls import BadCall, Call
from trl.environments.contract import (
    ROUTE,
    Kind,
    Reply,
    Turn,
    Words,
    broken,
    number_of,
    prompt_of,
    text_of,
    turn_of,
)
from trl.environments.jobs import Chance, Hangs, Job, Jobs
from trl.evaluation.scores import described

__all__ = ["World"]

OnBadCall = Literal["answer", "end"]
Asked: TypeAlias = str | Call | BadCall
"""What one environment gets: the text of a turn, or a call."""


@dataclass
class Slot:
    """The place of a row in the batch."""

    kind: Kind
    environment: Any
    chance: Chance
    lost: bool = False
    """Whether a thread that hangs is still in the environment."""


class World:
    """The environments of a batch, side by side; see `contract.py` for what one is.

        world = World(Maze)
        prompts = world.reset([{"size": 4}, {"size": 5}], seeds=[0, 1])
        replies = world.respond([0, 1], texts, calls)
        rewards = world.rewards([0, 1])

    Environments are made once and kept from batch to batch. Tools run in threads, those that are
    `async` in one event loop; what a tool raises, or takes too long for, is told to the model, and
    never ends the run. See `tool` for other ways.

    Args:
        environment: A class, or a function that makes one; or a dict of such, of which the column
            `environment` of a row names one; None: there are tools alone.
        tools: Functions, also `async`, with types and docstrings.
        seconds: How long a call may take; `reset` takes as long as it likes.
        most_characters: Of what a tool or `step` returns; the rest is cut.
        most_hung: So many threads may hang at a time.
        on_bad_call: What a call that cannot be read does: it gets an "answer" that says so, or is
            the "end" of the episode.

    Raises:
        ValueError, TypeError: if a class or tool is not what it should be.
    """

    def __init__(
        self,
        environment: Callable[[], Any] | Mapping[str, Callable[[], Any]] | None = None,
        tools: Sequence[Callable[..., Any]] = (),
        *,
        seconds: float = 10.0,
        most_characters: int = 4000,
        most_hung: int = 8,
        on_bad_call: OnBadCall = "answer",
    ) -> None:
        checks = {
            "seconds": (Positive, seconds),
            "most_characters": (Count, most_characters),
            "most_hung": (Whole, most_hung),
            "on_bad_call": (OnBadCall, on_bad_call),
        }
        check_values("World", checks)
        if callable(tools):
            refuse("tools", "be a list of functions", shown(tools), "write [...] around it")
        self.seconds, self.most_characters, self.on_bad_call = seconds, most_characters, on_bad_call
        self.made_of = [environment, list(tools), *[value for _, value in checks.values()]]
        """What tells it from another."""
        self._routes = isinstance(environment, Mapping)
        self._jobs = Jobs(most_hung)
        self._slots: list[Slot] = []
        self._used = Counter[str]()
        self._raised = set[tuple[str, type]]()
        """What was warned of."""
        routes = environment if isinstance(environment, Mapping) else {"": environment}
        if not routes:
            refuse("environment", "name at least one environment", "{}")
        with Chance(0).swapped_in():
            self._kinds = {
                key: Kind(factory, tools, f"environment[{key!r}]" if key else "environment")
                for key, factory in routes.items()
            }
        self._kept = {key: [kind.first] for key, kind in self._kinds.items()}

    @property
    def hung(self) -> int:
        """How many threads hang now."""
        return self._jobs.hung

    @property
    def gives_rewards(self) -> bool:
        """Whether an environment has rewards of its own."""
        return any(k.plain or hasattr(k.first, "get_reward") for k in self._kinds.values())

    def schemas(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the JSON schemas of the tools that a row has; none in the plain form."""
        return self._kinds[self._key(row)].schemas

    def needs(self, row: Mapping[str, Any]) -> set[str]:
        """Return the columns that the `reset` of a row cannot do without."""
        return self._kinds[self._key(row)].needs

    def instances(self, slots: Sequence[int]) -> list[Any]:
        """Return the environments in some slots, for rewards that ask for what they know."""
        return [self._slots[slot].environment for slot in slots]

    def check(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Check that the environment of each row is there, and what its `reset` needs.

        Raises:
            ValueError: for the first row of which that is not so.
        """
        for index, row in enumerate(rows):
            kind = self._kinds[self._key(row, index)]
            if missing := sorted(kind.needs - row.keys()):
                fix = f"add it to the rows, or write {missing[0]}=None in {kind.name}.reset"
                rule = f"have the columns that {kind.name}.reset asks for, {missing}"
                refuse(f"row {index}", rule, list(row), fix)

    def _key(self, row: Mapping[str, Any], index: int | None = None) -> str:
        """Return the name of a row's environment."""
        if not self._routes:
            return ""
        name = row.get(ROUTE)
        if not isinstance(name, str) or name not in self._kinds:
            what = ROUTE if index is None else f"row {index}, {ROUTE}"
            got = shown(name) + closest(str(name), self._kinds)
            refuse(what, f"be one of {list(self._kinds)}", got, f"mend the column `{ROUTE}`")
        return name

    def reset(
        self, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int], *, beside: bool = False
    ) -> list[str | list[dict[str, Any]] | None]:
        """Begin an episode for each row, one after the other.

        Args:
            rows: Of the data; `reset` gets the columns that it accepts.
            seeds: Of each row: for `reset(seed=...)`, and for Python's and NumPy's global random
                states, which are left as they were.
            beside: Leave the environments of the last `reset` alone, which a reward may still
                read, and take others.
        Returns:
            What each `reset` returned.
        Raises:
            ValueError: see `check`.
            EpisodeError: if a `reset` raises, or returns something else.
        """
        self.check(rows)
        self._slots, prompts = [], []
        used = self._used = self._used if beside else Counter()
        for index, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
            key, chance = self._key(row), Chance(seed)
            kind, kept = self._kinds[key], self._kept[key]
            what = f"{kind.name}.reset"
            try:
                if used[key] == len(kept):
                    with Chance(seed).swapped_in():  # making it is no part of the episode
                        kept.append(kind.make())
                environment = kept[used[key]]
                with chance.swapped_in():
                    found = self._begin(kind, environment, row, seed)
            except Exception as error:
                broken(what, "begin an episode", f"{described(error)} (row {index})")
            used[key] += 1
            prompts.append(prompt_of(found, what))
            self._slots.append(Slot(kind, environment, chance))
        return prompts

    def respond(
        self,
        slots: Sequence[int],
        texts: Sequence[str],
        calls: Sequence[Sequence[Call | BadCall]],
    ) -> list[Reply]:
        """Let the environments of some slots answer the turn that the policy wrote in each.

        Args:
            slots: Of the last `reset`.
            texts: What the policy wrote: for environments of the plain form.
            calls: The tool calls in it: for the others.
        Raises:
            EpisodeError: if a `step` returns no `Turn`, its reward is no finite number, or too many
                threads hang.
        """
        places = [self._slots[slot] for slot in slots]
        asked: list[Sequence[Asked]] = [
            [text] if slot.kind.plain else [] if self._ends(some) else some
            for slot, text, some in zip(places, texts, calls, strict=True)
        ]
        answers: list[list[Any]] = [[] for _ in slots]
        for number in range(max(map(len, asked), default=0)):  # calls of a turn are in order
            now = [each for each, some in enumerate(asked) if number < len(some)]
            found = self._jobs.run([self._calls(places[each], asked[each][number]) for each in now])
            for each, answer in zip(now, found, strict=True):
                answers[each].append(answer)
                places[each].lost |= self._loses(places[each], asked[each][number], answer)
        return [self._reply(*each) for each in zip(places, calls, answers, strict=True)]

    def rewards(self, slots: Sequence[int]) -> list[float | None]:
        """Return what `get_reward` of the environments in some slots returns.

        Returns:
            A number for each; None: there is none, it returned None, or a tool hangs in it.
        Raises:
            EpisodeError: if it raises, takes too long, or returns no finite number.
        """
        places, found = [self._slots[slot] for slot in slots], list[float | None]()
        for slot, answer in zip(places, self._jobs.run([*map(self._asks, places)]), strict=True):
            what = f"{slot.kind.name}.get_reward"
            if isinstance(answer, BaseException):
                if not slot.lost:
                    broken(what, "return a number", described(answer))
                answer = None
            found.append(None if answer is None else number_of(answer, what))
        return found

    def close(self) -> None:
        """Let all environments end that have a method `close`."""
        for environment in [each for kept in self._kept.values() for each in kept]:
            if callable(end := getattr(environment, "close", None)):
                with suppress(Exception):  # the run is over, whatever it says
                    self._jobs.finished(end())
        self._jobs.close()

    # -- one environment -----------------------------------------------------------------------

    def _begin(self, kind: Kind, environment: Any, row: Mapping[str, Any], seed: int) -> Any:
        if environment is None:
            return None
        columns = {key: row[key] for key in row if not (self._routes and key == ROUTE)}
        return self._jobs.finished(environment.reset(**kind.given(columns, seed)))

    def _ends(self, calls: Sequence[Call | BadCall]) -> bool:
        return self.on_bad_call == "end" and any(isinstance(each, BadCall) for each in calls)

    def _loses(self, slot: Slot, asked: Asked, answer: Any) -> bool:
        """Tell whether a thread now hangs in an environment; the next `reset` has another then."""
        own = isinstance(asked, str) or (isinstance(asked, Call) and asked.name in slot.kind.own)
        if lost := own and isinstance(answer, Hangs):
            for key, kept in self._kept.items():
                self._kept[key] = [each for each in kept if each is not slot.environment]
                self._used[key] -= len(kept) - len(self._kept[key])
        return lost

    def _asks(self, slot: Slot) -> Job | None:
        """Return the call of `get_reward`, if there is one."""
        get_reward = getattr(slot.environment, "get_reward", None)
        return get_reward and self._job(slot, "get_reward", partial(get_reward), lambda x: x)

    def _calls(self, slot: Slot, asked: Asked) -> Job | Exception:
        """Return the call of `step` or of a tool; an error: why there is none."""
        kind, most = slot.kind, self.most_characters
        if isinstance(asked, BadCall):
            return Words(asked.problem)
        if isinstance(asked, str):
            step = partial(slot.environment.step, asked)
            return self._job(slot, "step", step, partial(turn_of, most=most))
        if asked.name not in kind.tools:
            return Words(f"there is no tool {shown(asked.name)}, there is {', '.join(kind.tools)}.")
        if slot.lost and asked.name in kind.own:
            return Words("an earlier call has not ended: nothing more can be called.")
        try:
            arguments = kind.tools[asked.name].read(asked.arguments)
        except Exception as error:  # also of what is nested too deep to be shown
            return error
        call = partial(kind.function_of(asked.name, slot.environment), **arguments)
        return self._job(slot, asked.name, call, partial(text_of, most=most))

    def _job(self, slot: Slot, name: str, call: Any, finish: Callable[[Any], Any]) -> Job:
        return Job(f"{slot.kind.name}.{name}", call, finish, slot.chance, self.seconds)

    def _reply(self, slot: Slot, calls: Sequence[Call | BadCall], answers: list[Any]) -> Reply:
        if slot.kind.plain:
            return self._said(slot, *answers)
        if self._ends(calls):
            bad = sum(isinstance(each, BadCall) for each in calls)
            return Reply(done=True, calls=len(calls), failed=bad)
        names = [each.name if isinstance(each, Call) else "error" for each in calls]
        names = [text_of(name, self.most_characters) for name in names]
        messages = tuple(
            {"role": "tool", "name": name, "content": self._words(answer)}
            for name, answer in zip(names, answers, strict=True)
        )
        failed = sum(isinstance(each, BaseException) for each in answers)
        return Reply(messages, calls=len(calls), failed=failed)

    def _said(self, slot: Slot, answer: Any) -> Reply:
        """Return what a `step` has said."""
        what = f"{slot.kind.name}.step"
        if isinstance(answer, BaseException):
            if not isinstance(answer, Words) and (what, type(answer)) not in self._raised:
                self._raised.add((what, type(answer)))
                told = f"{what} raised {described(answer)}: the policy is told that, and the "
                warnings.warn(told + "episode goes on. Mend it, unless it is meant.", stacklevel=2)
            answer, failed = Turn(self._words(answer), done=slot.lost), 1
        elif isinstance(answer, Turn):
            failed = 0
        else:
            broken(what, "return a Turn", shown(answer), "return Turn(observation, reward, done)")
        told = [] if answer.observation is None else [answer.observation]
        messages = tuple({"role": "user", "content": text} for text in told)
        reward = number_of(answer.reward, f"reward of {what}")
        return Reply(messages, reward, bool(answer.done), failed=failed)

    def _words(self, answer: str | BaseException) -> str:
        """Return what the model is told; of an error, in words."""
        if isinstance(answer, str):
            return answer
        try:
            words = str(answer) if isinstance(answer, Words) else described(answer)
        except Exception:  # it cannot say what is wrong
            words = type(answer).__name__
        return text_of(f"Error: {words}", self.most_characters)
