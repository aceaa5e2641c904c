"""Weights that stay in their file until they are used: for those of which a process keeps a part.

A tensor of a safetensors file is a view of the file, mapped into memory: its pages are the file's,
shared by the processes of a host, and the system may drop them. A copy, or a cast to float32, is
memory of the process' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

_ATEN = torch.ops.aten
_THE_SAME = {_ATEN.detach.default, _ATEN.alias.default, _ATEN.clone.default}
"""What gives the same numbers, which nobody may change."""
_FORMATS = {torch.float32, torch.bfloat16, torch.float16}


class Stored(Tensor):
    """A float32 tensor whose numbers are held in another one, in the format of their file.

    Each operation casts them anew, and lets go of what it cast. They cannot be changed in place.

    Attributes:
        held: The numbers, of the same shape.
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Self:
        """Return what has no memory itself."""
        how: Any = {"strides": held.stride(), "dtype": torch.float32, "device": held.device}
        made: Self = Tensor._make_wrapper_subclass(cls, held.shape, **how)
        return made

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Return a weight with the same numbers, in the same memory."""
        copy = memo[id(self)] = nn.Parameter(Stored(self.held), self.requires_grad)
        return copy

    @property
    def data(self) -> Tensor:
        """The same numbers; others may take their place."""
        return self.detach()

    @data.setter
    def data(self, numbers: Tensor) -> None:  # type: ignore[override]
        if (numbers.shape, numbers.dtype, numbers.device) != (self.shape, self.dtype, self.device):
            raise TypeError(_UNCHANGED)
        self.held = held_of(numbers)

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Cast what an operation is given, but for those that need no cast of all of it."""
        kwargs = dict(kwargs or {})
        if func in _THE_SAME:
            return cls(args[0].held)
        if func is _ATEN.slice.Tensor:
            return cls(func(args[0].held, *args[1:], **kwargs))
        if func is _ATEN._to_copy.default:
            return func(args[0].held, **{"dtype": torch.float32, **kwargs})
        if func._schema.is_mutable:
            raise TypeError(_UNCHANGED)
        args, kwargs = tree_map_only(Stored, lambda x: x.held.float(), (args, kwargs))
        return func(*args, **kwargs)


_UNCHANGED = (
    "weights that were loaded with shard=True stay in their file, and must not be changed or moved "
    "before PPOTrainer(..., shard=True) shards them: load the model without `shard`."
)


def held_of(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor: that of its file, in the file's format, if it is there yet."""
    return tensor.held if isinstance(tensor, Stored) else tensor.detach()


def bring_in(tensors: Iterable[Tensor]) -> None:
    """Make tensors that are in their files ordinary ones: the same objects, in float32."""
    for tensor in tensors:
        if isinstance(tensor, Stored):
            own = tensor.held.to(torch.float32, copy=True)
            is_weight = isinstance(tensor, nn.Parameter)
            torch.utils.swap_tensors(
                tensor, nn.Parameter(own, tensor.requires_grad) if is_weight else own
            )


@contextmanager
def left_in_files(wanted: bool) -> Iterator[None]:
    """Let models that transformers loads inside, in float32, keep their weights in their files.

    It casts each to the precision that it is to have, in a function of its own. Of a release that
    has no such function, or for tensors of other formats, nothing changes.
    """
    from transformers import core_model_loading as loading

    cast: Callable[..., Tensor] | None = getattr(loading, _CASTS, None)
    if not wanted or cast is None:
        yield
        return

    def kept(tensor: Any, device: Any = None, dtype: Any = None) -> Tensor:
        own = cast(tensor, device)
        on_cpu = isinstance(own, Tensor) and own.device.type == "cpu"
        if on_cpu and dtype is torch.float32 and own.dtype in _FORMATS and own.is_contiguous():
            return Stored(own)
        return own.to(dtype=dtype)

    try:
        setattr(loading, _CASTS, kept)
        yield
    finally:
        setattr(loading, _CASTS, cast)


_CASTS = "_materialize_copy"
