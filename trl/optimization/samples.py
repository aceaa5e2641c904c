"""Whether a policy has drawn the responses that it is given, as far as their tokens tell."""

from __future__ import annotations

import math

from torch import Tensor

from trl.batch import ResponseOutput, Rollout

SURE = 6.0
"""Standard errors; of samples one batch in 10⁹ is as far from 0."""
LEAST = 0.02
"""Nats per token, below which rounding may explain the difference."""
ROWS = 8
"""That are looked through for their queries."""
HELD = (
    "every response holds its query: `generate` returns both. Pass what follows, "
    "output[len(query):], or the policy is trained to write queries."
)
TOO_LIKELY = (
    "With transformers' `generate` pass do_sample=True, top_k=0, top_p=1.0, temperature={:g}"
)
TOO_UNLIKELY = (
    "They may count padding behind the end (shorten them, or give `response_masks`), go on from "
    "other tokens than the query, or be of another model, another temperature, or some steps old"
)


class Doubt:
    """What the responses so far, of which nobody has recorded what wrote them, tell of that.

        d_t = −log π(y_t | y_<t) − H(π(· | y_<t))        z = Σ_t d_t / √(Σ_t d_t²)

    A token that π draws has the mean surprisal H, so that d is 0 in the mean, whatever came before
    it: the sum over all tokens of all steps is a martingale, and z is normal for many of them.
    """

    def __init__(self) -> None:
        self.tokens, self.sum, self.squares, self.told = 0, 0.0, 0.0, False

    @property
    def mean(self) -> float:
        """By how many nats a token is less likely than a sample."""
        return self.sum / self.tokens if self.tokens else 0.0

    @property
    def errors(self) -> float:
        """The same in standard errors, z."""
        return self.sum / math.sqrt(self.squares) if self.squares > 0 else 0.0

    def add(self, logprobs: Tensor, entropy: Tensor, mask: Tensor) -> None:
        """Take account of the counted tokens [B, R], by their log π and the H before each."""
        d = (-logprobs - entropy)[mask].cpu().double()  # a Mac has no float64
        self.tokens += len(d)
        self.sum += float(d.sum())
        self.squares += float(d.square().sum())

    def of(self, rollout: Rollout, old: ResponseOutput, temperature: float) -> str | None:
        """Return what is wrong with responses as samples of the policy; None: nothing, or it was
        told before.

        Args:
            rollout: Recorded log-probs say what wrote it: then it is not looked at.
            old: What the policy says of it.
            temperature: That of the policy.
        """
        if self.told or rollout.behaviour_logprobs is not None:
            return None
        self.add(old.logprobs, old.entropy, rollout.response_mask)
        found = HELD if hold_their_queries(rollout) else self._found(temperature)
        self.told = found is not None
        return found

    def _found(self, temperature: float) -> str | None:
        mean, errors = self.mean, self.errors
        if abs(errors) < SURE or abs(mean) < LEAST:
            return None
        how, cause = ("likelier", TOO_LIKELY) if mean < 0 else ("less likely", TOO_UNLIKELY)
        return (
            f"the responses are {how} than samples of the policy at temperature {temperature:g}, "
            f"by {abs(mean):.2f} nats per token ({abs(errors):.0f} standard errors), but it is "
            f"trained as if it had drawn them. {cause.format(temperature)}. Sampler does it right; "
            "of other samples give a Rollout with `behaviour_logprobs`."
        )


def hold_their_queries(rollout: Rollout) -> bool:
    """Return whether each response has all of its query in it, of two tokens or more.

    The first rows tell. One row alone may be an echo.
    """
    queries = _written(rollout.queries, rollout.query_mask)
    responses = _written(rollout.responses, rollout.response_mask)
    held = [query in response for query, response in zip(queries, responses, strict=True)]
    long = rollout.query_mask[:ROWS].sum(1) > 1
    return len(held) > 1 and bool(long.all()) and all(held)


def _written(tokens: Tensor, mask: Tensor) -> list[str]:
    """Return the counted tokens of the first rows as texts of numbers, a space around each."""
    rows = zip(tokens[:ROWS].cpu(), mask[:ROWS].cpu(), strict=True)
    return [" ".join(["", *map(str, row[counts].tolist()), ""]) for row, counts in rows]
