"""Where the gradients of an update are collected: in memory that is kept for the next one.

Autograd by itself makes a new tensor for each gradient of each pass, and new memory is slow: the
system clears every page of it. For an embedding that tensor is as large as the vocabulary, however
few of its rows were used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from trl.anatomy import language_model

_SPARSE_DEVICES = ("cpu", "cuda")

_collecting: ContextVar[Gradients | None] = ContextVar("collecting", default=None)


def has_hooks(weight: Tensor) -> bool:
    """Return whether the user wants to see the gradient of a weight, so that autograd makes it."""
    return bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)


class Gradients:
    """The gradients of the trained weights, kept from update to update.

    A weight is one of three kinds: its gradient comes from `receive` alone; or it is added to in
    place (embeddings, and a language head tied to one); or autograd makes it anew.

    Args:
        model: The model whose weights are trained.
        weights: Those of them that an optimiser owns.
        received: Those that get their gradients from `receive`.
    """

    def __init__(
        self, model: nn.Module, weights: Sequence[nn.Parameter], received: Sequence[nn.Parameter]
    ) -> None:
        trained = {id(weight) for weight in weights}
        self._received = {id(weight): weight for weight in received if id(weight) in trained}
        adapted = {id(getattr(module, "base_layer", None)) for module in model.modules()}
        self._embeddings = [
            module
            for module in model.modules()
            if isinstance(module, nn.Embedding)
            and id(module.weight) in trained
            and id(module) not in adapted  # its adapter looks up dense rows in the same way
            and not has_hooks(module.weight)
            and module.max_norm is None
            and not module.scale_grad_by_freq
        ]
        adding = [*self._embeddings, language_model(model).get_output_embeddings()]
        added_to = {id(module.weight): module.weight for module in adding if module is not None}
        self._added_to = {
            name: added_to[name]
            for name in added_to.keys() & trained
            if not has_hooks(added_to[name])
        }
        kept = self._received.keys() | self._added_to.keys()
        self._made_anew = [weight for weight in model.parameters() if id(weight) not in kept]
        self._stale: set[int] = set()

    @staticmethod
    def collecting() -> Gradients | None:
        """Return the gradients that are being collected now, if any are."""
        return _collecting.get()

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Collect the gradients of the passes inside; afterwards there are none."""
        embeddings = [m for m in self._embeddings if m.weight.device.type in _SPARSE_DEVICES]
        sparse = [module.sparse for module in embeddings]
        token = _collecting.set(self)
        for module in embeddings:
            module.sparse = True  # only the rows that were used are added
        try:
            yield
        finally:
            _collecting.reset(token)
            for module, own in zip(embeddings, sparse, strict=True):
                module.sparse = own
            for weight in (*self._made_anew, *self._received.values(), *self._added_to.values()):
                weight.grad = None

    def start(self) -> None:
        """Begin an update: gradients count from zero."""
        for weight in self._made_anew:
            weight.grad = None
        for weight in self._added_to.values():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.zero_()
        self._stale = set(self._received)

    def adds_to(self, weight: Tensor) -> bool:
        """Return whether one may add to `weight.grad` in place."""
        return id(weight) in self._added_to

    def receive(self, weight: nn.Parameter, gradient: Tensor) -> None:
        """Take the gradient that a pass gave a weight; none that the optimiser does not own."""
        if id(weight) not in self._received:
            return
        if weight.grad is None:
            weight.grad = torch.empty_like(weight)
        if id(weight) in self._stale:
            self._stale.remove(id(weight))
            weight.grad.copy_(gradient)
        else:
            weight.grad.add_(gradient)

    def finish(self) -> None:
        """End an update: a weight that no pass has used has the gradient zero, or none."""
        for name in self._stale:
            weight = self._received[name]
            if weight.grad is not None:
                weight.grad.zero_()
