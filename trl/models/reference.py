"""What the KL penalty is measured against, and where its log-probs come from.

copy            a frozen copy of the policy
adapters-off    the policy with its adapter (LoRA, …) switched off: one base in memory
adapter-at-start  the policy with its adapter as it was at first: for one that is trained already,
                or that changed its base when it was made (PiSSA, OLoRA)
shared-trunk    the policy's frozen lower layers, with what is above them as it was at first
none            no reference: only with a KL coefficient of 0
a model         one of the user's
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, get_args

import torch
from torch import Tensor, nn

from trl.anatomy import language_model, try_out, vocabulary_size
from trl.config import check_values
from trl.config.errors import refuse
from trl.kernels.sharded import is_sharded, own_part
from trl.models.adapters import base_weights, check_enabled
from trl.models.critic import shares_trunk, without_critic
from trl.models.response import ResponseModel
from trl.models.trunk import SharedTrunk

ReferenceKind = Literal["copy", "adapters-off", "adapter-at-start", "shared-trunk", "none"]

_KINDS = Annotated[ReferenceKind, f"a model or one of {', '.join(get_args(ReferenceKind))}"]

ADAPTER_GAP = 1e-3
"""Relative difference of logits that is more than rounding."""


@dataclass
class Reference:
    """Answers by `module`, inside of `switched()`.

    Attributes:
        kind: One of `ReferenceKind`, or "model".
        module: What to run: a `ResponseModel` around that model, or the policy's.
        model: The model of its own, None if it is the policy's.
        switched: Returns a context in which `module` answers as the reference.
    """

    kind: str
    module: nn.Module
    model: nn.Module | None = None
    switched: Callable[[], AbstractContextManager[None]] = nullcontext


@contextmanager
def _adapter_off(policy: nn.Module) -> Iterator[None]:
    """Switch the adapter off inside; what is trained stays so, which PEFT would not see to."""
    trained = [(weight, weight.requires_grad) for weight in policy.parameters()]
    try:
        with policy.pretrained_model.disable_adapter():
            yield
    finally:
        for weight, requires_grad in trained:
            weight.requires_grad = requires_grad


@contextmanager
def _swapped(weights: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Give weights other numbers inside, without copying any that are not sharded."""

    @torch.no_grad()
    def swap() -> None:
        for weight, other in weights:
            if is_sharded(weight):  # what is gathered is copied from where it lies
                part, others = own_part(weight), own_part(other)
                before = part.clone()
                part.copy_(others)
                others.copy_(before)
            else:
                weight.data, other.data = other.data, weight.data

    swap()
    try:
        yield
    finally:
        swap()


def as_at_start(policy: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Return what gives the trained weights inside the numbers that they have now."""
    trained = [w for w in language_model(policy).parameters() if w.requires_grad]
    return partial(_swapped, [(weight, weight.detach().clone()) for weight in trained])


def make_reference(
    policy: nn.Module,
    responder: ResponseModel,
    asked: nn.Module | ReferenceKind | None,
    copied: Callable[[ResponseModel], ResponseModel] | None = None,
) -> Reference | None:
    """Return the reference that was asked for, or the one that suits the policy.

    Args:
        policy: The policy, its weights as the reference is to know them.
        responder: The policy's `ResponseModel`; gets its `trunk` here if it has one.
        asked: A model, a kind, or None: adapters-off for a policy with an adapter that changes
            nothing yet, adapter-at-start for one that does, shared-trunk for one with
            `unfrozen_layers`, else a copy.
        copied: Makes a copy of `responder` and its policy; None: the policy is copied as it is.

    Returns:
        None for the kind "none".

    Raises:
        ValueError: if the kind is unknown or does not fit the policy.
    """
    adapter = hasattr(getattr(policy, "pretrained_model", None), "disable_adapter")
    if adapter:
        check_enabled(policy)
    unfrozen_layers = getattr(policy, "unfrozen_layers", None)
    if unfrozen_layers is not None:
        responder.trunk = SharedTrunk(language_model(policy), unfrozen_layers)
        if responder.critic is not None and shares_trunk(policy):
            responder.critic.trunk = SharedTrunk(responder.critic.plain, unfrozen_layers)
    if asked is None and adapter:
        _check_base_frozen(policy)  # switched off, such a base gives PEFT's own warning
        asked = "adapter-at-start" if _adapter_gap(policy) > 0 else "adapters-off"
    elif asked is None:
        asked = "copy" if unfrozen_layers is None else "shared-trunk"
    if isinstance(asked, nn.Module):
        return Reference("model", ResponseModel(asked, responder.temperature), asked)
    check_values("PPOTrainer", {"ref_model": (_KINDS, asked)})
    if asked == "none":
        return None
    if asked == "copy" and copied is not None:
        module = copied(responder).requires_grad_(False)
        return Reference("copy", module, module.model)
    if asked == "copy":
        with without_critic(policy):
            model = copy.deepcopy(policy).requires_grad_(False)
        return Reference("copy", ResponseModel(model, responder.temperature), model)
    shares = asked == "shared-trunk"
    fits = responder.trunk is not None if shares else adapter
    if not fits:
        needed = "unfrozen_layers=..." if shares else "peft_config=..."
        rule = f"go with a policy that was loaded with {needed} if it is {asked!r}"
        refuse("ref_model", rule, "one without", "load it so, or leave `ref_model` out")
    if not shares:
        _check_base_frozen(policy)
    if asked != "adapters-off":
        return Reference(asked, responder, switched=as_at_start(policy))
    if (gap := _adapter_gap(policy)) > ADAPTER_GAP:
        warnings.warn(
            f"with ref_model='adapters-off' the policy does not start at its reference: its logits "
            f"differ by up to {gap:.0%}, since the adapter is trained already, or changed its base "
            "when it was made. The KL is not 0 at the start. Leave `ref_model` out to measure it "
            "from where the policy starts.",
            stacklevel=4,
        )
    return Reference(asked, responder, switched=partial(_adapter_off, policy))


@torch.no_grad()
def _adapter_gap(policy: nn.Module) -> float:
    """Return by how much the adapter changes the logits of a few tokens, or the embedding of any,
    relative to the largest.

    0 for a fresh adapter that adds to its base, as those of LoRA are at first.
    """
    plain = language_model(policy)
    embedding = plain.get_input_embeddings()
    asked: list[Callable[[], Tensor]] = [lambda: try_out(plain)[0]]
    if next(embedding.children(), None) is not None:  # it may be changed for a single token
        ids = torch.arange(vocabulary_size(plain), device=plain.device)
        asked += [partial(embedding, some) for some in ids.split(4096)]
    gaps = []
    for answer in asked:
        with_adapter = answer()
        with _adapter_off(policy):
            without = answer()
        gaps.append(float((with_adapter - without).abs().max() / with_adapter.abs().max()))
    return max(gaps)


def _check_base_frozen(policy: nn.Module) -> None:
    """Raise if something is trained that stays in force when the adapter is switched off."""
    for name, weight in base_weights(language_model(policy)):
        if weight.requires_grad:
            raise ValueError(
                f"`ref_model` 'adapters-off' needs a base model that is not trained, but `{name}` "
                "has requires_grad=True: make the adapter with bias='none', freeze the weight, or "
                "pass ref_model='copy'."
            )
