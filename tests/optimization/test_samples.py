"""Responses that the policy has not drawn are told from those that it has."""

import math
import re
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.rows import quick
from trl import CausalLMWithValueHead, PPOTrainer, Rollout, Sampler, starter
from trl.optimization.samples import Doubt, hold_their_queries


def surprise(*tables):
    doubt = Doubt()
    doubt.add(*tables)
    return doubt.mean, doubt.errors


def test_surprise():
    """d = (.7 − .5, 1.3 − .4, 2 − 2) = (.2, .9, 0): mean 1.1/3, z = 1.1/√(.04 + .81)."""
    logprobs = torch.tensor([[-0.7, -1.3], [-2.0, -9.0]])
    entropy = torch.tensor([[0.5, 0.4], [2.0, 0.1]])
    mask = torch.tensor([[True, True], [True, False]])
    found = surprise(logprobs, entropy, mask)
    assert found == pytest.approx((1.1 / 3, 1.1 / math.sqrt(0.85)), rel=1e-6)
    assert surprise(torch.zeros(1, 2), torch.zeros(1, 2), mask[:1]) == (0.0, 0.0)
    assert surprise(logprobs, entropy, ~mask.any() & mask) == (0.0, 0.0)
    doubt = Doubt()  # row by row, in steps
    for row in range(2):
        doubt.add(logprobs[row : row + 1], entropy[row : row + 1], mask[row : row + 1])
    assert (doubt.mean, doubt.errors) == pytest.approx(found)


@given(st.integers(0, 2**32 - 1), st.floats(0.3, 3.0))
@settings(max_examples=25, deadline=None)
def test_samples_of_a_distribution_surprise_by_its_entropy(seed, sharp):
    """z of tokens that are drawn is that of a normal distribution, whatever the distributions."""
    torch.manual_seed(seed)
    logprobs = (sharp * torch.randn(40, 25, 30)).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    tokens = torch.multinomial(logprobs.flatten(0, 1).exp(), 1).view(40, 25, 1)
    drawn = logprobs.gather(-1, tokens)[..., 0]
    mask = torch.rand(40, 25) > 0.2
    _, z = surprise(drawn, entropy, mask)
    assert abs(z) < 5
    greedy = logprobs.max(-1).values
    assert surprise(greedy, entropy, mask)[1] < -6


@pytest.mark.parametrize(
    ("queries", "responses", "held"),
    [
        ([[1, 2], [3, 4, 5]], [[0, 1, 2, 9], [3, 4, 5, 1]], True),  # padding before the first
        ([[1, 2], [3, 4, 5]], [[1, 2, 9], [3, 4, 1, 5]], False),
        ([[1, 2], [3]], [[1, 2, 9], [3, 4]], False),  # a single token may be there by chance
        ([[1, 2]], [[1, 2, 9]], False),
        ([[1, 2], [3, 4]], [[11, 2, 9], [3, 4]], False),  # 11, 2 ends like 1, 2 as text
    ],
)
def test_a_response_that_holds_its_query(queries, responses, held):
    rows = ([torch.tensor(row) for row in of] for of in (queries, responses))
    assert hold_their_queries(Rollout.from_lists(*rows)) == held


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(starter.LANGUAGE_MODEL)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


RIGHT = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
WRONG = {
    "greedy": ({"do_sample": False}, r"likelier .* do_sample=True, top_k=0, top_p=1.0, temp"),
    "the default top_k": ({"do_sample": True}, "likelier"),
    "colder": (RIGHT | {"temperature": 0.5}, "likelier"),
    "hotter": (RIGHT | {"temperature": 2.0}, "less likely .* another temperature"),
    "a nucleus": (RIGHT | {"top_p": 0.8}, "likelier"),
}


def generated(model, tokenizer, *, size=16, **how):
    """Queries and whole outputs of `generate` for eight prompts."""
    given = tokenizer(starter.prompts("train")[:8], return_tensors="pt", padding=True)
    pad = tokenizer.pad_token_id
    output = model.generate(
        **given, min_new_tokens=size, max_new_tokens=size, pad_token_id=pad, **how
    )
    rows = zip(given.input_ids, given.attention_mask.bool(), strict=True)
    return [ids[mask] for ids, mask in rows], output, given.input_ids.shape[1]


def fresh():
    torch.manual_seed(0)
    model = CausalLMWithValueHead.from_pretrained(starter.LANGUAGE_MODEL)
    return model, PPOTrainer(model, batch_size=8, minibatch_size=8, precision="fp32")


def told(trainer, *given):
    """What a step warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.step(*given, [0.1 * n for n in range(8)])
    assert {each.filename for each in caught} <= {__file__}  # where `step` is called
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("name", quick(WRONG, "greedy", "the default top_k"))
def test_what_generate_was_not_told_is_noticed(name, tokenizer):
    """At once, or where it is little in the sum of some steps; and then no more."""
    how, words = WRONG[name]
    model, trainer = fresh()
    found = []
    for _ in range(4):
        queries, output, start = generated(model, tokenizer, **how)
        found.append(told(trainer, queries, list(output[:, start:])))
    (message,) = (message for of_step in found for message in of_step)
    assert re.search(words, message)
    assert name == "a nucleus" or found[0]


def test_samples_are_not_doubted(tokenizer):
    model, trainer = fresh()
    for _ in range(3):
        queries, output, start = generated(model, tokenizer, **RIGHT)
        assert told(trainer, queries, list(output[:, start:])) == []
    rollout = Sampler(tokenizer, max_new_tokens=16)(model, starter.prompts("train")[:8])
    assert told(trainer, list(rollout.queries), list(rollout.responses)) == []


def test_a_query_in_the_response_is_noticed(tokenizer):
    model, trainer = fresh()
    queries, output, _ = generated(model, tokenizer, **RIGHT)
    with pytest.warns(
        UserWarning, match=r"every response holds its query.*output\[len\(query\):\]"
    ):
        trainer.step(queries, list(output), [0.1 * n for n in range(8)])


def test_padding_that_counts_is_noticed(tokenizer):
    model, trainer = fresh()
    queries, output, start = generated(model, tokenizer, **RIGHT)
    responses = output[:, start:].clone()
    responses[:, 8:] = tokenizer.pad_token_id
    with pytest.warns(UserWarning, match="less likely .* padding behind the end"):
        trainer.step(queries, list(responses), [0.1 * n for n in range(8)])


def test_recorded_logprobs_answer_for_themselves(tokenizer):
    model, trainer = fresh()
    queries, output, start = generated(model, tokenizer, do_sample=False)
    rollout = Rollout.from_lists(queries, list(output[:, start:]))
    recorded = trainer.forward_pass(trainer.policy, rollout).logprobs - 0.01
    assert told(trainer, replace(rollout, behaviour_logprobs=recorded)) == []
