"""The sampler writes on the GPU what it writes on the CPU, from the same random numbers.

A token is where a random number falls in a cumulative sum. Rounding moves the borders between
tokens by some 1e-7, so that with 61 tokens about one draw in 100,000 goes to the neighbour, and the
rest of that row goes its own way: one such row is let pass.
"""

from dataclasses import fields

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.conftest import ragged
from tests.gpu.devices import CPU, waits
from tests.gpu.policies import SETTINGS, VOCABULARY, made
from tests.rollout.tokenizers_for_tests import byte_level
from trl.ppo import PPOTrainer
from trl.rollout import Sampler
from trl.rollout.sampling import sample

QUERIES = ragged([3, 9, 1, 5, 2, 6], 0, VOCABULARY)
WAYS = {
    "plain": {},
    "groups": {"group_size": 3},
    "early ends": {"eos_token_id": list(range(1, 9)), "max_new_tokens": (2, 12)},
    "groups that end early, in parts": {
        "eos_token_id": list(range(1, 9)),
        "group_size": 3,
        "max_rows": 4,
    },
    "hot": {"temperature": 1.7},
    "few tokens": {"top_k": 12, "top_p": 0.9, "min_new_tokens": 3, "eos_token_id": [4, 5]},
}


def assert_same_rollout(ours, theirs):
    width = min(ours.responses.shape[1], theirs.responses.shape[1])  # of another row's length
    same = (ours.responses.cpu()[:, :width] == theirs.responses.cpu()[:, :width]).all(1)
    assert (~same).sum() <= 1
    for field in fields(ours):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(mine, torch.Tensor):
            mine, other = mine.cpu()[same], other.cpu()[same]
            if not field.name.startswith("quer") and mine.ndim > 1:
                mine, other = mine[:, :width], other[:, :width]
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4, msg=field.name)


@pytest.mark.filterwarnings("ignore:.*tokens are then drawn from a cut distribution")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_responses_are_those_of_the_cpu(family, way, device):
    policy = made(family)
    found = []
    for where in (CPU, device):
        sampler = Sampler(**{"max_new_tokens": 12, "seed": 3} | WAYS[way])
        found.append(sampler(policy.to(where), QUERIES))
        assert found[-1].responses.device.type == where.type
    assert_same_rollout(*found)


def test_texts_end_at_a_string_wherever_they_are_written(device):
    tokenizer = byte_level()
    size = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **size)).eval()
    found = []
    for where in (CPU, device):
        sampler = Sampler(tokenizer, max_new_tokens=24, stop_strings=["ab", "."], group_size=8)
        found.append(sampler(policy.to(where), ["a film", "some"]))
    ours, theirs = found
    assert_same_rollout(ours, theirs)
    assert theirs.ended.any()
    differing = sum(a != b for a, b in zip(ours.response_texts, theirs.response_texts, strict=True))
    assert differing <= 1


@pytest.mark.parametrize("where", [CPU, "the device"])
def test_queries_may_lie_anywhere(where, device):
    queries = [row.to(device if where == "the device" else where) for row in QUERIES]
    rollout = Sampler(max_new_tokens=4)(made("llama").to(device), queries)
    assert rollout.queries.device.type == rollout.behaviour_logprobs.device.type == device.type


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_what_was_recorded_is_what_a_pass_gives(family):
    policy = made(family)
    trainer = PPOTrainer(policy, **SETTINGS)
    with trainer.sampling():
        rollout = Sampler(max_new_tokens=10, eos_token_id=[4, 5, 6], group_size=2)(policy, QUERIES)
    with trainer.updater.in_use():
        fresh = trainer.forward_pass(trainer.policy, rollout)
    torch.testing.assert_close(fresh.logprobs, rollout.behaviour_logprobs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fresh.values, rollout.values, rtol=1e-4, atol=1e-4)


def test_a_generator_may_be_one_of_the_device(device):
    policy, queries = made("llama").to(device), torch.stack(ragged([4] * 3, 0, VOCABULARY))
    responses = [
        sample(
            policy,
            queries.to(device),
            max_new_tokens=6,
            generator=torch.Generator(device).manual_seed(3),
        ).responses
        for _ in range(2)
    ]
    assert torch.equal(*responses)


@pytest.mark.parametrize(("ends", "allowed"), [([], 2), ([4], 6)])
def test_a_token_costs_few_waits_for_the_device(ends, allowed, device):
    """However many rows there are. transformers looks at the mask; an early end has to be seen."""
    policy = made("llama").to(device)
    torch.nn.init.zeros_(policy.language_model.get_output_embeddings().weight)

    def of(tokens, rows):
        sampler = Sampler(max_new_tokens=tokens, eos_token_id=ends)
        queries = [QUERIES[1]] * rows
        sampler(policy, queries, seeds=range(rows))  # whatever is done only once
        return waits(lambda: sampler(policy, queries, seeds=range(rows)))

    of_each_token = (of(20, rows=4) - of(4, rows=4)) / 16
    assert of_each_token <= allowed
    assert (of(20, rows=16) - of(4, rows=16)) / 16 <= allowed
