"""The loop: rollout, evaluation, optimisation, again and again.

loop = Loop(trainer, Sampler(tokenizer), scorer, prompts)
for _ in range(100):
    row = loop.step()
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from trl.batch import Rollout
from trl.config import check_values
from trl.config.errors import refuse, shown
from trl.config.ppo import sampling_contradictions
from trl.config.types import Count
from trl.data.stream import PromptStream, all_or_rest, stream_of
from trl.environments import episode_figures
from trl.evaluation.function import as_scorer
from trl.evaluation.scores import Scorer, score
from trl.ppo import PPOTrainer
from trl.rollout.queries import Chat, listed
from trl.rollout.sampler import Sampler
from trl.scored import Scored
from trl.training.overlap import Overlap
from trl.watch.profile import Profile

Row = dict[str, float]
"""Figures of one step, by name."""


class Loop:
    """The three steps on batches of prompts; every prompt comes up once before any comes again.

    Args:
        trainer: Its policy writes the responses.
        sampler: Its temperature must be the trainer's.
        scorer: Judges them: a scorer, or a function as `trl.train` takes it.
        prompts: Whatever the sampler takes; all of them are looked at here, before any is used. Or
            a stream of them, see `trl.data.stream.stream_of`, of which the first are looked at.
        schedule: Factor on the learning rate of step 0, 1, …; None: it stays as it is.
        parts: Write each batch in so many parts, and score one while the next is written: for a
            scorer that waits for a server. It must not compare the responses of a whole batch.
        profile: A folder for where the time goes, see `trl.watch.profile`; the first process
            writes it. None: it is not looked at, which costs nothing.

    Attributes:
        steps_done: Steps so far.
        rollout: This process's rollout of the last step.
        scores: [B] their scores; NaN where nothing has a say.
        scored: What the scorer gave for them, with the parts of a sum.
        all_scores: Those of all processes.

    Raises:
        TypeError: if the prompts are not a list of prompts.
        ValueError: if the parts do not fit together, or a prompt does not fit the policy.
    """

    def __init__(
        self,
        trainer: PPOTrainer,
        sampler: Sampler,
        scorer: Scorer | Callable[[list[str]], Any],
        prompts: Sequence[str] | Sequence[Chat] | Sequence[Tensor] | Iterable[Any] | PromptStream,
        *,
        schedule: Callable[[int], float] | None = None,
        parts: int = 1,
        profile: str | os.PathLike[str] | None = None,
    ) -> None:
        self.trainer, self.sampler, self.scorer = trainer, sampler, as_scorer(scorer)
        self.prompts = checked_prompts(prompts)
        config = trainer.config
        if sampler.distribution.temperature != config.temperature:
            both = f"{sampler.distribution.temperature} and {config.temperature}"
            refuse("temperature", "be the same for sampler and trainer", both)
        self.processes = trainer.accelerator.num_processes
        check_values("Loop", {"parts": (Count, parts)})
        group = sampler.group_size
        got = {"batch_size": config.batch_size, "parts": parts, "group_size": group}
        for name, rule, *fix in sampling_contradictions(config, group, parts, self.processes):
            refuse(name, rule, got[name], *fix)
        stream = self.stream = self.prompts if isinstance(self.prompts, PromptStream) else None
        sampler.check(trainer.model, stream.look() if stream else self.prompts, name="prompts")
        self.prompts_per_step = config.batch_size // group
        self.parts = parts
        self.schedule = schedule
        self.rates = [group["lr"] for group in trainer.optimizer.param_groups]
        self.steps_done = 0
        self.rollout: Rollout | None = None
        self.scores = self.all_scores = torch.empty(0)
        self.scored: Scored | None = None
        profiles = profile is not None and trainer.accelerator.is_main_process
        self.profile = Profile(profile, trainer) if profiles else None
        self._order: list[int] = []
        self._shuffle = torch.Generator().manual_seed(config.seed)

    def step(self) -> Row:
        """Roll out, evaluate, optimise; return what is worth a row of figures.

        A step that fails can be called again: it takes the same prompts and random numbers.
        """
        before, texts = self.state_dict(), self.trainer.pretraining
        drawn = texts.state_dict() if hasattr(texts, "state_dict") else None
        try:
            with self.profile.step() if self.profile else nullcontext():
                row = self._step()
        except BaseException:  # Ctrl-C too
            self.load_state_dict(before)
            if drawn is not None:
                texts.load_state_dict(drawn)
            raise
        self.steps_done += 1
        return row

    def state_dict(self) -> dict[str, Any]:
        """Return where the loop stands: with it a new loop goes on as this one would."""
        return {
            "steps_done": self.steps_done,
            "order": list(self._order),
            "shuffle": self._shuffle.get_state(),
            "sampler_calls": self.sampler.calls,
            "stream": self.stream and self.stream.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            ValueError: if it is not the state of a loop over so many prompts.
        """
        needed = self.state_dict().keys() - {"stream"}  # which older ones have not
        whole = needed <= set(state) and isinstance(state["order"], list)
        counts = [state["steps_done"], state["sampler_calls"], *state["order"]] if whole else [None]
        sound = all(type(count) is int and count >= 0 for count in counts)
        size = 0 if self.stream else len(self.prompts)  # a stream has no order
        if not sound or max(state["order"], default=-1) >= size:
            rule = f"be what `state_dict` returned for {size or 'a stream of'} prompts"
            refuse("state", rule, shown(dict(state)))
        self.steps_done = state["steps_done"]
        self._order = list(state["order"])
        self._shuffle.set_state(state["shuffle"])
        self.sampler.calls = state["sampler_calls"]
        if self.stream and (of_stream := state.get("stream")):
            self.stream.load_state_dict(of_stream)

    def _step(self) -> Row:
        trainer, profile, started = self.trainer, self.profile, time.perf_counter()
        prompts = self._next_prompts()
        self._set_learning_rate()
        rollout, scored, sampled = self._rollout_and_scores(prompts)
        evaluated = time.perf_counter()
        stats = trainer.step(rollout, scored)
        ended = time.perf_counter()
        totals, rate = scored.totals, trainer.optimizer.param_groups[0]["lr"]
        # Of all processes, as are the figures of the trainer.
        gathered = trainer.accelerator.gather(totals.to(trainer.accelerator.device)).cpu()
        self.rollout, self.scores, self.all_scores = rollout, totals, gathered
        self.scored = scored
        there = gathered[~gathered.isnan()]  # those on which a scorer has a say
        of_scores = (
            {"response/counted": len(there) / len(gathered)} if len(there) < len(gathered) else {}
        )
        if len(there):
            mean, std = there.mean().item(), there.std(correction=0).item()
            of_scores = {"reward/mean": mean, "reward/std": std} | of_scores
        figures = {name: value for name, value in stats.items() if isinstance(value, float)}
        lengths = rollout.response_mask.sum(1).float()
        if self.processes > 1:
            scored = of_all_processes(scored)
        own = {
            "response/length": lengths.mean().item(),
            "response/ended": rollout.ended.float().mean().item(),
        }
        if rollout.episodes is not None:
            own |= episode_figures(rollout.episodes)
        tokens = lengths.sum().item() * self.processes  # the others have about as many
        updates = stats["ppo/updates"] + stats["ppo/skipped_updates"]
        return {
            **of_scores,
            **{f"reward/{name}": mean for name, mean in scored.means().items()},
            **(own if self.processes == 1 else mean_of_each(gather_object([own]))),
            **figures,
            "learning_rate": float(rate if rate is not None else math.nan),
            "time/rollout": sampled - started,
            "time/evaluation": evaluated - sampled,
            "time/optimisation": ended - evaluated,
            "tokens_per_second": tokens / (ended - started),
            "tokens_per_second/rollout": tokens / (sampled - started),
            "tokens_per_second/optimisation": tokens / (ended - evaluated),
            **(profile.count(rollout, updates, ended - started) if profile else {}),
        }

    def _rollout_and_scores(self, prompts: list[Any]) -> tuple[Rollout, Scored, float]:
        """Return responses to the prompts, their scores, and when the last response was written."""
        trainer, around = self.trainer, self.trainer.clock.around
        if self.parts == 1:
            with around("generation"), trainer.sampling():
                rollout = self.sampler(trainer.model, prompts)
            sampled = time.perf_counter()
            with around("scorer"):
                return rollout, score(self.scorer, rollout), sampled
        with Overlap(self.scorer) as overlap:
            with around("generation"), trainer.sampling():
                for part in self.sampler.in_parts(trainer.model, prompts, self.parts):
                    overlap.add(part)
            sampled = time.perf_counter()
            with around("scorer"):
                return *overlap.result(), sampled

    def _set_learning_rate(self) -> None:
        """Set the learning rate of this step; of "auto", how far it is to go."""
        if self.schedule is None:
            return
        factor = self.trainer.way_factor = self.schedule(self.steps_done)
        for group, rate in zip(self.trainer.optimizer.param_groups, self.rates, strict=True):
            if rate is not None and (group.get("of_values") or not self.trainer.auto_rate):
                group["lr"] = rate * factor

    def _next_prompts(self) -> list[Any]:
        """Return this process's share of the next batch."""
        size, rank = self.prompts_per_step, self.trainer.accelerator.process_index
        if self.stream:
            return self.stream.draw(size, self._shuffle)[rank :: self.processes]
        while len(self._order) < size:
            again = torch.randperm(len(self.prompts), generator=self._shuffle)
            self._order += again.tolist()
        chosen, self._order = self._order[:size], self._order[size:]
        return [self.prompts[index] for index in chosen[rank :: self.processes]]


def of_all_processes(scored: Scored) -> Scored:
    """Return the scores of the rollouts of all processes together, without notes."""
    return Scored.concat(gather_object([replace(scored, notes={})]))


def mean_of_each(rows: Sequence[Row]) -> Row:
    """Return the mean of each figure over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: fmean(row[name] for row in rows if name in row) for name in names}


def checked_prompts(prompts: Any, name: str = "prompts", **of_stream: Any) -> Any:
    """Return the prompts as a list of at least one, or as a `PromptStream`.

    Args:
        prompts: See `Loop`.
        name: What errors call them.
        **of_stream: See `stream_of`.

    Raises:
        TypeError: if they are one prompt, or nothing of the kind.
        ValueError: if there are none.
    """
    if isinstance(prompts, PromptStream):
        return prompts
    if isinstance(prompts, Iterator):  # of a few, all are there
        prompts = all_or_rest(prompts)
    if (stream := stream_of(prompts, name=name, **of_stream)) is not None:
        return stream
    if isinstance(prompts, Iterable) and not isinstance(prompts, str | bytes | Mapping):
        prompts = list(prompts)
    prompts = listed(prompts, name)
    if not prompts:
        refuse(name, "have at least one entry", "none")
    return prompts
