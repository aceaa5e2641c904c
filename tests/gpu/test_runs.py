"""Whole runs: a classifier as the reward, `trl.train`, recipes, stopping and going on."""

import json
import math

import pytest
import torch
from transformers import AutoTokenizer

import trl
from tests.families import tiny_model
from tests.gpu.devices import CPU, trainers_on
from tests.gpu.runs import stopped_and_gone_on
from tests.training.runs import lines, make_parts
from tests.training.test_loop import count_w7, tokenizer
from trl import cli, starter
from trl.evaluation import ClassifierScorer
from trl.models.with_value_head import load_policy
from trl.training import run

TEXTS = ["A wonderful film.", "A waste of two hours, and the actors knew it.", "It was there."]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Pictures take seconds, and have tests of their own."""
    monkeypatch.setattr(run, "write_report", lambda runs, out: out / "report.html")


@pytest.fixture
def deterministic():
    """Every operation gives the same bits again, or raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_classifier_scores_as_on_the_cpu(device):
    here = ClassifierScorer(starter.CLASSIFIER, device=device)
    assert here.model.device.type == device.type
    scores = here(TEXTS)
    assert scores.device.type == "cpu"
    on_cpu = ClassifierScorer(starter.CLASSIFIER, device=CPU)(TEXTS)
    torch.testing.assert_close(scores, on_cpu, rtol=1e-4, atol=1e-4)


def test_one_call_trains_here_with_a_classifier_and_a_profile(tmp_path, device):
    scorer = ClassifierScorer(starter.CLASSIFIER, device=device)
    model, history = trl.train(
        starter.LANGUAGE_MODEL,
        starter.prompts("train")[:16],
        scorer,
        steps=4,
        batch_size=8,
        minibatch_size=4,
        ppo_epochs=1,
        max_new_tokens=6,
        profile=tmp_path / "profile",
    )
    assert {weight.device.type for weight in model.parameters()} == {device.type}
    assert all(math.isfinite(value) for row in history for value in row.values())
    profile = json.loads((tmp_path / "profile" / "profile.json").read_text())
    assert profile["device"] == device.type
    assert sum(phase["seconds"] for phase in profile["phases"].values()) > 0

    model.save_pretrained(tmp_path / "tuned")
    again = load_policy(tmp_path / "tuned")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight.cpu(), rtol=0, atol=0)


@pytest.mark.parametrize("parts", [1, 3])
def test_it_learns_here(parts, device):
    _, history = trl.train(
        tiny_model("llama"),
        ["w3 w4", "w5", "w6 w9 w10"],
        count_w7,
        steps=25,
        tokenizer=tokenizer(),
        max_new_tokens=6,
        parts=parts,
        batch_size=33,
        minibatch_size=33,
        learning_rate=1e-2,
        init_kl_coef=0.02,
        adaptive_kl=False,
        ppo_epochs=1,
        precision="fp32",
    )
    first, last = ([row["reward/mean"] for row in rows] for rows in (history[:3], history[-3:]))
    assert sum(last) / 3 > sum(first) / 3 + 1.0


def test_a_recipe_runs_here_and_goes_on_anywhere(tmp_path, device):
    """As `trl train toy-token`, with fewer and smaller steps."""
    out = tmp_path / "run"
    few = "--steps 2 --eval-every 2 --data.held-out 4 --ppo.batch-size 8 --ppo.minibatch-size 4"
    assert cli.main(["train", "toy-token", *few.split(), "--quiet", "--out", str(out)]) == 0
    assert [row["step"] for row in lines(out / "metrics.jsonl")] == [0, 1, 2]
    assert AutoTokenizer.from_pretrained(out / "policy").eos_token
    assert load_policy(out / "policy").device == CPU

    with trainers_on(CPU):
        assert cli.main(["train", str(out / "recipe.yaml"), "--resume", "--steps", "3"]) == 0
    assert [row["step"] for row in lines(out / "metrics.jsonl")] == [0, 1, 2, 3]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.usefixtures("deterministic")
def test_a_run_that_stopped_goes_on_bit_for_bit(family, precision, tmp_path, device):
    make_parts(tmp_path, family)
    result = stopped_and_gone_on(tmp_path, ppo={"precision": precision})
    assert result.model.device.type == device.type
