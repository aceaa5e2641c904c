"""How a policy does on the held-out prompts of a recipe, with several samples of each.

evaluation = evaluate("runs/mine", read_recipe("runs/mine"), samples=8, out="runs/mine/eval")
rich.print(evaluation.table())  # mean score, accuracy, pass@k, majority@k, with their intervals
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from trl.config import check_values
from trl.config.code import Trust
from trl.config.errors import refuse
from trl.config.recipe import Recipe
from trl.config.types import Count
from trl.data.prompts import load_prompts
from trl.evaluation.metrics import bootstrap, checks_of, majority_at_k, pass_at_k
from trl.evaluation.people.scorer import for_held_out
from trl.evaluation.scores import Scorer, score
from trl.report.figures import figure_name, shown
from trl.report.run import COUNTS
from trl.rollout.sampler import Sampler
from trl.training.held_out import Sample, is_right, samples_of
from trl.training.loop import mean_of_each
from trl.training.named import load_environment, load_scorer
from trl.training.parts import sampling_of
from trl.training.tools import AT_ONCE, loaded

ANSWER = "answer"
"""The note of a scorer that majorities are counted of."""
LAST = ("length", "ended", "episode/", "stop/")
"""Figures that stand behind those of what was reached."""

Figures = dict[str, dict[str, float]]
"""By name: `value`, and the ends of its interval of 95 % over the prompts, `low` and `high`."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found."""

    model: str
    settings: dict[str, Any]
    """How the samples came about."""
    samples: list[list[Sample]]
    """Of each prompt: those drawn, and then the greedy one, if there is one."""
    sampled: Figures
    greedy: Figures = field(default_factory=dict)

    def table(self) -> Table:
        """Return the figures for the terminal."""
        count, of_each = len(self.samples), self.settings["samples"]
        title = f"{count} prompts, {of_each} samples of each"
        table = Table("", title=title, title_justify="left")
        if "accuracy" not in self.sampled:
            table.caption = "No accuracy: say by --right-from from which reward on it is right."
        for head in ("sampled", "95 % interval", *(["greedy"] if self.greedy else [])):
            table.add_column(head, justify="right")
        for name, found in self.sampled.items():
            value, low, high = (shown(name, x, among=found.values()) for x in found.values())
            spread = found["high"] > found["low"]  # without one, it says nothing of other prompts
            ends = f"{low} to {high}" if spread else "–"
            greedy = [shown(name, self.greedy.get(name, {}).get("value"))] if self.greedy else []
            table.add_row(figure_name(name), value, ends, *greedy)
        return table

    def write(self, folder: Path | str) -> None:
        """Write the figures, and a line for each sample."""
        figures = {"sampled": self.sampled, "greedy": self.greedy}
        whole = {"model": self.model, **self.settings, "prompts": len(self.samples), **figures}
        rows = [{"row": row} | sample for row, group in enumerate(self.samples) for sample in group]
        as_json = TypeAdapter(Any).dump_json  # null for NaN, as in a run
        own, of_samples = _files(folder)
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_bytes(as_json(whole, indent=2) + b"\n")
        of_samples.write_bytes(b"".join(as_json(row) + b"\n" for row in rows))


def _files(folder: Path | str) -> list[Path]:
    """Return the files of an evaluation in a folder."""
    return [Path(folder).expanduser() / name for name in ("eval.json", "eval_samples.jsonl")]


def evaluate(
    model: str | Path,
    recipe: Recipe,
    *,
    samples: int = 8,
    k: Sequence[int] | None = None,
    greedy: bool = False,
    prompts: str | None = None,
    right_from: float | None = None,
    out: Path | str | None = None,
    trust: Trust = (),
) -> Evaluation:
    """Let a policy answer held-out prompts, and judge what it writes by the reward of a recipe.

    Args:
        model: A model's folder or hub name, starter, or the folder of a run.
        recipe: Its data, sampling, temperature and reward.
        samples: Responses to each prompt.
        k: For pass@k and majority@k; None: the powers of two up to `samples`.
        greedy: Write the likeliest response to each prompt too.
        prompts: A file or dataset in place of the held-out prompts; all of it is used.
        right_from: A response is right from this reward on. None: if each part of the reward that
            compares with a column gives it 1; without such a part, if the reward is 1 and all
            rewards are 0 or 1.
        out: Folder for eval.json, the figures, and eval_samples.jsonl, a line for each sample.
        trust: Modules and packages whose functions may run.

    Raises:
        ValueError: for what is out of range, or a recipe without held-out prompts.
    """
    check_values("evaluate", {"samples": (Count, samples)})
    ks = [2**power for power in range(samples.bit_length())] if k is None else list(k)
    for one in ks:
        if not 1 <= one <= samples:
            refuse("k", f"be from 1 to `samples`, {samples}", one, "raise `samples`")
    if out and (there := [str(file) for file in _files(out) if file.exists()]):
        refuse("out", "be a folder without an evaluation", there[0], "name another")
    data = recipe.data
    if prompts is not None:
        whole: Any = {"held_out": 0, "held_out_prompts": None, "limit": None, "deduplicate": False}
        data = replace(data, prompts=prompts, shuffle=False, shuffle_buffer=None, **whole)
    elif data.held_out == 0:
        refuse("data.held_out", "be above 0", 0, "set it, or give `prompts`")
    judge = for_held_out(load_scorer(recipe.reward, trust, out=recipe.out)[1])
    settings = sampling_of(recipe) | {"temperature": recipe.ppo.temperature, "group_size": samples}
    settings["seed"] = recipe.seed + 1  # as in a run
    where = {"trust_remote_code": True} if recipe.model.trust_remote_code else {}
    policy, sampler, _ = loaded(model, (), {"chat": False}, where, **settings)
    if recipe.environment is not None:
        sampler = load_environment(recipe.environment, trust)(sampler)
    split = load_prompts(data, sampler.tokenizer, seed=recipe.seed, policy=policy)  # type: ignore[arg-type]
    if split.note:
        print("trl:", split.note, file=sys.stderr)
    rows: Any = split.held_out_rows if prompts is None else split.train_rows
    drawn = _written(policy, sampler, judge, rows)
    best = copy.copy(sampler)
    best.distribution, best.group_size = replace(sampler.distribution, top_k=1), 1
    likeliest = _written(policy, best, judge, rows) if greedy else []
    every = [sample for group in drawn + likeliest for sample in group]
    _mark_right(every, checks_of(judge), right_from)
    for group in likeliest:
        group[0]["greedy"] = True
    found = Evaluation(
        str(model),
        {name: settings[name] for name in ("seed", "temperature", "max_new_tokens")}
        | {"samples": samples, "k": ks, "right_from": right_from},
        [one + other for one, other in zip(drawn, likeliest, strict=True)] if greedy else drawn,
        figures_of(drawn, ks),
        figures_of(likeliest) if greedy else {},
    )
    if out:
        found.write(out)
    return found


@torch.no_grad()
def _written(
    policy: nn.Module, sampler: Sampler, scorer: Scorer, rows: Sequence[Any]
) -> list[list[Sample]]:
    """Return the samples of each row, `max_rows` of them written and scored at once."""
    size = sampler.group_size
    at_once = max(1, (sampler.max_rows or AT_ONCE) // size)
    found: list[list[Sample]] = []
    console = Console(stderr=True)
    starts, quiet = range(0, len(rows), at_once), not console.is_terminal
    for start in track(starts, "writing", console=console, transient=True, disable=quiet):
        part = rows[start : start + at_once]
        first = sampler.seed * len(rows) + start
        seeds = [(first + row) * size + one for row in range(len(part)) for one in range(size)]
        rollout = sampler(policy, part, seeds=seeds)
        samples = samples_of(rollout, score(scorer, rollout))
        found += [samples[row : row + size] for row in range(0, len(samples), size)]
    return found


def _mark_right(samples: Sequence[Sample], checks: Sequence[str], right_from: float | None) -> None:
    """Write into each sample whether it is right, if there is a right and wrong."""
    rewards = {sample["reward"] for sample in samples if not math.isnan(sample["reward"])}
    if right_from is None and not checks and rewards <= {0.0, 1.0}:
        right_from = 1.0
    for sample in samples if checks or right_from is not None else ():
        reward, says = sample["reward"], is_right(sample, checks)
        if right_from is not None:
            says = None if math.isnan(reward) else reward >= right_from
        sample["right"] = says


def figures_of(groups: Sequence[Sequence[Sample]], ks: Sequence[int] = ()) -> Figures:
    """Return the figures of the samples of some prompts, each prompt with the same weight.

    Args:
        groups: The samples of each prompt.
        ks: For pass@k and majority@k.
    """
    stops = dict.fromkeys(s["episode"]["stop"] for g in groups for s in g if s.get("episode"))
    prompts = [_of_prompt(group, ks, [*stops]) for group in groups]
    names = [*dict.fromkeys(name for prompt in prompts for name in prompt)]
    names.sort(key=lambda name: name.startswith(LAST))
    table = np.array([[prompt.get(name, math.nan) for name in names] for prompt in prompts])
    columns = np.stack([np.nanmean(table, 0), *bootstrap(table)], 1).round(12).tolist()
    return {
        name: {"value": value, "low": low, "high": high}
        for name, (value, low, high) in zip(names, columns, strict=True)
    }


def _of_prompt(
    group: Sequence[Sample], ks: Sequence[int], stops: Sequence[str]
) -> dict[str, float]:
    """Return the figures of the samples of one prompt; those that nobody can tell are left out."""
    counted = [sample for sample in group if sample.get("right") is not None]
    right = [float(sample["right"]) for sample in counted]
    means = mean_of_each([_of_sample(sample, stops) for sample in group])
    fitting = [k for k in ks if k <= len(right)]
    means |= {f"pass@{k}": pass_at_k(len(right), int(sum(right)), k) for k in fitting}
    answers = [sample.get("notes", {}).get(ANSWER) for sample in counted]
    if any(answer is not None for answer in answers):
        means |= {f"majority@{k}": majority_at_k(answers, right, k) for k in fitting}
    return means


def _of_sample(sample: Sample, stops: Sequence[str]) -> dict[str, float]:
    parts = sample["parts"] if len(sample["parts"]) > 1 else {}
    right = sample.get("right")
    found = {"reward/mean": sample["reward"], **{f"reward/{k}": x for k, x in parts.items()}}
    found |= {} if right is None else {"accuracy": float(right)}
    found |= {"length": sample["length"], "ended": sample["ended"]}
    if episode := sample.get("episode"):
        found |= {f"episode/{name}": episode[name] for name in COUNTS}
        found |= {f"stop/{reason}": reason == episode["stop"] for reason in stops}
    return {name: x for name, x in found.items() if not math.isnan(x)}
