"""What may be switched on in `PPOTrainer`: value warm-up, penalties, pretraining, temperature."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.conftest import ragged, tiny_gpt2
from tests.families import tiny_model
from tests.models.policies import lora_policy, with_values
from trl.batch import Rollout
from trl.config import PPOConfig
from trl.models.with_value_head import CausalLMWithValueHead, Seq2SeqLMWithValueHead
from trl.optimization.adam import TensorFlowAdam
from trl.optimization.algorithms import ALGORITHMS
from trl.ppo import PPOTrainer
from trl.rollout import Sampler
from trl.rollout.sampling import sample

SCORES = [1.0, -1.0, 0.5, 2.0]
VOCABULARY = 61  # of the tiny models of other families


def rollout(vocabulary=97):
    queries = ragged([3, 1, 4, 2], vocabulary=vocabulary)
    return Rollout.from_lists(queries, ragged([2, 5, 3, 1], 1, vocabulary))


def trainer_of(model=None, ref_model=None, **settings):
    model = model or tiny_gpt2(0)
    ref_model = ref_model or (tiny_gpt2(1) if hasattr(model, "transformer") else None)
    defaults = {"precision": "fp32", "batch_size": 4, "minibatch_size": 2, "learning_rate": 1e-3}
    return PPOTrainer(model, ref_model, **defaults | settings)


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def changed(before, model):
    after = weights(model)
    return {name for name in before if not torch.equal(before[name], after[name])}


# -- value warm-up -------------------------------------------------------------------------------


def policies(folder):
    frozen = with_values(CausalLMWithValueHead(tiny_model("llama")))
    frozen.language_model.model.embed_tokens.requires_grad_(False)

    def top_layer():
        tiny_model("llama").save_pretrained(folder)
        return with_values(CausalLMWithValueHead.from_pretrained(folder, unfrozen_layers=1))

    return {
        "gpt2": lambda: tiny_gpt2(0),
        "llama, embedding frozen": lambda: frozen,
        "lora": lambda: lora_policy(folder),
        "top layer": top_layer,
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["gpt2", "llama, embedding frozen", "lora", "top layer"])
def test_value_warmup_trains_the_value_head_alone(kind, precision, tmp_path):
    """Whatever else is in the loss; afterwards everything that was trained is trained again."""
    model = policies(tmp_path)[kind]()
    vocabulary = 97 if kind == "gpt2" else VOCABULARY
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    ppo = trainer_of(
        model,
        value_warmup_steps=2,
        entropy_coef=1.0,
        kl_in="loss",
        precision=precision,
        pretraining_coef=1.0,
        pretraining=lambda rows: ragged([4] * rows, vocabulary=vocabulary),
    )
    batch = rollout(vocabulary)
    logprobs = ppo.forward_pass(ppo.policy, batch).logprobs
    for step in range(2):
        before, beta = weights(model), ppo.kl_ctl.value
        stats = ppo.step(batch, SCORES)
        assert changed(before, model) == {"v_head.summary.weight", "v_head.summary.bias"}
        assert stats["ppo/loss/total"] == pytest.approx(0.1 * stats["ppo/loss/value"], rel=1e-5)
        assert ppo.kl_ctl.value == beta
        assert ppo.steps_done == step + 1
        assert {n for n, weight in model.named_parameters() if weight.requires_grad} == trained
    assert torch.equal(ppo.forward_pass(ppo.policy, batch).logprobs, logprobs)
    before = weights(model)
    stats = ppo.step(batch, SCORES)
    assert changed(before, model) == trained
    assert "ppo/loss/pretraining" in stats
    assert ppo.kl_ctl.value != beta


def test_value_warmup_lowers_the_error_of_the_values():
    ppo = trainer_of(value_warmup_steps=6, vf_coef=1.0, cliprange_value=100.0, learning_rate=3e-2)
    errors = [ppo.step(rollout(), SCORES)["ppo/val/error"] for _ in range(6)]
    assert errors[-1] < 0.5 * errors[0]


def test_value_warmup_does_not_let_other_weights_decay():
    """Nor does it move them by the momentum of an optimiser that has been used before."""
    model = tiny_gpt2(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model(torch.arange(12).view(2, 6)).logits.square().mean().backward()
    optimizer.step()
    before = weights(model)
    ppo = trainer_of(model, value_warmup_steps=1, optimizer=optimizer)
    ppo.step(rollout(), SCORES)
    assert changed(before, model) == {"v_head.summary.weight", "v_head.summary.bias"}


def test_an_algorithm_without_a_critic_has_nothing_to_warm_up():
    """Also one that takes the place of another during the warm-up."""
    ppo = trainer_of(value_warmup_steps=5)
    assert ppo.warming_up
    ppo.algorithm = ALGORITHMS["reinforce++"]
    before = weights(ppo.model)
    stats = ppo.step(rollout(), SCORES)
    assert "ppo/loss/value" not in stats
    assert changed(before, ppo.model) == set(before) - {
        "v_head.summary.weight",
        "v_head.summary.bias",
    }


@pytest.mark.parametrize("critic", [True, False])
def test_an_estimate_gives_returns_if_there_is_a_critic(critic):
    ppo = trainer_of()
    ppo.algorithm = replace(ALGORITHMS["reinforce++" if critic else "ppo"], critic=critic)
    before = weights(ppo.model)
    with pytest.raises(
        ValueError, match=f"`algorithm.estimate` must give returns if.*not {critic}"
    ):
        ppo.step(rollout(), SCORES)
    assert not changed(before, ppo.model)
    assert ppo.steps_done == 0


def test_a_warmup_step_that_fails_leaves_everything_trainable():
    ppo = trainer_of(value_warmup_steps=1)
    ppo.model.transformer.ln_f.weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError):
        ppo.step(rollout(), SCORES)
    assert all(weight.requires_grad for weight in ppo.model.parameters())
    assert ppo.steps_done == 0


# -- responses without an end --------------------------------------------------------------------

ENDED = torch.tensor([True, False, True, False])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1.0, -1.0, 0.5, 2.0]),
        ({"missing_eos_penalty": 3.0}, [1.0, -4.0, 0.5, -1.0]),
        ({"missing_eos_penalty": 3.0, "missing_eos_replaces": True}, [1.0, -3.0, 0.5, -3.0]),
        # before clipping
        ({"missing_eos_penalty": 3.0, "clip_scores": 2.0}, [1.0, -2.0, 0.5, -1.0]),
        # after the range: it may go below −1
        ({"missing_eos_penalty": 3.0, "score_range": [-1, 3]}, [0.0, -4.0, -0.25, -2.5]),
    ],
)
def test_a_response_without_an_end_is_punished(settings, expected):
    """The score is what the last token's reward holds besides its KL."""
    ppo = trainer_of(algorithm="reinforce++", init_kl_coef=0.0, **settings)
    seen = []
    advantages = ppo.advantages
    ppo.advantages = lambda rewards, *more: seen.append(rewards) or advantages(rewards, *more)
    stats = ppo.step(replace(rollout(), ended=ENDED), SCORES)
    torch.testing.assert_close(seen[0].sum(1), torch.tensor(expected))
    assert stats["objective/ended"] == 0.5
    assert stats["objective/scores"] == pytest.approx(sum(expected) / 4)


def test_the_penalty_needs_to_know_what_ended():
    ppo = trainer_of(missing_eos_penalty=1.0)
    before = weights(ppo.model)
    with pytest.raises(
        ValueError, match="`missing_eos_penalty` must be None for .*`ended`: use Sampler"
    ):
        ppo.step(rollout(), SCORES)
    known = replace(rollout(), ended=ENDED)
    with pytest.raises(ValueError, match="`missing_eos_penalty` must be None with scores for sin"):
        ppo.step(known, torch.ones(4, 5))
    assert not changed(before, ppo.model)
    assert "objective/ended" not in trainer_of().step(rollout(), SCORES)


def test_good_responses_are_those_of_the_scores_as_they_were_given():
    settings = {"positive_coef": 0.1, "positive_above": 0.5, "learning_rate": 1e-6}
    ppo = trainer_of(center_scores=True, score_range=[-1, 3], **settings)
    targets, seen = ppo.targets, []
    ppo.targets = lambda *given: seen.append(targets(*given)) or seen[0]
    ppo.step(rollout(), SCORES)
    good = (seen[0].positive > 0).any(1).tolist()
    assert good == [score > 0.5 for score in SCORES]
    assert any(good)


def test_a_range_is_for_scores_of_whole_responses():
    """−1 for each token without a score of its own would be another score."""
    ppo = trainer_of(score_range=[0, 1])
    with pytest.raises(ValueError, match="`score_range` must be None with scores for single tok"):
        ppo.step(rollout(), torch.ones(4, 5))
    with pytest.raises(ValueError, match="`positive_coef` must be > 0 with positive_above=0.5"):
        PPOConfig(positive_above=0.5)
    PPOConfig(algorithm="vapo", positive_above=0.5)


def test_the_settings_of_the_penalty_are_checked():
    with pytest.raises(ValueError, match="`missing_eos_penalty` must be a finite number >= 0"):
        PPOConfig(missing_eos_penalty=-1.0)
    with pytest.raises(ValueError, match="`missing_eos_penalty` must be given with missing_eos_r"):
        PPOConfig(missing_eos_replaces=True)


# -- pretraining ---------------------------------------------------------------------------------


def texts(rows, seed=5):
    return ragged([2, 6, 3, 5, 4, 2][:rows], seed=seed)


def mean_surprise(model, rows):
    """Mean over all predicted tokens of −log π, text by text."""
    found = []
    for row in rows:
        logprobs = model(row[None]).logits[0, :-1].log_softmax(-1)
        found += [-logprobs[t, token] for t, token in enumerate(row[1:])]
    return torch.stack(found).mean()


def gradient(temperature=1.0, pretraining=None, **settings):
    model = tiny_gpt2(0)
    ppo = trainer_of(
        model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        minibatch_size=4,
        ppo_epochs=1,
        max_grad_norm=None,
        temperature=temperature,
        pretraining=pretraining,
        **settings,
    )
    before = weights(model)
    stats = ppo.step(rollout(), SCORES)
    return {name: before[name] - weight for name, weight in weights(model).items()}, stats


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("forward_batch_size", [1, 2, None])
def test_the_gradient_of_pretraining_is_that_of_a_plain_loop(forward_batch_size, temperature):
    """At temperature 1, whatever the responses were sampled with."""
    coefficient, rows = 3.0, texts(6)
    without, stats = gradient(temperature)
    found, mixed = gradient(
        temperature,
        lambda count: rows[:count],
        pretraining_coef=coefficient,
        pretraining_rows=6,
        forward_batch_size=forward_batch_size,
    )
    model = tiny_gpt2(0)
    surprise = mean_surprise(model, rows)
    surprise.backward()
    for name, weight in model.named_parameters():
        added = torch.zeros_like(weight) if weight.grad is None else coefficient * weight.grad
        torch.testing.assert_close(found[name] - without[name], added, rtol=1e-4, atol=2e-5)
    assert mixed["ppo/loss/pretraining"] == pytest.approx(surprise.item(), rel=1e-5)
    assert mixed["ppo/loss/total"] == pytest.approx(
        stats["ppo/loss/total"] + coefficient * surprise.item(), rel=1e-5
    )
    assert "ppo/loss/pretraining" not in stats


def test_pretraining_asks_for_as_many_rows_as_an_update_has():
    asked = []

    def pretraining(rows):
        asked.append(rows)
        return texts(rows, seed=len(asked))

    for rows, expected in ((None, [3, 1, 3, 1]), (5, [5, 5, 5, 5])):
        asked.clear()
        ppo = trainer_of(
            pretraining=pretraining,
            pretraining_coef=0.1,
            pretraining_rows=rows,
            minibatch_size=3,
            ppo_epochs=2,
        )
        ppo.step(rollout(), SCORES)
        assert asked == expected


def test_pretraining_keeps_a_text_likely():
    rows = texts(4)
    surprises = []
    for coefficient in (0.0, 1.0):
        given = {"pretraining": lambda count: rows[:count]} if coefficient else {}
        ppo = trainer_of(pretraining_coef=coefficient, learning_rate=1e-3, **given)
        for _ in range(5):
            ppo.step(rollout(), SCORES)
        with torch.no_grad():
            surprises.append(mean_surprise(ppo.model, rows).item())
    assert surprises[1] < 0.5 * surprises[0]


def test_pretraining_without_a_critic():
    ppo = trainer_of(
        algorithm="reinforce++", pretraining_coef=1.0, pretraining=lambda rows: texts(rows)
    )
    before = weights(ppo.model)
    stats = ppo.step(rollout(), SCORES)
    assert stats["ppo/loss/pretraining"] > 0
    assert not {name for name in changed(before, ppo.model) if "v_head" in name}


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (
            ragged([3]),
            ValueError,
            "`pretraining` must return as many rows as it is asked for, got 1",
        ),
        (ragged([3, 1]), ValueError, r"`pretraining\[1\]` must have at least two tokens.*got 1"),
        ([[1, 2], [3, 4]], TypeError, r"`pretraining\[0\]` must be a 1-D tensor of token ids"),
        (ragged([3, 4], vocabulary=2000), ValueError, "must hold token ids from 0 to 96"),
        (ragged([3, 65]), ValueError, "must fit the model's 64 positions"),
    ],
)
def test_bad_texts_are_refused_before_anything_changes(returned, error, message):
    ppo = trainer_of(pretraining=lambda rows: returned, pretraining_coef=1.0)
    before = weights(ppo.model), ppo.shuffle.get_state()
    with pytest.raises(error, match=message):
        ppo.step(rollout(), SCORES)
    assert not changed(before[0], ppo.model)
    assert torch.equal(before[1], ppo.shuffle.get_state())


def test_settings_of_pretraining_are_checked():
    with pytest.raises(ValueError, match="`pretraining_coef` must be > 0 with `pretraining`"):
        trainer_of(pretraining=texts)
    with pytest.raises(ValueError, match="`pretraining_coef` must be > 0 with pretraining_rows=4"):
        PPOConfig(pretraining_rows=4)
    ppo = trainer_of(pretraining_coef=1.0)
    with pytest.raises(ValueError, match="`pretraining` must be given with pretraining_coef=1.0"):
        ppo.step(rollout(), SCORES)
    ppo.pretraining = texts
    ppo.step(rollout(), SCORES)
    policy = Seq2SeqLMWithValueHead(tiny_model("t5"))
    with pytest.raises(ValueError, match="`pretraining_coef` must be 0 for an encoder-decoder"):
        PPOTrainer(policy, pretraining_coef=1.0, pretraining=texts, precision="fp32")


# -- temperature ---------------------------------------------------------------------------------


def test_responses_of_another_temperature_are_refused():
    queries = torch.stack(ragged([3] * 4))
    samplers = {
        "Sampler": Sampler(max_new_tokens=4, temperature=0.93),
        "sample": partial(sample, max_new_tokens=4, temperature=0.93),
    }
    for name, sampler in samplers.items():
        model = tiny_gpt2(0)
        batch = sampler(model, queries)
        assert batch.temperature == 0.93, name
        before = weights(model)
        with pytest.raises(ValueError, match=r"`temperature` must be the 0.93 .*1.0"):
            trainer_of(model, precision="bf16").step(batch, SCORES)
        assert not changed(before, model)
        stats = trainer_of(model, temperature=0.93).step(batch, SCORES)
        assert stats["ppo/first_log_ratio"] < 1e-4


def test_the_temperature_of_a_rollout_is_kept(tmp_path):
    batch = replace(rollout(), temperature=0.7)
    assert batch.select(torch.tensor([1, 2])).temperature == 0.7
    assert batch.to("cpu").temperature == 0.7
    batch.save(tmp_path / "rollout.safetensors")
    assert Rollout.load(tmp_path / "rollout.safetensors").temperature == 0.7
    rollout().save(tmp_path / "rollout.safetensors")
    assert Rollout.load(tmp_path / "rollout.safetensors").temperature is None


# -- stats, optimiser ----------------------------------------------------------------------------


def test_explained_variance_is_that_of_the_values_at_rollout():
    ppo = trainer_of(init_kl_coef=0.0, adaptive_kl=False, gae_lambda=1.0)
    batch = rollout()
    values = ppo.forward_pass(ppo.policy, batch).values[batch.response_mask]
    # without KL, and with γ = λ = 1, every token's return is its response's score
    returns = torch.tensor(SCORES).repeat_interleave(torch.tensor([2, 5, 3, 1]))
    stats = ppo.step(batch, SCORES)
    expected = 1 - (returns - values).var() / returns.var()
    assert stats["ppo/val/explained_variance"] == pytest.approx(expected.item(), rel=1e-4)
    assert "ppo/val/var_explained" in stats


def test_the_adam_of_tensorflow():
    ppo = trainer_of(tf_adam=True, adam_eps=1e-5)
    assert isinstance(ppo.optimizer.optimizer, TensorFlowAdam)
    assert ppo.optimizer.param_groups[0]["eps"] == 1e-5
    moved = {}
    for tf_adam in (False, True):
        ppo = trainer_of(tf_adam=tf_adam, adam_eps=1e-5, learning_rate=1e-3, ppo_epochs=1)
        before = weights(ppo.model)
        ppo.step(rollout(), SCORES)
        after = weights(ppo.model)
        moved[tf_adam] = sum(float((after[name] - before[name]).abs().sum()) for name in before)
    assert moved[True] < moved[False]
