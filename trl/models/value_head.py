"""A scalar output for each token, used as the value function."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from trl.config.errors import refuse


class ValueHead(nn.Module):
    """Predicts the value of each token from its hidden state: dropout → linear → one number.

    Weight and bias start at zero, so that V ≡ 0 at first (Ziegler et al., arXiv:1909.08593).
    The parameters are named `summary.weight` [1, d] and `summary.bias` [1], as in all releases
    of trl with a value head. Follows these fields of the config, where it has them:
    `summary_first_dropout`, `summary_last_dropout`, `summary_activation` (None or "tanh").

    Args:
        config: Of the language model.
        hidden_size: d; None: the config's. (In some OPT models the last states are narrower.)
    """

    def __init__(self, config: PretrainedConfig, hidden_size: int | None = None) -> None:
        super().__init__()
        activation = getattr(config, "summary_activation", None)
        if activation not in (None, "tanh"):
            refuse("config.summary_activation", "be None or 'tanh'", repr(activation))
        if not getattr(config, "summary_use_proj", True):
            refuse("config.summary_use_proj", "be True", "False", "a value is one number")
        self.detach_head = False
        self.summary = nn.Linear(hidden_size or config.hidden_size, 1)
        self.activation = nn.Tanh() if activation == "tanh" else nn.Identity()
        self.first_dropout = nn.Dropout(getattr(config, "summary_first_dropout", None) or 0.0)
        self.last_dropout = nn.Dropout(getattr(config, "summary_last_dropout", None) or 0.0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the values [...] of hidden states [..., d], in float32.

        Always computed in float32: a value is a sum of d products whose error enters every
        advantage, and the product is too small for lower precision to save time.
        """
        if self.detach_head:
            hidden_states = hidden_states.detach()
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = hidden_states.to(self.summary.weight.dtype)
            output = self.summary(self.first_dropout(hidden_states))
            return self.last_dropout(self.activation(output)).squeeze(-1)
