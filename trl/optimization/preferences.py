"""What choices among responses say about their rewards: losses of a reward model.

Of the K responses to a prompt somebody preferred one, or none. The probability of each answer is a
softmax over the rewards r_1 … r_K and one more logit, for "no difference":

    p_k = e^(r_k) / Z      p_tie = ν·e^(mean r) / Z      Z = Σ_j e^(r_j) + ν·e^(mean r)

K = 2, ν = 0    Bradley and Terry (1952), as in Stiennon et al. (arXiv:2009.01325, section 3.4):
                p_1 = σ(r_1 − r_2)
K > 2, ν = 0    the softmax of the best of n, Ziegler et al. (arXiv:1909.08593, equation 1)
K = 2, ν > 0    ties after Davidson (1970, JASA 65, equation 2.3): p_tie = ν·√(p_1·p_2)

Only differences count: the same number added to all rewards of a prompt changes nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trl.core import check_same_shape

__all__ = ["centring_loss", "choice_loss", "tie_strength"]


def choice_loss(
    rewards: Tensor,
    votes: Tensor,
    present: Tensor,
    margins: Tensor | None = None,
    *,
    nu: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of the votes on the responses to each prompt.

        loss = − Σ_k votes_k · log p_k(m) − votes_tie · log p_tie

    with the p of this module, where p_k(m) has r_k − m for r_k: who preferred response k by a
    margin m is to see it ahead by m. With K = 2 and one vote that is −log σ(r_1 − r_2 − m), Touvron
    et al. (arXiv:2307.09288, equation 2). Votes for several responses are soft labels; shares may
    stand for counts.

    Args:
        rewards: [B, K]; what stands where there is no response is of no account.
        votes: [B, K + 1], not negative, 0 where there is no response; the last for no response.
        present: [B, K] True where there is a response.
        margins: [B] in units of the rewards. None: 0.
        nu: Strength of ties, ν; with 0 a vote for no response is impossible.
    Returns:
        loss [B].
    """
    check_same_shape(rewards=rewards, present=present)
    K = rewards.shape[1]
    ties = rewards.where(present, 0).sum(1, keepdim=True) / present.sum(1, keepdim=True)
    ties = ties + (math.log(nu) if nu else -math.inf)
    logits = torch.cat([rewards.masked_fill(~present, -math.inf), ties], 1)  # [B, K + 1]
    each = logits[:, None].expand(-1, K + 1, -1)  # [B, K + 1, K + 1]: a row for each answer
    if margins is not None:
        behind = torch.eye(K + 1, dtype=logits.dtype, device=logits.device)
        behind[K, K] = 0  # a tie has no margin
        each = each - margins[:, None, None] * behind
    logprobs = each.log_softmax(2).diagonal(dim1=1, dim2=2)
    return -torch.where(votes > 0, votes * logprobs, 0).sum(1)


def centring_loss(rewards: Tensor, present: Tensor) -> Tensor:
    """(Σ_k r_k)², which draws rewards to a mean of 0 (Eisenstein et al., arXiv:2312.09244, 3).

    Args:
        rewards: [B, K].
        present: [B, K] True where there is a response.
    Returns:
        loss [B].
    """
    return rewards.where(present, 0).sum(1).square()


def tie_strength(votes: Tensor, present: Tensor) -> float:
    """ν at which ties are as frequent as in the votes if all rewards are equal.

        p_tie = ν / (K + ν)      ν = K · ties / choices

    That is the most likely ν where nothing is known of the responses; K is the mean number of
    them. Where they differ it is a lower bound, and the rewards come out on a smaller scale.

    Args:
        votes: [B, K + 1] as for `choice_loss`.
        present: [B, K] True where there is a response.
    """
    ties, choices = votes[:, -1].sum().item(), votes[:, :-1].sum().item()
    return present.sum(1).double().mean().item() * ties / choices if choices else 0.0
