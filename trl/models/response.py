"""What training asks of a model: log-prob, value and entropy of each response token."""

from __future__ import annotations

from contextlib import nullcontext
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
    vocabulary_size,
    without_dropout,
)
from trl.anatomy import last_hidden_state as hidden_of
from trl.batch import ResponseOutput, Rollout, pad_rows
from trl.core import logprobs_and_entropy
from trl.models.head import LanguageHead, precise_head
from trl.models.quick_kernels import QuickKernels
from trl.models.shared_prompts import Packed, can_pack, pack, trial_of_groups
from trl.models.side_by_side import fill_lines, line_up, places, trial_of_rows
from trl.models.trunk import SharedTrunk


class ResponseModel(nn.Module):
    """Wraps a language model to answer for response tokens only.

    The decoder runs over the whole sequence; heads and softmax only where a counted response token
    is predicted, so no tensor of [B, T, V] exists. A model that makes its logits in a way that
    `LanguageHead` does not know makes them itself, for all columns of the responses.

    Args:
        model: A causal or an encoder-decoder language model of transformers, with a `v_head` if
            it is a policy.
        temperature: The logits are divided by it, as they were while sampling.

    Attributes:
        trunk: If the policy's lower layers are frozen, what makes a pass start above them for a
            rollout with `trunk_states`.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.trunk: SharedTrunk | None = None
        self._plain = (language_model(model),)  # in a tuple: it is a part of `model` already
        self.head = LanguageHead(self.plain)
        self.quick = QuickKernels(self.plain)

    @property
    def plain(self) -> PreTrainedModel:
        """The language model itself."""
        return self._plain[0]

    def forward(self, rollout: Rollout) -> ResponseOutput:
        """Return log-probs, values and entropies [B, R] of the response tokens."""
        mask = rollout.response_mask
        labels = rollout.responses[mask]  # [N], the counted tokens
        states = rollout.trunk_states
        resumed = states is not None and self.trunk is not None
        with (
            self.trunk.from_kept(states) if resumed else nullcontext(),
            self.quick.in_use(),
        ):
            if self.head.complete:
                hidden = self._predicting(rollout, None if resumed else self._packed(rollout))
                logprobs, entropy = self.head.logprobs(hidden, labels, self.temperature)
            else:
                last = rollout.responses.shape[1]
                with keep_hidden_states(self.plain) as kept, precise_head(self.plain):
                    logits = _models_logits(self.plain, rollout, last)[:, -last:][mask]
                hidden = kept.hidden[:, -last:][mask]
                logprobs, entropy = logprobs_and_entropy(
                    logits, labels, temperature=self.temperature
                )
        value_head = getattr(self.model, "v_head", None)
        values = torch.zeros_like(logprobs) if value_head is None else value_head(hidden)
        empty = torch.zeros(mask.shape, device=mask.device)
        return ResponseOutput(
            *(empty.masked_scatter(mask, column.float()) for column in (logprobs, values, entropy))
        )

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


def _decoder_inputs(plain: nn.Module, rollout: Rollout) -> dict[str, Tensor | bool]:
    """Return the arguments of the decoder's forward pass: all tokens but the last, which predicts
    nothing.
    """
    if plain.config.is_encoder_decoder:
        encoded, mask, tokens = _encoded(plain, rollout)
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "encoder_hidden_states": hidden_of(encoded),
            "encoder_attention_mask": mask,
            "use_cache": False,
        }
    inputs: dict[str, Tensor | bool] = {
        "input_ids": rollout.input_ids[:, :-1],
        "attention_mask": rollout.attention_mask[:, :-1].long(),
        "use_cache": False,
    }
    if accepts(decoder(plain), "position_ids"):
        inputs["position_ids"] = rollout.position_ids[:, :-1]
    return inputs


def _encoded(plain: nn.Module, rollout: Rollout) -> tuple[Any, Tensor, Tensor]:
    """Return what the encoder gives for the queries, their mask [B, Q], and what the decoder reads:
    what starts a response, and all its tokens but the last.

    The queries are padded on the right: not all encoders know where a text begins. All that the
    decoder reads counts, padding too, which comes last: by themselves some would take the token
    that starts a response for padding, since it has the same id (T5Gemma).
    """
    rows = zip(rollout.queries, rollout.query_mask, strict=True)
    queries, mask = pad_rows([row[seen] for row, seen in rows], left=False)
    encoded = plain.get_encoder()(input_ids=queries, attention_mask=mask.long())
    start = rollout.responses.new_tensor(response_start(plain)).repeat(len(rollout), 1)
    return encoded, mask.long(), torch.cat((start, rollout.responses[:, :-1]), dim=1)


def _models_logits(plain: nn.Module, rollout: Rollout, last: int) -> Tensor:
    """Return the logits that the model makes itself, of the `last` tokens or more."""
    if plain.config.is_encoder_decoder:
        encoded, mask, tokens = _encoded(plain, rollout)
        return plain(
            encoder_outputs=encoded,  # its own kind of output: it may have more than hidden states
            attention_mask=mask,
            decoder_input_ids=tokens,
            decoder_attention_mask=torch.ones_like(tokens),
            use_cache=False,
        ).logits
    inputs = _decoder_inputs(plain, rollout)
    if accepts(plain, "logits_to_keep"):
        inputs["logits_to_keep"] = last
    return plain(**inputs).logits
