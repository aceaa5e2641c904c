"""Rows that stand in one line give the numbers of padded rows."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from tests.conftest import ragged
from tests.families import CAUSAL, VOCABULARY, tiny_model
from tests.models.test_engine import gradients_of_a_step, trainer_of
from tests.models.test_families import policy_of
from tests.strategies import properties
from trl.batch import Rollout
from trl.models.response import ResponseModel
from trl.models.side_by_side import Places, fill_lines, line_up, places
from trl.models.with_value_head import CausalLMWithValueHead

ALONE = {"mamba", "bloom"}
"""A state-space model and ALiBi have no positions to set."""


def uneven(holes=False):
    """Rows of 3 to 12 tokens."""
    queries = ragged([9, 2, 1, 4, 2, 1], 0, VOCABULARY)
    responses = ragged([3, 5, 2, 1, 3, 4], 1, VOCABULARY)
    masks = [torch.ones(len(row), dtype=torch.bool) for row in responses]
    if holes:
        masks[1][1:3] = False
    return Rollout.from_lists(queries, responses, response_masks=masks)


def padded(responder, rollout):
    responder.lines_up = False
    found = responder(rollout)
    del responder.lines_up
    return found


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_numbers_are_those_of_padded_rows(family):
    responder = ResponseModel(policy_of(family))
    rollout = uneven(holes=True)
    assert responder.lines_up == (family not in ALONE)
    expected = padded(responder, rollout)
    for mine, theirs in zip(responder(rollout), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gptj", "mixtral"])
def test_gradients_too(family):
    gradients = []
    scores = torch.tensor([1.0, -1.0, 0.5, 0.2, -0.3, 0.7])
    for lines_up in (True, False):
        torch.manual_seed(0)
        trainer = trainer_of(policy_of(family), quick=True, precision="fp32", forward_batch_size=6)
        assert trainer.updater.responder.lines_up
        trainer.updater.responder.lines_up = lines_up
        gradients.append(gradients_of_a_step(trainer, uneven(), scores))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_rows_in_their_places_by_hand():
    rollout = Rollout.from_lists(
        [torch.tensor([5, 6, 7]), torch.tensor([8])],
        [torch.tensor([9, 10]), torch.tensor([11, 12])],
    )
    packed = line_up(tiny_model("llama"), rollout, Places([0, 0], [0, 4], (1, 7)))
    inputs = packed.inputs
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 9, 8, 11, 0]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0]]
    assert inputs["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert packed.columns.tolist() == [[2, 3], [4, 5]]
    assert packed.rows.tolist() == [[0], [0]]


@properties
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(0, 40))
def test_lines_hold_every_row_once_and_are_few(lengths, more):
    lines, starts, (number, columns) = fill_lines(lengths, max(lengths) + more)
    assert columns == max(lengths) + more
    taken = set()
    for line, start, length in zip(lines, starts, lengths, strict=True):
        assert 0 <= line < number
        assert start + length <= columns
        own = {(line, start + step) for step in range(length)}
        assert not own & taken
        taken |= own
    assert number <= 11 / 9 * max(1, -(-sum(lengths) // columns)) * 1.5 + 1  # far from the worst
    assert set(lines) == set(range(number))


def test_even_rows_stay_as_they_are():
    plain = tiny_model("llama")
    assert places(plain, uneven()) is not None
    even = Rollout.from_lists(ragged([4] * 5, 0, VOCABULARY), ragged([3] * 5, 1, VOCABULARY))
    assert places(plain, even) is None
    assert places(plain, uneven().select(torch.tensor([0]))) is None
    assert places(tiny_model("t5"), uneven()) is None


def test_lines_are_not_wider_than_a_model_has_positions():
    """GPT-Neo's attention has a buffer of so many columns."""
    config = GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_layers=1,
        attention_types=[[["global"], 1]],
        num_heads=2,
        max_position_embeddings=32,
    )
    policy = CausalLMWithValueHead.from_pretrained(GPTNeoForCausalLM(config))
    rollout = Rollout.from_lists(
        ragged([16, 12, 12, 7], 0, VOCABULARY), ragged([8, 6, 6, 5], 1, VOCABULARY)
    )
    responder = ResponseModel(policy)
    assert responder.lines_up
    found = places(policy.language_model, rollout)
    assert found is None or found.shape[1] <= 32
    with torch.no_grad():
        expected = padded(responder, rollout)
        for mine, theirs in zip(responder(rollout), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_row_does_not_see_its_neighbours():
    responder = ResponseModel(policy_of("gpt2"))
    rollout = uneven()
    other = rollout.responses.clone()
    other[1] = (other[1] + 1) % VOCABULARY * rollout.response_mask[1]
    with torch.no_grad():
        first, second = responder(rollout), responder(replace(rollout, responses=other))
    kept = [0, 2, 3, 4, 5]
    assert torch.equal(first.logprobs[kept], second.logprobs[kept])
    assert not torch.equal(first.logprobs[1], second.logprobs[1])
