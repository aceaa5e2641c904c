"""Stop a run and go on: it ends with the same weights, bit for bit, as one that never stopped.

    python examples/resume.py

From the shell it is Ctrl-C, and then `trl train runs/mine/recipe.yaml --resume`. Here the reward
presses the keys, in the middle of the first step; the step is finished, a checkpoint is written.
"""

import argparse
import os
import signal
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from trl import PPOConfig, Recipe, run_recipe
from trl.config.recipe import DataConfig, RewardConfig, SamplingConfig


def short_words(texts):
    """The reward: minus the mean length of a word."""
    if os.environ.pop("PRESS_CTRL_C", None):
        signal.raise_signal(signal.SIGINT)
    return [-len(text) / len(text.split()) for text in texts]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    steps = parser.parse_args().steps

    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(
            data=DataConfig(limit=200, held_out=0),
            sampling=SamplingConfig(max_new_tokens=8),
            reward=(RewardConfig(kind="function", name=f"{__file__}:short_words"),),
            ppo=PPOConfig(batch_size=16, learning_rate=1e-4),
            steps=steps,
            out=str(Path(folder, "whole")),
            quiet=True,
        )
        whole = run_recipe(recipe)

        recipe = replace(recipe, out=str(Path(folder, "in-two-parts")))
        os.environ["PRESS_CTRL_C"] = "1"
        stopped = run_recipe(recipe)
        print(f"stopped after step {stopped.steps}: {stopped.summary['reason']}")
        went_on = run_recipe(recipe, resume="auto")
        print(f"went on to step {went_on.steps}")

    assert stopped.interrupted
    assert stopped.steps == 1
    assert went_on.steps == whole.steps == steps
    weights = whole.model.state_dict()
    for name, weight in went_on.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    assert not torch.equal(
        weights["v_head.summary.weight"], torch.zeros_like(weights["v_head.summary.weight"])
    )
    print(f"all {len(weights)} tensors are equal, bit for bit")


if __name__ == "__main__":
    main()
