"""What the KL penalty is measured against, and where its log-probs come from.

copy            a frozen copy of the policy
adapters-off    the policy with its adapter (LoRA, …) switched off: one base in memory
shared-trunk    the policy's frozen lower layers, with an own copy of those that are trained
none            no reference: only with a KL coefficient of 0
a model         one of the user's
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

from torch import nn

from trl.anatomy import language_model
from trl.config import closest
from trl.models.adapters import base_weights, check_enabled
from trl.models.response import ResponseModel
from trl.models.trunk import SharedTrunk

ReferenceKind = Literal["copy", "adapters-off", "shared-trunk", "none"]


class Reference:
    """Answers by `module`, inside of `switched()`.

    Attributes:
        kind: One of `ReferenceKind`, or "model".
        model: The model of its own, None if it is the policy's.
        module: What to run: a `ResponseModel` around that model, or the policy's.
    """

    def __init__(
        self, kind: str, policy: nn.Module, module: ResponseModel, model: nn.Module | None
    ) -> None:
        self.kind, self.policy = kind, policy
        self.module: nn.Module = module
        self.model = model

    def switched(self) -> AbstractContextManager[None]:
        """Return a context in which `module` answers as the reference."""
        if self.kind == "adapters-off":
            return _adapter_off(self.policy)
        if self.kind == "shared-trunk":
            return self.module.trunk.reference()
        return nullcontext()


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


def make_reference(
    policy: nn.Module, responder: ResponseModel, asked: nn.Module | ReferenceKind | None
) -> Reference | None:
    """Return the reference that was asked for, or the one that suits the policy.

    Args:
        policy: The policy, its weights as the reference is to know them.
        responder: The policy's `ResponseModel`; gets its `trunk` here if it has one.
        asked: A model, a kind, or None: adapters-off for a policy with an adapter, shared-trunk
            for one with `unfrozen_layers`, else a copy.

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
    if asked is None:
        asked = "adapters-off" if adapter else "copy" if unfrozen_layers is None else "shared-trunk"
    if isinstance(asked, nn.Module):
        return Reference("model", policy, ResponseModel(asked, responder.temperature), asked)
    if asked not in get_args(ReferenceKind):
        raise ValueError(
            f"`ref_model` must be a model or one of {list(get_args(ReferenceKind))}, got {asked!r}."
            + closest(str(asked), get_args(ReferenceKind))
        )
    if asked == "none":
        return None
    if asked == "adapters-off" and not adapter:
        raise ValueError(
            "`ref_model` 'adapters-off' must go with a policy that has an adapter, got a plain "
            "model: load it with peft_config=..., or leave `ref_model` out."
        )
    if asked == "adapters-off":
        _check_base_frozen(policy)
    if asked == "shared-trunk" and unfrozen_layers is None:
        raise ValueError(
            "`ref_model` 'shared-trunk' must go with a policy whose lower layers are frozen, got "
            "one without: load it with unfrozen_layers=..., or leave `ref_model` out."
        )
    if asked == "copy":
        model = copy.deepcopy(policy).requires_grad_(False)
        return Reference("copy", policy, ResponseModel(model, responder.temperature), model)
    return Reference(asked, policy, responder, None)


def _check_base_frozen(policy: nn.Module) -> None:
    """Raise if something is trained that stays in force when the adapter is switched off."""
    for name, weight in base_weights(language_model(policy)):
        if weight.requires_grad:
            raise ValueError(
                f"`ref_model` 'adapters-off' needs a base model that is not trained, but `{name}` "
                "has requires_grad=True: make the adapter with bias='none', freeze the weight, or "
                "pass ref_model='copy'."
            )
