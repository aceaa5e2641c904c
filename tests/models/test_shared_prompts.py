"""A prompt computed once for all its responses gives the numbers of one computed for each."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import ragged
from tests.families import CAUSAL, VOCABULARY, tiny_model
from tests.models.test_engine import gradients_of_a_step, trainer_of
from tests.models.test_families import policy_of
from trl.anatomy import decoder
from trl.batch import Rollout
from trl.models import shared_prompts
from trl.models.response import ResponseModel

# A state-space model and ALiBi have no positions to set; the tiny GPT-Neo sees 4 columns back.
ALONE = {"mamba", "bloom", "gpt_neo"}


def rollout_of_groups(queries=(2, 5, 4), groups=(2, 3, 1), longest=4, holes=False):
    """Responses of lengths 1, 2, …, the rows of a group side by side."""
    queries = ragged(queries, 0, VOCABULARY)
    rows = [query for query, size in zip(queries, groups, strict=True) for _ in range(size)]
    lengths = [1 + row % longest for row in range(len(rows))]
    responses = ragged(lengths, 1, VOCABULARY)
    masks = [torch.ones(length, dtype=torch.bool) for length in lengths]
    if holes:
        masks[1][0] = False
    rollout = Rollout.from_lists(rows, responses, response_masks=masks)
    ids = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups))
    return replace(rollout, group_ids=ids)


@pytest.mark.parametrize("family", CAUSAL)
@torch.no_grad()
def test_numbers_are_those_of_rows_alone(family):
    responder = ResponseModel(policy_of(family))
    rollout = rollout_of_groups(holes=True)
    assert responder.packs == (family not in ALONE)
    expected = responder(replace(rollout, group_ids=None))
    for mine, theirs in zip(responder(rollout), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "gptj", "mixtral"])
def test_gradients_too(family, monkeypatch):
    gradients = []
    scores = torch.tensor([1.0, -1.0, 0.5, 0.2, -0.3, 0.7])
    for packs in (True, False):
        torch.manual_seed(0)
        trainer = trainer_of(policy_of(family), quick=True, precision="fp32", forward_batch_size=4)
        assert trainer.updater.responder.packs
        trainer.updater.responder.packs = packs
        gradients.append(gradients_of_a_step(trainer, rollout_of_groups(), scores))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_group_takes_the_columns_of_one_prompt():
    rollout = rollout_of_groups(queries=(8, 6), groups=(4, 2))
    packed = shared_prompts.pack(tiny_model("llama"), rollout)
    assert packed.inputs["input_ids"].shape == (2, 8 + 4 * 3)
    assert packed.inputs["attention_mask"].shape == (2, 1, 20, 20)


def test_a_large_group_of_long_responses_is_cut():
    """Two tokens of prompt bear 8 columns of responses: 2 of 3 inputs each."""
    rollout = rollout_of_groups(queries=(2,), groups=(5,))
    packed = shared_prompts.pack(tiny_model("llama"), rollout)
    assert packed.inputs["input_ids"].shape == (3, 2 + 2 * 3)
    assert packed.rows.flatten().tolist() == [0, 0, 1, 1, 2]


def test_a_response_does_not_see_its_neighbours():
    responder = ResponseModel(policy_of("gpt2"))
    rollout = rollout_of_groups(queries=(4,), groups=(2,))
    other = rollout.responses.clone()
    other[0] = (other[0] + 1) % VOCABULARY
    with torch.no_grad():
        one = responder(rollout).logprobs[1]
        two = responder(replace(rollout, responses=other)).logprobs[1]
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_kinds_of_attention(attention):
    policy = policy_of("llama")
    policy.language_model.set_attn_implementation(attention)
    responder = ResponseModel(policy)
    assert decoder(policy.language_model).config._attn_implementation == attention
    assert responder.packs


def test_rows_are_not_packed_where_that_would_be_wrong():
    plain = tiny_model("llama")
    rollout = rollout_of_groups()
    assert shared_prompts.can_pack(plain, rollout)
    assert not shared_prompts.can_pack(plain, replace(rollout, group_ids=None))
    alone = replace(rollout, group_ids=torch.arange(len(rollout)))
    assert not shared_prompts.can_pack(plain, alone)
    # ids that lie: the queries differ, in their lengths or only in their tokens
    for lengths in ((2, 5, 4), (3, 3, 3)):
        lying = rollout_of_groups(queries=lengths)
        lying = replace(lying, group_ids=torch.zeros(len(lying), dtype=torch.long))
        assert not shared_prompts.can_pack(plain, lying)
    window = tiny_model("mistral")  # sees 8 columns back
    assert not shared_prompts.can_pack(window, rollout_of_groups(queries=(8,), groups=(2,)))
    assert shared_prompts.can_pack(window, rollout_of_groups(queries=(3,), groups=(2,), longest=2))


def assert_side_by_side(ids):
    starts = [number for place, number in enumerate(ids) if place == 0 or ids[place - 1] != number]
    assert len(starts) == len(set(starts))


def test_minibatches_keep_groups_together():
    rollout = rollout_of_groups()
    seen = set()
    for seed in range(20):
        rows = rollout.shuffled_rows(torch.Generator().manual_seed(seed))
        ids = rollout.group_ids[rows].tolist()
        assert sorted(rows.tolist()) == list(range(6))
        assert [i for n, i in enumerate(ids) if n == 0 or ids[n - 1] != i] == list(
            dict.fromkeys(ids)
        )
        seen.add(tuple(ids))
    assert len(seen) == 6


def test_passes_keep_groups_together():
    rollout = rollout_of_groups(queries=(3, 3, 3))  # the longest rows are of different groups
    for group in rollout.micro_batches(max_rows=None, max_tokens=1000):
        ids = rollout.group_ids[group].tolist()
        assert [i for n, i in enumerate(ids) if n == 0 or ids[n - 1] != i] == list(
            dict.fromkeys(ids)
        )


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@torch.no_grad()
def test_padding_takes_no_position_beyond_the_longest_row(family):
    """Rows of at most 62 of the model's 64 positions, a long prompt beside a long response."""
    queries, responses = ragged([58, 58, 20, 20], 0, VOCABULARY), ragged([4, 4, 40, 40], 1)
    responses = [tokens % VOCABULARY for tokens in responses]
    rollout = Rollout.from_lists([queries[0]] * 2 + [queries[2]] * 2, responses)
    rollout = replace(rollout, group_ids=torch.tensor([0, 0, 1, 1]))
    responder = ResponseModel(policy_of(family))
    expected = responder(replace(rollout, group_ids=None))
    for mine, theirs in zip(responder(rollout), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
