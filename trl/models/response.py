"""What training asks of a model: log-prob, value and entropy of each response token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from trl.batch import Rollout
from trl.core import logprobs_and_entropy
from trl.models.head import language_logits


class ResponseOutput(NamedTuple):
    """All [B, R], float32, 0 outside the response mask."""

    logprobs: Tensor
    """log π(token | query, earlier tokens)."""
    values: Tensor
    """V before the token is written; zeros if the model has no value head."""
    entropy: Tensor
    """Entropy in nats of the distribution that the token was drawn from."""


class ResponseModel(nn.Module):
    """Wraps a causal language model to answer for response tokens only.

    The trunk runs over the whole sequence; heads and softmax only where a counted response token
    is predicted, so no tensor of [B, T, V] exists.

    Args:
        model: A causal language model of transformers, with a `v_head` if it is a policy.
        temperature: The logits are divided by it, as they were while sampling.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, rollout: Rollout) -> ResponseOutput:
        """Return log-probs, values and entropies [B, R] of the response tokens."""
        trunk = self.model.base_model(
            input_ids=rollout.input_ids,
            attention_mask=rollout.attention_mask,
            position_ids=rollout.position_ids,
            use_cache=False,
        )
        query_length = rollout.queries.shape[1]
        # The hidden state at column Q − 1 + t predicts response token t.
        hidden = trunk.last_hidden_state[:, query_length - 1 : -1]
        mask = rollout.response_mask
        hidden = hidden[mask]  # [N, d], N counted tokens
        logits = language_logits(hidden, self.model.get_output_embeddings())
        logprobs, entropy = logprobs_and_entropy(
            logits, rollout.responses[mask], temperature=self.temperature
        )
        value_head = getattr(self.model, "v_head", None)
        values = torch.zeros_like(logprobs) if value_head is None else value_head(hidden)
        return ResponseOutput(*(_scatter(column, mask) for column in (logprobs, values, entropy)))


def _scatter(column: Tensor, mask: Tensor) -> Tensor:
    """Put N numbers back to their places in [B, R], zeros elsewhere."""
    return torch.zeros(mask.shape, device=column.device).masked_scatter(mask, column.float())
