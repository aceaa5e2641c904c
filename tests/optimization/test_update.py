"""What a `loss` of one's own must return."""

import re

import pytest
import torch

from tests.families import tiny_model
from trl import CausalLMWithValueHead, PPOTrainer
from trl.optimization.losses import token_mean

QUERIES = [torch.tensor([1, 2, 3])] * 4
RESPONSES = [torch.tensor([4, 5, 6, 7])] * 4
SCORES = torch.tensor([0.0, 1.0, 2.0, 3.0])


def stepped(change):
    """The figures of a step whose loss is changed."""

    class Changed(PPOTrainer):
        def loss(self, new, targets, mask, counts):
            loss, stats = super().loss(new, targets, mask, counts)
            return change(loss, stats, token_mean(new.entropy, mask, counts.tokens), new)

    torch.manual_seed(0)
    model = CausalLMWithValueHead.from_pretrained(tiny_model("llama"))
    settings = {"batch_size": 4, "minibatch_size": 4, "forward_batch_size": 2, "ppo_epochs": 1}
    return Changed(model, precision="fp32", **settings).step(QUERIES, RESPONSES, SCORES)


def test_the_total_has_a_term_of_ones_own():
    plain = stepped(lambda loss, stats, entropy, new: (loss, stats))
    changed = stepped(lambda loss, stats, entropy, new: (loss - 0.5 * entropy, stats))
    added = changed["ppo/loss/total"] - plain["ppo/loss/total"]
    assert added == pytest.approx(-0.5 * plain["ppo/policy/entropy"], rel=1e-4)


def with_share(share):
    def change(loss, stats, entropy, new):
        stats.shares["loss/mine"] = share(new)
        return loss, stats

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loss, *_: loss, "`loss` must return (loss, stats)"),
        (lambda loss, stats, *_: (stats, loss), "got tuple"),
        (lambda loss, stats, *_: (loss, {}), "got tuple"),
        (lambda loss, stats, *_: (loss.detach(), stats), "got one without a gradient"),
        (lambda loss, stats, _, new: (loss + new.entropy, stats), "got a tensor [2, 4]: add terms"),
        (lambda loss, stats, *_: (0.5, stats), "got 0.5: add terms as token_mean"),
        (with_share(lambda new: new.entropy), "got [2, 4] for 'loss/mine': take token_mean"),
        (with_share(lambda new: 0.5), "got 0.5 for 'loss/mine'"),
    ],
)
def test_what_is_no_loss_is_named(change, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        stepped(change)
