"""Silent errors that were found in other libraries, each with a test that we do not make them."""

import math
from collections.abc import Callable

import pytest
import torch

from tests.conftest import ragged
from tests.test_core import NAN, F, T, close
from trl.batch import Rollout
from trl.core import kl_estimate, masked_mean, masked_whiten
from trl.gpt2 import GPT2HeadWithValueModel
from trl.models.response import ResponseModel
from trl.optimization.advantages import discounted_returns, gae
from trl.optimization.losses import (
    clipped_policy_loss,
    clipped_surrogate,
    clipped_value_loss,
    sequence_ratio,
    token_mean,
)
from trl.optimization.rewards import token_rewards
from trl.ppo import PPOTrainer

MakeModel = Callable[..., GPT2HeadWithValueModel]


def test_torchtune_whiten_adds_the_mean_back_only_when_it_is_not_shifted() -> None:
    """torchtune adds the mean back if `shift_mean`: its advantages stay un-centred."""
    advantages, mask = torch.tensor([[10.0, 11.0], [12.0, 13.0]]), torch.tensor([[T, T], [T, T]])
    close(masked_whiten(advantages, mask, shift_mean=True).mean(), 0.0, atol=1e-6)
    close(masked_whiten(advantages, mask, shift_mean=False).mean(), 11.5)
    # the default is the one for advantages
    close(masked_whiten(advantages, mask).mean(), 0.0, atol=1e-6)


@pytest.mark.parametrize("garbage", [100.0, NAN])
def test_skyrl_values_at_padding_stay_out_of_gae(garbage: float) -> None:
    """SkyRL's GAE does not look at the mask: values of pads enter δ."""
    rewards = torch.tensor([[0.0, 1.0, garbage]])
    values = torch.tensor([[0.5, 0.25, garbage]])
    advantages, _ = gae(rewards, values, torch.tensor([[T, T, F]]), gamma=1.0, gae_lambda=0.95)
    # 1 − 0.25 = 0.75;  0 + 0.25 − 0.5 + 0.95·0.75 = 0.4625
    close(advantages, [[0.4625, 0.75, 0.0]])


def test_openrlhf_the_next_trainable_value_is_carried_over_a_hole() -> None:
    """OpenRLHF zeroes masked values: before a hole V = 0 is next, and λ decays in the hole."""
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 7.0, 7.0, 0.25]])
    mask = torch.tensor([[T, F, F, T]])
    advantages, _ = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    # as without the hole: 0.25 − 0.5 + 0.95·0.75 = 0.4625; with V = 0 and λ³ it would be 0.143
    close(advantages, [[0.4625, 0.0, 0.0, 0.75]])


def test_trlx_tokens_reach_the_model_as_they_were_sampled() -> None:
    """trlx decodes and re-encodes: "ab" sampled as two tokens comes back as one."""
    two_tokens_that_a_tokenizer_would_merge = torch.tensor([11, 12, 7])
    rollout = Rollout.from_lists(
        [torch.tensor([3]), torch.tensor([4])],
        [two_tokens_that_a_tokenizer_would_merge, torch.tensor([9])],
    )
    assert rollout.responses[rollout.response_mask].tolist() == [11, 12, 7, 9]


@pytest.mark.parametrize("pad", [0.0, 9.0])
def test_trlx_whitening_does_not_count_padding(pad: float) -> None:
    """trlx whitens without a mask: what stands at pads enters mean and variance."""
    advantages = torch.tensor([[1.0, 2.0, pad, pad], [3.0, pad, pad, pad]])
    mask = torch.tensor([[T, T, F, F], [T, F, F, F]])
    # mean 2, variance (1 + 0 + 1)/2 = 1
    close(masked_whiten(advantages, mask), [[-1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])


def test_verl_2506_advantages_are_no_mask() -> None:
    """verl #2506 passed the advantages as the response mask, and nothing complained."""
    advantages = torch.tensor([[0.5, -1.0]])
    logprobs = torch.zeros(1, 2)
    loss, _, _ = clipped_policy_loss(logprobs, logprobs, advantages, cliprange=0.2)
    with pytest.raises(ValueError, match="`mask` must be a bool tensor"):
        token_mean(loss, advantages)


def test_verl_50_the_value_loss_is_masked() -> None:
    """verl #50: the critic's loss counted pads. What a pad's value is must not matter."""
    mask = torch.tensor([[T, T, F]])
    returns, old_values = torch.tensor([[1.0, 1.0, 0.0]]), torch.zeros(1, 3)
    for at_pad in (0.0, 50.0, NAN):
        values = torch.tensor([[0.0, 0.5, at_pad]])
        loss, _ = clipped_value_loss(values, old_values, returns, cliprange_value=1.0)
        close(token_mean(loss, mask), 0.3125)  # (½·1 + ½·0.25) / 2


def test_verl_1758_values_stand_before_their_token_and_the_mask_on_it(
    make_model: MakeModel,
) -> None:
    """verl #1758: the critic's mask was one column off the values.

    The value of a response token is read where the token is predicted, one column before it; the
    mask is that of the token itself, so that the last token (EOS) of each row has a value.
    """
    model = make_model()
    queries, responses = ragged([3, 3]), ragged([2, 4], seed=1)
    with torch.no_grad():
        values = ResponseModel(model)(Rollout.from_lists(queries, responses)).values
        for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
            everywhere = model(torch.cat([query, response])[None])[-1][0]  # [T]
            expected = everywhere[2 : 2 + len(response)].tolist()
            close(values[row], expected + [0.0] * (4 - len(response)), atol=1e-5)
    assert (values != 0).sum(1).tolist() == [2, 4]


def test_verl_entropies_keep_their_row_when_passes_are_sorted_by_length(
    make_model: MakeModel,
) -> None:
    """verl <= 0.4 (JustRL #5): log-probs were put back in order after dynamic batches, entropies
    were not."""
    model = make_model()
    queries, responses = ragged([2, 5, 3, 4]), ragged([1, 2, 5, 3], seed=1)
    trainer = PPOTrainer(model, batch_size=4, forward_batch_size=2)
    together = trainer.forward_pass(trainer.policy, Rollout.from_lists(queries, responses))
    for row, (query, response) in enumerate(zip(queries, responses, strict=True)):
        alone = trainer.forward_pass(trainer.policy, Rollout.from_lists([query], [response]))
        for whole, single in zip(together[:3], alone[:3], strict=True):
            close(whole[row, : len(response)], single[0], atol=1e-5)
    assert together.entropy[:, 0].unique().numel() == 4  # no two rows could be mistaken


def test_roll_447_the_critic_at_a_pad_is_not_the_next_value() -> None:
    """ROLL #447: mask [1, 1, 0], r [0, 1, 0], V [0, 0, 100] gave Â = [5.7, 6.0]."""
    advantages, returns = gae(
        torch.tensor([[0.0, 1.0, 0.0]]),
        torch.tensor([[0.0, 0.0, 100.0]]),
        torch.tensor([[T, T, F]]),
        gamma=1.0,
        gae_lambda=0.95,
    )
    # 1 − 0 = 1;  0 + 0 − 0 + 0.95·1
    close(advantages, [[0.95, 1.0, 0.0]])
    close(returns, [[0.95, 1.0, 0.0]])


def test_areal_1346_a_sequence_advantage_averages_counted_tokens_only() -> None:
    """AReaL #1346: sequence-level losses averaged the advantages of pads too."""
    mask = torch.tensor([[T, T, F, F]])
    logprobs = torch.zeros(1, 4)
    for padding in (0.0, 10.0):
        advantages = torch.tensor([[1.0, 1.0, padding, padding]])
        ratio = sequence_ratio(logprobs, logprobs, mask)
        loss, _ = clipped_surrogate(ratio, masked_mean(advantages, mask, 1), cliprange=0.2)
        close(loss, [-1.0])


def test_miles_1827_the_score_reaches_the_last_trainable_token() -> None:
    """miles #1827: the score landed on a masked last token and decayed, or got lost at γ = 0."""
    logprobs = torch.zeros(1, 5)
    mask = torch.tensor([[T, F, T, F, F]])
    rewards, _ = token_rewards(logprobs, logprobs, torch.tensor([2.0]), mask, kl_coef=0.1)
    close(rewards, [[0.0, 0.0, 2.0, 0.0, 0.0]])
    advantages, _ = gae(rewards, torch.zeros(1, 5), mask, gamma=0.0, gae_lambda=0.95)
    close(advantages[0, 2], 2.0)
    # one γλ per trainable token, not one per column
    advantages, _ = gae(rewards, torch.zeros(1, 5), mask, gamma=0.5, gae_lambda=0.5)
    close(advantages, [[0.5, 0.0, 2.0, 0.0, 0.0]])


def test_vagen_8_tokens_of_the_environment_pay_no_kl_penalty() -> None:
    """VAGEN #8, multi-turn: what the policy did not write is neither rewarded nor punished."""
    logprobs, ref_logprobs = torch.zeros(1, 3), torch.tensor([[-1.0, -40.0, -2.0]])
    mask = torch.tensor([[T, F, T]])
    rewards, non_score_rewards = token_rewards(
        logprobs, ref_logprobs, torch.tensor([1.0]), mask, kl_coef=0.1
    )
    close(non_score_rewards, [[-0.1, 0.0, -0.2]])
    close(discounted_returns(rewards, mask, gamma=1.0), [[0.7, 0.0, 0.8]])


def test_rlhf_book_216_the_kl_of_pads_does_not_leak_into_returns() -> None:
    """rlhf-book #216: pads with a KL penalty leaked into the returns of real tokens."""
    rewards = torch.tensor([[-0.1, 1.0, -5.0, -5.0]])
    returns = discounted_returns(rewards, torch.tensor([[T, T, F, F]]), gamma=1.0)
    close(returns, [[0.9, 1.0, 0.0, 0.0]])


def test_rlhf_book_216_the_advantage_is_return_minus_value() -> None:
    """rlhf-book #216 took r − V, which leaves the score out of all but the last token."""
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.75]])
    advantages, _ = gae(rewards, values, torch.tensor([[T, T, T]]), gamma=1.0, gae_lambda=1.0)
    close(advantages, [[0.5, 0.75, 0.25]])  # 1 − V


def test_rlhf_book_216_approxkl_is_a_mean_over_counted_tokens() -> None:
    """rlhf-book #216 averaged the KL over pads too."""
    logprobs = torch.tensor([[-1.0, -2.0, 0.0, math.inf]])
    old_logprobs = torch.tensor([[-1.2, -2.4, 30.0, 0.0]])
    mask = torch.tensor([[T, T, F, F]])
    approxkl = token_mean(kl_estimate(logprobs, old_logprobs, "k2"), mask)
    close(approxkl, 0.05)  # (½·0.04 + ½·0.16) / 2
