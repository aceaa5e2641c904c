"""The loss of a critic that predicts a distribution over bins."""

from __future__ import annotations

import torch
from torch import Tensor

from trl.config.errors import refuse
from trl.core import at_least_fp32


def two_hot_loss(logits: Tensor, returns: Tensor, centres: Tensor) -> Tensor:
    """Cross-entropy to the two bins around each return (DreamerV3, arXiv:2301.04104, equation 9).

        R̂ = clip(R, c_0, c_{K−1})        k: c_k <= R̂ <= c_{k+1}
        w = (R̂ − c_k) / (c_{k+1} − c_k)        L = −(1 − w)·log p_k − w·log p_{k+1}

    with p = softmax(z). The weights have the expectation R̂: where the loss is least, so has p. A
    gradient of cross-entropy has the same scale whatever the scale of the returns, and learns
    noisy targets better than squares do (Farebrother et al., arXiv:2403.03950, which spread each
    return over more bins).

    Args:
        logits: [..., K] z, with gradient.
        returns: [...] R.
        centres: [K] c, rising; K > 1.
    Returns:
        [...] loss in nats.
    """
    if logits.shape != (*returns.shape, *centres.shape) or len(centres) < 2:
        got = f"{list(logits.shape)}, {list(returns.shape)} and {list(centres.shape)}"
        rule = "have the shapes [..., K], [...] and [K] with K > 1"
        refuse("logits`, `returns` and `centres", rule, got)
    returns = at_least_fp32(returns)
    centres = centres.to(returns.dtype)
    targets = returns.clamp(centres[0], centres[-1])
    upper = torch.searchsorted(centres, targets).clamp(1, len(centres) - 1)
    low, high = centres[upper - 1], centres[upper]
    weight = (targets - low) / (high - low)
    around = at_least_fp32(logits).log_softmax(-1).gather(-1, torch.stack((upper - 1, upper), -1))
    return -(around[..., 0] * (1 - weight) + around[..., 1] * weight)
