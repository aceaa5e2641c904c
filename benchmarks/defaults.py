"""What `trl.train` learns at its defaults: models, ways to train them, rewards, fixed rates beside.

    python benchmarks/defaults.py                      each cell that has no result yet, in turn
    python benchmarks/defaults.py --only smollm2-full  those with this in their names
    python benchmarks/defaults.py --list               names, and what is there
    python benchmarks/defaults.py --table              a Markdown table of the results

A cell is one training of 30 steps in a process of its own, with nothing set but model, prompts,
reward and `steps`; the prompts of chat models are chats. Its result is a line of
results/defaults.jsonl: figures of each step, of 64 held-out prompts before and after, samples. A
killed script goes on at the first cell without a line.

Rewards: `json` and `polite` are those of the recipes json-object and chat-reward; `sentiment`, the
log-odds of a film-review classifier; `length`, nearness to 18 words, which takes shorter ones than
the model would write. Models come from examples/real_models/get.py; the classifier of the chat
model is all-MiniLM, trained as the recipe imdb-classifier says, with `--out
~/.cache/trl/models/minilm-imdb`.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cells

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # for the tests' reader of llama2.c's files

MODELS = Path(os.environ.get("TRL_MODELS", "~/.cache/trl/models")).expanduser()
STORIES = HERE.parents[1] / "shared/data/stories260K"
HELD_OUT = 64
KEPT = (
    "reward/mean",
    "reward/std",
    "objective/kl",
    "objective/kl_coef",
    "ppo/policy/approxkl",
    "ppo/policy/clipfrac",
    "ppo/val/var_explained",
    "response/length",
    "learning_rate",
)

# -- what is asked, and what is rewarded -----------------------------------------------------------

RECIPES = HERE.parent / "recipes"
STORY_OPENINGS = [
    f"{opening} {who} {what}"
    for opening in ("Once upon a time,", "One day,", "There was", "In a small town,")
    for who in ("a boy", "a girl", "a dog", "a cat", "a bird", "an old man", "a fish", "a bear")
    for what in ("named", "who", "that", "went", "had", "saw", "wanted", "was")
]


def of_recipe(prompts: str, reward: str) -> tuple[list[str], Callable[..., Any]]:
    """The prompts and the reward of a recipe."""
    texts = (RECIPES / f"{prompts}-prompts.txt").read_text().splitlines()
    return texts, runpy.run_path(str(RECIPES / "rewards.py"))[reward]


def words_from_18(completions: list[str]) -> list[float]:
    """Less the distance from 18 words, of which 18 cost 1."""
    return [-abs(len(text.split()) - 18) / 18 for text in completions]


# -- cells -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One training."""

    model: str
    kind: str
    task: str
    algorithm: str = "ppo"
    seed: int = 0
    rate: float | None = None
    """A fixed one, with one epoch and β 0.05; None: the defaults."""
    initial: float | None = None
    """`auto_initial_rate`; None: the default."""
    gae_lambda: float | None = None
    """None: the default."""
    steps: int = 30

    @property
    def name(self) -> str:
        parts = [self.model, self.kind, self.task, self.algorithm]
        parts += [f"rate{self.rate:g}"] if self.rate else []
        parts += [f"from{self.initial:g}"] if self.initial else []
        parts += [f"lambda{self.gae_lambda:g}"] if self.gae_lambda else []
        return "-".join([*parts, str(self.seed)])


def grid() -> Iterator[Cell]:
    """All of them, those that say most first."""
    kinds = ("full", "lora", "top")
    for task in ("json", "sentiment", "polite"):
        yield from (Cell("smollm2", kind, task) for kind in kinds)
    yield from (Cell("smollm2", "full", task, "grpo") for task in ("json", "sentiment", "polite"))
    for seed in range(3):
        yield from (Cell("starter", kind, "sentiment", seed=seed) for kind in kinds)
        yield Cell("stories", "full", "length", seed=seed)
        for kind in ("full", "lora"):
            yield Cell("starter", kind, "sentiment", seed=seed, gae_lambda=0.95)
    for initial in (1e-6, 1e-3):  # 3e-5 is the default
        yield Cell("smollm2", "full", "json", initial=initial)
        yield Cell("starter", "full", "sentiment", initial=initial)
    for seed in (1, 2):
        yield Cell("smollm2", "full", "json", seed=seed)
        yield Cell("smollm2", "full", "json", "grpo", seed=seed)
    for task in ("json", "sentiment"):
        for kind in kinds:
            for rate in (1.4e-5, 5e-5, 1.5e-4):
                yield Cell("smollm2", kind, task, rate=rate * (10 if kind == "lora" else 1))


def model_of(cell: Cell) -> Any:
    """A folder, or a model with its tokenizer."""
    from trl import starter

    if cell.model == "smollm2":
        return {"model": str(MODELS / "smollm2")}
    if cell.model == "starter":
        return {"model": str(starter.LANGUAGE_MODEL)}
    from tests.llama2c import load_model, load_tokenizer

    return {
        "model": load_model(STORIES / "stories260K.bin"),
        "tokenizer": load_tokenizer(STORIES / "tok512.bin", 512),
    }


def task_of(cell: Cell) -> tuple[list[Any], Any]:
    """Prompts and reward."""
    from trl import starter
    from trl.evaluation import ClassifierScorer

    if cell.task == "json":
        return of_recipe("json-object", "json_object")
    if cell.task == "polite":
        return of_recipe("chat-reward", "polite_and_short")
    if cell.task == "length":
        return STORY_OPENINGS, words_from_18
    small = cell.model == "starter"
    prompts = starter.prompts("train")[: 600 + HELD_OUT]
    if small:
        return prompts, ClassifierScorer(str(starter.CLASSIFIER), label="POSITIVE")
    prompts = [f'Continue this film review: "{text}' for text in prompts]
    judge = MODELS / "minilm-imdb" / "classifier"
    return prompts, ClassifierScorer(str(judge), label="POSITIVE", output="log_odds")


def settings_of(cell: Cell) -> dict[str, Any]:
    """What a cell gives `trl.train` beside model, prompts, reward, and steps."""
    given: dict[str, Any] = {"seed": cell.seed} if cell.seed else {}
    if cell.kind == "lora":
        from peft import LoraConfig

        given["peft_config"] = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    if cell.kind == "top":
        given["unfrozen_layers"] = {"smollm2": 10, "starter": 1, "stories": 2}[cell.model]
    if cell.algorithm != "ppo":
        given["algorithm"] = cell.algorithm
    if cell.initial is not None:
        given["auto_initial_rate"] = cell.initial
    if cell.gae_lambda is not None:
        given["gae_lambda"] = cell.gae_lambda
    if cell.rate is not None:
        from trl import PPOConfig

        config = {"learning_rate": cell.rate, "ppo_epochs": 1, "init_kl_coef": 0.05}
        given["config"] = PPOConfig(batch_size=32, seed=given.pop("seed", 0), **config)
    return given


def run(cell: Cell, steps: int | None = None) -> dict[str, Any]:
    """Train, and return the result."""
    import trl

    cell = replace(cell, steps=steps or cell.steps)
    prompts, reward = task_of(cell)
    if cell.model == "smollm2":
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    started, rows, samples = time.time(), list[dict[str, float]](), list[str]()

    def told(step: int, row: dict[str, float]) -> None:
        rows.append(row)
        figures = " ".join(f"{name} {row.get(name, float('nan')):.4g}" for name in KEPT)
        print(f"{cell.name} {step} {time.time() - started:.0f}s {figures}", flush=True)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        policy, history = trl.train(
            **model_of(cell),
            prompts=prompts[:-HELD_OUT],
            reward=reward,
            held_out=prompts[-HELD_OUT:],
            eval_every=cell.steps,
            steps=cell.steps,
            on_step=told,
            **settings_of(cell),
        )
    if policy.tokenizer is not None:
        sampler = trl.Sampler(policy.tokenizer, max_new_tokens=24)
        samples = list(sampler(policy, prompts[-8:]).response_texts or ())
    held = [row for row in history if any(name.startswith("held_out/") for name in row)]
    return {
        "steps": {name: [round(row.get(name, 0.0), 7) for row in rows] for name in KEPT},
        "held_out": [
            {name: round(x, 4) for name, x in row.items() if name.startswith("held_out/")}
            for row in (held[0], held[-1])
        ],
        "samples": samples,
        "warnings": sorted({str(warning.message)[:300] for warning in caught}),
    }


# -- results ---------------------------------------------------------------------------------------


def table(found: Mapping[str, dict[str, Any]]) -> str:
    """One row a cell: held-out reward, KL, distinct-2, length before and after, and the rates."""
    lines = [
        "| cell | reward | KL, nats | distinct-2 | tokens | rate, first to last step | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in grid():
        if (result := found.get(cell.name)) is None:
            continue
        before, after = result["held_out"]

        def pair(name: str, digits: int, before: Any = before, after: Any = after) -> str:
            return f"{before[name]:.{digits}f} → {after[name]:.{digits}f}"

        rates = result["steps"]["learning_rate"]
        lines.append(
            f"| {cell.name} | {pair('held_out/reward/mean', 2)} | {after['held_out/kl']:.1f} "
            f"| {pair('held_out/distinct_2', 2)} | {pair('held_out/length', 0)} "
            f"| {rates[0]:.1e} to {rates[-1]:.1e} | {result['seconds']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cells.main(__file__, grid(), run, table)
