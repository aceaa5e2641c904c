"""The device of the tests of this folder: CUDA, or what TRL_GPU_TESTS_ON says.

TRL_GPU_TESTS_ON=cpu runs on the CPU what has a meaning there: it tries out the tests themselves.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ASKED = os.environ.get("TRL_GPU_TESTS_ON", "cuda")
DEVICE = torch.device(ASKED)
CPU = torch.device("cpu")

aten = torch.ops.aten
_ASK_THE_DEVICE = (
    aten._local_scalar_dense,
    aten.equal,
    aten.masked_select,
    aten.nonzero,
    aten.unique_consecutive,
    aten._unique2,
)
_TAKE_MASKS = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


def only_on_cuda(why: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(DEVICE.type != "cuda", reason=f"only on CUDA: {why}")


@contextmanager
def trainers_on(device: torch.device) -> Iterator[None]:
    """Inside, trainers choose the device; accelerate has one for all of a process at a time."""
    _forget_the_accelerator()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", str(device.type == "cpu").lower())
        yield
    _forget_the_accelerator()


def _forget_the_accelerator() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def waits(function: Callable[[], Any]) -> int:
    """How often Python waits for the device while the function runs.

    On the CPU nothing waits: what would do so on CUDA is counted, but for copies between the two.
    """
    if DEVICE.type != "cuda":
        with _Waits() as counted:
            function()
        return counted.number
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


class _Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        packet = function.overloadpacket
        by_mask = packet in _TAKE_MASKS and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        self.number += packet in _ASK_THE_DEVICE or by_mask
        return function(*args, **kwargs or {})
