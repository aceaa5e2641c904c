"""Where the gradients of an update are collected: in memory that is kept for the next one.

Autograd by itself makes a new tensor for each gradient of each pass, and new memory is slow: the
system clears every page of it. For an embedding that tensor is as large as the vocabulary, however
few of its rows were used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_collecting: ContextVar[Gradients | None] = ContextVar("collecting", default=None)


def has_hooks(weight: Tensor) -> bool:
    """Return whether the user wants to see the gradient of a weight, so that autograd makes it."""
    return bool(weight._backward_hooks or weight._post_accumulate_grad_hooks)


class Gradients:
    """The gradients of weights, kept from update to update.

    Args:
        received: Weights that get their gradients from `receive` alone.
        added_to: Weights whose gradients are added to in place.
        made_anew: Weights whose gradients autograd makes.
        keep_low: Leave a gradient that was received once in an update as it is, in `low`.

    Attributes:
        low: Once an update has ended, the weights whose gradient is left in low precision, and
            those gradients. `.grad` of these weights is None.
    """

    def __init__(
        self,
        received: Iterable[Tensor],
        added_to: Iterable[Tensor],
        made_anew: Iterable[Tensor],
        *,
        keep_low: bool = False,
    ) -> None:
        self._received = {id(weight): weight for weight in received}
        self._added_to = {id(weight): weight for weight in added_to}
        self._made_anew = list(made_anew)
        self._keep_low = keep_low
        self.low: list[tuple[Tensor, Tensor]] = []
        self._first: dict[int, Tensor] = {}  # what this update has received once
        self._room: dict[int, Tensor] = {}  # for a gradient in float32
        self._seen: set[int] = set()  # weights that have had a gradient

    @staticmethod
    def collecting() -> Gradients | None:
        """Return the gradients that are being collected now, if any are."""
        return _collecting.get()

    @contextmanager
    def collect(self) -> Iterator[Gradients]:
        """Collect the gradients of the passes inside, and yield self; afterwards there are none."""
        token = _collecting.set(self)
        try:
            yield self
        finally:
            _collecting.reset(token)
            for weight in (*self._made_anew, *self._received.values(), *self._added_to.values()):
                weight.grad = None
            self.low, self._first, self._room, self._seen = [], {}, {}, set()

    def start(self) -> None:
        """Begin an update: gradients count from zero."""
        for weight in (*self._made_anew, *self._received.values()):
            weight.grad = None
        for weight in self._added_to.values():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.zero_()
        self.low, self._first = [], {}

    def adds_to(self, weight: Tensor) -> bool:
        """Return whether one may add to `weight.grad` in place."""
        return id(weight) in self._added_to

    def receive(self, weight: Tensor, gradient: Tensor) -> None:
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
            if gradient is None:
                continue
            if self._keep_low and weight.is_contiguous() and gradient.is_contiguous():
                self.low.append((weight, gradient))
            else:
                weight.grad = self._in_float32(weight, gradient)

    def _in_float32(self, weight: Tensor, gradient: Tensor) -> Tensor:
        name = id(weight)
        if name not in self._room:
            self._room[name] = torch.empty_like(weight)
        return self._room[name].copy_(gradient)
