"""What rollouts do that another policy wrote: some steps old, or sampled in another precision.

    python benchmarks/staleness.py                   each cell that has no result yet, in turn
    python benchmarks/staleness.py --only toy        those with this in their names
    python benchmarks/staleness.py --table           the table
    python benchmarks/staleness.py --figure          the rewards of all steps, as the docs show them
    python benchmarks/staleness.py --steps 2 --cell toy-lag1-tis-0    try one; nothing is kept

A buffer hands each rollout on `lag` steps late, so that the policy has made as many steps since it
wrote it. `toy`: 64 responses of 6 tokens a step from a tiny random model; divided by 4, their ids
are to leave 0, 1, 2, 3, 0, 1, and the share before the first that does not is the score. `quarter`:
the same at a quarter of the rate, so that four steps go about as far as one of `toy`.
`sentiment`: the starter model and P(positive), at the settings of `trl.train`. `bf16`: the top
ten layers of SmolLM2 on the recipe json-object, trained in fp32 and sampled by a copy in bf16.
Rewards are those of fresh responses.

Results: results/staleness.jsonl.
"""

from __future__ import annotations

import copy
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import cells

FIGURE = Path(__file__).parents[1] / "docs" / "pictures" / "staleness.png"
CORRECTIONS = ("none", "tis", "sequence_tis", "icepop", "dppo", "clip", "geometric")
LAGS = (1, 4)
STEPS = {"toy": 130, "quarter": 520, "sentiment": 40, "bf16": 20}
RATES = {"toy": 5e-3, "quarter": 1.25e-3}
LAST = 5
"""Steps whose mean reward is the final one."""
SOLVED = {"toy": 0.95, "quarter": 0.95}
"""A final reward that ends a training: of answers that are all right, PPO's whitened advantages are
noise, and it may lose again what it has.
"""
KEPT = {
    "kl": "objective/kl",
    "error": "ppo/behaviour/token_mult_prob_error",
    "truncated": "ppo/behaviour/truncated",
    "masked": "ppo/behaviour/masked",
    "clipped": "ppo/policy/clipfrac",
}


@dataclass(frozen=True)
class Cell:
    """One training."""

    task: str
    lag: int = 0
    correction: str = "none"
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.task}-lag{self.lag}-{self.correction}-{self.seed}"

    @property
    def steps(self) -> int:
        """How many there are at most. Four steps old, `clip` is about that much slower."""
        slow = self.task == "toy" and self.correction == "clip"
        return STEPS[self.task] * (max(self.lag, 1) if slow else 1)


def grid() -> Iterator[Cell]:
    """All of them, seed by seed."""
    for seed in range(3):
        for task in ("toy", "sentiment"):
            yield Cell(task, 0, "none", seed)
            for lag in LAGS:
                yield from (Cell(task, lag, correction, seed) for correction in CORRECTIONS)
        yield Cell("quarter", 0, "none", seed)
        yield from (Cell("quarter", 4, correction, seed) for correction in ("none", "tis", "dppo"))
        yield from (Cell("bf16", 0, correction, seed) for correction in ("none", "tis"))


class Delayed:
    """Hands on what was put in so many calls ago; None: nothing has been in for so long."""

    def __init__(self, lag: int) -> None:
        self.lag, self.waiting = lag, deque[Any]()

    def __call__(self, item: Any) -> Any:
        self.waiting.append(item)
        return self.waiting.popleft() if len(self.waiting) > self.lag else None


def made(cell: Cell) -> tuple[Any, Callable[[int], tuple[Any, Any]]]:
    """The trainer, and what samples and scores the batch of a step."""
    import torch

    torch.manual_seed(cell.seed)
    settings: dict[str, Any] = {
        "reuse_recorded": False,
        "correction": None if cell.correction == "none" else cell.correction,
        "prob_error_warn": None,
        "prob_error_stop": None,
        "precision": "fp32",
        "seed": cell.seed,
    }
    makers = {"toy": toy, "quarter": toy, "sentiment": sentiment, "bf16": bf16}
    return makers[cell.task](cell, settings)


def toy(cell: Cell, settings: dict[str, Any]) -> tuple[Any, Callable[[int], tuple[Any, Any]]]:
    """A task whose steps hang together: what a token is worth depends on all before it."""
    import torch

    from tests.conftest import VOCABULARY, tiny_gpt2
    from trl import PPOTrainer
    from trl.rollout.sampling import sample

    model = tiny_gpt2(cell.seed, scale=0.02)
    torch.nn.init.zeros_(model.v_head.summary.weight)
    settings |= {"learning_rate": RATES[cell.task], "batch_size": 64, "minibatch_size": 64}
    trainer = PPOTrainer(
        model, forward_batch_size=64, adaptive_kl=False, init_kl_coef=0.0, **settings
    )

    def batch(step: int) -> tuple[Any, Any]:
        rollout = sample(model, torch.randint(VOCABULARY, (64, 3)), max_new_tokens=6)
        return rollout, counted_up(rollout.responses)

    return trainer, batch


def counted_up(responses: Any) -> Any:
    """The share [B] of tokens [B, R] before the first whose remainder by 4 is not its place's."""
    import torch

    right = responses % 4 == torch.arange(responses.shape[1]) % 4
    return right.float().cumprod(1).mean(1)


def sentiment(cell: Cell, settings: dict[str, Any]) -> tuple[Any, Callable[[int], tuple[Any, Any]]]:
    """The starter model and its classifier."""
    from trl import ClassifierScorer, starter

    scorer = ClassifierScorer(starter.CLASSIFIER, label="POSITIVE", output="probability")
    prompts = starter.prompts("train")
    return of_texts(str(starter.LANGUAGE_MODEL), prompts, lambda r: scorer(r).totals, settings)


def bf16(cell: Cell, settings: dict[str, Any]) -> tuple[Any, Callable[[int], tuple[Any, Any]]]:
    """SmolLM2, and JSON."""
    import torch
    from defaults import MODELS, of_recipe

    texts, reward = of_recipe("json-object", "json_object")
    prompts = [[{"role": "user", "content": text}] for text in texts]

    def scored(rollout: Any) -> Any:
        found = reward(list(rollout.query_texts), list(rollout.response_texts))
        return torch.tensor(found, dtype=torch.float32)

    return of_texts(str(MODELS / "smollm2"), prompts, scored, settings, low=True)


class InBf16:
    """A copy of a model that computes as an engine in bf16 does, on any machine.

    Its weights, and what goes into and comes out of each of its modules, are rounded to bf16;
    products are summed in fp32, as where bf16 is in the hardware.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.rounded = model, copy.deepcopy(model).requires_grad_(False)
        for module in self.rounded.modules():
            module.register_forward_pre_hook(lambda _, given: in_bf16(given))
            module.register_forward_hook(lambda _, given, output: in_bf16(output))

    def __call__(self) -> Any:
        """The copy, with the weights that the model has by now."""
        weights = zip(self.rounded.parameters(), self.model.parameters(), strict=True)
        for rounded, weight in weights:
            rounded.copy_(in_bf16(weight.detach()))
        return self.rounded


def in_bf16(value: Any) -> Any:
    """A tensor of floats, or those in a tuple, rounded to bf16 and kept as they were."""
    import torch

    if isinstance(value, tuple):
        return tuple(map(in_bf16, value))
    floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.bfloat16().to(value.dtype) if floats else value


def of_texts(
    name: str,
    prompts: list[Any],
    score: Callable[[Any], Any],
    settings: dict[str, Any],
    *,
    low: bool = False,
) -> tuple[Any, Callable[[int], tuple[Any, Any]]]:
    """At the settings of `trl.train`; `low`: sampled in bf16, the top layers trained."""
    from transformers import AutoTokenizer

    from trl import CausalLMWithValueHead, PPOConfig, PPOTrainer, Sampler

    model = CausalLMWithValueHead.from_pretrained(name, unfrozen_layers=10 if low else None)
    tokenizer = AutoTokenizer.from_pretrained(name)
    seed, rows = settings["seed"], 32
    sampler = Sampler(tokenizer, max_new_tokens=24, add_bos=not low, seed=seed)
    trainer = PPOTrainer(model, config=PPOConfig.that_learns(**settings))
    other = InBf16(model.language_model) if low else None

    def batch(step: int) -> tuple[Any, Any]:
        first = step * rows % (len(prompts) - rows)
        with trainer.sampling():
            rollout = sampler(other() if other else model, prompts[first : first + rows])
        return rollout, score(rollout)

    return trainer, batch


def run(cell: Cell, steps: int | None = None) -> dict[str, Any]:
    """Train, and return what happened."""
    trainer, batch = made(cell)
    buffer, rewards = Delayed(cell.lag), list[float]()
    figures: dict[str, list[float]] = {name: [] for name in KEPT}
    for step in range(cell.lag + (steps or cell.steps)):
        rollout, scores = batch(step)
        rewards.append(round(float(scores.mean()), 4))
        late = buffer((rollout, scores))
        stats = trainer.step(*late) if late else {}
        for name, key in KEPT.items():
            figures[name].append(round(float(stats.get(key, 0.0)), 5))
        print(cell.name, step, rewards[-1], {k: v[-1] for k, v in figures.items()}, flush=True)
        if final(rewards) > SOLVED.get(cell.task, math.inf):
            break
    return {"final": final(rewards), "rewards": rewards, "figures": figures}


def final(rewards: Sequence[float]) -> float:
    """The mean reward of the last steps."""
    last = rewards[-LAST:]
    return sum(last) / len(last)


def of_seeds(found: Mapping[str, dict[str, Any]], cell: Cell) -> list[dict[str, Any]]:
    """The results of a cell with all seeds that there are."""
    named = (Cell(cell.task, cell.lag, cell.correction, seed).name for seed in range(3))
    return [found[name] for name in named if name in found]


def table(found: Mapping[str, dict[str, Any]]) -> str:
    """Final reward, steps made, KL, and what was seen of the other policy, over the seeds."""
    lines = [
        "| task | lag | correction | final reward | steps | KL | probability error "
        "| masked, truncated |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in (cell for cell in grid() if cell.seed == 0):
        if known := of_seeds(found, cell):
            kl, error, held = (
                [sum(sum(r["figures"][name][-LAST:]) / LAST for name in names) for r in known]
                for names in (("kl",), ("error",), ("masked", "truncated"))
            )
            lines.append(
                f"| {cell.task} | {cell.lag} | {cell.correction} "
                f"| {cells.spread(r['final'] for r in known)} "
                f"| {cells.spread((len(r['rewards']) for r in known), 0)} | {cells.spread(kl, 1)} "
                f"| {cells.spread(error, 3)} | {cells.spread(held, 3)} |"
            )
    return "\n".join(lines)


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """The mean of each step; a curve that has ended stays where it was, at its final reward."""
    steps = max(map(len, curves))
    held = [[*curve, *[final(curve)] * (steps - len(curve))] for curve in curves]
    return [sum(column) / len(column) for column in zip(*held, strict=True)]


def figure(found: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Draw the mean reward of the seeds at each step, a panel for each task and lag."""
    import matplotlib.pyplot as plt
    from PIL import Image

    panels = [(task, lag) for task in ("toy", "sentiment") for lag in LAGS]
    fig, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained")
    for ax, (task, lag) in zip(axes.flat, panels, strict=True):
        shown = Cell(task, 0), *(Cell(task, lag, name) for name in CORRECTIONS)
        for number, cell in enumerate(shown):
            if not (known := of_seeds(found, cell)):
                continue
            mean = mean_curve([result["rewards"] for result in known])
            label = cell.correction if cell.lag else "no lag"
            ax.plot(mean, label=label, color=f"C{number}" if number else "black")
        ax.set(title=f"{task}, {lag} step{'s' * (lag > 1)} old", xlabel="step", ylabel="reward")
    axes.flat[2].legend(fontsize=8, loc="lower right")
    fig.savefig(path, dpi=80)
    Image.open(path).convert("RGB").quantize(32).save(path, optimize=True)  # few colours are small


if __name__ == "__main__":
    if "--figure" in sys.argv:
        found = cells.results(cells.RESULTS / "staleness.jsonl")
        figure(found, FIGURE)
    else:
        cells.main(__file__, grid(), run, table)
