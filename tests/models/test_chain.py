"""The whole way in every family: sample, score, learn, save, load, and the same numbers again."""

import pytest
import torch

from tests.conftest import ragged
from tests.families import CAUSAL, SEQ2SEQ, VOCABULARY, tiny_model
from trl.evaluation import score
from trl.models.with_value_head import load_policy
from trl.ppo import PPOTrainer
from trl.rollout import Sampler


def share_of_even_tokens(rollout):
    even = (rollout.responses % 2 == 0) & rollout.response_mask
    return even.sum(1) / rollout.response_mask.sum(1)


@pytest.mark.parametrize("family", [*CAUSAL, *SEQ2SEQ])
def test_what_was_tuned_and_saved_is_what_is_loaded(family, tmp_path):
    policy = load_policy(tiny_model(family))
    trainer = PPOTrainer(
        policy, batch_size=4, minibatch_size=4, learning_rate=1e-2, precision="fp32"
    )
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    sampler = Sampler(max_new_tokens=(2, 6), eos_token_id=1, group_size=2)
    with trainer.sampling():
        rollout = sampler(policy, ragged([3, 6], vocabulary=VOCABULARY))
    stats = trainer.step(rollout, score(share_of_even_tokens, rollout))
    assert abs(stats["objective/kl"]) < 1e-4
    assert not torch.equal(before["v_head.summary.weight"], policy.v_head.summary.weight)
    assert any(not torch.equal(before[name], weight) for name, weight in policy.named_parameters())

    policy.save_pretrained(tmp_path)
    inputs = {"input_ids": rollout.input_ids, "attention_mask": rollout.attention_mask.long()}
    if family in SEQ2SEQ:
        inputs["decoder_input_ids"] = rollout.responses
    for again in (load_policy(tmp_path), type(policy).from_pretrained(tmp_path)):
        with torch.no_grad():
            expected, found = policy.eval()(**inputs), again(**inputs)
        assert type(again) is type(policy)
        assert torch.equal(found.logits, expected.logits)
        assert torch.equal(found.value, expected.value)
