"""docs/metrics.md has every figure that a run writes, and no other."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import trl
from tests.families import tiny_model
from tests.training.test_loop import SMALL, count_w7, tokenizer
from trl.config import PPOConfig
from trl.evaluation import FunctionScorer, WeightedSum
from trl.ppo import PPOTrainer
from trl.rollout import Sampler
from trl.training.loop import Loop
from trl.watch.symptoms import SYMPTOMS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text()
DOCUMENTED = re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE)
FINDINGS = re.findall(r"^\| ([a-z_0-9]+) \| [A-Z`a-z]", PAGE, re.MULTILINE)
SOURCE = "\n".join(path.read_text() for path in (ROOT / "trl").rglob("*.py"))


def many_words(texts):
    return [float(len(text.split())) for text in texts]


@pytest.fixture(scope="module")
def written():
    """The names of all that a short run writes and the trainer returns."""
    torch.manual_seed(0)
    config = PPOConfig(**SMALL)
    trainer = PPOTrainer(trl.CausalLMWithValueHead(tiny_model("llama")), config=config)
    scorer = WeightedSum([(FunctionScorer(count_w7), 1.0), (FunctionScorer(many_words), 0.1)])
    sampler = Sampler(tokenizer(), max_new_tokens=6)
    loop = Loop(trainer, sampler, scorer, ["w3 w4", "w5"])
    row = loop.step()
    stats = trainer.step(replace(loop.rollout, behaviour_logprobs=None), torch.arange(8.0))
    return set(row) | set(stats)


def matches(name, documented):
    pattern = re.escape(documented).replace("<scorer>", ".+")
    return re.fullmatch(pattern, name)


def test_every_figure_of_a_run_is_explained(written):
    assert [n for n in sorted(written) if not any(matches(n, d) for d in DOCUMENTED)] == []


def test_every_explained_figure_is_written_somewhere(written):
    """By the short run, or under its name in the source."""
    absent = [
        documented
        for documented in DOCUMENTED
        if not any(matches(name, documented) for name in written)
        and not any(form in SOURCE for form in forms(documented))
    ]
    assert absent == []


def forms(documented):
    """How the source may have a name: as it is, or without the `ppo/` that is put before it."""
    if "<" in documented:
        return [f'"{documented.split("<")[0]}{{']
    return [f'"{documented}"', f'"{documented.removeprefix("ppo/")}"']


def test_no_figure_is_explained_twice():
    assert len(DOCUMENTED) == len(set(DOCUMENTED)) > 50


def test_every_finding_is_listed():
    assert set(FINDINGS) - {"figure", "finding"} == {each.name for each in SYMPTOMS}
