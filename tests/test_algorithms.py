"""The relatives of PPO: what each computes, against loops that spell it out."""

import math
import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ragged, tiny_gpt2
from trl.batch import Rollout
from trl.config import PPOConfig
from trl.config.algorithms import FACTS
from trl.config.recipe import RewardRecipe
from trl.optimization import algorithms
from trl.optimization.algorithms import (
    ALGORITHMS,
    ESTIMATORS,
    Advantages,
    Counts,
    compose,
    estimate_gae,
    estimate_group_centred,
    estimate_group_normalized,
    estimate_leave_one_out,
    estimate_returns,
    kl_kind,
)
from trl.ppo import PPOTrainer
from trl.rollout import Sampler

NAMES = list(ALGORITHMS)
GROUP_NAMES = [name for name in NAMES if ALGORITHMS[name].groups]
CRITIC_FREE = [name for name in NAMES if not ALGORITHMS[name].critic]
QUERIES, RESPONSES, GROUPS = [3, 3, 5, 5, 3, 5], [4, 1, 7, 2, 6, 3], [0, 0, 1, 1, 0, 1]
SCORES = [-2.0, -1.0, 0.5, 3.0, 1.0, -0.5]


def grouped_rollout():
    two = ragged([3, 5])
    queries = [two[group] for group in GROUPS]
    return Rollout.from_lists(queries, ragged(RESPONSES, seed=1), group_ids=GROUPS)


def trainer_of(name, *, sgd=None, **settings):
    model = tiny_gpt2(0)
    optimizer = None if sgd is None else torch.optim.SGD(model.parameters(), lr=sgd)
    defaults = {
        "precision": "fp32",
        "batch_size": 6,
        "minibatch_size": 6,
        "learning_rate": 1e-3,
        "adaptive_kl": False,
        "algorithm": name,
    }
    return PPOTrainer(model, tiny_gpt2(1), optimizer=optimizer, **defaults | settings)


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


# -- estimators by hand ----------------------------------------------------------------------------

# Three responses of 2, 1 and 3 tokens; the first two answer one query, so does the third with a
# fourth of 1 token. Sums of the rewards: 3, 1, 4, 6.
REWARDS = torch.tensor([[1.0, 2.0, 9.0], [1.0, 9.0, 9.0], [1.0, 1.0, 2.0], [6.0, 9.0, 9.0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0]]).bool()
PAIRS = torch.tensor([7, 7, 2, 2])


def of_rows(*values):
    return torch.tensor(values)[:, None] * MASK


def test_leave_one_out_by_hand():
    found = estimate_leave_one_out(REWARDS, None, MASK, PAIRS, PPOConfig())
    torch.testing.assert_close(found.advantages, of_rows(2.0, -2.0, -2.0, 2.0))
    assert found.returns is None


def test_group_normalized_by_hand():
    # σ of 3 and 1 is √2 (unbiased), of 4 and 6 too: ±1/√2
    found = estimate_group_normalized(REWARDS, None, MASK, PAIRS, PPOConfig())
    half = math.sqrt(0.5)
    torch.testing.assert_close(
        found.advantages, of_rows(half, -half, -half, half), rtol=1e-5, atol=1e-6
    )
    assert found.returns is None


def test_group_centred_by_hand():
    found = estimate_group_centred(REWARDS, None, MASK, PAIRS, PPOConfig())
    torch.testing.assert_close(found.advantages, of_rows(1.0, -1.0, -1.0, 1.0))


def test_returns_by_hand():
    found = estimate_returns(REWARDS, None, MASK, None, PPOConfig(gamma=0.5))
    expected = torch.tensor([[2.0, 2.0, 0.0], [1.0, 0.0, 0.0], [2.0, 2.0, 2.0], [6.0, 0.0, 0.0]])
    torch.testing.assert_close(found.advantages, expected)
    assert found.returns is None


def test_gae_gives_returns_too():
    values = torch.full_like(REWARDS, 0.5)
    found = estimate_gae(REWARDS, values, MASK, None, PPOConfig(gae_lambda=1.0))
    expected = torch.tensor([[3.0, 2.0, 0.0], [1.0, 0.0, 0.0], [4.0, 3.0, 2.0], [6.0, 0.0, 0.0]])
    torch.testing.assert_close(found.returns, expected)
    torch.testing.assert_close(found.advantages, (expected - 0.5) * MASK)


# -- presets -------------------------------------------------------------------------------------


def test_the_names_of_the_settings_are_those_of_the_presets():
    """An algorithm is an entry in the table of facts, and an estimator."""
    assert set(FACTS) == set(ESTIMATORS) == set(NAMES)
    assert NAMES == ["ppo", "vapo", "rloo", "grpo", "dr_grpo", "reinforce++"]
    assert CRITIC_FREE == ["rloo", "grpo", "dr_grpo", "reinforce++"]
    assert GROUP_NAMES == ["rloo", "grpo", "dr_grpo"]
    assert {name for name in NAMES if ALGORITHMS[name].kl_in == "loss"} == {"grpo", "dr_grpo"}
    assert {name for name in NAMES if ALGORITHMS[name].whiten} == {"ppo", "vapo", "reinforce++"}
    for name in NAMES:
        assert compose(PPOConfig(algorithm=name)) == ALGORITHMS[name]


def test_the_kl_estimator_follows_the_place_of_the_kl():
    for settings, expected in (
        ({}, "k1"),
        ({"algorithm": "grpo"}, "k3"),
        ({"algorithm": "grpo", "kl_in": "reward"}, "k1"),
        ({"kl_in": "loss"}, "k3"),
        ({"kl_in": "loss", "kl_estimator": "k2"}, "k2"),
        ({"kl_in": "loss", "kl_estimator": "k3+"}, "k3+"),
    ):
        config = PPOConfig(**settings)
        assert kl_kind(config, compose(config)) == expected, settings


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    # losses 1 2 3 | 5 of a minibatch of 8 tokens in 3 responses, which another pass has the rest of
    [
        ("token", 11 / 8),
        ("sequence", (2 + 5) / 3),
        ("sequence_sum", 11 / 3),
        ("constant", 11 / 3 / 10),
    ],
)
def test_aggregates_by_hand(aggregate, expected):
    length = 10 if aggregate == "constant" else None
    algorithm = compose(PPOConfig(aggregate=aggregate, aggregate_length=length))
    losses = torch.tensor([[1.0, 2.0, 3.0], [5.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    counts = Counts(torch.tensor(8), torch.tensor(3))
    assert float(algorithm.aggregate(losses, mask, counts)) == pytest.approx(expected)


def test_the_page_of_papers_knows_every_preset_and_names_what_there_is():
    root = Path(__file__).parents[1]
    page = (root / "docs/papers.md").read_text()
    named = {id(value): name for name, value in vars(algorithms).items()}
    for name in NAMES:
        assert f"| `{name}` |" in page
        assert f"`{named[id(ALGORITHMS[name].estimate)]}`" in page
    for path in re.findall(r"`(tests/[\w/]+\.py|trl/[\w/]+\.py)", page):
        assert (root / path).is_file(), path
    names = {entry.name for kind in (PPOConfig, RewardRecipe) for entry in fields(kind)}
    assert set(re.findall(r"^\| `(\w+)[`=]", page, re.MULTILINE)) <= names | set(NAMES)
    (example,) = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    exec(example, {"PPOTrainer": PPOTrainer, "policy": tiny_gpt2()})


# -- the whole update against a loop -------------------------------------------------------------


def own_logprobs(model, rollout):
    """Log-probs and values of each row's response, from the plain forward pass."""
    rows = []
    for query, response in zip(rollout.query_lists(), rollout.response_lists(), strict=True):
        output = model(torch.tensor([query + response]))
        at = slice(len(query) - 1, -1)
        logprobs = output.logits[0, at].log_softmax(-1)
        chosen = torch.stack([line[token] for line, token in zip(logprobs, response, strict=True)])
        rows.append((chosen, output.value[0, at]))
    return rows


def whitened(rows):
    flat = torch.cat(rows)
    return [(row - flat.mean()) / (flat.var() + 1e-8).sqrt() for row in rows]


def expected_advantages(name, old, ref, beta):
    """Each row's advantages, and with a critic its returns, by loops over rows and tokens."""
    kl = [now - there for (now, _), there in zip(old, ref, strict=True)]
    rewards = [-beta * row for row in kl]
    if name in ("grpo", "dr_grpo"):
        rewards = [0 * row for row in kl]
    for row, score in zip(rewards, SCORES, strict=True):
        row[-1] += score
    sums = [float(row.sum()) for row in rewards]
    mates = [[j for j in range(6) if GROUPS[j] == GROUPS[i]] for i in range(6)]
    if name in ("ppo", "vapo"):
        advantages, returns = [], []
        for row, (_, values) in zip(rewards, old, strict=True):
            out, following, ahead = [], 0.0, 0.0
            lam = 0.95 if name == "ppo" else 1 - 1 / max(ALPHA * len(row), 1)
            for t in reversed(range(len(row))):
                following = row[t] + ahead - values[t] + lam * following
                ahead = values[t]
                out.insert(0, following)
            advantages.append(torch.stack(out))
            really = row.flip(0).cumsum(0).flip(0)
            returns.append(advantages[-1] + values if name == "ppo" else really)
        return whitened(advantages), returns
    if name == "reinforce++":
        return whitened([row.flip(0).cumsum(0).flip(0) for row in rewards]), None
    numbers = []
    for i in range(6):
        others = [sums[j] for j in mates[i] if j != i]
        everyone = np.array([sums[j] for j in mates[i]])
        if name == "rloo":
            numbers.append(sums[i] - sum(others) / len(others))
        elif name == "grpo":
            numbers.append((sums[i] - everyone.mean()) / (everyone.std(ddof=1) + 1e-6))
        else:
            numbers.append(sums[i] - everyone.mean())
    return [torch.full_like(row, n) for row, n in zip(rewards, numbers, strict=True)], None


ALPHA = 0.4  # so that λ is more than 0 for some of these short responses
GOOD = sum(length for length, score in zip(RESPONSES, SCORES, strict=True) if score > 0)


def expected_loss(name, model, rollout, old, ref, advantages, returns, beta):
    per_row, token_count = [], sum(RESPONSES)
    for i, (logprobs, values) in enumerate(own_logprobs(model, rollout)):
        losses = []
        for t in range(len(logprobs)):
            ratio = (logprobs[t] - old[i][0][t]).exp()
            size = ratio.item()
            near = min(max(size, 0.8), 1.28 if name == "vapo" else 1.2)
            inside = near == size
            advantage = float(advantages[i][t])
            near = ratio if inside else near
            loss = torch.maximum(-advantage * ratio, torch.as_tensor(-advantage * near))
            if returns is not None:
                before, target = float(old[i][1][t]), float(returns[i][t])
                value = values[t]
                bounded = torch.minimum(
                    torch.maximum(value, torch.tensor(before - 0.2)), torch.tensor(before + 0.2)
                )
                square = torch.maximum((value - target) ** 2, (bounded - target) ** 2)
                loss = loss + 0.1 * 0.5 * square
            if name == "vapo" and SCORES[i] > 0:
                loss = loss - 0.1 * logprobs[t] * token_count / GOOD
            if name in ("grpo", "dr_grpo"):
                gap = logprobs[t] - ref[i][t]
                loss = loss + beta * ((-gap).exp() - 1 + gap)
            losses.append(loss)
        per_row.append(torch.stack(losses))
    if name in ("ppo", "vapo", "reinforce++"):
        return torch.cat(per_row).sum() / token_count
    if name == "grpo":
        return torch.stack([row.mean() for row in per_row]).mean()
    return torch.stack([row.sum() for row in per_row]).mean()  # rloo, dr_grpo


@pytest.mark.parametrize("name", NAMES)
def test_two_updates_are_those_of_a_plain_loop(name):
    """With SGD, so that a wrong factor shows; in the second update some ratios are clipped."""
    rollout, beta = grouped_rollout(), 0.3
    rate = {"rloo": 0.003, "dr_grpo": 0.01}.get(name, 0.05)
    more = {"length_adaptive": ALPHA, "value_pretraining": 0} if name == "vapo" else {}
    how = {"ppo_epochs": 2, "max_grad_norm": None, "init_kl_coef": beta}
    ppo = trainer_of(name, sgd=rate, **how, **more)
    stats = ppo.step(rollout, SCORES)

    model = tiny_gpt2(0)
    with torch.no_grad():
        old = own_logprobs(model, rollout)
        ref = [logprobs for logprobs, _ in own_logprobs(tiny_gpt2(1), rollout)]
        advantages, returns = expected_advantages(name, old, ref, beta)
    totals = []
    for _ in range(2):
        model.zero_grad()
        loss = expected_loss(name, model, rollout, old, ref, advantages, returns, beta)
        loss.backward()
        totals.append(loss.item())
        with torch.no_grad():
            for weight in model.parameters():
                if weight.grad is not None:
                    weight -= rate * weight.grad
    assert stats["ppo/policy/clipfrac"] > 0
    assert stats["ppo/loss/total"] == pytest.approx(np.mean(totals), rel=1e-4)
    start = weights(tiny_gpt2(0))
    moved = torch.cat([(model.state_dict()[k] - start[k]).flatten() for k in start])
    found = torch.cat([(ppo.model.state_dict()[k] - start[k]).flatten() for k in start])
    assert moved.norm() > 0
    assert (found - moved).norm() <= 1e-4 * moved.norm()


def gradient(name, **settings):
    settings = {"value_pretraining": 0} | settings if name == "vapo" else settings
    ppo = trainer_of(name, sgd=1.0, ppo_epochs=1, max_grad_norm=None, **settings)
    before = weights(ppo.model)
    stats = ppo.step(grouped_rollout(), SCORES)
    after = weights(ppo.model)
    return torch.cat([(before[key] - after[key]).flatten() for key in before]), stats


SPLITS = [(name, {}) for name in NAMES] + [
    ("ppo", {"aggregate": "sequence"}),
    ("ppo", {"aggregate": "sequence_sum"}),
    ("ppo", {"aggregate": "constant", "aggregate_length": 10}),
    ("ppo", {"kl_in": "loss", "entropy_coef": 0.5, "aggregate": "sequence"}),
    ("grpo", {"policy_loss": "gspo"}),
    ("rloo", {"policy_loss": "cispo"}),
]


@pytest.mark.parametrize(("name", "settings"), SPLITS)
def test_micro_batches_leave_no_trace(name, settings):
    whole, stats = gradient(name, forward_batch_size=None, **settings)
    assert whole.norm() > 0
    for size in (1, 4):
        split, split_stats = gradient(name, forward_batch_size=size, **settings)
        assert (split - whole).norm() <= 1e-5 * whole.norm()
        for key in ("ppo/loss/total", "ppo/loss/policy", "ppo/policy/entropy"):
            assert split_stats[key] == pytest.approx(stats[key], rel=1e-5, abs=1e-6), key


def test_the_average_is_the_one_that_was_set():
    whole, _ = gradient("dr_grpo")
    tenth, _ = gradient("dr_grpo", aggregate="constant", aggregate_length=10)
    torch.testing.assert_close(tenth, whole / 10, rtol=1e-4, atol=1e-6)
    other, _ = gradient("dr_grpo", aggregate="token")
    torch.testing.assert_close(other, whole * 6 / sum(RESPONSES), rtol=1e-4, atol=1e-6)


def test_before_the_first_update_gspo_and_cispo_have_the_gradient_of_the_clipped_loss():
    """All ratios are 1 then, so nothing is clipped."""
    plain, _ = gradient("grpo")
    for policy_loss in ("gspo", "cispo"):
        other, _ = gradient("grpo", policy_loss=policy_loss)
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy_loss", ["clip", "gspo", "cispo"])
def test_policy_losses_differ_once_the_policy_has_moved(policy_loss):
    ppo = trainer_of("grpo", policy_loss=policy_loss, learning_rate=3e-3)
    stats = ppo.step(grouped_rollout(), SCORES)
    reference = trainer_of("grpo", learning_rate=3e-3)
    expected = reference.step(grouped_rollout(), SCORES)
    same = stats["ppo/loss/total"] == expected["ppo/loss/total"]
    assert same == (policy_loss == "clip")


def test_dual_clip_bounds_the_loss_of_a_bad_token():
    losses = []
    for dual_clip in (None, 1.01):
        ppo = trainer_of("ppo", dual_clip=dual_clip, learning_rate=0.02, ratio_threshold=1e9)
        losses.append(ppo.step(grouped_rollout(), SCORES)["ppo/loss/policy"])
    assert losses[1] < losses[0]


# -- the KL penalty ------------------------------------------------------------------------------


def test_the_kl_of_the_loss_is_reported_and_not_in_the_reward():
    ppo = trainer_of("grpo", init_kl_coef=0.3, ppo_epochs=1)
    stats = ppo.step(grouped_rollout(), SCORES)
    assert stats["ppo/mean_non_score_reward"] == 0
    gaps = torch.as_tensor(stats["objective/kl_dist"])
    lengths = torch.tensor(RESPONSES)
    # k3 is 0 outside of the mask, where the gap is 0
    k3 = ((-gaps).exp() - 1 + gaps).sum(1) / lengths
    assert stats["ppo/loss/kl"] == pytest.approx(float(k3.mean()), rel=1e-5)
    expected = stats["ppo/loss/policy"] + 0.3 * stats["ppo/loss/kl"]
    assert stats["ppo/loss/total"] == pytest.approx(expected, rel=1e-5)
    assert stats["objective/kl_coef"] == 0.3


def test_the_kl_in_the_reward_of_grpo_changes_its_advantages():
    in_loss, stats = gradient("grpo", init_kl_coef=0.5)
    in_reward, other = gradient("grpo", init_kl_coef=0.5, kl_in="reward")
    assert "ppo/loss/kl" in stats
    assert "ppo/loss/kl" not in other
    assert other["ppo/mean_non_score_reward"] != 0
    assert (in_loss - in_reward).norm() > 0.1 * in_loss.norm()


def test_the_gradient_of_the_kl_is_that_of_the_new_logprobs():
    """The same scores everywhere: all that is left is the KL."""
    rollout = grouped_rollout()
    ppo = trainer_of("dr_grpo", sgd=0.01, init_kl_coef=1.0, ppo_epochs=1, max_grad_norm=None)
    first = ppo.step(rollout, [1.0] * 6)
    for _ in range(5):
        last = ppo.step(rollout, [1.0] * 6)
    assert last["ppo/loss/kl"] < 0.7 * first["ppo/loss/kl"]


def test_without_a_reference_there_is_no_kl_in_the_loss():
    ppo = PPOTrainer(
        tiny_gpt2(), "none", algorithm="grpo", init_kl_coef=0.0, precision="fp32", batch_size=6
    )
    stats = ppo.step(grouped_rollout(), SCORES)
    assert "ppo/loss/kl" not in stats
    assert math.isnan(stats["objective/kl"])
    assert math.isfinite(stats["ppo/loss/total"])


def test_the_controller_steers_the_kl_of_the_loss_too():
    ppo = trainer_of("grpo", adaptive_kl=True, kl_horizon=50)
    before = ppo.kl_ctl.value
    stats = ppo.step(grouped_rollout(), SCORES)
    error = min(max(stats["objective/kl"] / 6 - 1, -0.2), 0.2)
    assert ppo.kl_ctl.value == pytest.approx(before * (1 + error * 6 / 50))


# -- without a critic ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CRITIC_FREE)
def test_the_value_head_stays_as_it_is(name):
    """Also with an optimiser that would let unused weights decay."""
    model = tiny_gpt2(0)
    ppo = PPOTrainer(
        model,
        tiny_gpt2(1),
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1),
        algorithm=name,
        precision="fp32",
        batch_size=6,
    )
    before = weights(model)
    ppo.step(grouped_rollout(), SCORES)
    changed = [key for key in before if not torch.equal(before[key], weights(model)[key])]
    assert "transformer.h.0.attn.c_attn.weight" in changed
    assert not [key for key in changed if "v_head" in key]
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("name", CRITIC_FREE)
def test_stats_of_a_critic_are_left_out(name):
    stats = trainer_of(name).step(grouped_rollout(), SCORES)
    assert not [key for key in stats if key.startswith(("ppo/val/", "ppo/returns/"))]
    assert "ppo/loss/value" not in stats
    for key, value in stats.items():
        assert isinstance(value, float | np.ndarray), key
        assert np.isfinite(value).all(), key


def test_recorded_logprobs_do_without_values_if_nobody_asks_for_them():
    model = tiny_gpt2(0)
    sampler = Sampler(max_new_tokens=5, group_size=3)
    rollout = sampler(model, ragged([2, 4]))
    ppo = PPOTrainer(model, tiny_gpt2(1), algorithm="rloo", precision="fp32", batch_size=6)
    passes = []
    forward_pass = ppo.forward_pass
    ppo.forward_pass = lambda *args: passes.append(1) or forward_pass(*args)
    stats = ppo.step(replace(rollout, values=None), SCORES)
    assert len(passes) == 1  # the reference's
    assert abs(stats["ppo/first_log_ratio"]) < 1e-5


@pytest.mark.parametrize("name", GROUP_NAMES)
def test_scores_of_tokens_are_added_up(name):
    placed = [[0.0] * (n - 1) + [s] for n, s in zip(RESPONSES, SCORES, strict=True)]
    results = []
    for scores in (SCORES, placed):
        ppo = trainer_of(name)
        ppo.step(grouped_rollout(), scores)
        results.append(weights(ppo.model))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_whitening_is_over_the_tokens_of_the_batch():
    ppo = trainer_of("reinforce++", ppo_epochs=1)
    advantages = ppo.step(grouped_rollout(), SCORES)["ppo/policy/advantages"]
    assert advantages.mean() == pytest.approx(0, abs=1e-6)
    assert advantages.var(ddof=1) == pytest.approx(1, rel=1e-5)
    for name in GROUP_NAMES:
        ppo = trainer_of(name, ppo_epochs=1)
        plain = ppo.step(grouped_rollout(), SCORES)["ppo/policy/advantages"]
        assert plain.var(ddof=1) != pytest.approx(1, rel=1e-2)


def test_an_algorithm_of_ones_own():
    """The advantage of a token is its response's score, nothing else."""

    def estimate(rewards, values, mask, group_ids, config):
        return Advantages(rewards.sum(1, keepdim=True) * mask, None)

    ppo = trainer_of("reinforce++", init_kl_coef=0.0, ppo_epochs=1)
    ppo.algorithm = replace(ppo.algorithm, estimate=estimate, whiten=False)
    stats = ppo.step(grouped_rollout(), SCORES)
    counts = torch.tensor(RESPONSES)
    expected = torch.tensor(SCORES).repeat_interleave(counts).sort().values
    found = torch.as_tensor(stats["ppo/policy/advantages"]).sort().values
    torch.testing.assert_close(found, expected)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GROUP_NAMES)
def test_groups_must_be_given(name):
    ppo = trainer_of(name)
    before = weights(ppo.model), ppo.shuffle.get_state()
    rule = "`group_ids` must say which responses answer the same query with "
    message = rule + r".*got None.*Sampler\(group_size=4\).*from_lists\(group"
    with pytest.raises(ValueError, match=message):
        ppo.step(replace(grouped_rollout(), group_ids=None), SCORES)
    with pytest.raises(ValueError, match=message):
        ppo.step(ragged(QUERIES), ragged(RESPONSES), SCORES)
    alone = replace(grouped_rollout(), group_ids=torch.tensor([0, 0, 1, 1, 2, 5]))
    with pytest.raises(ValueError, match=r"at least 2 responses in each group.*\[2, 5\]: sample"):
        ppo.step(alone, SCORES)
    assert all(torch.equal(before[0][key], weights(ppo.model)[key]) for key in before[0])
    assert torch.equal(before[1], ppo.shuffle.get_state())
    assert ppo.steps_done == 0


def test_group_ids_of_a_rollout_are_checked():
    with pytest.raises(ValueError, match="`group_ids` must be one whole number for each of the 2"):
        Rollout.from_lists(ragged([1, 2]), ragged([1, 2]), group_ids=[1])
    with pytest.raises(ValueError, match="`group_ids` must be one whole number.*float32"):
        Rollout.from_lists(ragged([1, 2]), ragged([1, 2]), group_ids=[1.0, 1.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "gpro"}, r"`algorithm` must be one of .*got 'gpro'. Did you mean `grpo`"),
        ({"algorithm": "grpo", "whiten_rewards": True}, "`whiten_rewards` must be False with alg"),
        ({"algorithm": "rloo", "value_warmup_steps": 3}, "`value_warmup_steps` must be 0 with"),
        ({"value_warmup_steps": 3, "vf_coef": 0}, "`vf_coef` must be > 0 with value_warmup_steps"),
        ({"algorithm": "dr_grpo", "gamma": 0.9}, "`gamma` must be 1 with algorithm='dr_grpo'"),
        ({"algorithm": "grpo", "kl_estimator": "k1"}, "`kl_estimator` must be 'k2', 'k3' or 'k3"),
        ({"kl_in": "loss", "kl_estimator": "k1"}, "`kl_estimator` must be 'k2', 'k3' or 'k3"),
        ({"kl_in": "both"}, "`kl_in` must be one of"),
        ({"aggregate": "mean"}, "`aggregate` must be one of"),
        ({"aggregate": "constant"}, "`aggregate_length` must be given with aggregate='constant'"),
        ({"aggregate_length": 5}, "`aggregate_length` must be None unless aggregate='constant'"),
        ({"aggregate": "constant", "aggregate_length": 0}, "`aggregate_length` must be an integer"),
        ({"policy_loss": "gpso"}, "`policy_loss` must be one of.*Did you mean `gspo`"),
        ({"policy_loss": "cispo", "dual_clip": 3.0}, "`dual_clip` must be None with policy_loss="),
        ({"dual_clip": 1.0}, "`dual_clip` must be a finite number > 1 or None, got 1.0"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)


def test_all_contradictions_are_reported_together():
    with pytest.raises(ValueError) as error:
        PPOConfig(algorithm="grpo", whiten_rewards=True, gamma=0.5, kl_estimator="k1")
    for name in ("whiten_rewards", "gamma", "kl_estimator"):
        assert f"`{name}`" in str(error.value)


def test_settings_of_a_critic_are_no_contradiction_without_one():
    """A recipe for ppo is turned to another algorithm by one word."""
    PPOConfig(algorithm="grpo", vf_coef=0.5, gae_lambda=0.9, cliprange_value=0.1)
