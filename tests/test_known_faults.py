"""The faults that releases of trl had, 1 to 17: one regression test (or more) each."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch

from tests.conftest import ragged, tiny_gpt2
from trl.batch import Rollout
from trl.gpt2 import GPT2HeadWithValueModel, respond_to_batch
from trl.optimization.rewards import RunningMoments, normalize_scores
from trl.ppo import FixedKLController, PPOTrainer
from trl.rollout.sampling import sample


def make_trainer(**settings):
    settings = {"precision": "fp32", "learning_rate": 1e-3, "batch_size": 4} | settings
    return PPOTrainer(tiny_gpt2(0), tiny_gpt2(1), **settings)


def batch(size=4, query=3, response=5):
    return (
        torch.stack(ragged([query] * size)),
        torch.stack(ragged([response] * size, seed=1)),
        torch.linspace(-1, 1, size),
    )


def test_fault_1_a_second_trainer_does_not_inherit_settings():
    make_trainer(batch_size=2, learning_rate=0.5, gamma=0.5, ppo_epochs=9)
    second = PPOTrainer(tiny_gpt2(), tiny_gpt2(1)).config
    assert (second.batch_size, second.gamma, second.ppo_epochs) == (256, 1.0, 4)


def test_fault_2_adap_kl_ctrl_false_is_heeded():
    ppo = make_trainer(adap_kl_ctrl=False, init_kl_coef=0.4, horizon=10)
    assert isinstance(ppo.kl_ctl, FixedKLController)
    for _ in range(3):
        assert ppo.step(*batch())["objective/kl_coef"] == 0.4
    assert ppo.kl_ctl.value == 0.4


def test_fault_3_an_update_takes_a_minibatch():
    steps: list[int] = []
    ppo = make_trainer(minibatch_size=4, ppo_epochs=3)
    ppo.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    ppo.step(*batch())
    assert len(steps) == 3


def test_fault_4_no_autograd_graph_survives_sampling_or_a_step():
    model = tiny_gpt2()
    assert not respond_to_batch(model, torch.tensor([[1, 2]])).requires_grad
    ppo = make_trainer()
    stats = ppo.step(*batch())
    assert not any(isinstance(value, torch.Tensor) for value in stats.values())

    alive: list[weakref.ref] = []
    ppo.model.lm_head.register_forward_hook(lambda *_: None)
    hook = ppo.model.transformer.ln_f.register_forward_hook(
        lambda _module, _inputs, output: alive.append(weakref.ref(output))
    )
    del stats
    ppo.step(*batch())
    hook.remove()
    gc.collect()
    assert alive
    assert all(reference() is None for reference in alive)


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_fault_5_the_remainder_of_a_batch_is_used(size):
    ppo = make_trainer(forward_batch_size=2, minibatch_size=2)
    stats = ppo.step(*batch(size))
    assert stats["objective/logprobs"].shape == (size, 5)
    assert (stats["objective/logprobs"] < 0).all()  # none left at the zero it began with
    assert len(stats["ppo/policy/ratio"]) == 4 * size * 5


def test_fault_6_rows_of_any_lengths():
    ppo = make_trainer(learning_rate=1e-4)
    responses = ragged([1, 4, 9, 2], seed=1)
    stats = ppo.step(ragged([5, 1, 2, 8]), responses, torch.ones(4))
    counted = stats["objective/logprobs"] != 0
    assert counted.sum(1).tolist() == [1, 4, 9, 2]
    assert all(np.isfinite(value).all() for value in stats.values())


def test_fault_7_a_value_is_that_before_its_token():
    """V_t sits at column Q − 1 + t: it must not have seen response token t."""
    ppo = make_trainer()
    queries, responses, _ = batch(1)
    rollout = Rollout.from_lists(queries, responses)
    values = ppo.forward_pass(ppo.policy, rollout).values
    whole = ppo.model(rollout.input_ids).value
    torch.testing.assert_close(values, whole[:, 2:-1])
    changed = responses.clone()
    changed[0, 3] = 7 if responses[0, 3] != 7 else 8
    other = ppo.forward_pass(ppo.policy, Rollout.from_lists(queries, changed)).values
    torch.testing.assert_close(values[0, :4], other[0, :4])
    assert (values[0, 4] - other[0, 4]).abs() > 1e-4


@pytest.mark.parametrize("size", [1, 3])
def test_fault_8_a_response_of_one_token(size):
    ppo = make_trainer()
    stats = ppo.step(*batch(size, response=1))
    assert all(np.isfinite(value).all() for value in stats.values())
    assert all(torch.isfinite(weight).all() for weight in ppo.model.parameters())


def test_fault_9_entropy_is_that_of_response_tokens():
    ppo = make_trainer(ppo_epochs=1, minibatch_size=4)
    queries, responses, scores = batch()
    with torch.no_grad():
        log_softmax = ppo.model(torch.cat((queries, responses), 1)).logits.log_softmax(-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    stats = ppo.step(queries, responses, scores)
    assert stats["ppo/policy/entropy"] == pytest.approx(entropy[:, 2:-1].mean().item(), rel=1e-5)
    assert abs(entropy[:, 2:-1].mean() - entropy.mean()) > 1e-3


def test_fault_10_sampling_equals_scoring():
    """The log-probs of what was sampled, EOS and padding included, are those that are scored."""
    model = tiny_gpt2()
    recorded: list[torch.Tensor] = []
    forward = model.forward

    def spy(*arguments, **keywords):
        output = forward(*arguments, **keywords)
        recorded.append((output.logits[:, -1] / 0.7).log_softmax(-1))
        return output

    model.forward = spy
    queries = Rollout.from_lists(ragged([2, 5, 3, 4] * 8), ragged([1] * 32))
    rollout = sample(
        model,
        queries.queries,
        queries.query_mask,
        max_new_tokens=12,
        temperature=0.7,
        eos_token_id=11,
    )
    model.forward = forward
    sampled = torch.stack(recorded, 1).gather(-1, rollout.responses[..., None])[..., 0]
    once = {"batch_size": 32, "minibatch_size": 32, "ppo_epochs": 1}
    ppo = PPOTrainer(model, precision="fp32", temperature=0.7, **once)
    scored = ppo.forward_pass(ppo.policy, rollout).logprobs
    assert not rollout.response_mask.all()  # some rows ended early
    torch.testing.assert_close(
        sampled[rollout.response_mask], scored[rollout.response_mask], rtol=1e-4, atol=1e-4
    )
    stats = ppo.step(rollout, torch.zeros(32))
    assert abs(stats["objective/kl"]) < 1e-5  # the policy is the reference still


def test_fault_11_an_early_eos_leaks_no_query_token_into_the_response():
    model = tiny_gpt2()
    queries = Rollout.from_lists(ragged([1, 9]), ragged([1, 1]))
    rollout = sample(model, queries.queries, queries.query_mask, max_new_tokens=15, eos_token_id=3)
    assert rollout.query_lists() == [row.tolist() for row in ragged([1, 9])]
    text = [
        query + response
        for query, response in zip(rollout.query_lists(), rollout.response_lists(), strict=True)
    ]
    for row, tokens in enumerate(text):
        kept = rollout.input_ids[row][rollout.attention_mask[row]].tolist()
        assert kept == tokens


def test_fault_12_gradients_add_up_over_passes():
    states = []
    for forward_batch_size in (1, 4):
        model = tiny_gpt2(0)
        ppo = PPOTrainer(
            model,
            tiny_gpt2(1),
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            precision="fp32",
            batch_size=4,
            minibatch_size=4,
            ppo_epochs=1,
            forward_batch_size=forward_batch_size,
            max_grad_norm=None,
        )
        ppo.step(ragged([2, 3, 4, 5]), ragged([6, 1, 3, 2], seed=1), torch.arange(4.0))
        states.append(torch.cat([weight.flatten() for weight in model.parameters()]))
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)


def test_fault_13_tokens_after_eos_are_not_scored():
    ppo = make_trainer()
    queries = ragged([3, 3])
    cut = [torch.tensor([4, 5, 9]), torch.tensor([6, 9])]
    going_on = [torch.tensor([4, 5, 9, 33, 9]), torch.tensor([6, 9, 44, 55, 66])]
    scores = torch.tensor([1.0, -1.0])
    one = ppo.step(Rollout.from_lists(queries, cut, eos_token_id=9), scores)
    ppo = make_trainer()
    other = ppo.step(Rollout.from_lists(queries, going_on, eos_token_id=9), scores)
    for name in ("objective/kl", "ppo/loss/total", "ppo/returns/mean", "objective/entropy"):
        assert one[name] == pytest.approx(other[name], rel=1e-6)


def test_fault_14_ratio_spikes_do_not_explode_the_loss():
    ppo = make_trainer(learning_rate=0.3, ratio_threshold=3.0)
    with pytest.warns(UserWarning, match="an update was skipped"):
        losses = [ppo.step(*batch())["ppo/loss/total"] for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
    assert all(torch.isfinite(weight).all() for weight in ppo.model.parameters())
    # A log-ratio of hundreds stays a finite ratio.
    from trl.optimization.losses import clipped_policy_loss

    loss, ratio, _ = clipped_policy_loss(
        torch.tensor([[500.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]]), cliprange=0.2
    )
    assert torch.isfinite(loss).all()
    assert torch.isfinite(ratio).all()


@pytest.mark.parametrize("settings", [{"scale_scores": True}, {"center_scores": True}])
def test_fault_15_score_scaling_works_from_the_first_score_on(settings):
    ppo = make_trainer(**settings)
    for size in (1, 1, 4):
        stats = ppo.step(*batch(size))
        assert all(np.isfinite(value).all() for value in stats.values())
    moments = RunningMoments()
    moments.update(torch.tensor([2.0]))
    assert torch.isfinite(
        normalize_scores(torch.tensor([2.0]), moments, center=True, scale=True, clip=None)
    ).all()


def test_fault_16_early_stop_looks_at_all_tokens_of_the_epoch():
    """A calm last minibatch does not hide that the epoch as a whole went too far."""
    ppo = make_trainer(max_approxkl=0.1, minibatch_size=1, ppo_epochs=1)
    gaps = iter([1.0, 0.0, 0.0, 0.0])  # mean log-ratio² / 2 = .5, then 0
    accumulate = ppo._gradient

    def scripted(*arguments):
        update = accumulate(*arguments)
        update.means["policy/approxkl"] = next(gaps) / 2
        return update

    ppo._gradient = scripted
    stats = ppo.step(*batch())
    assert stats["ppo/updates"] == 0
    # With gaps that are small at first, the mean over the epoch decides, not the last value.
    ppo = make_trainer(max_approxkl=0.1, minibatch_size=1, ppo_epochs=1)
    gaps = iter([0.0, 0.0, 0.5, 0.0])
    accumulate = ppo._gradient
    ppo._gradient = scripted
    assert ppo.step(*batch())["ppo/updates"] == 4  # ½·0.5 / 3 = 0.083 < 0.1


def test_fault_17_the_value_head_survives_saving_and_loading(tmp_path, capfd):
    ppo = make_trainer()
    ppo.step(*batch())
    ppo.model.save_pretrained(tmp_path)
    capfd.readouterr()
    loaded = GPT2HeadWithValueModel.from_pretrained(tmp_path)
    assert "v_head" not in "".join(capfd.readouterr())
    assert torch.equal(loaded.v_head.summary.weight, ppo.model.v_head.summary.weight)
    assert torch.equal(loaded.v_head.summary.bias, ppo.model.v_head.summary.bias)
