"""`Episodes`: a sampler whose responses are conversations with an environment.

episodes = Episodes(Sampler(tokenizer, max_new_tokens=48), Maze, max_turns=6)
rollout = episodes(policy, ["Find the way out."])
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from trl.anatomy import is_encoder_decoder, position_limits
from trl.batch import Rollout
from trl.config import closest
from trl.config.errors import refuse, shown
from trl.config.section import section
from trl.config.types import Count
from trl.environments.contract import Reply
from trl.environments.running import World
from trl.environments.turns import ChatTurns, PlainTurns
from trl.evaluation.scores import words_of
from trl.fit import check_positions, out_of_memory_told, uncompiled
from trl.rollout.past import State
from trl.rollout.queries import Encoded, Queries, encode_queries, listed, prompts_apart
from trl.rollout.sampler import Sampler
from trl.rollout.sampling import Progress
from trl.rollout.stop import StopRule

__all__ = ["Episodes", "episode_figures", "episodes_of"]

STOPS = ("done", "answered", "turns", "tokens", "tool_calls")
"""What ends an episode: the environment; a turn that calls no tool; a limit."""


@section
class Limits:
    """What bounds an episode, and how calls are written in it: see `Episodes`."""

    max_turns: Count = 8
    max_tokens: Count = 1024
    max_tool_calls: Count | None = None
    call_format: str | None = None


@dataclass
class _Episode:
    """One row, while it is written."""

    slot: int
    query: list[int]
    stream: np.random.Generator
    most: int
    """Tokens that its response may have."""
    tools: Sequence[Mapping[str, Any]]
    """Schemas of those that it has."""
    told: str = ""
    """What the model is told of them."""
    tokens: list[int] = field(default_factory=list)
    """Of the response: what the policy wrote, and what it was told in between."""
    written: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    begins: int = 0
    """Where the last turn begins, among the tokens."""
    said: list[str] = field(default_factory=list)
    """The text of each turn of the policy, without special tokens unless they are kept."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    tool_calls: int = 0
    tool_errors: int = 0
    stop: str = ""
    ended: bool = False
    state: State | None = None
    """What the model has read so far; None: that is not kept."""

    def add(self, tokens: Sequence[int], *, written: bool, **recorded: Sequence[float]) -> None:
        """Add tokens to the response; what is not recorded of them is 0."""
        self.tokens += tokens
        self.written += [written] * len(tokens)
        for name in ("logprobs", "values", "rewards"):
            getattr(self, name).extend(recorded.get(name) or [0.0] * len(tokens))

    def reward(self, number: float) -> None:
        """Add a reward at the last token that the policy wrote."""
        last = len(self.written) - 1 - self.written[::-1].index(True)
        self.rewards[last] += number


class Episodes(Sampler):
    """Samples conversations: the policy writes a turn, the environment replies, and so on.

    A `Sampler`, wherever one is asked for. Its responses are whole conversations: what the policy
    wrote counts, what it was told in between is a hole in `Rollout.response_mask`. Its tokens are
    those that were sampled: no turn is ever decoded and encoded again.

    An environment is a class of yours:

        class Maze:
            def reset(self, start, seed=None):      # the columns of the row that it asks for
                self.at = start
                return "You stand at a fork."       # added to the user's message; or None

            def go(self, direction: str) -> str:    # each public method is a tool
                '''Walk one step, left or right.'''
                ...

            def get_reward(self) -> float:          # at the end, if there is one
                ...

    as in TRL; or one with `step(text) -> Turn(observation, reward, done)`, for games and
    simulators; or none, and `tools`, plain functions. See docs/howto/environments.md.

    Args:
        sampler: Whose settings are taken: `max_new_tokens` is that of a turn.
        environment: A class, or a function that returns an object of one; or several, by the name
            that a row has in its column `environment`. Or a `World` of these, to share.
        tools: Functions that the policy may call, `async` ones too; the environment's methods come
            beside them.
        max_turns: Most turns of the policy.
        max_tokens: Most tokens of a response, replies included.
        max_tool_calls: Most calls of an episode; None: no such limit.
        call_format: How a call is written; None: as the chat template has it. See `ChatTurns`.
        **of_world: See `World`: `seconds` that a call may take, ….

    Attributes:
        told: What a user should know of how tools are shown to the model; empty: nothing.
        goes_on: Let the environments of the last call go on, rather than begin them anew: for one
            that a person talks with.

    Raises:
        TypeError, ValueError: if a setting is out of range, or something is no environment.
    """

    def __init__(
        self,
        sampler: Sampler,
        environment: Any = None,
        *,
        tools: Sequence[Any] = (),
        max_turns: int = 8,
        max_tokens: int = 1024,
        max_tool_calls: int | None = None,
        call_format: str | None = None,
        **of_world: Any,
    ) -> None:
        if not isinstance(sampler, Sampler) or isinstance(sampler, Episodes):
            got, rule = type(sampler).__name__, "be a Sampler, whose settings are taken"
            refuse("sampler", rule, got, "pass Sampler(tokenizer, ...)", error=TypeError)
        if sampler.tokenizer is None:
            rule, fix = "have a tokenizer: an environment reads texts", "Sampler(tokenizer)"
            refuse("sampler", rule, "none", f"make it with {fix}")
        self.__dict__.update(vars(sampler))
        self.limits = Limits(max_turns, max_tokens, max_tool_calls, call_format)
        shared = isinstance(environment, World)
        self.world = environment if shared else World(environment, tools, **of_world)
        self._turns: dict[tuple[bool, bool], ChatTurns | PlainTurns] = {}
        self._beside = False
        self.told, self.goes_on = "", False

    def in_parts(self, *args: Any, **named: Any) -> Iterator[Rollout]:
        """See `Sampler.in_parts`; the environments of a part stay as they are in the next ones."""
        self._beside = False
        for part in super().in_parts(*args, **named):
            yield part
            self._beside = True

    def check(self, policy: nn.Module, queries: Queries, *, name: str = "queries") -> None:
        """See `Sampler.check`; no environment is begun."""
        policy = uncompiled(policy, "policy")
        encoded = self._encode(policy, queries, name)
        rows = self._rows_of(encoded)
        self.world.check(rows)
        tools = any(self.world.schemas(row) for row in rows)
        self.told = self._turns_for(self._stop_for(policy), encoded, tools).told

    def _encode(self, policy: nn.Module, queries: Queries, name: str) -> Encoded:
        """Return texts or chats; what is in them is known when the environments have begun."""
        if is_encoder_decoder(policy):
            rule = "be a causal model: an encoder has read the query when the first turn is written"
            refuse("policy", rule, type(policy).__name__, error=TypeError)
        prompts, others = prompts_apart(listed(queries, name))
        if isinstance(prompts, Tensor) or (len(prompts) and isinstance(prompts[0], Tensor)):
            rule = "be texts or chats, to which an environment can add"
            refuse(name, rule, "token ids", error=TypeError)
        if len(prompts) == 0:
            refuse(name, "have at least one entry", "none")
        nothing = [torch.zeros(1, dtype=torch.long, device="cpu")] * len(prompts)
        if isinstance(prompts[0], str):
            return Encoded(nothing, list(prompts), None, others)
        return Encoded(nothing, None, [[dict(m) for m in chat] for chat in prompts], others)

    def _rows_of(self, encoded: Encoded) -> list[dict[str, Any]]:
        """Return what `reset` may ask for: the prompt, and the other columns of each row."""
        prompts = encoded.texts if encoded.messages is None else encoded.messages
        others = encoded.others or [{}] * len(encoded.rows)
        return [{"prompt": p} | o for p, o in zip(prompts or (), others, strict=True)]

    def _turns_for(self, stop: StopRule, encoded: Encoded, tools: bool) -> ChatTurns | PlainTurns:
        """Return how turns follow one another, for texts or chats, with tools or without."""
        chats = encoded.messages is not None
        if (chats, tools) not in self._turns:
            settings: dict[str, Any] = {"call_format": self.limits.call_format, "tools": tools}
            if chats:
                settings["end_ids"] = stop.token_ids
                settings["chat_template_kwargs"] = self.chat_template_kwargs
            kind = ChatTurns if chats else PlainTurns
            self._turns[chats, tools] = kind(self.tokenizer, **settings)
        return self._turns[chats, tools]

    @out_of_memory_told("sampling")
    def _sample(
        self,
        policy: nn.Module,
        encoded: Encoded,
        streams: list[np.random.Generator],
        progress: Progress | None,
    ) -> Rollout:
        """Return a rollout of whole episodes."""
        stop, size = self._stop_for(policy), self.group_size
        rows = [row for row in self._rows_of(encoded) for _ in range(size)]
        schemas = [self.world.schemas(row) for row in rows]
        turns = self._turns_for(stop, encoded, any(schemas))
        # The task of a group is one: so are the random numbers that it is made with.
        drawn = [int(stream.integers(2**31)) for stream in streams[::size]]
        seeds = [seed for seed in drawn for _ in range(size)]
        nothing: list[Any] = [None] * len(rows)
        said = nothing if self.goes_on else self.world.reset(rows, seeds, beside=self._beside)
        begun = [_begun(row["prompt"], each) for row, each in zip(rows, said, strict=True)]
        queries = self._query_tokens(turns, begun, schemas)
        most = self._most_tokens(policy, queries)
        told = map(turns.words_on, schemas)
        episodes = [
            _Episode(slot, *each)
            for slot, each in enumerate(zip(queries, streams, most, schemas, told, strict=True))
        ]
        for turn in itertools.count(1):
            if not (going := [episode for episode in episodes if not episode.stop]):
                break
            last = turn == self.limits.max_turns
            valued = self._write_turn(policy, going, stop, progress, shared=turn == 1, last=last)
            self._reply(going, turns, stop, last=last)
        slots = [episode.slot for episode in episodes]
        for episode, reward in zip(episodes, self.world.rewards(slots), strict=True):
            if reward is not None:
                episode.reward(reward)
        of_rows: dict[str, Any] = {"environments": tuple(self.world.instances(slots))}
        if encoded.messages is not None:
            of_rows["query_messages"] = tuple(begun)
        if encoded.others:
            of_rows["columns"] = {k: tuple(row[k] for row in rows) for k in encoded.others[0]}
        # Of chats as their template writes them; of texts without what begins them.
        decode: Any = self.tokenizer.decode
        texts = [
            each if isinstance(each, str) else decode(query)
            for each, query in zip(begun, queries, strict=True)
        ]
        return self._rollout(policy, episodes, valued, query_texts=tuple(texts), **of_rows)

    def _query_tokens(
        self, turns: ChatTurns | PlainTurns, begun: Sequence[Any], schemas: Sequence[Any]
    ) -> list[list[int]]:
        """Return the token ids of each row's query, up to where the policy begins to write."""
        if isinstance(turns, ChatTurns):
            return [turns.prompt(chat, tools) for chat, tools in zip(begun, schemas, strict=True)]
        encoded = encode_queries(begun, self.tokenizer, add_bos=self.add_bos)
        return [row.tolist() for row in encoded.rows]

    def _most_tokens(self, policy: nn.Module, queries: Sequence[list[int]]) -> list[int]:
        """Return how many tokens each response may have: the limit, or what the model can take."""
        lengths = [len(query) for query in queries]
        positions, border = position_limits(policy)
        check_positions(policy, lengths, 1)
        # LongRoPE's other frequencies would be those of all rows of a pass.
        ends = [end for end in (positions, border) if end is not None and end > max(lengths)]
        end = min(ends, default=None)
        most = self.limits.max_tokens
        return [most if end is None else min(most, end - n) for n in lengths]

    def _write_turn(
        self,
        policy: nn.Module,
        going: Sequence[_Episode],
        stop: StopRule,
        progress: Progress | None,
        *,
        shared: bool,
        last: bool,
    ) -> bool:
        """Let the policy write a turn in each of the episodes.

        Args:
            policy: See `__call__`.
            going: Those that are not over.
            stop: When a turn ends by itself.
            progress: See `__call__`.
            shared: Whether the rows of a group may have read the same, which is read once then.
            last: Whether no turn can follow, for which what was read would be kept.

        Returns:
            Whether the policy gives values.
        """
        tokens = [episode.query + episode.tokens for episode in going]
        before = [episode.state for episode in going if episode.state is not None]
        for episode in going:
            episode.state = None
        if shared and _alike(tokens, self.group_size):
            tokens = tokens[:: self.group_size]
        writing = self._written(
            policy,
            [torch.tensor(row, dtype=torch.long, device="cpu") for row in tokens],
            [episode.stream for episode in going],
            [min(self._draw_limit(e.stream), e.most - len(e.tokens)) for e in going],
            stop,
            progress,
            before=before if len(before) == len(going) else None,  # what need not be read again
            keeps=not last,
        )
        turn = writing.rollout().to("cpu")
        for row, episode in enumerate(going):
            length = int(turn.response_mask[row].sum())
            episode.begins = len(episode.tokens)
            columns = {"logprobs": turn.behaviour_logprobs, "values": turn.values}
            recorded = {k: x[row, :length].tolist() for k, x in columns.items() if x is not None}
            episode.add(turn.responses[row, :length].tolist(), written=True, **recorded)
            episode.ended = bool(turn.ended[row])
            episode.state = writing.states[row]
        return turn.values is not None

    def _reply(
        self,
        going: Sequence[_Episode],
        turns: ChatTurns | PlainTurns,
        stop: StopRule,
        *,
        last: bool,
    ) -> None:
        """Let the environments read what was written, and add what they say."""
        texts = [self._last_turn(episode, stop) for episode in going]
        calls = [turns.calls(t, e.tools) for t, e in zip(texts, going, strict=True)]
        for episode, text, called in zip(going, texts, calls, strict=True):
            episode.messages.append({"role": "assistant", "content": text})
            limit = self.limits.max_tool_calls
            if limit is not None and episode.tool_calls + len(called) > limit:
                episode.stop = "tool_calls"
        heard = [row for row, episode in enumerate(going) if not episode.stop]
        replies = self.world.respond(
            [going[row].slot for row in heard],
            [texts[row] for row in heard],
            [calls[row] for row in heard],
        )
        for row, reply in zip(heard, replies, strict=True):
            episode = going[row]
            self._take(episode, reply, last=last)
            if not episode.stop:
                ids = turns.following(calls[row], reply.messages, ended=episode.ended)
                if len(episode.tokens) + len(ids) >= episode.most:  # no room for another turn
                    episode.stop = "tokens"
                else:
                    episode.add(ids, written=False)

    def _take(self, episode: _Episode, reply: Reply, *, last: bool) -> None:
        """Take down what an environment replied, and whether that is the end."""
        episode.tool_calls += reply.calls
        episode.tool_errors += reply.failed
        if reply.reward:
            episode.reward(reply.reward)
            episode.messages[-1]["reward"] = reply.reward
        episode.messages += map(dict, reply.messages)
        if reply.done:
            episode.stop, episode.ended = "done", True
        elif not reply.messages:
            episode.stop = "answered" if episode.ended else "tokens"
        elif last:
            episode.stop = "turns"

    def _last_turn(self, episode: _Episode, stop: StopRule) -> str:
        """Return the text of the last turn, special tokens included but for those that end it."""
        tokens, ends = episode.tokens[episode.begins :], set(stop.token_ids)
        while tokens and tokens[-1] in ends:
            tokens = tokens[:-1]
        decode: Any = self.tokenizer.decode
        whole = str(decode(tokens, skip_special_tokens=False))
        keeps = self.keep_special_tokens
        episode.said.append(whole if keeps else str(decode(tokens, skip_special_tokens=True)))
        return whole

    def _rollout(
        self, policy: nn.Module, episodes: Sequence[_Episode], valued: bool, **of_rows: Any
    ) -> Rollout:
        """Return the episodes as a rollout."""
        device = next(policy.parameters()).device
        rows, on_cpu = range(len(episodes)), {"device": "cpu"}
        rollout = Rollout.from_lists(
            [torch.tensor(episode.query, **on_cpu) for episode in episodes],
            [torch.tensor(episode.tokens, **on_cpu) for episode in episodes],
            response_masks=[torch.tensor(episode.written, **on_cpu) for episode in episodes],
            group_ids=[row // self.group_size for row in rows] if self.group_size > 1 else None,
        )
        names = ["logprobs", "rewards", *(["values"] if valued else [])]
        recorded = {
            name: pad_sequence([torch.tensor(getattr(e, name), **on_cpu) for e in episodes], True)
            for name in names
        }
        return dataclasses.replace(
            rollout,
            behaviour_logprobs=recorded["logprobs"],
            values=recorded.get("values"),
            turn_rewards=recorded["rewards"],
            ended=torch.tensor([e.stop in ("done", "answered") for e in episodes], **on_cpu),
            temperature=self.distribution.temperature,
            response_texts=tuple("\n\n".join(episode.said) for episode in episodes),
            decode=self.text_of,
            episodes=tuple(map(_record, episodes)),
            **of_rows,
        ).to(device)


def episodes_of(
    environment: Any = None, tools: Sequence[Any] = (), **settings: Any
) -> partial[Episodes]:
    """Return what makes a sampler one of episodes; the environments are made now.

    Args:
        environment: See `Episodes`.
        tools: See `Episodes`.
        **settings: Of `Episodes` and `World`.

    Raises:
        TypeError: for a setting that neither has.
        TypeError, ValueError: see `World`.
    """
    of_world = inspect.signature(World).parameters
    known = [*of_world, *inspect.signature(Episodes).parameters]
    for name in settings:
        if name not in known:
            raise TypeError(f"Episodes has no setting `{name}`.{closest(name, known)}")
    given = {name: value for name, value in settings.items() if name in of_world}
    limits = {name: value for name, value in settings.items() if name not in of_world}
    return partial(Episodes, environment=World(environment, tools, **given), **limits)


def _begun(prompt: Any, said: Any) -> Any:
    """Return a prompt with what an environment says at the start.

    Args:
        prompt: A text, or the messages of a chat.
        said: A text, which comes at the end of the prompt, or of the user's last message; messages,
            which follow those of the prompt; or None.
    """
    if isinstance(said, str):  # half of a character is none, as in replies
        said = said.encode("utf-8", "replace").decode()
    if isinstance(prompt, str):
        if said is not None and not isinstance(said, str):
            rule, fix = "return a text or None for prompts that are texts", "send them as chats"
            refuse("reset", rule, shown(said), fix, error=TypeError)
        return prompt + (said or "")
    chat = [dict(message) for message in prompt]
    if isinstance(said, str):
        users = [message for message in chat if message["role"] == "user"]
        if users:
            users[-1]["content"] = "\n\n".join(filter(None, (words_of(users[-1]), said)))
            return chat
        said = [{"role": "user", "content": said}]
    nothing = chat[-1:] == [{"role": "user", "content": ""}]
    return [*(chat[:-1] if nothing and said else chat), *map(dict, said or ())]


def _alike(rows: Sequence[list[int]], size: int) -> bool:
    """Tell whether in each group, of so many rows, all rows are the same."""
    return all(row == rows[place - place % size] for place, row in enumerate(rows))


def _record(episode: _Episode) -> dict[str, Any]:
    """Return what `Rollout.episodes` says of one."""
    return {
        "messages": episode.messages,
        "turns": len(episode.said),
        "tool_calls": episode.tool_calls,
        "tool_errors": episode.tool_errors,
        "stop": episode.stop,
    } | ({"tools": episode.told} if episode.told else {})


def episode_figures(episodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean turns, calls and errors of `Rollout.episodes`, and the share of each stop."""
    if not episodes:
        return {}
    counts = ("turns", "tool_calls", "tool_errors")
    means = {f"episode/{name}": fmean(each[name] for each in episodes) for name in counts}
    stops = [each["stop"] for each in episodes]
    return means | {f"stop/{name}": stops.count(name) / len(stops) for name in STOPS}
