"""A tiny model, prompts and a reward on the disk, and recipes for runs with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.families import tiny_model
from tests.training.test_loop import tokenizer
from trl.config import PPOConfig
from trl.config.recipe import CheckpointConfig, DataConfig, ModelConfig, Recipe, RewardConfig
from trl.config.recipe import SamplingConfig as Sampling
from trl.training.sharded import put_together
from trl.training.supervised import Fit

REWARD = """
import random
import numpy
import torch


def drawing(texts):
    noise = random.random() + numpy.random.rand() + torch.rand(()).item()
    return [text.split().count("w7") + 0.1 * noise for text in texts]


def count_w7(texts):
    return [float(text.split().count("w7")) for text in texts]


class Counting:
    "A reward that depends on how often it was called."

    def __init__(self):
        self.calls = 0

    def __call__(self, texts):
        self.calls += 1
        return [text.split().count("w7") + 0.1 * (self.calls % 3) for text in texts]

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


counting = Counting()
"""


def make_parts(folder: Path, family: str = "llama") -> None:
    """Write a model, its tokenizer, prompts and a reward function into a folder."""
    tiny_model(family).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    words = [f"w{a} w{b}" for a in range(1, 8) for b in range(9, 14)]
    (folder / "prompts.txt").write_text("\n".join(words) + "\n")
    (folder / "reward.py").write_text(REWARD)


def tiny_recipe(folder: Path, out: Path, **changes: Any) -> Recipe:
    """Return a recipe of a run of seconds with the parts of `make_parts`."""
    ppo = {
        "batch_size": 8,
        "minibatch_size": 4,
        "learning_rate": 1e-2,
        "precision": "fp32",
        "ppo_epochs": 1,
    }
    base: dict[str, Any] = {
        "model": ModelConfig(name=str(folder / "model")),
        "data": DataConfig(prompts=str(folder / "prompts.txt"), held_out=6),
        "sampling": Sampling(max_new_tokens=5),
        "reward": (RewardConfig(kind="function", name=f"{folder / 'reward.py'}:count_w7"),),
        "ppo": PPOConfig(**ppo | changes.pop("ppo", {})),
        "steps": 6,
        "eval_every": 2,
        "checkpoints": CheckpointConfig(every=2, keep=2),
        "out": str(out),
        "quiet": True,
    }
    return Recipe(**base | changes)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics without what differs from run to run."""
    timed = ("time/", "tokens_per_second", "machine")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def equal(a: Any, b: Any) -> bool:
    """Compare nested states bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def last_state(out: Path) -> dict[str, Any]:
    """Return what the last checkpoint of a run holds, less its time and its place."""
    newest = max((out / "checkpoints").glob("step-*"))
    state = torch.load(newest / "state.pt", weights_only=True)
    state = put_together(state, newest, torch.nn.Linear(1, 1))
    del state["seconds"], state["files"]["metrics"], state["recipe"]
    return state


def assert_same_run(a: Path, b: Path) -> None:
    """Check that two runs ended alike, bit for bit: weights, optimiser, figures, samples."""
    first, second = last_state(a), last_state(b)
    for key in first:
        assert equal(first[key], second[key]), key
    assert without_time(lines(a / "metrics.jsonl")) == without_time(lines(b / "metrics.jsonl"))
    for name in ("scores", "samples", "warnings"):
        ours, theirs = a / f"{name}.jsonl", b / f"{name}.jsonl"
        assert ours.exists() == theirs.exists(), name
        assert not ours.exists() or ours.read_bytes() == theirs.read_bytes(), name


def stop_after(monkeypatch, steps, how, fit=Fit):
    """Have `how` happen in the update of a fit after so many."""
    compute_loss = fit.compute_loss
    calls = []

    def interrupted(self, model, *inputs, **others):
        calls.append(model)
        if len(calls) == steps + 1:
            how()
        return compute_loss(self, model, *inputs, **others)

    monkeypatch.setattr(fit, "compute_loss", interrupted)
