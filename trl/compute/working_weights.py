"""Copies of a model's matrices in the low precision that they are multiplied in.

Weights are float32, so that small updates count. autocast casts them for every product of every
pass, and every gradient back. Here a matrix is cast once for each update, into memory that stays,
and takes the matrix' place in its module; its gradient goes to the matrix. The numbers are those
of autocast, bit for bit, in a single pass; over several, gradients add up in float32 alike.

Several processes exchange gradients where autograd adds them to the matrices. A copy of theirs is
joined to its matrix: autograd knows it for the matrix, cast, and takes the gradient of every pass
back through that one cast, which keeps nothing that a pass could use up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trl.anatomy import instead, language_model
from trl.kernels.gradients import Gradients, has_hooks
from trl.kernels.packed import can_pack, packed_product
from trl.models.critic import critic_of
from trl.models.head import CentredWeights, constant_weights


class WorkingWeights:
    """The matrices of a model, and their copies while they are in use.

    Args:
        model: A language model, with or without a value head.
        dtype: The precision of autocast; None: there is none, so nothing is copied.

    Attributes:
        gradients: What collects the gradients of the copies. An attribute, since on a GPU autograd
            hands them over in a thread of its own.
        copies: Of the `weights`, while they are in use.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._places = _matrices(model) if dtype is not None else []
        critic = critic_of(model)
        of_critic = set() if critic is None else set(critic.modules())
        self._of_sampling = [module for module in self._places if module not in of_critic]
        self.gradients: Gradients | None = None
        self.copies: dict[nn.Parameter, Tensor] = {}
        self._centred: CentredWeights | None = None  # None: not in use

    @property
    def weights(self) -> list[nn.Parameter]:
        """The float32 weights that are copied, while no copies are in use."""
        return list(dict.fromkeys(m.weight for m in self._places if not has_hooks(m.weight)))

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Multiply by packed copies inside, where the CPU has a use for them: for sampling."""
        places = [] if self._centred is not None else self._of_sampling
        with ExitStack() as stack:
            if places and can_pack(places[0].weight.device, self._dtype):
                stack.enter_context(constant_weights(packed=True, apart=True))
                for module in places:
                    stack.enter_context(instead(module, _packed_linear(module, self._dtype)))
            else:
                stack.enter_context(self.in_use(places))
            yield

    @contextmanager
    def in_use(
        self, only: Collection[nn.Module] | None = None, *, joined: bool = False
    ) -> Iterator[None]:
        """Let the copies stand in for the matrices; whoever changes a weight calls `refresh`.

        Args:
            only: The modules whose matrices they are; None: all.
            joined: Let autograd take their gradients to the matrices, in place of `gradients`.
        """
        if self._centred is not None:
            yield
            return
        places = self._places if only is None else only
        places = [(m, m.weight) for m in places if not has_hooks(m.weight)]
        try:
            with constant_weights(apart=True) as self._centred:
                copy = self._joined_copy if joined else self._copy
                self.copies = {w: copy(w) for w in dict.fromkeys(w for _, w in places)}
                for module, weight in places:
                    # Not by name: a module takes nothing but a leaf of autograd's graph.
                    module._parameters["weight"] = cast(nn.Parameter, self.copies[weight])
                yield
        finally:
            for module, weight in places:
                module.weight = weight
            self.copies, self._centred = {}, None

    @torch.no_grad()
    def refresh(self, renewed: Collection[nn.Parameter] = ()) -> None:
        """Make the copies anew, in the same memory, after the weights have changed.

        Args:
            renewed: Those of the weights whose copies are new already; a set, or none.
        """
        for weight, copy in self.copies.items():
            if weight.requires_grad and weight not in renewed:
                copy.copy_(weight)
        if self._centred is not None:
            self._centred.refresh()

    def replace(self) -> None:
        """Put the copies in the place of the matrices for good: for a frozen model."""
        for module in self._places:
            module.weight = nn.Parameter(module.weight.to(self._dtype), requires_grad=False)
        self._places = []

    def _joined_copy(self, weight: nn.Parameter) -> Tensor:
        return weight.to(self._dtype)

    def _copy(self, weight: nn.Parameter) -> Tensor:
        copy = nn.Parameter(weight.detach().to(self._dtype), requires_grad=weight.requires_grad)

        def hand_over(copy: Tensor) -> None:
            gradient, copy.grad = copy.grad, None
            self.gradients.receive(weight, gradient)

        if weight.requires_grad:
            copy.register_post_accumulate_grad_hook(hand_over)
        return copy


def _packed_linear(module: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return what an nn.Linear or Conv1D computes under autocast."""
    weight = module.weight.detach().to(dtype)
    bias = None if module.bias is None else module.bias.detach().to(dtype)
    return packed_product(weight.T if isinstance(module, Conv1D) else weight, bias)


def _matrices(model: nn.Module) -> list[nn.Module]:
    """Return the modules that do nothing with their weight but multiply by it.

    Left out are heads and routers, which see to their precision themselves, and weights that
    another kind of module has too.
    """
    apart: set[nn.Module | None] = set()
    for part in filter(None, (model, critic_of(model))):
        plain = language_model(part)
        apart.add(getattr(plain, "get_output_embeddings", lambda: None)())
        apart.update((getattr(part, "v_head", None) or nn.Module()).modules())
    for module in model.modules():
        # Some routers convert their own layer in every pass, by what fits a leaf alone.
        converts = "router" in type(module).__name__.lower()
        if converts or (hasattr(module, "base_layer") and not _only_multiplies(module)):
            apart.update(module.modules())

    def suits(module: nn.Module) -> bool:
        return (
            type(module) in (nn.Linear, Conv1D)
            and module not in apart
            and "weight" in module._parameters  # pruning and the like make one of others
            and not hasattr(module, "_hf_hook")  # accelerate moves this one's weights about
            and module.weight.dtype == torch.float32
        )

    others = (module for module in model.modules() if not suits(module))
    used_by_others = {weight for other in others for weight in other.parameters(recurse=False)}
    return [m for m in model.modules() if suits(m) and m.weight not in used_by_others]


def _only_multiplies(adapter: Any) -> bool:
    """Return whether a layer of peft uses its weights in products alone: LoRA, but not DoRA."""
    is_lora = type(adapter).__name__ == "Linear" and "lora" in type(adapter).__module__
    return is_lora and not any(getattr(adapter, "use_dora", {}).values())
