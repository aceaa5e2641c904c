"""From one score per response to one reward per token, and what may be done to scores before."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trl.config import PPOConfig
from trl.config.errors import refuse
from trl.core import KLKind, at_least_fp32, check_mask, kl_estimate
from trl.scored import totals


@torch.no_grad()
def token_rewards(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    scores: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: KLKind = "k1",
) -> tuple[Tensor, Tensor]:
    """The reward of PPO for language models (Ziegler et al., arXiv:1909.08593, equation 2).

        r_t = −β·(log π_old,t − log π_ref,t) + 1[t is the last response token]·s

    The last token is the last one the mask counts (the EOS, or the one that was cut off at), not
    the last column. Scores given for every token take the place of the second term.

    Args:
        logprobs: [B, R] of the policy that sampled the response.
        ref_logprobs: [B, R] of the reference.
        scores: [B] the evaluation of each response, or [B, R] that of each token.
        mask: [B, R] True on response tokens; at least one in every row.
        kl_coef: β.
        kl_estimator: see `trl.core.kl_estimate`.
    Returns:
        rewards [B, R] and their KL part alone, non_score_rewards [B, R]; both 0 outside the mask
        and without gradient.
    """
    check_mask(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    if scores.shape not in (mask.shape[:1], mask.shape):
        rule = f"have one number per response, [{mask.shape[0]}], or per token, {list(mask.shape)}"
        refuse("scores", rule, list(scores.shape))
    counted = mask.long().cumsum(1)
    if not mask.any(1).all():
        rows = (~mask.any(1)).nonzero().flatten().tolist()
        refuse("mask", "count a token in every row", f"none in rows {rows}")
    given = mask
    if scores.ndim == 1:
        scores, given = scores.unsqueeze(1), mask & (counted == counted[:, -1:])
    kl = kl_estimate(logprobs, ref_logprobs, kl_estimator)
    non_score_rewards = torch.where(mask, -kl_coef * kl, 0.0)
    score_rewards = torch.where(given, at_least_fp32(scores), 0.0)
    return non_score_rewards + score_rewards, non_score_rewards


def missing_eos_penalty(scores: Tensor, ended: Tensor, penalty: float, *, replace: bool) -> Tensor:
    """Punish responses that were cut off rather than ended by the policy.

        replace:  s ← −penalty           else:  s ← s − penalty           where not ended

    Ziegler et al. and Huang et al. (arXiv:2403.17031, the "EOS trick") replace the score, with
    penalty 1; TRL subtracts from it.

    Args:
        scores: [B].
        ended: [B] bool, True where the response has its EOS.
        penalty: >= 0, in units of the score.
        replace: whether the penalty takes the place of the score.
    Returns:
        [B]
    """
    check_mask(ended, scores=scores)
    if not penalty >= 0:
        refuse("penalty", "be >= 0 (it is what a cut-off response loses)", penalty)
    scores = at_least_fp32(scores)
    punished = torch.full_like(scores, -penalty) if replace else scores - penalty
    return torch.where(ended, scores, punished)


def in_range(scores: Tensor, low: float, high: float) -> Tensor:
    """Bring scores to −1 … 1 by the lowest and the highest that there are.

        s ← clip(2·(s − low)/(high − low) − 1, ±1)

    Args:
        scores: Of any shape.
        low: Becomes −1.
        high: Becomes 1.
    """
    if not low < high:
        refuse("low", "be < `high`", f"{low} and {high}")
    return (2 * (at_least_fp32(scores) - low) / (high - low) - 1).clamp(-1, 1)


class RunningMoments:
    """Mean and standard deviation of every score seen so far, in one pass and without cancellation.

    Chan, Golub & LeVeque (1979), "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances". For a batch b with mean μ_b and sum of squared deviations M_b, and δ = μ_b − μ:

        μ ← μ + δ·n_b/(n + n_b)        M ← M + M_b + δ²·n·n_b/(n + n_b)        σ² = M/(n − 1)
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0  # M

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 0 before the second score."""
        return math.sqrt(self._squares / (self.count - 1)) if self.count > 1 else 0.0

    def update(self, scores: Tensor) -> None:
        """Take in a batch of scores, of any shape."""
        batch = scores.detach().cpu().double().flatten()  # not every device has float64
        if not bool(batch.isfinite().all()):
            refuse("scores", "be finite", scores.tolist())
        if (n := batch.numel()) == 0:
            return
        total = self.count + n
        batch_mean = float(batch.mean())
        delta = batch_mean - self.mean
        self._squares += float((batch - batch_mean).square().sum())
        self._squares += delta * delta * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"count": self.count, "mean": self.mean, "squares": self._squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state_dict()`.

        Raises:
            ValueError: if these are no moments; nothing has changed then.
        """
        count, mean, squares = (state[name] for name in ("count", "mean", "squares"))
        counts = 0 <= count < math.inf and count == int(count)
        if not (counts and math.isfinite(mean) and 0 <= squares < math.inf):
            got = f"count {count}, mean {mean}, squares {squares}"
            refuse("state", "be finite, with `count` and `squares` >= 0, `count` whole", got)
        self.count, self.mean, self._squares = int(count), float(mean), float(squares)


def normalize_scores(
    scores: Tensor,
    moments: RunningMoments,
    *,
    center: bool = False,
    scale: bool = False,
    clip: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Bring scores to a stable range with running moments ("Secrets of RLHF", arXiv:2307.04964).

        s ← clip((s − μ) / σ, ±clip)

    Does not update `moments`: call `moments.update(scores)` first. As long as all scores were equal
    (σ = 0) there is no spread to divide by, and they are not scaled.

    Args:
        scores: [B], or [B, R] of single tokens.
        moments: of the scores so far, these included; of single tokens, of their sums.
        center: subtract μ.
        scale: divide by σ.
        clip: bound on the result; None for none.
        mask: [B, R], for scores of single tokens: each of a response's tokens has its share of μ,
            so that their sum is centred.
    Returns:
        [B] or [B, R]
    """
    if clip is not None and not clip > 0:
        refuse("clip", "be > 0 or None", clip)
    scores = at_least_fp32(scores)
    if center:
        share = 1.0 if mask is None else mask / mask.sum(1, keepdim=True).clamp(min=1)
        scores = scores - share * moments.mean
    if scale and moments.std > 0:
        scores = scores / moments.std
    return scores if clip is None else scores.clamp(-clip, clip)


def adjusted_scores(
    scores: Tensor,
    moments: RunningMoments,
    config: PPOConfig,
    *,
    ended: Tensor | None,
    mask: Tensor | None,
    gathered: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the scores as they enter the rewards, and update `moments`, of their sums, by them.

    Args:
        scores: [B], or [B, R] of single tokens.
        moments: Of the scores before.
        config: What is to be made of them.
        ended: [B] whether the responses ended by themselves.
        mask: [B, R] their tokens, for scores of single tokens.
        gathered: Returns the rows of all processes that count.
    Returns:
        The shape of `scores`.
    """
    if config.score_range is not None:
        scores = in_range(scores, *config.score_range)
    if config.missing_eos_penalty is not None and ended is not None:  # as was checked
        penalty, replace = config.missing_eos_penalty, config.missing_eos_replaces
        scores = missing_eos_penalty(scores, ended, penalty, replace=replace)
    if config.center_scores or config.scale_scores:
        moments.update(gathered(totals(scores)))
    return normalize_scores(
        scores,
        moments,
        center=config.center_scores,
        scale=config.scale_scores,
        clip=config.clip_scores,
        mask=mask if scores.ndim == 2 else None,
    )
