"""Gradients that autograd's own thread hands over, waits for the device, and memory."""

import gc
import threading

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.conftest import ragged
from tests.families import tiny_config
from tests.gpu.devices import only_on_cuda, trainers_on, waits
from tests.gpu.policies import (
    PAIRS,
    SCORES,
    SETTINGS,
    VOCABULARY,
    batch,
    trainer_by_sgd,
    weights_of,
)
from tests.models.policies import leave_to_autograd, with_values
from trl.batch import Rollout
from trl.kernels.gradients import Gradients
from trl.models.with_value_head import CausalLMWithValueHead
from trl.optimization.algorithms import Counts
from trl.optimization.objective import Targets
from trl.ppo import PPOTrainer

ONE_UPDATE = {"minibatch_size": 8, "ppo_epochs": 1}


def change(pair, where, *, collected, **settings):
    """What one update does to the weights."""
    policy, reference, _ = PAIRS[pair]
    policy, reference = policy(), reference() if reference else None
    before = weights_of(policy)
    with trainers_on(where):
        trainer = trainer_by_sgd(policy, reference, **ONE_UPDATE | settings)
        if not collected:  # autocast casts for every product, autograd makes every gradient
            leave_to_autograd(trainer)
        trainer.step(batch(), SCORES)
    return weights_of(policy) - before


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pair", ["gpt2 and another", "llama and a copy", "lora, switched off"])
def test_gradients_of_several_passes_add_up_as_those_of_autograd(pair, precision, rows, device):
    settings = {"precision": precision, "forward_batch_size": rows}
    ours = change(pair, device, collected=True, **settings)
    plain = change(pair, device, collected=False, **settings)
    # On a GPU rows of an embedding are added up in any order.
    tolerance = 1e-5 if precision == "fp32" else 1e-3
    assert (ours - plain).norm() <= tolerance * plain.norm()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_passes_of_an_update_may_be_of_any_size(precision, device):
    pair, tolerance = "gpt2 and another", 1e-4 if precision == "fp32" else 3e-2
    whole = change(pair, device, collected=True, precision=precision, forward_batch_size=None)
    for rows in (1, 3):
        split = change(pair, device, collected=True, precision=precision, forward_batch_size=rows)
        assert (whole - split).norm() <= tolerance * whole.norm()


@only_on_cuda("there autograd works in a thread for each device")
def test_gradients_are_handed_over_in_another_thread(monkeypatch, device):
    threads, receive = set(), Gradients.receive

    def watched(self, weight, gradient):
        threads.add(threading.get_ident())
        receive(self, weight, gradient)

    monkeypatch.setattr(Gradients, "receive", watched)
    change("gpt2 and another", device, collected=True, precision="bf16")
    assert threads
    assert threading.get_ident() not in threads


# --- waiting for the device -----------------------------------------------------------------------


def deep_policy(layers):
    config = tiny_config("llama")
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    return with_values(CausalLMWithValueHead(LlamaForCausalLM(config).eval()))


def plain_batch(rows, tokens):
    return Rollout.from_lists(
        ragged([4] * rows, 0, VOCABULARY), ragged([tokens] * rows, 1, VOCABULARY)
    )


def waits_of_a_pass(layers=2, rows=4, tokens=6, **settings):
    """Those of the forward and backward pass of one micro-batch, as `step` makes it."""
    trainer = trainer_by_sgd(deep_policy(layers), **settings)
    rollout = plain_batch(rows, tokens).to(trainer.accelerator.device)
    part = rollout.select(torch.arange(rows, device=rollout.queries.device))
    mask = part.response_mask
    column = torch.zeros(mask.shape, device=mask.device)
    targets = Targets(column, column, mask, torch.ones_like(column), column)
    counts = Counts(mask.sum(), mask.any(1).sum())
    updater = trainer.updater
    with updater.for_step([]):

        def run():
            updater.start()
            new = trainer.policy(part)
            updater.backward(trainer.loss(new, targets, mask, counts)[0], new)

        run()  # whatever is done only once
        return waits(run)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_pass_waits_as_often_for_one_layer_and_row_as_for_many(precision):
    """Only where the counted tokens are picked out of their rows, and put back.

    Labels, hidden states, ratios and advantages going forward, and the look of transformers at the
    mask; log-probs, values and hidden states going backward.
    """
    few = waits_of_a_pass(precision=precision)
    assert few <= 10
    assert waits_of_a_pass(precision=precision, layers=6) == few
    assert waits_of_a_pass(precision=precision, rows=16) == few
    assert waits_of_a_pass(precision=precision, tokens=24) == few


def test_an_update_waits_for_its_passes_and_a_few_times_more(device):
    """The figures of an update are read at its end, and at once."""
    of = []
    for rows in (8, 2, 1):
        trainer = trainer_by_sgd(deep_policy(2), **ONE_UPDATE | {"forward_batch_size": rows})
        trainer.step(plain_batch(8, 6), SCORES)
        of.append(waits(lambda trainer=trainer: trainer.step(plain_batch(8, 6), SCORES)))
    whole, quarters, eighths = of
    # The passes without gradient come in the same sizes: policy, reference and update.
    assert (eighths - quarters) / 4 == pytest.approx((quarters - whole) / 3, abs=1)
    assert (eighths - quarters) / 4 <= 40


# --- memory ---------------------------------------------------------------------------------------


def peak_of_a_step(rows, **settings):
    """Bytes on the device at the most, beyond what lay there before."""
    trainer = PPOTrainer(
        deep_policy(2),
        **SETTINGS | {"batch_size": rows, "minibatch_size": rows, "ppo_epochs": 1} | settings,
    )
    scores = torch.linspace(-1, 1, rows)
    trainer.step(plain_batch(rows, 24), scores)  # makes the optimiser's state
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer.step(plain_batch(rows, 24), scores)
    return torch.cuda.max_memory_allocated() - before


@only_on_cuda("the peak of the CPU's memory is that of the whole process")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_grows_no_faster_than_the_batch(precision):
    small, middle, large = (
        peak_of_a_step(rows, precision=precision, forward_batch_size=None) for rows in (32, 64, 128)
    )
    assert middle <= 2.1 * small
    assert large <= 2.1 * middle


@only_on_cuda("the peak of the CPU's memory is that of the whole process")
def test_passes_of_the_same_size_keep_to_the_same_memory():
    small, large = (peak_of_a_step(rows, forward_batch_size=8) for rows in (16, 128))
    assert large <= 1.5 * small


@only_on_cuda("the peak of the CPU's memory is that of the whole process")
def test_what_a_step_took_is_free_after_it():
    trainer = PPOTrainer(deep_policy(2), **SETTINGS | {"precision": "bf16"})
    held = []
    for _ in range(3):
        trainer.step(plain_batch(8, 24), SCORES)
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert held[2] == held[1]
