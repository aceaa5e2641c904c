"""A scalar output for each token, used as the value function."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from trl.config import check_values
from trl.config.errors import refuse
from trl.config.types import Interval

ValueHeadKind = Literal["linear", "mlp", "bins"]

RANGE, BINS = (-10.0, 10.0), 101
"""Of the values of a head of bins, unless told otherwise, and how many bins it has."""


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

    outputs = 1
    """Numbers that are computed for each token."""

    def __init__(self, config: PretrainedConfig, hidden_size: int | None = None) -> None:
        super().__init__()
        activation = getattr(config, "summary_activation", None)
        if activation not in (None, "tanh"):
            refuse("config.summary_activation", "be None or 'tanh'", repr(activation))
        if not getattr(config, "summary_use_proj", True):
            refuse("config.summary_use_proj", "be True", "False", "a value is one number")
        self.detach_head = False
        self.inner: nn.Module = nn.Identity()
        self.summary = nn.Linear(hidden_size or config.hidden_size, self.outputs)
        self.activation = nn.Tanh() if activation == "tanh" else nn.Identity()
        self.first_dropout = nn.Dropout(getattr(config, "summary_first_dropout", None) or 0.0)
        self.last_dropout = nn.Dropout(getattr(config, "summary_last_dropout", None) or 0.0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the values [...] of hidden states [..., d], in float32."""
        return self.values(self.computed(hidden_states))

    def computed(self, hidden_states: Tensor) -> Tensor:
        """Return what values are made of, [..., `outputs`].

        Always computed in float32: a value is a sum of d products whose error enters every
        advantage, and the product is too small for lower precision to save time.
        """
        if self.detach_head:
            hidden_states = hidden_states.detach()
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = hidden_states.to(self.summary.weight.dtype)
            output = self.summary(self.inner(self.first_dropout(hidden_states)))
            return self.last_dropout(self.activation(output))

    def values(self, computed: Tensor) -> Tensor:
        """Return the values [...] of what `computed` returned."""
        return computed.squeeze(-1)


class MLPValueHead(ValueHead):
    """A value head with a layer inside: d → GELU(d) → one number.

    The inner layer starts as torch's do, the outer one at zero: V ≡ 0 at first.
    """

    def __init__(self, config: PretrainedConfig, hidden_size: int | None = None) -> None:
        super().__init__(config, hidden_size)
        size = self.summary.in_features
        self.inner = nn.Sequential(nn.Linear(size, size), nn.GELU())


class BinsValueHead(ValueHead):
    """A value head that predicts a distribution over bins; the value is its expectation.

        V = Σ_k softmax(z)_k · c_k

    It is trained by cross-entropy, as in distributional critics (see
    `trl.optimization.bins`). It starts as a normal distribution around the middle of the range,
    whose deviation is a tenth of half of it: returns are of that size, and from equal logits it
    takes many steps to learn just that.

    A return says something of two bins only. The signal in the gradient of a logit is about √p of
    that in the gradient of a single output, beside as much noise, p the bin's probability; Adam
    moves each weight by its share of signal. So logits are 1/√p times what `summary` gives, with
    the p of the middle at first (3.5 with 101 bins): V then learns as fast as a linear head's.

    Args:
        config: See `ValueHead`.
        hidden_size: Likewise.
        value_range: Centres of the lowest and of the highest bin, in units of returns: those
            beyond are taken for these.
        bins: Number of bins, evenly spaced.
    """

    centres: Tensor
    """[K], a buffer: saved with the weights."""

    def __init__(
        self,
        config: PretrainedConfig,
        hidden_size: int | None = None,
        value_range: tuple[float, float] = RANGE,
        bins: int = BINS,
    ) -> None:
        if getattr(config, "summary_activation", None):
            refuse("value_head", "be 'linear' or 'mlp' for a model with a summary_activation")
        self.outputs = bins
        super().__init__(config, hidden_size)
        self.register_buffer("centres", torch.linspace(*value_range, bins))
        middle, deviation = sum(value_range) / 2, (value_range[1] - value_range[0]) / 20
        logits = -((self.centres - middle) / deviation).square() / 2
        shape = (math.exp(-200 * (k / (bins - 1) - 0.5) ** 2) for k in range(bins))
        self.factor = math.sqrt(sum(shape))  # 1/p = Σ_k exp(logit_k), that of the middle being 0
        with torch.no_grad():
            self.summary.bias.copy_(logits / self.factor)

    def computed(self, hidden_states: Tensor) -> Tensor:
        """Return logits [..., K] of hidden states [..., d], in float32."""
        return self.factor * super().computed(hidden_states)

    def values(self, computed: Tensor) -> Tensor:
        """Return the expectations [...] of logits [..., K]."""
        return (computed.softmax(-1) * self.centres).sum(-1)


def check_head(kind: ValueHeadKind | None, value_range: tuple[float, float] | None) -> None:
    """Raise unless there is such a head, as far as can be told before a model is loaded.

    Raises:
        ValueError: for another kind, or a range that is none.
    """
    given = {
        "value_head": (ValueHeadKind | None, kind),
        "value_range": (Interval | None, value_range),
    }
    check_values("CausalLMWithValueHead", given)
    if value_range is None:
        return
    if kind not in ("bins", None):  # None: that which was saved
        refuse("value_range", "be None without value_head='bins'", str(value_range))
    if not bool((torch.linspace(*value_range, BINS).diff() > 0).all()):
        rule, fix = f"have room for {BINS} different float32 numbers", "widen it"
        refuse("value_range", rule, str(value_range), fix)


def make_value_head(
    kind: ValueHeadKind | None,
    config: PretrainedConfig,
    hidden_size: int,
    *,
    value_range: tuple[float, float] | None = None,
    saved: Mapping[str, Tensor] | None = None,
) -> ValueHead:
    """Return a new value head.

    Args:
        kind: None: that of `saved`, else linear.
        config: Of the language model.
        hidden_size: d.
        value_range: Of bins; None: that of `saved`, else `RANGE`.
        saved: Weights that the head is to take.

    Raises:
        ValueError: for another kind, or a range that is none.
    """
    check_head(kind, value_range)
    saved = saved or {}
    before = "bins" if "centres" in saved else "mlp" if "inner.0.weight" in saved else "linear"
    kind = kind or before
    if saved and kind != before:
        fix = f"set {before!r}, or delete the saved head to start with a new one"
        refuse("value_head", f"be that saved with the model, {before!r}", repr(kind), fix)
    if kind != "bins":
        if value_range is not None:
            refuse("value_range", "be None without value_head='bins'", str(value_range))
        return (ValueHead if kind == "linear" else MLPValueHead)(config, hidden_size)
    centres = saved.get("centres")
    if centres is None:
        return BinsValueHead(config, hidden_size, value_range or RANGE)
    ends = float(centres[0]), float(centres[-1])
    if value_range is not None and centres[[0, -1]].tolist() != torch.tensor(value_range).tolist():
        refuse(
            "value_range", f"be that of the saved bins, {ends}", str(value_range), "leave it out"
        )
    return BinsValueHead(config, hidden_size, ends, len(centres))
