"""A policy whose lower layers are frozen, and shared with its reference.

With `unfrozen_layers=k` only the top k decoder layers and what comes after them (a final norm, an
untied language head, the value head) are trained. What goes into them is then the same for policy,
reference and all epochs: it is computed once for each rollout, and kept in it. A pass that goes on
from there runs the model's own code, with the frozen layers handing on what they are given and the
first trained layer reading what was kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl.anatomy import called_modules, decoder, instead, text_config, try_out
from trl.config.errors import refuse


def decoder_layers(plain: PreTrainedModel) -> nn.ModuleList:
    """Return the stack of the decoder's layers.

    Raises:
        ValueError: if it cannot be told.
    """
    count = text_config(plain).num_hidden_layers
    for module in decoder(plain).children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    _refuse_split(plain, f"its decoder has no list of {count} layers")


def freeze_lower_layers(plain: PreTrainedModel, unfrozen_layers: int) -> None:
    """Leave the gradient on for the top `unfrozen_layers` decoder layers, and what is above them.

    Raises:
        ValueError: if the model does not have so many layers, or its family cannot be split.
    """
    if plain.config.is_encoder_decoder:
        _refuse_split(plain, "it is an encoder-decoder model")
    layers = decoder_layers(plain)
    whole_number = isinstance(unfrozen_layers, int) and not isinstance(unfrozen_layers, bool)
    if not whole_number or not 1 <= unfrozen_layers < len(layers):
        rule = f"be a whole number from 1 to {len(layers) - 1} for this model"
        refuse("unfrozen_layers", rule, repr(unfrozen_layers), "None trains all")
    top = set(layers[-unfrozen_layers:])
    inside = {weight for layer in top for weight in layer.parameters()}
    places = tuple(f"{name}." for name, part in plain.named_modules() if part in top)
    for name, weight in plain.named_parameters(remove_duplicate=False):
        if weight in inside and not name.startswith(places):  # as in Zamba
            where = f"below or above the top {unfrozen_layers} layers"
            _refuse_split(plain, f"`{name}`, {where}, is a weight of theirs too")
    trained = _upper_weights(plain, unfrozen_layers)
    for weight in plain.parameters():
        weight.requires_grad_(weight in trained)
    if any(weight.dtype != torch.float32 for weight in trained):
        _train_in_float32(plain, trained, layers[-unfrozen_layers])


def _train_in_float32(plain: PreTrainedModel, trained: set[nn.Parameter], first: nn.Module) -> None:
    """Make float32 of what is trained above layers that stay in low precision, and of what goes in.

    Args:
        plain: The language model.
        trained: Its weights that are trained.
        first: The lowest trained layer.
    """
    for weight in trained:
        weight.data = weight.data.float()
    first.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))
    head = plain.get_output_embeddings()
    head.register_forward_pre_hook(lambda head, inputs: (inputs[0].to(head.weight.dtype),))


def _upper_weights(plain: PreTrainedModel, unfrozen_layers: int) -> set[nn.Parameter]:
    """Return the weights of the top layers, and those that a pass uses after them only.

    These are a final norm and a head that is not tied to the embedding.
    """
    called, layers = called_modules(plain), decoder_layers(plain)
    place = called.index(layers[-1])
    below = {*called[:place], *(set(plain.modules()) - set(called))}
    for layer in layers[-unfrozen_layers:]:
        below -= set(layer.modules())
    elsewhere = {weight for module in below for weight in module.parameters(recurse=False)}
    return set(plain.parameters()) - elsewhere


class SharedTrunk:
    """The frozen layers of a policy, and passes that begin above them.

    Args:
        plain: The language model of the policy, its lower layers frozen. Nothing of it changes
            but what `step` trains.
        unfrozen_layers: k, the number of top layers that are trained.

    Raises:
        ValueError: if the family does not give the same logits when split so, or something
            below the top layers is to be trained.
    """

    def __init__(self, plain: PreTrainedModel, unfrozen_layers: int) -> None:
        layers = decoder_layers(plain)
        self.frozen, self.trained = layers[:-unfrozen_layers], layers[-unfrozen_layers:]
        _check_frozen(plain, unfrozen_layers)
        self._hands_on = _hand_on
        try:
            why = None if self._gives_the_same_logits(plain) else "its logits change"
        except Exception as error:  # whatever a family's own code makes of layers that hand on
            why = f"it fails with {type(error).__name__}: {error}"
        if why:
            _refuse_split(plain, f"its layers hand on more than hidden states ({why})")

    def _gives_the_same_logits(self, plain: PreTrainedModel) -> bool:
        """Find out what a layer returns, and if the split model gives the whole one's logits."""
        returned: list[Any] = []
        with self.frozen[0].register_forward_hook(lambda *seen: returned.append(seen[-1])):
            logits, _ = try_out(plain)
        if isinstance(returned[0], tuple):
            self._hands_on = _hand_on_as_tuple
        with self._keeping() as kept:
            try_out(plain)
        with self.from_kept(kept[0]):
            resumed, _ = try_out(plain)
        return torch.allclose(resumed, logits, rtol=1e-5, atol=1e-5)

    @torch.no_grad()
    def states(self, plain: PreTrainedModel, inputs: dict[str, Any]) -> Tensor:
        """Return what the frozen layers make of the decoder's inputs, [B, T, d]."""
        with self._keeping() as kept:
            decoder(plain)(**inputs)
        return kept[0]

    @contextmanager
    def from_kept(self, hidden: Tensor) -> Iterator[None]:
        """Start the passes inside at the trained layers, from `hidden` [B, T, d]."""
        with ExitStack() as stack:
            for layer in self.frozen:
                stack.enter_context(instead(layer, self._hands_on))
            before = self.trained[0].register_forward_pre_hook
            stack.enter_context(before(lambda _, inputs: (hidden, *inputs[1:])))
            yield

    @contextmanager
    def _keeping(self) -> Iterator[list[Tensor]]:
        """Keep what goes into the first trained layer; the trained layers hand it on."""
        kept: list[Tensor] = []

        def keep(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            kept.append(hidden)
            return self._hands_on(hidden)

        with ExitStack() as stack:
            stack.enter_context(instead(self.trained[0], keep))
            for layer in self.trained[1:]:
                stack.enter_context(instead(layer, self._hands_on))
            yield kept


def _check_frozen(plain: PreTrainedModel, unfrozen_layers: int) -> None:
    """Raise if a weight below the top layers is to be trained: passes start above it."""
    trained = _upper_weights(plain, unfrozen_layers)
    for name, weight in plain.named_parameters():
        if weight.requires_grad and weight not in trained:
            got = f"one in which `{name}` has requires_grad=True"
            fix = "call requires_grad_(False) on it, or load the model without `unfrozen_layers`"
            refuse("model", "be frozen below its top layers, as the reference shares it", got, fix)


def _refuse_split(plain: PreTrainedModel, why: str) -> NoReturn:
    fix = f"{why}. Train all of it, or a LoRA adapter"
    refuse("unfrozen_layers", f"be None for {type(plain).__name__}", fix=fix)


def _hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


def _hand_on_as_tuple(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
    return (hidden_states,)
