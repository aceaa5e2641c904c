"""It learns: a toy task goes from chance to almost always in well under a minute on a CPU."""

import time

import pytest
import torch

import trl
from tests.conftest import VOCABULARY, tiny_gpt2
from trl import starter
from trl.optimization.algorithms import ALGORITHMS
from trl.ppo import PPOTrainer
from trl.rollout import Sampler
from trl.rollout.sampling import sample

CHOSEN = 42


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_share_of_one_token_goes_from_chance_to_above_nine_tenths(seed):
    """The score is the share of token 42 in a response of 8 tokens."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    policy = tiny_gpt2(seed, scale=0.02)
    torch.nn.init.zeros_(policy.v_head.summary.weight)
    trainer = PPOTrainer(
        policy,
        precision="fp32",
        learning_rate=3e-3,
        batch_size=64,
        minibatch_size=16,
        forward_batch_size=64,
        adaptive_kl=False,
        init_kl_coef=0.0,
    )
    shares = []
    for _ in range(60):
        queries = torch.randint(VOCABULARY, (64, 3))
        rollout = sample(policy, queries, max_new_tokens=8)
        scores = (rollout.responses == CHOSEN).float().mean(1)
        shares.append(scores.mean().item())
        if shares[-1] > 0.9:
            break
        trainer.step(rollout, scores)
    assert shares[0] < 0.05  # chance is 1/97
    assert max(shares) > 0.9
    assert time.perf_counter() - started < 60


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "grpo" else [pytest.mark.slow])
        for name in ALGORITHMS
        if not ALGORITHMS[name].critic
    ],
)
def test_algorithms_without_a_critic_learn_the_same(name):
    """Groups of 4 responses; sums of losses over a response call for a smaller step."""
    torch.manual_seed(0)
    started = time.process_time()
    policy = tiny_gpt2(0, scale=0.02)
    trainer = PPOTrainer(
        policy,
        algorithm=name,
        precision="fp32",
        learning_rate=3e-3,
        batch_size=64,
        minibatch_size=16,
        forward_batch_size=64,
        adaptive_kl=False,
        init_kl_coef=0.0,
    )
    sampler = Sampler(max_new_tokens=8, group_size=4)
    shares = []
    for _ in range(60):
        rollout = sampler(policy, torch.randint(VOCABULARY, (16, 3)))
        scores = (rollout.responses == CHOSEN).float().mean(1)
        shares.append(scores.mean().item())
        if shares[-1] > 0.9:
            break
        trainer.step(rollout, scores)
    assert shares[0] < 0.05  # chance is 1/97
    assert max(shares) > 0.9
    assert time.process_time() - started < 60


def test_the_kl_penalty_holds_the_policy_near_the_reference():
    kls = []
    for coefficient, kl_in in ((0.0, "reward"), (5.0, "reward"), (5.0, "loss")):
        torch.manual_seed(0)
        policy = tiny_gpt2(0, scale=0.02)
        trainer = PPOTrainer(
            policy,
            precision="fp32",
            learning_rate=3e-3,
            batch_size=32,
            forward_batch_size=32,
            adaptive_kl=False,
            init_kl_coef=coefficient,
            kl_in=kl_in,
        )
        for _ in range(12):
            rollout = sample(policy, torch.randint(VOCABULARY, (32, 3)), max_new_tokens=8)
            stats = trainer.step(rollout, (rollout.responses == CHOSEN).float().mean(1))
        kls.append(stats["objective/kl"])
    free, *held = kls
    assert max(held) < 0.3 * free


def test_the_value_head_learns_the_score():
    """With a fixed rollout the explained variance of the value rises."""
    torch.manual_seed(0)
    trainer = PPOTrainer(
        tiny_gpt2(), precision="fp32", learning_rate=3e-3, batch_size=32, vf_coef=1.0
    )
    queries = torch.randint(VOCABULARY, (32, 3))
    scores = (queries[:, 0] > 48).float() * 2 - 1
    responses = sample(trainer.model, queries, max_new_tokens=4).responses
    first = trainer.step(queries, responses, scores)["ppo/val/error"]
    for _ in range(6):
        last = trainer.step(queries, responses, scores)["ppo/val/error"]
    assert last < 0.5 * first


@pytest.mark.parametrize("first", [1e-6, pytest.param(1e-3, marks=pytest.mark.slow)])
def test_train_learns_at_its_defaults_from_any_first_rate(first):
    """Openings of film reviews, the starter model, and nothing set that has to be tuned."""

    def stop(step, row):
        return row["reward/mean"] > 0.9

    _, history = trl.train(
        starter.LANGUAGE_MODEL,
        starter.prompts("train")[:400],
        trl.ClassifierScorer(starter.CLASSIFIER, label="POSITIVE"),
        steps=30,
        max_new_tokens=12,
        on_step=stop,
        auto_initial_rate=first,
    )
    assert history[0]["reward/mean"] < 0.4
    assert history[-1]["reward/mean"] > 0.9
    assert history[-1]["objective/kl"] < 15
