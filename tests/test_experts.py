"""Mixtures of experts: what balances their routers is a part of the loss."""

import pytest
import torch

from tests.conftest import ragged
from tests.families import VOCABULARY, tiny_model
from tests.models.policies import with_values
from trl.batch import Rollout
from trl.models.with_value_head import CausalLMWithValueHead, Seq2SeqLMWithValueHead
from trl.ppo import PPOTrainer

SCORES = [1.0, -1.0, 0.5, 2.0]
WEIGHTS = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.25}


def model_of(family, *, balanced):
    model = tiny_model(family)
    model.config.output_router_logits = balanced
    for name, weight in WEIGHTS.items():
        if hasattr(model, name):
            setattr(model, name, weight)
    return model


def rollout_of(**more):
    queries = ragged([3, 1, 6, 2], vocabulary=VOCABULARY)
    return Rollout.from_lists(queries, ragged([2, 5, 3, 4], 1, VOCABULARY), **more)


def one_update(family, *, balanced=True, rollout=None, **settings):
    """Statistics and gradient of one update over the whole batch."""
    model = model_of(family, balanced=balanced)
    head = Seq2SeqLMWithValueHead if model.config.is_encoder_decoder else CausalLMWithValueHead
    policy = with_values(head(model))
    defaults = {"precision": "fp32", "batch_size": 4, "minibatch_size": 4, "ppo_epochs": 1}
    ppo = PPOTrainer(
        policy,
        optimizer=torch.optim.SGD(policy.parameters(), lr=1.0),
        max_grad_norm=None,
        **defaults | settings,
    )
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    stats = ppo.step(rollout or rollout_of(), SCORES)
    return stats, {name: before[name] - weight for name, weight in model.named_parameters()}


def transformers_own(family):
    """What transformers adds to the loss of a training pass over the same tokens, and gradients."""
    model, rollout = model_of(family, balanced=True), rollout_of()
    inputs = {"input_ids": rollout.input_ids, "attention_mask": rollout.attention_mask.long()}
    if model.config.is_encoder_decoder:
        padded = zip(rollout.queries, rollout.query_mask, strict=True)
        rows = [row[mask] for row, mask in padded]
        start = torch.full((4, 1), model.config.decoder_start_token_id)
        inputs = {
            "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            "attention_mask": rollout.query_mask.flip(1).long(),
            "decoder_input_ids": torch.cat((start, rollout.responses[:, :-1]), 1),
        }
        inputs["labels"] = inputs["decoder_input_ids"]
    else:
        inputs["labels"] = rollout.input_ids
    whole, plain = (
        model(**inputs, output_router_logits=routed).loss.double() for routed in (True, False)
    )
    (whole - plain).backward()
    return (whole - plain).item(), dict(model.named_parameters())


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe", "switch_transformers"])
def test_the_loss_of_the_routers_is_that_of_transformers(family):
    expected, weights = transformers_own(family)
    stats, found = one_update(family)
    plain, without = one_update(family, balanced=False)
    assert stats["ppo/loss/router"] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert stats["ppo/loss/total"] == pytest.approx(plain["ppo/loss/total"] + expected, abs=1e-5)
    assert "ppo/loss/router" not in plain
    for name, weight in weights.items():
        added = torch.zeros_like(weight) if weight.grad is None else weight.grad
        torch.testing.assert_close(found[name] - without[name], added, rtol=1e-4, atol=1e-5)
    assert any(
        float(weight.grad.norm()) > 1e-3 for weight in weights.values() if weight.grad is not None
    )


def test_several_passes_balance_nearly_as_one_does():
    """The shares of the experts are those of a pass: see docs/details.md."""
    rollout = Rollout.from_lists(
        ragged([20] * 4, vocabulary=VOCABULARY), ragged([20, 24, 28, 32], 1, VOCABULARY)
    )
    one, whole = one_update("mixtral", rollout=rollout)
    two, parts = one_update("mixtral", rollout=rollout, forward_batch_size=1)
    assert two["ppo/loss/router"] == pytest.approx(one["ppo/loss/router"], rel=0.05)
    assert two["ppo/loss/policy"] == pytest.approx(one["ppo/loss/policy"], abs=1e-5)
    moved, apart = (
        torch.cat([gradient[name].flatten() for name in whole]) for gradient in (whole, parts)
    )
    assert (moved - apart).norm() < 0.1 * moved.norm()


def test_responses_of_a_group_are_balanced_as_padded_rows_are():
    """Not packed behind their prompt, where it would count once."""
    queries = [row for row in ragged([3, 5], vocabulary=VOCABULARY) for _ in range(2)]
    lists = queries, ragged([2, 5, 3, 4], 1, VOCABULARY)
    alone, _ = one_update("mixtral", rollout=Rollout.from_lists(*lists))
    group, _ = one_update("mixtral", rollout=Rollout.from_lists(*lists, group_ids=[0, 0, 1, 1]))
    assert group["ppo/loss/router"] == pytest.approx(alone["ppo/loss/router"], rel=1e-5)
