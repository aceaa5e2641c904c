"""What training asks of a model: log-prob, value and entropy of each response token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl.anatomy import (
    accepts,
    agree,
    decoder,
    keep_hidden_states,
    language_model,
    response_start,
    text_config,
    vocabulary_size,
    without_dropout,
)
from trl.anatomy import last_hidden_state as hidden_of
from trl.batch import ResponseOutput, Rollout, ValueBins, pad_rows
from trl.core import logprobs_and_entropy
from trl.models.critic import critic_of, value_head_of
from trl.models.head import LanguageHead, precise_head
from trl.models.quick_kernels import QuickKernels
from trl.models.shared_prompts import Packed, can_pack, pack, takes_lines, trial_of_groups
from trl.models.side_by_side import fill_lines, line_up, places, trial_of_rows
from trl.models.trunk import SharedTrunk
from trl.models.value_head import BinsValueHead, ValueHead


class Reader(nn.Module):
    """Reads the rows of a rollout for what predicts their response tokens.

    The decoder runs over the whole sequence, in fewer columns than padded rows have where that
    can be.

    Args:
        model: A causal or an encoder-decoder language model of transformers.

    Attributes:
        trunk: If the lower layers are frozen, what makes a pass start above them for a rollout
            with `trunk_states`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.trunk: SharedTrunk | None = None
        self._plain = (language_model(model),)  # in a tuple: it is a part of `model` already
        self.quick = QuickKernels(self.plain)

    @property
    def plain(self) -> PreTrainedModel:
        """The language model itself."""
        return self._plain[0]

    def _predicting(self, rollout: Rollout, packed: Packed | None = None) -> Tensor:
        """Return the hidden states [N, d] that predict the counted response tokens."""
        mask = rollout.response_mask
        if packed is not None:
            return packed.predicting(hidden_of(decoder(self.plain)(**packed.inputs)), mask)
        hidden = hidden_of(decoder(self.plain)(**_decoder_inputs(self.plain, rollout)))
        return hidden[:, -mask.shape[1] :][mask]

    def _packed(self, rollout: Rollout) -> Packed | None:
        """Return the rows in fewer columns than padded rows have, if there is a way."""
        if can_pack(self.plain, rollout) and self.packs:
            return pack(self.plain, rollout)
        where = places(self.plain, rollout)
        return line_up(self.plain, rollout, where) if where and self.lines_up else None

    def try_layouts(self) -> None:
        """Find out now which layouts the model takes, while its weights are whole."""
        if takes_lines(self.plain, columns=1):
            _ = self.packs, self.lines_up

    @cached_property
    def packs(self) -> bool:
        """Whether the model gives responses packed behind a prompt the states they have alone."""
        rollout = trial_of_groups(vocabulary_size(self.plain), self.plain.device)
        return self._agrees(rollout, pack(self.plain, rollout))

    @cached_property
    def lines_up(self) -> bool:
        """Whether the model gives rows that stand in one line the states they have alone."""
        rollout = trial_of_rows(vocabulary_size(self.plain), self.plain.device)
        where = fill_lines((rollout.lengths - 1).tolist(), columns=10)
        return self._agrees(rollout, line_up(self.plain, rollout, where))

    @torch.no_grad()
    def _agrees(self, rollout: Rollout, packed: Packed) -> bool:
        """Return whether a few rows have the same hidden states packed and alone."""
        with without_dropout(self.plain):
            alone = self._predicting(rollout)
            try:
                together = self._predicting(rollout, packed)
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                return False  # a family that takes no such mask
        low = torch.is_autocast_enabled(self.plain.device.type)
        return agree(together, alone, low=low, exact=1e-4)

    def trunk_states(self, rollout: Rollout) -> Tensor:
        """Return what the frozen layers make of a rollout, [B, T − 1, d], without gradient."""
        return self.trunk.states(self.plain, _decoder_inputs(self.plain, rollout))


class CriticReader(Reader):
    """Wraps a critic of its own to give the values of response tokens; it makes no logits."""

    def values(self, rollout: Rollout) -> tuple[Tensor, Tensor | None]:
        """Return the values [N] of the counted tokens, and logits of bins: see `_values`."""
        resumed = rollout.trunk_states is not None and self.trunk is not None
        above = self.trunk.from_kept(rollout.trunk_states) if resumed else nullcontext()
        with above, self.quick.in_use():
            hidden = self._predicting(rollout, None if resumed else self._packed(rollout))
        return _values(self.model.v_head, hidden)

    def forward(self, rollout: Rollout) -> ResponseOutput:
        """Return the values [B, R] of the response tokens; log-probs and entropies are zeros."""
        values, _ = self.values(rollout)
        mask = rollout.response_mask
        zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        return ResponseOutput(zeros, zeros.masked_scatter(mask, values.float()), zeros)


class ResponseModel(Reader):
    """Wraps a language model to answer for response tokens only.

    Heads and softmax run only where a counted response token is predicted, so no tensor of
    [B, T, V] exists. A model that makes its logits in a way that `LanguageHead` does not know makes
    them itself, for all columns of the responses.

    Args:
        model: A causal or an encoder-decoder language model of transformers, with a `v_head`, or a
            `critic` of its own, if it is a policy.
        temperature: The logits are divided by it, as they were while sampling.

    Attributes:
        critic: What answers for the values, if the policy has a critic of its own.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__(model)
        self.temperature = temperature
        self.head = LanguageHead(self.plain)
        critic = critic_of(model)
        self.critic = None if critic is None else CriticReader(critic)
        self._asks_critic = True

    @property
    def readers(self) -> list[Reader]:
        """The policy's, and that of a critic of its own."""
        return [self] if self.critic is None else [self, self.critic]

    @contextmanager
    def without_critic(self) -> Iterator[None]:
        """Ask no critic of its own in the passes inside: the values are zeros."""
        before, self._asks_critic = self._asks_critic, False
        try:
            yield
        finally:
            self._asks_critic = before

    def forward(self, rollout: Rollout, temperature: float | None = None) -> ResponseOutput:
        """Return log-probs, values and entropies [B, R] of the response tokens.

        Args:
            rollout: B rows.
            temperature: In place of the one that the responses were sampled with.
        """
        temperature = self.temperature if temperature is None else temperature
        mask = rollout.response_mask
        labels = rollout.responses[mask]  # [N], the counted tokens
        states = rollout.trunk_states
        routed = torch.is_grad_enabled() and bool(_router_weights(self.plain))
        resumed = states is not None and self.trunk is not None and not routed
        logits = router = None
        above = self.trunk.from_kept(states) if resumed else nullcontext()
        with above, self.quick.in_use():
            if routed or not self.head.complete:
                hidden, logits, router = self._of_the_model(rollout, routed)
            else:
                hidden = self._predicting(rollout, None if resumed else self._packed(rollout))
            if self.head.complete:
                logprobs, entropy = self.head.logprobs(hidden, labels, temperature)
            else:
                logprobs, entropy = logprobs_and_entropy(logits, labels, temperature=temperature)
        if self.critic is not None and self._asks_critic:
            values, logits = self.critic.values(rollout)
        else:
            values, logits = _values(getattr(self.model, "v_head", None), hidden)
        columns = [logprobs, values, entropy]
        if router is not None:
            columns.append(router.expand_as(logprobs))
        empty = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        output = ResponseOutput(*(empty.masked_scatter(mask, x.float()) for x in columns))
        if logits is None:
            return output
        bins = logits.new_zeros(*mask.shape, logits.shape[-1])
        bins = bins.masked_scatter(mask[..., None], logits)
        return output._replace(bins=ValueBins(bins, value_head_of(self.model).centres))

    def _of_the_model(
        self, rollout: Rollout, routed: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return hidden states [N, d], logits [N, V] (None: not asked for) and the routers' loss []
        from one pass of the model itself.
        """
        plain, mask = self.plain, rollout.response_mask
        # The last token of a row predicts nothing, but an expert gets it.
        past = int(routed and not plain.config.is_encoder_decoder)
        inputs = _model_inputs(plain, rollout, past)
        if routed:
            inputs["output_router_logits"] = True
        if routed and "decoder_input_ids" in inputs:
            inputs["labels"] = inputs["decoder_input_ids"]  # without any, NLLB balances nothing
        if accepts(plain, "logits_to_keep"):
            inputs["logits_to_keep"] = 1 if self.head.complete else mask.shape[1] + past
        with keep_hidden_states(plain) as kept, precise_head(plain):
            output = plain(**inputs)
        predicting = slice(-mask.shape[1] - past, -past or None)
        logits = None if self.head.complete else output.logits[:, predicting][mask]
        router = _router_loss(plain, output) if routed else None
        return kept.hidden[:, predicting][mask], logits, router


def _values(head: ValueHead | None, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the values [N] of hidden states [N, d], zeros without a head; and what the loss of a
    head of bins needs, its logits [N, K], or None.
    """
    if head is None:
        return torch.zeros(len(hidden), device=hidden.device), None
    if not isinstance(head, BinsValueHead):
        return head(hidden), None
    logits = head.computed(hidden)
    return head.values(logits), logits if torch.is_grad_enabled() else None


def _decoder_inputs(plain: nn.Module, rollout: Rollout) -> dict[str, Any]:
    """Return the arguments of the decoder's forward pass."""
    inputs = _model_inputs(plain, rollout)
    if not plain.config.is_encoder_decoder:
        return inputs
    queries = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return {
        "input_ids": inputs["decoder_input_ids"],
        "attention_mask": inputs["decoder_attention_mask"],
        "encoder_hidden_states": hidden_of(plain.get_encoder()(**queries)),
        "encoder_attention_mask": queries["attention_mask"],
        "use_cache": False,
    }


def _model_inputs(plain: nn.Module, rollout: Rollout, past: int = 0) -> dict[str, Any]:
    """Return the arguments of the model's forward pass: all tokens but the last, which predicts
    nothing; or that too, with `past` = 1.

    For an encoder the queries are padded on the right: not all know where a text begins. Its
    decoder reads what starts a response, and all its tokens but the last. All of that counts,
    padding too, which comes last: by themselves some would take the token that starts a response
    for padding, since it has the same id (T5Gemma).
    """
    if plain.config.is_encoder_decoder:
        rows = zip(rollout.queries, rollout.query_mask, strict=True)
        queries, mask = pad_rows([row[seen] for row, seen in rows], left=False)
        start = rollout.responses.new_tensor(response_start(plain)).repeat(len(rollout), 1)
        tokens = torch.cat((start, rollout.responses[:, :-1]), dim=1)
        return {
            "input_ids": queries,
            "attention_mask": mask.long(),
            "decoder_input_ids": tokens,
            "decoder_attention_mask": torch.ones_like(tokens),
            "use_cache": False,
        }
    read = slice(rollout.attention_mask.shape[1] - 1 + past)
    inputs: dict[str, Any] = {
        "input_ids": rollout.input_ids[:, read],
        "attention_mask": rollout.attention_mask[:, read].long(),
        "use_cache": False,
    }
    if accepts(decoder(plain), "position_ids"):
        inputs["position_ids"] = rollout.position_ids[:, read]
    return inputs


def _router_weights(plain: nn.Module) -> dict[str, float]:
    """Return what the losses of the routers of a mixture of experts weigh, by kind; empty without
    `output_router_logits` in the model's configuration.
    """
    config = text_config(plain)
    if not getattr(config, "output_router_logits", False):
        return {}
    return {
        name.removeprefix("router_").removesuffix("_coef"): getattr(place, name)
        for place in (config, plain)  # the model's own goes over its configuration's
        for name in ("aux_loss_coef", "router_aux_loss_coef", "router_z_loss_coef")
        if getattr(place, name, None)
    }


def _router_loss(plain: nn.Module, output: Any) -> Tensor | None:
    """Return what transformers adds to the loss of a training pass, []; None: nothing."""
    losses = [
        weight * loss
        for kind, weight in _router_weights(plain).items()
        for part in ("", "encoder_", "decoder_")
        if isinstance(loss := getattr(output, part + kind, None), Tensor)
    ]
    return torch.stack(losses).sum() if losses else None
