"""The loop of Ziegler et al. (arXiv:1909.08593): people choose, a reward model learns, PPO follows.

    trl taste MODEL PROMPTS
    trl train human-preferences --people.simulated '{noise: 0.1}'

In the folder of the loop:

    votes.sqlite                  all that was asked and answered
    round-1/items.jsonl           what is asked: responses by the policy as it was then
    round-1/preferences.jsonl     all choices up to this round, once they are there
    round-1/reward-1/             a reward model, trained anew on them, as `trl reward` writes it
    round-1/result.json           how the round went, once PPO has made its steps
    round-2/…
    run/                          PPO: one run over all rounds, on another reward model in each
    summary.json                  at the end

A stage is done when its file is there. So a loop that was killed goes on where it was, and ends as
one that was not, bit for bit, if the same is chosen: samples, reward models and steps follow from
the settings, the seed and the choices alone.
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
import sys
import time
import warnings
import webbrowser
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl import config as settings
from trl.config.code import Trust
from trl.config.errors import refuse
from trl.config.recipe import (
    PeopleConfig,
    PreferencesRecipe,
    Recipe,
    RewardConfig,
    RewardRecipe,
    SimulatedConfig,
)
from trl.data.prompts import load_prompts
from trl.evaluation.people.agreement import interval
from trl.evaluation.people.asking import ask, wait
from trl.evaluation.people.formats import read_items
from trl.evaluation.people.items import SKIP, Item, Prompt
from trl.evaluation.people.store import Shown, Store
from trl.evaluation.reward_model import RewardModelScorer
from trl.evaluation.scores import rollout_of, score
from trl.models.loading import quiet_transformers
from trl.models.with_value_head import load_policy
from trl.rollout.sampler import Sampler
from trl.training.folder import RunFolder
from trl.training.named import load_scorer
from trl.training.parts import find_tokenizer, model_name, sampling_of
from trl.training.resume import check_same
from trl.training.reward import train_reward
from trl.training.run import run_recipe

__all__ = ["Simulated", "at_chance", "disagreement", "schedule", "tune_to_taste"]

MAY_CHANGE = (
    *("out", "quiet", "tracking", "profile", "checkpoints.every", "checkpoints.keep"),
    *(f"people.{name}" for name in ("annotators", "guidelines", "minutes", "port")),
)
"""Settings that may differ when a loop is gone on with."""
DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")
"""Without one of them a browser would take the terminal."""
AT_ONCE = 64
"""Responses that are written at once."""
FEW_GOLD = 8
"""Of fewer known answers nothing is said."""


def tune_to_taste(
    recipe: PreferencesRecipe, *, resume: bool = False, trust: Trust = ()
) -> dict[str, Any] | None:
    """Tune a model to what people choose, or a simulated annotator.

    Args:
        recipe: The settings.
        resume: Go on with the loop in `out`, if there is one.
        trust: Modules and packages whose functions may run.

    Returns:
        What stands in summary.json; None: it was interrupted, and can be gone on with.

    Raises:
        OSError: for a folder in use, or one that holds a loop that is not to be gone on with.
        SettingsError, ValueError: for settings that are others than before, or cannot work.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        refuse("people", "have one process, which waits for them", os.environ["WORLD_SIZE"])
    folder = RunFolder(Path(recipe.out).expanduser())
    if not resume and (folder.path / "votes.sqlite").exists():
        rule = (
            "`out` must be a folder without a loop: add --resume to go on with it, or name another"
        )
        raise FileExistsError(errno.EEXIST, rule, str(folder.path))
    with folder.in_use():
        check_same(folder, recipe, MAY_CHANGE)
        reward_recipe(recipe, folder.path, 1, 1)  # refused now, if it cannot be
        folder.write("recipe.yaml", settings.dump(recipe))
        try:
            with closing(Store(folder.path / "votes.sqlite", make=True)) as store:
                return Taste(recipe, folder, store, trust).run()
        except KeyboardInterrupt:
            print(f"trl: stopped. Go on with: trl train {folder.path} --resume", file=sys.stderr)
            return None


def schedule(people: PeopleConfig, steps: int) -> list[tuple[int, int]]:
    """Return for each round how many items are asked up to it, and after which step it ends.

        l(n) = N₀ + (N − N₀)·(1 − (1 − n/T)²)

    are the choices that are there before step n of T, where N₀ (`first`) are there before the first
    and N in all (Ziegler et al., section 2.3). They train a reward model before the first step and
    19 more at evenly spaced values of it, each from the untuned model, with a new head, on all
    choices so far. So it is here, for as many rounds as there are; but the choices of a round are
    made all at once, at its start, and the last reward model has all of them.
    """
    total, count = people.choices // people.per_item, people.rounds
    first = math.ceil((people.first or people.choices / 4) / people.per_item)
    ends = [round(steps * (1 - math.sqrt(1 - j / count))) for j in range(1, count + 1)]
    ends = [min(max(end, j), steps - count + j) for j, end in enumerate(ends, 1)]
    asked = [first + (total - first) * j // (count - 1) for j in range(count - 1)]
    return list(zip([*asked, total], ends, strict=True))


def disagreement(rewards: Tensor) -> float:
    """Return how far the reward models of an ensemble disagree about a choice, in nats.

        H(mean_e p_e) − mean_e H(p_e),     p_e = softmax of the rewards by model e

    what the answer would tell of which model is right (Houlsby et al., arXiv:1112.5745).

    Args:
        rewards: [models, responses], as they were trained, without their scale.
    """
    p = rewards.double().softmax(1)

    def entropy(p: Tensor) -> Tensor:
        return torch.special.entr(p).sum(-1)

    return float(entropy(p.mean(0)) - entropy(p).mean())


def at_chance(items: Sequence[Item]) -> dict[str, dict[str, Any]]:
    """Return who may be choosing blindly: whose known answers are no better than chance.

    Returns:
        For each of them the interval of the share that is right, and `chance`.
    """
    known = [(item, vote) for item in items if item.gold is not None for vote in item.votes]
    found = {}
    for name in sorted({vote.annotator for _, vote in known}):
        own = [(i, v) for i, v in known if v.annotator == name and v.answer != SKIP]
        told = interval(sum(item.gold == vote.answer for item, vote in own), len(own))
        chance = sum(1 / len(item.responses) for item, _ in own) / max(len(own), 1)
        if len(own) >= FEW_GOLD and told["low"] <= chance:
            found[name] = told | {"chance": chance}
    return found


def reward_recipe(recipe: PreferencesRecipe, out: Path, number: int, model: int) -> RewardRecipe:
    """Return the settings of one reward model of a round."""
    place, first = out / f"round-{number}", out / "round-1" / "reference.jsonl"
    tree = {"model": model_name(recipe.model.name), "reference": str(first)}
    tree |= dict(recipe.reward_model)
    tree |= {"train": str(place / "preferences.jsonl"), "out": str(place / f"reward-{model}")}
    tree |= {"seed": recipe.seed + 1000 * (model - 1), "quiet": recipe.quiet}
    found: RewardRecipe = settings.build(RewardRecipe, tree, owner="reward_model")
    return found


class Simulated:
    """Chooses by a hidden reward, at times blindly; always the same for the same responses.

    Args:
        how: The reward, and how far its choices follow it.
        trust: Modules and packages whose functions may run.
        seed: Of what is drawn.
    """

    def __init__(self, how: SimulatedConfig, *, trust: Trust = (), seed: int = 0) -> None:
        with quiet_transformers():
            self.scorer, _ = load_scorer(how.reward, trust)
        self.how, self.seed = how, seed

    def choose(self, name: str, shown: Shown) -> int:
        """Return the index of the response that somebody of that name would choose."""
        texts = sorted(shown.responses)  # whatever the order in which they are shown
        key = Item(shown.prompt, tuple(texts)).key
        rng = random.Random(f"{self.seed} {name} {key}")
        if rng.random() < self.how.noise:
            return shown.responses.index(rng.choice(texts))
        totals = score(self.scorer, rollout_of([(shown.prompt, text) for text in texts], {})).totals
        if self.how.temperature:
            weights = (totals.double() / self.how.temperature).softmax(0).tolist()
            return shown.responses.index(rng.choices(texts, weights)[0])
        return shown.responses.index(texts[int(totals.argmax())])

    def answer_all(self, store: Store, name: str) -> None:
        """Judge everything that there is for somebody."""
        me = store.join(store.link(name))
        while (shown := store.next(me)) is not None:
            store.vote(me, shown.id, f"simulated-{shown.id}", self.choose(name, shown))


class Taste:
    """The rounds of a loop; see this module."""

    def __init__(
        self, recipe: PreferencesRecipe, folder: RunFolder, store: Store, trust: Trust
    ) -> None:
        self.recipe, self.folder, self.store, self.trust = recipe, folder, store, trust
        self.people, self.plan = recipe.people, schedule(recipe.people, recipe.total_steps)
        guidelines = self.people.guidelines and Path(self.people.guidelines).expanduser()
        told = guidelines.read_text(encoding="utf-8") if guidelines else None
        store.ask("best", per_item=self.people.per_item, guidelines=told)
        self.gold: list[Item] = []
        if self.people.gold:
            items, _ = read_items(self.people.gold)
            self.gold = [item for item in items if item.gold is not None]
            if not self.gold:
                refuse("people.gold", "have items with a field gold", repr(self.people.gold))

    def run(self) -> dict[str, Any]:
        """Make what is left of the rounds."""
        with closing(self._page()) if self.people.simulated is None else nullcontext():
            rounds = [self._round(number) for number in range(1, len(self.plan) + 1)]
        summary = {"rounds": rounds, "at_chance": at_chance(list(self.store.items()))}
        self.folder.write("summary.json", json.dumps(summary, indent=2) + "\n")
        self._say(f"finished. The tuned model is in {self.folder.path / 'run' / 'policy'}/.")
        return summary

    def choices(self, number: int) -> Path:
        """Return the file of all choices up to a round, once they are made."""
        place = self.folder.path / f"round-{number}"
        place.mkdir(exist_ok=True)
        if not (place / "items.jsonl").is_file():
            self._sample(number)
        if not (place / "preferences.jsonl").is_file():
            self._ask(number)
        return place / "preferences.jsonl"

    def _round(self, number: int) -> dict[str, Any]:
        place = self.folder.path / f"round-{number}"
        if (place / "result.json").is_file():
            return dict(json.loads((place / "result.json").read_text(encoding="utf-8")))
        choices = sum(len(row["votes"]) for row in _rows(self.choices(number)))
        fits = [self._fit(number, model) for model in range(1, self.people.ensemble + 1)]
        self._say_if_it_learnt_nothing(fits)
        figures = self._steps(number)
        result = {
            "round": number,
            "choices": choices,
            "accuracy": [fit["accuracy"] for fit in fits],
            "step": self.plan[number - 1][1],
            "held_out": figures,
        }
        self.folder.write(f"round-{number}/result.json", json.dumps(result, indent=2) + "\n")
        return result

    def _say_if_it_learnt_nothing(self, fits: Sequence[dict[str, Any]]) -> None:
        """Say it where no reward model of a round is surely better than drawing lots."""
        chance = 1 / self.people.responses
        if all(fit["interval"][0] <= chance for fit in fits):
            told = ", ".join(f"{fit['accuracy'] or 0:.2f}" for fit in fits)
            self._say(
                "the held-out choices do not show that the reward model knows more than chance: "
                f"it is right in {told} of the cases, chance is in {chance:.2f}. They may be too "
                "few to tell, or it has learnt nothing; then PPO learns noise, and more would help."
            )

    def _say(self, text: str) -> None:
        if not self.recipe.quiet:
            print(f"trl: {text}", file=sys.stderr, flush=True)

    # -- what is asked ---------------------------------------------------------------------------

    def _sample(self, number: int) -> None:
        """Let the policy as it is now write what is asked in a round."""
        people, before = self.people, self.plan[number - 2][0] if number > 1 else 0
        count = self.plan[number - 1][0] - before
        chosen = people.pick == "disagreement" and number > 1
        asked = count * (people.candidates if chosen else 1)
        self._say(f"{people.responses} responses to each of {asked} prompts are being written.")
        groups = self._groups(number, asked)
        if chosen:
            worth = self._disagreements(number - 1, groups)
            best = sorted(range(len(groups)), key=lambda i: -worth[i])[:count]
            groups = [groups[i] for i in sorted(best)]
        if number == 1:
            texts = [{"prompt": p, "response": r} for p, responses in groups for r in responses]
            if not all(isinstance(prompt, str) for prompt, _ in groups):
                texts = [{"text": text["response"]} for text in texts]
            self.folder.write("round-1/reference.jsonl", _lines(texts))
        step = self.plan[number - 2][1] if number > 1 else 0
        rows = [{"prompt": p, "responses": r, "sources": [f"step {step}"] * len(r)}
                for p, r in groups]  # fmt: skip
        self.folder.write(f"round-{number}/items.jsonl", _lines(rows))

    def _groups(self, number: int, count: int) -> list[tuple[Prompt, list[str]]]:
        """Return prompts that were not used before, as far as there are some, with responses."""
        recipe, model = self.recipe, self.recipe.model
        name, where = str(self.folder.path / "run" / "policy"), dict[str, Any]()
        if number == 1:
            name = model_name(model.name)
            where = {"revision": model.revision, "gguf_file": model.gguf_file}
            where["trust_remote_code"] = model.trust_remote_code or None
            where = {key: value for key, value in where.items() if value is not None}
        with quiet_transformers(), torch.no_grad():
            device = "cuda" if torch.cuda.is_available() else "cpu"
            policy = load_policy(name, **where).to(device).eval()
            own = model.tokenizer and model_name(model.tokenizer)
            tokenizer: Any = find_tokenizer(own, name, policy, where)
            prompts = self._prompts(tokenizer, policy)
            before = self._used(number)
            asked = [prompts[i % len(prompts)] for i in range(before, before + count)]
            seed = recipe.seed + 1_000_003 * number
            how = sampling_of(recipe) | {"group_size": self.people.responses, "max_rows": AT_ONCE}
            how = {"add_bos": tokenizer.bos_token_id is not None} | how
            sampler = Sampler(
                tokenizer, **how, temperature=recipe.seeded_ppo.temperature, seed=seed
            )
            texts = (sampler(policy, asked).response_texts if asked else None) or []
        size = self.people.responses
        told = [list(dict.fromkeys(texts[size * i : size * (i + 1)])) for i in range(len(asked))]
        return [(p, r) for p, r in zip(asked, told, strict=True) if len(r) > 1]

    def _prompts(self, tokenizer: Any, policy: Any) -> list[Prompt]:
        """Return all prompts in the order in which they are asked."""
        place = self.folder.path / "prompts.json"
        if not place.is_file():  # else the policy has learnt, which may have written them
            data, seed = self.recipe.data, self.recipe.seed
            found = load_prompts(data, tokenizer, seed=seed, policy=policy).train
            order = random.Random(seed).sample(found, len(found))
            self.folder.write("prompts.json", json.dumps(order))
        return list(json.loads(place.read_text(encoding="utf-8")))

    def _used(self, number: int) -> int:
        """Return how many prompts were answered before a round."""
        people, counts = self.people, [count for count, _ in self.plan[: number - 1]]
        if people.pick == "random" or not counts:
            return counts[-1] if counts else 0
        return counts[0] + people.candidates * (counts[-1] - counts[0])

    def _disagreements(
        self, number: int, groups: Sequence[tuple[Prompt, list[str]]]
    ) -> list[float]:
        """Return how far the reward models of a round disagree on each group."""
        flat = [(prompt, text) for prompt, responses in groups for text in responses]
        told = []
        for model in range(1, self.people.ensemble + 1):
            place = self._reward(number, model)
            scale = json.loads((place.parent / "summary.json").read_text(encoding="utf-8"))["std"]
            scorer = RewardModelScorer(place)
            told.append(score(scorer, rollout_of(flat, {})).totals * scale)
        sizes = [len(responses) for _, responses in groups]
        return [disagreement(part) for part in torch.stack(told).split(sizes, 1)]

    def _ask(self, number: int) -> None:
        """Have the choices of a round made, and write all that there are so far."""
        place = self.folder.path / f"round-{number}"
        asked = [Item(row["prompt"], tuple(row["responses"]), tuple(row["sources"]))
                 for row in _rows(place / "items.jsonl")]  # fmt: skip
        self.store.add([*asked, *self.gold[number - 1 :: len(self.plan)]])
        self._say(f"round {number} of {len(self.plan)}: {len(asked)} items to choose from.")
        how = self.people.simulated
        self._wait(asked) if how is None else self._simulate(how)
        items = list(self.store.items())
        for name, told in at_chance(items).items():
            share, chance = f"{told['share']:.2f} of {told['of']}", f"{told['chance']:.2f}"
            self._say(f"{name} gave {share} known answers, where chance gives {chance}.")
        rows = [
            {"prompt": item.prompt, "responses": item.responses, "votes": votes}
            for item in items
            if item.gold is None and (votes := _votes(item))
        ]
        made = sum(len(row["votes"]) for row in rows)
        self._say(f"{made} choices so far.")
        if not rows:
            refuse("choices", "be there to learn from", "none", "go on, and choose")
        self.folder.write(f"round-{number}/preferences.jsonl", _lines(rows))

    # -- who answers -----------------------------------------------------------------------------

    def _simulate(self, how: SimulatedConfig) -> None:
        hidden = Simulated(how, trust=self.trust, seed=self.recipe.seed)
        for name in self.people.annotators:
            hidden.answer_all(self.store, name)

    def _wait(self, asked: Sequence[Item]) -> None:
        """Wait until all of it is chosen or skipped, or the time for it is over."""
        self._say(self.told)
        self.told = f"the page at {self.address} asks on"  # whose links are good once
        file = self.folder.path / "waited.json"  # seconds, of all sessions
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else 0.0
        began, minutes = time.monotonic(), self.people.minutes
        left = None if minutes is None else 60 * minutes - before

        def note() -> bool:
            self.folder.write(file.name, json.dumps(before + time.monotonic() - began))
            return False

        nobody = not self.store.fact("votes")
        wait(ask(self.store, asked, again=nobody), timeout=left, stop=note)

    def _page(self) -> Any:
        """Open the page, in a thread that ends with this process."""
        from trl.evaluation.people.server import Page

        page = Page(self.store.path, self.people.annotators, port=self.people.port)
        self.told = "; ".join(f"{name}: {link}" for name, link in page.links.items())
        self.address = page.address
        seen = any(map(os.environ.get, DISPLAYS)) or sys.platform in ("darwin", "win32")
        if seen and sys.stdout.isatty() and not self.recipe.quiet:
            webbrowser.open(next(iter(page.links.values())))
        return page

    # -- what is learnt --------------------------------------------------------------------------

    def _reward(self, number: int, model: int) -> Path:
        return self.folder.path / f"round-{number}" / f"reward-{model}" / "reward_model"

    def _fit(self, number: int, model: int) -> dict[str, Any]:
        """Train a reward model of a round, unless it is there, and return how it does."""
        recipe = reward_recipe(self.recipe, self.folder.path, number, model)
        done = Path(recipe.out) / "summary.json"
        if done.is_file():
            return dict(json.loads(done.read_text(encoding="utf-8")))
        return train_reward(recipe, resume=True)

    def _steps(self, number: int) -> dict[str, Any]:
        """Make the steps of a round, and return the figures of the held-out prompts after them."""
        recipe, count = self.recipe, self.people.ensemble
        models = [
            RewardConfig(
                kind="reward_model",
                name=str(self._reward(number, model)),
                title="taste" if count == 1 else f"taste_{model}",
                weight=1 / count,
            )
            for model in range(1, count + 1)
        ]
        given = {field.name: getattr(recipe, field.name) for field in fields(Recipe)}
        given |= {"reward": (*models, *recipe.reward), "out": str(self.folder.path / "run")}
        # Rewards of two rounds do not compare.
        given["checkpoints"] = replace(recipe.checkpoints, best=None)
        until = self.plan[number - 1][1]
        with warnings.catch_warnings():
            # Of another reward model than in the round before.
            warnings.filterwarnings("ignore", message=".*Gone on with all the same")
            result = run_recipe(Recipe(**given), "changed", trust=self.trust, until=until)
        if result.interrupted:
            raise KeyboardInterrupt
        return dict(result.summary["after"])


def _votes(item: Item) -> list[dict[str, Any]]:
    """Return who chose what, in an order that does not depend on who was first."""
    told = sorted((vote.annotator, vote.answer) for vote in item.votes if vote.answer != SKIP)
    return [{"annotator": name, "answer": answer} for name, answer in told]


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def _lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
