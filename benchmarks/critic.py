"""What each critic is good for: steps to a reward that is fixed beforehand, on two tasks.

    python benchmarks/critic.py                   each cell that has no result yet, in turn
    python benchmarks/critic.py --only mlp        those with this in their names
    python benchmarks/critic.py --table           the tables
    python benchmarks/critic.py --steps 1 --cell sentiment-linear-0    try one; nothing is kept

`sentiment`: film reviews of 64 tokens, P(positive) of the starter classifier. `first`: 192 tokens,
scored at the end by P(positive) of the first 16; nothing after these matters, so that all that the
critic says of 176 tokens is whether it has read them. The settings are those of `trl.train`, 32
responses a step; the reward of three steps in a row must reach the goal.

`fit` cells train the values alone, and then tell on fresh rollouts how much of the returns they
explain, beside the best of two regressors (ridge and a small network, fitted on as many rollouts,
chosen on others) on the same hidden states: the last ones of the policy.

Results: results/critic.jsonl.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import cells

BATCH = 32
IN_A_ROW = 3
FIRST = 16
GOALS = {"sentiment": 0.85, "first": 0.85}
TOKENS = {"sentiment": 64, "first": 192}
MOST_STEPS = 80
FITTING_STEPS, FITTING_BATCHES = 60, 24

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({}, {}),
    "lambda-value": ({}, {"gae_lambda_value": 1.0}),
    "lambda-1": ({}, {"gae_lambda": 1.0}),
    "mlp": ({"value_head": "mlp"}, {}),
    "bins": ({"value_head": "bins"}, {}),
    "own-critic": ({"critic": "copy"}, {}),
    "length-adaptive": ({}, {"length_adaptive": 0.05, "gae_lambda_value": 1.0}),
    "no-clip": ({}, {"cliprange_value": None}),
    "vapo": ({}, {"algorithm": "vapo", "positive_above": 0.5}),
}
"""Arguments of the model, and settings of PPO."""


@dataclass(frozen=True)
class Cell:
    """One training."""

    task: str
    variant: str
    seed: int = 0
    fit: bool = False
    """Train the values alone, and say what they explain."""

    @property
    def name(self) -> str:
        return "-".join([*(["fit"] if self.fit else []), self.task, self.variant, str(self.seed)])


def grid() -> Iterator[Cell]:
    """All of them, seed by seed."""
    for seed in range(3):
        for task in GOALS:
            yield from (Cell(task, variant, seed) for variant in VARIANTS)
        for task in GOALS:
            for variant in ("linear", "mlp", "bins", "own-critic"):
                yield Cell(task, variant, seed, fit=True)


class Setting:
    """Model, sampler, reward and trainer of a cell."""

    def __init__(self, cell: Cell, **more: Any) -> None:
        import torch
        from transformers import AutoTokenizer

        from trl import (
            CausalLMWithValueHead,
            ClassifierScorer,
            PPOConfig,
            PPOTrainer,
            Sampler,
            starter,
        )

        torch.manual_seed(cell.seed)
        of_model, of_ppo = VARIANTS[cell.variant]
        self.task, self.calls = cell.task, 0
        self.model = CausalLMWithValueHead.from_pretrained(starter.LANGUAGE_MODEL, **of_model)
        tokenizer = AutoTokenizer.from_pretrained(starter.LANGUAGE_MODEL)
        ends = {"eos_token_id": None} if cell.task == "first" else {}
        new = TOKENS[cell.task]
        how = {"max_new_tokens": new, "add_bos": True, "seed": cell.seed, **ends}
        self.sampler = Sampler(tokenizer, **how)
        self.classifier = ClassifierScorer(
            starter.CLASSIFIER, label="POSITIVE", output="probability"
        )
        config = PPOConfig.that_learns(batch_size=BATCH, seed=cell.seed, **of_ppo | more)
        self.trainer = PPOTrainer(self.model, config=config)
        self.prompts = starter.prompts("train")

    def sample(self) -> tuple[Any, Any]:
        """A rollout of prompts that come in turn, and its scores [B]."""
        first = self.calls * BATCH % (len(self.prompts) - BATCH)
        self.calls += 1
        with self.trainer.sampling():
            rollout = self.sampler(self.model, self.prompts[first : first + BATCH])
        if self.task == "first":
            tokens = rollout.responses[:, :FIRST].tolist()
            heard = self.sampler.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            queries = rollout.query_texts
            texts = [query + text for query, text in zip(queries, heard, strict=True)]
            return rollout, self.classifier(texts)
        return rollout, self.classifier(rollout).totals


def run(cell: Cell, steps: int | None = None) -> dict[str, Any]:
    """Train until the goal is reached, and return what happened."""
    if cell.fit:
        return fit(cell, steps)
    setting, rewards, explained = Setting(cell), list[float](), list[float]()
    for step in range(steps or MOST_STEPS):
        rollout, scores = setting.sample()
        rewards.append(round(float(scores.mean()), 4))
        stats = setting.trainer.step(rollout, scores)
        explained.append(round(stats["ppo/val/explained_variance"], 4))
        print(cell.name, step, rewards[-1], explained[-1], flush=True)
        if len(rewards) >= IN_A_ROW and min(rewards[-IN_A_ROW:]) >= GOALS[cell.task]:
            break
    reached = min(rewards[-IN_A_ROW:]) >= GOALS[cell.task] and len(rewards) >= IN_A_ROW
    return {
        "steps": len(rewards) if reached else None,
        "rewards": rewards,
        "explained_variance": explained,
    }


# -- what the values explain -----------------------------------------------------------------------


def fit(cell: Cell, steps: int | None) -> dict[str, Any]:
    """Pretrain the values; their R² on fresh rollouts, and the best one on the hidden states."""
    import torch

    most = steps or FITTING_STEPS
    setting = Setting(cell, value_pretraining=most, gae_lambda_value=1.0, init_kl_coef=0.0)
    trainer = setting.trainer
    for step in range(most):
        if trainer.value_pretraining.over:
            break
        stats = trainer.step(*setting.sample())
        print(cell.name, step, stats["ppo/val/explained_variance"], flush=True)
    fresh = [setting.sample() for _ in range(FITTING_BATCHES if steps is None else 3)]
    # The moments of pretraining: what the values were trained towards.
    parts = [(*states_and_values(setting, rollout), score) for rollout, score in fresh]
    states = torch.cat([part[0] for part in parts])
    values = torch.cat([part[1] for part in parts])
    returns, rows, first = list[Any](), list[Any](), 0
    for (_, _, tokens, score), (rollout, _) in zip(parts, fresh, strict=True):
        moments = trainer.score_moments
        scaled = (score - moments.mean) / moments.std
        returns.append(scaled.repeat_interleave(tokens))
        rows.append(torch.arange(first, first + len(rollout)).repeat_interleave(tokens))
        first += len(rollout)
    best, kind = best_r2(states, torch.cat(returns), torch.cat(rows) * 3 // first)
    held_out = torch.cat(rows) * 3 // first == 2
    own = r2(values[held_out], torch.cat(returns)[held_out])
    return {"r2": own, "best_r2": best, "best": kind, "pretraining_steps": most}


def states_and_values(setting: Setting, rollout: Any) -> tuple[Any, Any, Any]:
    """The last hidden state [N, d] and value [N] of each response token, and the tokens [B]."""
    import torch

    mask, start = rollout.response_mask, rollout.queries.shape[1] - 1
    with torch.no_grad():
        output = setting.model.language_model(
            input_ids=rollout.input_ids,
            attention_mask=rollout.attention_mask.long(),
            position_ids=rollout.position_ids,
            output_hidden_states=True,
        )
        states = output.hidden_states[-1][:, start:-1]
    values = setting.trainer.forward_pass(setting.trainer.policy, rollout).values
    return states[mask].float(), values[mask], mask.sum(1)


def r2(values: Any, returns: Any) -> float:
    """1 − Var(R − V)/Var(R), as the figure `ppo/val/explained_variance`."""
    return float(1 - (returns - values).var() / returns.var())


def best_r2(states: Any, returns: Any, third: Any) -> tuple[float, str]:
    """Fit on the first third of the responses, choose on the second, and tell of the last."""
    import torch

    torch.manual_seed(0)
    train, choose, test = (third == n for n in range(3))
    mean, std = states[train].mean(0), states[train].std(0) + 1e-6
    x, offset = (states - mean) / std, returns[train].mean()
    y = returns - offset
    found = list[tuple[float, float, str]]()
    gram = (x[train].T @ x[train]).double()
    towards = (x[train].T @ y[train]).double()
    for strength in (1e0, 1e1, 1e2, 1e3, 1e4, 1e5):
        eye = strength * torch.eye(len(gram), dtype=torch.double)
        guess = x @ torch.linalg.solve(gram + eye, towards).float()
        found.append(
            (r2(guess[choose], y[choose]), r2(guess[test], y[test]), f"ridge {strength:g}")
        )
    network = torch.nn.Sequential(
        torch.nn.Linear(x.shape[1], 128), torch.nn.GELU(), torch.nn.Linear(128, 1)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.1)
    places = train.nonzero().flatten()
    for epoch in range(20):
        for rows in places[torch.randperm(len(places))].split(256):
            loss = (network(x[rows]).squeeze(-1) - y[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            guess = network(x).squeeze(-1)
        scored = r2(guess[choose], y[choose]), r2(guess[test], y[test])
        found.append((*scored, f"network, {epoch + 1} epochs"))
    _, best, kind = max(found)
    return best, kind


def table(found: Mapping[str, dict[str, Any]]) -> str:
    """Steps to the goal, with the lowest and the highest of the seeds; then what values explain."""
    lines = [
        f"| critic | {' | '.join(f'{task}, steps to {goal}' for task, goal in GOALS.items())} |",
        "|---|---|---|",
    ]
    for variant in VARIANTS:
        shown = []
        for task in GOALS:
            of = [found.get(Cell(task, variant, seed).name) for seed in range(3)]
            known = [result for result in of if result]
            missed = sum(result["steps"] is None for result in known)
            text = cells.spread((result["steps"] for result in known), 0)
            shown.append(f"{text}{f', {missed} of {len(known)} never' if missed else ''}")
        lines.append(f"| {variant} | {' | '.join(shown)} |")
    lines += ["", "| fit | task | R² of the values | of the best regressor |", "|---|---|---|---|"]
    for task in GOALS:
        for variant in ("linear", "mlp", "bins", "own-critic"):
            of = [found.get(Cell(task, variant, seed, fit=True).name) for seed in range(3)]
            known = [result for result in of if result]
            own, best = ([result[key] for result in known] for key in ("r2", "best_r2"))
            lines.append(f"| {variant} | {task} | {cells.spread(own)} | {cells.spread(best)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    cells.main(__file__, grid(), run, table)
