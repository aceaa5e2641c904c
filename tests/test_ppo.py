"""`PPOTrainer.step`: what it returns and what it changes."""

import dataclasses
import math
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers.optimization import Adafactor

from tests.conftest import ragged, tiny_gpt2
from trl.batch import Rollout
from trl.gpt2 import GPT2HeadWithValueModel
from trl.ppo import AdaptiveKLController, FixedKLController, PPOConfig, PPOTrainer

STATS_OF_2020 = [
    "objective/kl",
    "objective/kl_dist",
    "objective/logprobs",
    "objective/ref_logprobs",
    "objective/kl_coef",
    "objective/entropy",
    "ppo/mean_non_score_reward",
    "ppo/loss/policy",
    "ppo/loss/value",
    "ppo/loss/total",
    "ppo/policy/entropy",
    "ppo/policy/approxkl",
    "ppo/policy/policykl",
    "ppo/policy/clipfrac",
    "ppo/policy/advantages",
    "ppo/policy/advantages_mean",
    "ppo/policy/ratio",
    "ppo/returns/mean",
    "ppo/returns/var",
    "ppo/val/vpred",
    "ppo/val/error",
    "ppo/val/clipfrac",
    "ppo/val/mean",
    "ppo/val/var",
    "ppo/val/var_explained",
    "time/ppo/forward_pass",
    "time/ppo/compute_rewards",
    "time/ppo/optimize_step",
    "time/ppo/calc_stats",
    "time/ppo/total",
]


def trainer(make_model, *, seed=0, ref_seed=1, **settings):
    defaults = {"precision": "fp32", "learning_rate": 1e-3, "batch_size": 4, "minibatch_size": 2}
    settings = defaults | settings
    return PPOTrainer(make_model(seed), make_model(ref_seed), **settings)


def batch(size=4, query=3, response=5):
    return (
        torch.stack(ragged([query] * size)),
        torch.stack(ragged([response] * size, seed=1)),
        torch.linspace(-1, 1, size),
    )


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(first, second):
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_step_returns_the_30_stats_of_2020(make_model):
    stats = trainer(make_model).step(*batch())
    assert len(STATS_OF_2020) == 30
    assert set(STATS_OF_2020) <= set(stats)
    for name, value in stats.items():
        assert isinstance(value, float | np.ndarray), name
        assert np.isfinite(value).all(), name
    assert stats["objective/logprobs"].shape == (4, 5)
    assert stats["ppo/policy/ratio"].shape == (4 * 4 * 5,)  # epochs · rows · tokens


def test_objective_stats_by_hand(make_model):
    ppo = trainer(make_model)
    queries, responses, scores = batch()
    logprobs = {}
    for name, model in (("policy", ppo.model), ("reference", ppo.ref_model)):
        logits = model(torch.cat((queries, responses), 1)).logits.log_softmax(-1)[:, 2:-1]
        logprobs[name] = logits.gather(-1, responses[..., None])[..., 0].detach()
    stats = ppo.step(queries, responses, scores)
    kl = (logprobs["policy"] - logprobs["reference"]).sum(1)
    assert stats["objective/kl"] == pytest.approx(kl.mean().item(), abs=1e-5)
    assert stats["objective/entropy"] == pytest.approx(
        -logprobs["policy"].sum(1).mean().item(), abs=1e-5
    )
    assert stats["ppo/mean_non_score_reward"] == pytest.approx(-0.2 * kl.mean().item(), abs=1e-5)
    assert stats["objective/kl_coef"] == 0.2


def test_step_trains_the_policy_and_leaves_the_reference(make_model):
    ppo = trainer(make_model)
    policy, reference = weights(ppo.model), weights(ppo.ref_model)
    ppo.step(*batch())
    changed = [key for key in policy if not torch.equal(policy[key], ppo.model.state_dict()[key])]
    assert "v_head.summary.weight" in changed
    assert "transformer.h.0.attn.c_attn.weight" in changed
    assert all(torch.equal(reference[key], ppo.ref_model.state_dict()[key]) for key in reference)
    assert all(weight.grad is None for weight in ppo.ref_model.parameters())


def test_lists_and_tensors_give_the_same_step(make_model):
    queries, responses, scores = batch()
    results = []
    for arguments in (
        (queries, responses, scores),
        (list(queries), list(responses), scores.tolist()),
        (Rollout.from_lists(queries, responses), scores),
    ):
        ppo = trainer(make_model)
        stats = ppo.step(*arguments)
        results.append((stats["ppo/loss/total"], weights(ppo.model)))
    for loss, state in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(state[key], results[0][1][key]) for key in state)


def test_default_reference_is_a_frozen_copy(make_model):
    ppo = PPOTrainer(make_model(), precision="fp32", learning_rate=1e-2, batch_size=4)
    before = weights(ppo.ref_model)
    assert not any(weight.requires_grad for weight in ppo.ref_model.parameters())
    first = ppo.step(*batch())
    second = ppo.step(*batch())
    assert first["objective/kl"] == 0
    assert second["objective/kl"] != 0
    assert all(torch.equal(before[key], ppo.ref_model.state_dict()[key]) for key in before)


@pytest.mark.parametrize(("minibatch_size", "updates"), [(1, 10), (3, 8), (4, 6), (10, 2), (64, 2)])
def test_number_of_updates_uses_the_remainder(make_model, minibatch_size, updates):
    ppo = trainer(make_model, minibatch_size=minibatch_size, ppo_epochs=2, batch_size=10)
    size = 10 if minibatch_size != 1 else 5
    stats = ppo.step(*batch(size))
    assert stats["ppo/updates"] == updates
    assert len(stats["ppo/policy/ratio"]) == 2 * size * 5  # every token in every epoch


def rollout_of(rows):
    return Rollout.from_lists(*(torch.ones(rows, 1, dtype=torch.long) for _ in range(2)))


def test_every_row_is_used_once_per_epoch(make_model):
    ppo = trainer(make_model, minibatch_size=3, ppo_epochs=3)
    for _ in range(3):
        rows = list(ppo._minibatches(rollout_of(10)))
        assert [len(part) for part in rows] == [3, 3, 3, 1]
        assert sorted(torch.cat(rows).tolist()) == list(range(10))


def test_the_shuffle_follows_the_seed(make_model):
    first = [
        torch.cat(
            list(PPOTrainer(make_model(), batch_size=4, seed=s)._minibatches(rollout_of(50)))
        ).tolist()
        for s in (0, 0, 1)
    ]
    assert first[0] == first[1] != first[2]


def test_kl_controller_moves_by_the_kl_of_the_step(make_model):
    ppo = trainer(make_model, init_kl_coef=0.3, target=6, horizon=100)
    assert isinstance(ppo.kl_ctl, AdaptiveKLController)
    stats = ppo.step(*batch())
    error = min(max(stats["objective/kl"] / 6 - 1, -0.2), 0.2)
    assert ppo.kl_ctl.value == pytest.approx(0.3 * (1 + error * 4 / 100))


def test_whitening_rewards_changes_the_step_and_keeps_it_finite(make_model):
    stats = trainer(make_model, whiten_rewards=True).step(*batch())
    plain = trainer(make_model).step(*batch())
    assert stats["ppo/returns/var"] != plain["ppo/returns/var"]
    assert all(np.isfinite(value).all() for value in stats.values())


def test_gradient_clipping_bounds_the_update(make_model):
    """With plain SGD of rate 1 the weights move by at most the clipped norm."""
    model = make_model()
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ppo = PPOTrainer(
        model,
        make_model(1),
        optimizer=optimizer,
        precision="fp32",
        batch_size=4,
        minibatch_size=4,
        ppo_epochs=1,
        max_grad_norm=1e-3,
    )
    stats = ppo.step(*batch())
    keys = {name for name, _ in model.named_parameters()}
    moved = math.sqrt(sum(float((model.state_dict()[k] - before[k]).square().sum()) for k in keys))
    assert stats["ppo/grad_norm"] > 1e-2
    assert moved == pytest.approx(1e-3, rel=1e-3)


def test_entropy_bonus_raises_the_entropy(make_model):
    entropies = []
    for coefficient in (0.0, 5.0):
        ppo = trainer(make_model, entropy_coef=coefficient, learning_rate=3e-3, minibatch_size=4)
        ppo.step(*batch())
        entropies.append(ppo.step(*batch())["ppo/policy/entropy"])
    assert entropies[1] > entropies[0] + 0.05


def test_early_stop_leaves_out_the_remaining_updates(make_model):
    full = trainer(make_model, learning_rate=0.02, minibatch_size=2)
    assert full.step(*batch())["ppo/updates"] == 8
    stopped = trainer(make_model, learning_rate=0.02, minibatch_size=2, max_approxkl=0.01)
    stats = stopped.step(*batch())
    assert 1 <= stats["ppo/updates"] < 8
    assert stats["ppo/skipped_updates"] == 1


def test_ratio_guard_skips_a_wild_update_and_says_so(make_model):
    ppo = trainer(make_model, learning_rate=0.5, max_grad_norm=None, ratio_threshold=1.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stats = ppo.step(*batch())
    assert stats["ppo/skipped_updates"] > 0
    assert "mean importance ratio" in str(caught[0].message)
    assert all(torch.isfinite(weight).all() for weight in ppo.model.parameters())


def test_first_ratio_check_finds_a_model_that_is_not_a_function(make_model):
    model = make_model()
    noise = torch.Generator().manual_seed(0)
    model.transformer.ln_f.register_forward_hook(
        lambda _module, _inputs, output: output + 0.5 * torch.randn(output.shape, generator=noise)
    )
    before = weights(model)
    ppo = PPOTrainer(model, make_model(1), precision="fp32", batch_size=4)
    with pytest.raises(RuntimeError, match="not a fixed function of its input: look for dropout"):
        ppo.step(*batch())
    assert all(torch.equal(before[key], model.state_dict()[key]) for key in before)


def test_unknown_parameters_are_named_in_one_warning():
    from tests.conftest import tiny_gpt2

    with pytest.warns(
        UserWarning, match=r"^PPOTrainer ignores `lm_name`, `steps`: no such field in PPOConfig\.$"
    ):
        ppo = PPOTrainer(tiny_gpt2(), tiny_gpt2(1), lm_name="gpt2", steps=3, batch_size=2)
    assert ppo.config.batch_size == 2


def test_a_name_close_to_a_field_is_refused():
    from tests.conftest import tiny_gpt2

    with pytest.raises(
        TypeError,
        match=r"no setting `batchsize`. Did you mean `batch_size`\?; .*`ppo_epoch`.*`ppo_epochs`",
    ):
        PPOTrainer(tiny_gpt2(), batchsize=3, ppo_epoch=2, steps=3)


def test_config_object_instead_of_keywords(make_model):
    config = PPOConfig(batch_size=2, adaptive_kl=False)
    ppo = PPOTrainer(make_model(), make_model(1), config)
    assert ppo.config == dataclasses.replace(config, token_budget=ppo.config.token_budget)
    given = dataclasses.replace(config, token_budget=100)
    assert PPOTrainer(make_model(), make_model(1), given).config is given
    assert isinstance(ppo.kl_ctl, FixedKLController)
    with pytest.raises(TypeError, match="not both"):
        PPOTrainer(make_model(), make_model(1), config, batch_size=3)
    with pytest.raises(TypeError, match="`config` must be a PPOConfig, got dict"):
        PPOTrainer(make_model(), make_model(1), {"batch_size": 3})


def test_scores_are_centred_scaled_and_clipped_by_running_moments(make_model):
    ppo = trainer(make_model, center_scores=True, scale_scores=True, clip_scores=1.0)
    queries, responses, _ = batch()
    stats = ppo.step(queries, responses, torch.tensor([10.0, 20.0, 30.0, 100.0]))
    # mean 40, variance (900 + 400 + 100 + 3600)/3, std 40.82: z = −.735, −.490, −.245, 1.47 → 1
    assert stats["objective/scores"] == pytest.approx((-0.7348 - 0.4899 - 0.2449 + 1) / 4, abs=1e-3)
    assert ppo.score_moments.count == 4
    ppo.step(queries, responses, torch.tensor([10.0, 20.0, 30.0, 100.0]))
    assert ppo.score_moments.count == 8


def test_modes_of_the_models_come_back(make_model):
    ppo = trainer(make_model)
    ppo.model.train()
    ppo.model.transformer.h[0].eval()
    ppo.step(*batch())
    assert ppo.model.training
    assert ppo.model.transformer.h[1].mlp.training
    assert not ppo.model.transformer.h[0].training
    assert not ppo.ref_model.training


@pytest.mark.parametrize(("mine", "other"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_second_trainer_of_another_precision_leaves_the_first_alone(make_model, mine, other):
    undisturbed = trainer(make_model, precision=mine).step(*batch())
    first = trainer(make_model, precision=mine)
    trainer(make_model, precision=other).step(*batch())
    stats = first.step(*batch())
    assert stats["ppo/loss/total"] == undisturbed["ppo/loss/total"]
    assert stats["ppo/first_log_ratio"] == undisturbed["ppo/first_log_ratio"]
    assert first.autocast()._enabled == (mine == "bf16")


def test_gradients_left_on_the_model_do_not_enter_an_update(make_model):
    expected = trainer(make_model).step(*batch())["ppo/grad_norm"]
    ppo = trainer(make_model)
    for weight in ppo.model.parameters():
        weight.grad = torch.full_like(weight, 1e3)
    assert ppo.step(*batch())["ppo/grad_norm"] == expected


def test_an_interrupted_pass_leaves_no_gradient_behind(make_model):
    expected = trainer(make_model, forward_batch_size=1).step(*batch())["ppo/grad_norm"]
    ppo = trainer(make_model, forward_batch_size=1, seed=0)
    order = ppo.shuffle.get_state()
    backward, calls = ppo.accelerator.backward, []

    def interrupted(loss):
        calls.append(1)
        backward(loss)
        raise KeyboardInterrupt

    ppo.accelerator.backward = interrupted
    with pytest.raises(KeyboardInterrupt):
        ppo.step(*batch())
    ppo.accelerator.backward = backward
    ppo.shuffle.set_state(order)
    assert ppo.step(*batch())["ppo/grad_norm"] == expected


def test_an_optimizer_of_some_weights_trains_and_clips_those(make_model):
    model = make_model()
    head = list(model.v_head.parameters())
    ppo = PPOTrainer(
        model,
        make_model(1),
        optimizer=torch.optim.SGD(head, lr=0.1),
        precision="fp32",
        batch_size=4,
        max_grad_norm=None,
    )
    before = weights(model)
    first, second = ppo.step(*batch()), ppo.step(*batch())
    changed = [key for key in before if not torch.equal(before[key], model.state_dict()[key])]
    assert changed == ["v_head.summary.weight", "v_head.summary.bias"]
    assert second["ppo/grad_norm"] < 2 * first["ppo/grad_norm"]
    with pytest.raises(ValueError, match="none has requires_grad=True and is in `optimizer`"):
        PPOTrainer(make_model(), optimizer=torch.optim.SGD(make_model().parameters(), lr=0.1))


def test_fp16_goes_on_after_an_update_that_was_not_applied(make_model):
    """With a gradient scaler, as at fp16, an early stop must not block the next update."""
    from accelerate.optimizer import AcceleratedOptimizer

    ppo = trainer(make_model, learning_rate=0.02, minibatch_size=2, max_approxkl=0.001)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    ppo.accelerator.scaler, ppo.accelerator.native_amp = scaler, True
    ppo.accelerator.state._mixed_precision = "fp16"
    ppo.updater.optimizer = AcceleratedOptimizer(ppo.optimizer.optimizer, scaler=scaler)
    first, second = ppo.step(*batch()), ppo.step(*batch())
    assert first["ppo/skipped_updates"] == 1
    assert second["ppo/updates"] >= 1


def test_accelerators_that_contradict_the_trainer(make_model):
    from accelerate import Accelerator

    with pytest.raises(ValueError, match="gradient_accumulation_steps 1, got 4"):
        PPOTrainer(make_model(), accelerator=Accelerator(gradient_accumulation_steps=4))
    with pytest.raises(ValueError, match="`precision` must agree with the accelerator's"):
        PPOTrainer(make_model(), accelerator=Accelerator(), precision="bf16")


def test_step_takes_scores_by_name(make_model):
    queries, responses, scores = batch()
    rollout = Rollout.from_lists(queries, responses)
    one = trainer(make_model).step(rollout, scores=scores)
    other = trainer(make_model).step(query=queries, response=responses, scores=scores)
    assert one["ppo/loss/total"] == other["ppo/loss/total"]


# -- scores of tokens, and tokens of others --------------------------------------------------------


def test_a_score_on_the_last_token_alone_is_a_score_of_the_response(make_model):
    queries, responses = ragged([3, 1, 2, 4]), ragged([2, 5, 3, 1], seed=1)
    whole = [1.0, -1.0, 0.5, 2.0]
    placed = [[0.0] * (len(row) - 1) + [s] for row, s in zip(responses, whole, strict=True)]
    results = []
    for scores in (whole, placed):
        ours = trainer(make_model)
        stats = ours.step(queries, responses, scores)
        results.append((weights(ours.model), stats["objective/scores"]))
    assert_same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] == pytest.approx(0.625)


def test_scores_of_tokens_enter_the_returns_where_they_stand(make_model):
    """With λ = γ = 1, no KL and values of 0 the return of a token is the sum from there on."""
    model = make_model()
    torch.nn.init.zeros_(model.v_head.summary.weight)
    ours = PPOTrainer(
        model, batch_size=2, gae_lambda=1.0, init_kl_coef=0.0, adaptive_kl=False, precision="fp32"
    )
    rollout = Rollout.from_lists(ragged([2, 3]), ragged([3, 2], seed=1))
    seen = []
    advantages = ours.advantages
    ours.advantages = lambda *args: seen.append(advantages(*args)) or seen[0]
    ours.step(rollout, [[1.0, 2.0, 4.0], [8.0, 16.0]])
    torch.testing.assert_close(seen[0][1], torch.tensor([[7.0, 6.0, 4.0], [24.0, 16.0, 0.0]]))


def test_centring_scores_of_tokens_centres_their_sums(make_model):
    ours = trainer(make_model, center_scores=True)
    mask = torch.tensor([[True, True, True], [True, False, True]])
    scores = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 10.0]])
    moments, centred = ours.normalized(scores, mask=mask)
    assert moments.mean == 10.0  # of the sums, 6 and 14
    expected = torch.tensor([[1 - 10 / 3, 2 - 10 / 3, 3 - 10 / 3], [-1.0, 0.0, 5.0]])
    torch.testing.assert_close(centred, expected)
    torch.testing.assert_close(centred.sum(1), torch.tensor([-4.0, 4.0]))
    stats = ours.step(ragged([2]), ragged([3]), [[1.0, 2.0, 3.0]])
    assert stats["objective/scores"] == pytest.approx(0, abs=1e-6)


def test_tokens_of_others_are_read_but_neither_scored_nor_trained(make_model):
    queries, responses = ragged([3, 2]), ragged([5, 4], seed=1)
    masks = [torch.tensor([1, 1, 0, 0, 1]), torch.tensor([0, 1, 1, 1])]
    results = []
    for by_rollout in (False, True):
        ours = trainer(make_model, minibatch_size=2)
        if by_rollout:
            rollout = Rollout.from_lists(queries, responses, response_masks=masks)
            stats = ours.step(rollout, [1.0, -1.0])
        else:
            stats = ours.step(queries, responses, [1.0, -1.0], response_masks=masks)
        results.append((weights(ours.model), stats))
    assert_same(results[0][0], results[1][0])
    stats = results[0][1]
    holes = torch.tensor([[0, 0, 1, 1, 0], [1, 0, 0, 0, 1]]).bool().numpy()
    for name in ("objective/logprobs", "objective/ref_logprobs", "objective/kl_dist"):
        assert (stats[name][holes] == 0).all()
        assert (stats[name][~holes] != 0).all()
    assert len(stats["ppo/policy/ratio"]) == 6 * stats["ppo/updates"]
    # What stands in a hole changes what follows.
    responses[0][2] = (responses[0][2] + 1) % 97
    other = trainer(make_model, minibatch_size=2)
    changed = other.step(queries, responses, [1.0, -1.0], response_masks=masks)
    assert changed["objective/logprobs"][0, 4] != stats["objective/logprobs"][0, 4]
    assert (changed["objective/logprobs"][0, :2] == stats["objective/logprobs"][0, :2]).all()


def test_a_mask_beside_a_rollout_is_refused(make_model):
    rollout = Rollout.from_lists(ragged([2]), ragged([3]))
    with pytest.raises(TypeError, match="`response_masks` must be None beside a Rollout"):
        trainer(make_model).step(rollout, [1.0], response_masks=[torch.ones(3)])


def test_a_step_that_fails_draws_the_same_shuffle_again(monkeypatch):
    """Ctrl-C in the second update, say."""
    trainers = [PPOTrainer(tiny_gpt2(0), tiny_gpt2(1), **SHUFFLED) for _ in range(2)]
    batch = (ragged([3, 1, 4, 1]), ragged([2, 7, 1, 8]), torch.linspace(-1, 1, 4))
    with monkeypatch.context() as patched:
        patched.setattr(trainers[0].updater, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainers[0].step(*batch)
    for trainer in trainers:
        trainer.step(*batch)
    for one, other in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        assert torch.equal(one, other)


SHUFFLED = {"batch_size": 4, "minibatch_size": 1, "ppo_epochs": 2, "precision": "fp32"}


def interrupted():
    raise KeyboardInterrupt


def test_equal_scores_are_said_to_be_equal(make_model):
    """The numbers stay: what the critic missed is whitened to full size, and the figure tells."""
    queries, responses, scores = batch()
    ppo = trainer(make_model)
    assert ppo.step(queries, responses, torch.full((4,), 0.5))["objective/constant_scores"] == 1.0
    stats = ppo.step(queries, responses, scores)
    assert stats["objective/constant_scores"] == 0.0
    whole = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]).repeat(4, 1)
    whole[0] = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0])  # of tokens: their sums are compared
    assert ppo.step(queries, responses, whole)["objective/constant_scores"] == 1.0


class Empty(GPT2HeadWithValueModel):
    """A model that has a length, as containers do: an empty one is false."""

    def __len__(self):
        return 0


class Unsized(GPT2HeadWithValueModel):
    """What `torch.compile` returns has a length too, that of what is inside."""

    def __len__(self):
        raise TypeError("GPT2HeadWithValueModel does not support len()")


@pytest.mark.parametrize("kind", [Empty, Unsized])
def test_a_model_with_a_length_is_a_model(make_model, kind):
    policy, reference = make_model(0), make_model(1)
    policy.__class__ = reference.__class__ = kind
    reference.train()
    reference.transformer.drop.p = 0.5
    ppo = PPOTrainer(policy, reference, precision="fp32", batch_size=4, minibatch_size=4)
    assert isinstance(ppo.ref_model, kind)
    plain = trainer(make_model).step(*batch())
    assert ppo.step(*batch())["objective/kl"] == plain["objective/kl"]
    assert reference.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_of_the_process_changes_nothing(make_model, dtype):
    found = []
    queries, responses, scores = batch()
    rows = [row.tolist() for row in torch.eye(4, 5) + 0.1]
    for default in (torch.float32, dtype):
        models = make_model(0), make_model(1)
        torch.set_default_dtype(default)
        try:
            ppo = PPOTrainer(
                *models, precision="fp32", batch_size=4, whiten_rewards=True, ppo_epochs=2
            )
            stats = ppo.step(queries, responses, scores), ppo.step(queries, responses, rows)
        finally:
            torch.set_default_dtype(torch.float32)
        found.append((weights(ppo.model), *stats))
    assert_same(found[0][0], found[1][0])
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        for name in one:
            if not name.startswith("time/"):
                assert np.array_equal(one[name], other[name]), name


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_step_has_gradients_wherever_it_is_called(make_model, around):
    found = []
    for inside in (nullcontext, around):
        ppo = PPOTrainer(make_model(), make_model(1), precision="fp32", batch_size=4)
        with inside():
            ppo.step(*batch())
        found.append(weights(ppo.model))
    assert_same(*found)


def test_optimisers_that_need_more_than_a_gradient_are_refused_when_the_trainer_is_made(make_model):
    model = make_model()
    for kind in (torch.optim.LBFGS, torch.optim.SparseAdam):
        with pytest.raises(ValueError, match=f"`optimizer` must take .*closure.*{kind.__name__}"):
            PPOTrainer(model, optimizer=kind(model.parameters()), batch_size=4)


@pytest.mark.parametrize(
    ("make", "error", "got"),
    [
        (lambda model: torch.optim.SGD, TypeError, "got SGD"),
        (lambda model: "adam", TypeError, "got str"),
        (lambda model: torch.optim.SGD(model.parameters(), lr=math.nan), ValueError, "lr=nan"),
        (
            lambda model: torch.optim.Adam(model.parameters(), maximize=True),
            ValueError,
            "maximize=True",
        ),
    ],
)
def test_what_does_not_minimise_is_no_optimiser(make, error, got):
    model = tiny_gpt2()
    with pytest.raises(error, match=f"`optimizer` must (be an|minimise the loss).*{got}"):
        PPOTrainer(model, optimizer=make(model), batch_size=4)


def test_an_optimiser_that_finds_its_own_learning_rate(make_model):
    model = make_model()
    optimizer = Adafactor(model.parameters(), lr=None, relative_step=True, warmup_init=True)
    ppo = PPOTrainer(model, make_model(1), optimizer=optimizer, precision="fp32", batch_size=4)
    before = weights(model)
    assert ppo.step(*batch())["ppo/updates"] == 16
    assert not torch.equal(before["lm_head.weight"], model.lm_head.weight)
    state = ppo.state_dict()
    ppo.load_state_dict(state)
