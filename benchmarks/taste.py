"""Do choices teach what a hidden reward would have taught? The loop of Ziegler et al., simulated.

    python benchmarks/taste.py                  each cell that has no result yet, in turn
    python benchmarks/taste.py --only online    those with this in their names
    python benchmarks/taste.py --list           names, and what is there
    python benchmarks/taste.py --table          a Markdown table of the results

The starter model and its openings of film reviews. The hidden reward is the starter's classifier
(logit of POSITIVE); the simulated annotator takes the best of four by it, one time in ten blindly.
Reward models start from the policy, never from the hidden one, and get 2,000 choices at most. Their
learning rate and epochs are chosen once for all cells, by the accuracy on held-out choices of a
seed that no cell has: results/taste-fit.json.

    hidden         PPO on the hidden reward itself, evaluated every few steps: P(POSITIVE) by KL
    far            the same with a quarter of the KL coefficient, to go as far as the loops do
    online         choices before the first step and on the way, of what the policy writes then
    offline        all of them before the first step
    disagreement   as online, but asked is what an ensemble of three disagrees about
    minilm         as online, reward models from all-MiniLM (examples/real_models/get.py minilm)

The share of the gain is (P − P₀)/(P_hidden − P₀), P_hidden being the best that `hidden` and `far`
of the same seed have at the KL of the loop (between two evaluations in a line; beyond all of a
training: its best).

A result is a line of results/taste.jsonl. A killed script goes on amid a cell, in the folder that
--runs names.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "taste.jsonl"
MINILM = Path("~/.cache/trl/models/minilm").expanduser()
ALONE = ("hidden", "far")
ARMS = (*ALONE, "online", "offline", "disagreement", "minilm")
SEEDS = 3
FITS = RESULTS.with_name("taste-fit.json")
TRIED = ((1e-4, 2), (3e-4, 2), (1e-3, 2), (3e-4, 4))
"""Learning rates and epochs."""
FIT_SEED, FIT_CHOICES, FIT_HELD_OUT = 99, 1200, 0.25
CHOICES, FIRST = 2000, 800
STEPS, EVERY = 100, 10
P, KL = "held_out/reward/positive_probability", "held_out/kl"
BAR = 0.85


def cells() -> Iterator[tuple[str, int]]:
    """Arms and seeds, those that say most first."""
    for seed in range(SEEDS):
        yield from ((arm, seed) for arm in ARMS[:-1])
    yield from (("minilm", seed) for seed in range(SEEDS))


def recipe_of(
    arm: str, seed: int, out: Path, fit: dict[str, Any] | None = None, **people: Any
) -> Any:
    """The recipe human-preferences with the arm's settings; `hidden`: its PPO on that reward."""
    from trl import config as settings
    from trl.cli.recipes import find_recipe
    from trl.config.recipe import PeopleConfig, Recipe, RewardConfig, SimulatedConfig

    values = settings.read_yaml(find_recipe(str(HERE.parent / "recipes/human-preferences.yaml")))
    loop = settings.build(settings.PreferencesRecipe, values)
    measured = RewardConfig(kind="classifier", output="probability", weight=0)
    judge = RewardConfig(kind="classifier", output="logit")
    more = {"steps": STEPS, "eval_every": EVERY, "seed": seed, "out": str(out), "quiet": True}
    if arm in ALONE:
        given = {name: getattr(loop, name) for name in Recipe.__dataclass_fields__}
        if arm == "far":
            given["ppo"] = replace(loop.ppo, init_kl_coef=loop.ppo.init_kl_coef / 4)
        return Recipe(**given | {"reward": (judge, measured)} | more)
    who: dict[str, Any] = {"choices": CHOICES, "first": FIRST, "rounds": 4}
    who |= {"offline": {"rounds": 1}, "disagreement": {"pick": "disagreement", "ensemble": 3}}.get(
        arm, {}
    )
    who["simulated"] = SimulatedConfig(reward=(judge,), noise=0.1)
    more["reward_model"] = dict(loop.reward_model) | (fit or {})
    if arm == "minilm":
        more["reward_model"] |= {"model": str(MINILM)}
    return replace(loop, people=PeopleConfig(**who | people), reward=(measured,), **more)


def fit_of(arm: str, runs: Path) -> dict[str, Any]:
    """Choose learning rate and epochs of an arm's reward models, unless they are chosen already."""
    from contextlib import closing

    from trl.evaluation.people.store import Store
    from trl.training.folder import RunFolder
    from trl.training.reward import train_reward
    from trl.training.taste import Taste, reward_recipe

    kind = "minilm" if arm == "minilm" else "starter"
    found = json.loads(FITS.read_text()) if FITS.exists() else {}
    if kind not in found:
        folder = RunFolder(runs / "fit")
        recipe = recipe_of(
            kind if kind == "minilm" else "offline",
            FIT_SEED, folder.path, choices=FIT_CHOICES, first=FIT_CHOICES, rounds=1,
        )  # fmt: skip
        folder.path.mkdir(parents=True, exist_ok=True)
        with closing(Store(folder.path / "votes.sqlite", make=True)) as store:
            Taste(recipe, folder, store, ()).choices(1)
        found[kind] = []
        for rate, epochs in TRIED:
            one = reward_recipe(recipe, folder.path, 1, 1)
            out = folder.path / f"{kind}-{rate:g}-{epochs}"
            how = {"learning_rate": rate, "epochs": epochs, "held_out": FIT_HELD_OUT}
            one = replace(one, **how, out=str(out))
            done = out / "summary.json"
            told = json.loads(done.read_text()) if done.exists() else train_reward(one, resume=True)
            figures = {k: told[k] for k in ("accuracy", "interval")}
            found[kind].append({"learning_rate": rate, "epochs": epochs} | figures)
            print(kind, found[kind][-1], flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        FITS.write_text(json.dumps(found, indent=2) + "\n")
    best = max(found[kind], key=lambda each: each["accuracy"])
    return {name: best[name] for name in ("learning_rate", "epochs")}


def run(arm: str, seed: int, runs: Path) -> dict[str, Any]:
    """Make a cell, or go on with it, and return its result."""
    from trl.training.run import run_recipe
    from trl.training.taste import tune_to_taste

    started, out = time.process_time(), runs / f"{arm}-{seed}"
    rounds: list[dict[str, Any]] = []
    if arm in ALONE:
        run_recipe(recipe_of(arm, seed, out), "auto")
    else:
        recipe = recipe_of(arm, seed, out, fit_of(arm, runs))
        summary = tune_to_taste(recipe, resume=True)
        if summary is None:
            raise KeyboardInterrupt
        rounds, out = summary["rounds"], out / "run"
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {
        "name": f"{arm}-{seed}",
        "arm": arm,
        "seed": seed,
        "curve": [
            {k: row[k] for k in ("step", P, KL, "held_out/distinct_2")} for row in lines if P in row
        ],
        "rounds": [{k: each[k] for k in ("choices", "accuracy", "step")} for each in rounds],
        "cpu_seconds": round(time.process_time() - started),
    }


def results() -> dict[str, dict[str, Any]]:
    """The last result of each cell, by name."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {result["name"]: result for result in map(json.loads, lines)}


def at_kl(curve: list[dict[str, float]], kl: float) -> float:
    """P(POSITIVE) of a training at a KL; beyond its last one the best of all."""
    for before, after in pairwise(curve):
        if before[KL] <= kl <= after[KL]:
            share = (kl - before[KL]) / max(after[KL] - before[KL], 1e-9)
            return before[P] + share * (after[P] - before[P])
    return max(point[P] for point in curve)


def share(found: dict[str, dict[str, Any]], arm: str, seed: int) -> float:
    """The share of the hidden reward's gain that an arm has at its end."""
    one, others = found.get(f"{arm}-{seed}"), [found.get(f"{each}-{seed}") for each in ALONE]
    if one is None or None in others:
        return math.nan
    before, after = one["curve"][0][P], one["curve"][-1]
    best = max(at_kl(other["curve"], after[KL]) for other in others)
    return (after[P] - before) / (best - before)


def table(found: dict[str, dict[str, Any]]) -> str:
    """A row for each arm, its seeds with a comma between."""
    lines = [
        f"| arm | choices | accuracy, last | P(POSITIVE) before | after | KL, nats | share of the "
        f"gain (bar {BAR:.2f}) | mean | CPU minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        rows = [found[f"{arm}-{seed}"] for seed in range(SEEDS) if f"{arm}-{seed}" in found]
        if not rows:
            continue
        last = [row["rounds"][-1] if row["rounds"] else None for row in rows]
        shares = [share(found, arm, row["seed"]) for row in rows] if arm not in ALONE else []
        told = [
            arm,
            ", ".join(f"{each['choices']:,}" for each in last if each),
            ", ".join(f"{mean(each['accuracy']):.2f}" for each in last if each),
            ", ".join(f"{row['curve'][0][P]:.2f}" for row in rows),
            ", ".join(f"{row['curve'][-1][P]:.2f}" for row in rows),
            ", ".join(f"{row['curve'][-1][KL]:.1f}" for row in rows),
            ", ".join(f"{each:.2f}" for each in shares),
            f"{mean(shares):.2f}" if shares else "",
            ", ".join(f"{row['cpu_seconds'] / 60:.0f}" for row in rows),
        ]
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cells with this in their names")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--runs", type=Path, default=Path("runs/taste"))
    chosen = parser.parse_args()
    if chosen.table:
        return print(table(results()))
    for arm, seed in cells():
        name = f"{arm}-{seed}"
        if chosen.only not in name:
            continue
        if chosen.list:
            print("x" if name in results() else " ", name)
        elif name not in results():
            result = run(arm, seed, chosen.runs)
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(name, json.dumps(result["curve"][-1]), result["rounds"], flush=True)
    return None


if __name__ == "__main__":
    main()
