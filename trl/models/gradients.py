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
        keep_low: Leave a gradient that was received once in an update as it is, in `low`.

    Attributes:
        low: Once an update has ended, the weights whose gradient is left in low precision, and
            those gradients. `.grad` of these weights is None.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Sequence[nn.Parameter],
        received: Sequence[nn.Parameter],
        *,
        keep_low: bool = False,
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
        self._keep_low = keep_low
        self.low: list[tuple[nn.Parameter, Tensor]] = []
        self._first: dict[int, Tensor] = {}  # what this update has received once
        self._room: dict[int, Tensor] = {}  # for a gradient in float32
        self._seen: set[int] = set()  # weights that have had a gradient

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
            self.low, self._first, self._room, self._seen = [], {}, {}, set()

    def start(self) -> None:
        """Begin an update: gradients count from zero."""
        for weight in self._made_anew:
            weight.grad = None
        for weight in self._added_to.values():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.zero_()
        for weight in self._received.values():
            weight.grad = None
        self.low, self._first = [], {}

    def adds_to(self, weight: Tensor) -> bool:
        """Return whether one may add to `weight.grad` in place."""
        return id(weight) in self._added_to

    def receive(self, weight: nn.Parameter, gradient: Tensor) -> None:
        """Take the gradient that a pass gave a weight; none that the optimiser does not own."""
        name = id(weight)
        if name not in self._received:
            return
        if weight.grad is None and name not in self._first:
            self._first[name] = gradient
            return
        if weight.grad is None:
            weight.grad = self._in_float32(weight, self._first.pop(name))
        weight.grad.add_(gradient)

    def finish(self) -> None:
        """End an update: a weight that no pass has used has the gradient zero, or none."""
        for name, weight in self._received.items():
            gradient = self._first.pop(name, None)
            if gradient is None and weight.grad is None:
                if name in self._seen:
                    weight.grad = torch.zeros_like(weight)
                continue
            self._seen.add(name)
            if gradient is not None and self._stays_low(weight, gradient):
                self.low.append((weight, gradient))
            elif gradient is not None:
                weight.grad = self._in_float32(weight, gradient)

    def _stays_low(self, weight: Tensor, gradient: Tensor) -> bool:
        return self._keep_low and weight.is_contiguous() and gradient.is_contiguous()

    def _in_float32(self, weight: Tensor, gradient: Tensor) -> Tensor:
        name = id(weight)
        if name not in self._room:
            self._room[name] = torch.empty_like(weight)
        return self._room[name].copy_(gradient)
