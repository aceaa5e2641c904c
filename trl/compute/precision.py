"""Where the matrix products run, and how precisely: an `Accelerator` for a precision."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from trl.compute.peers import watch_peers
from trl.compute.starting import check_joined, joins_on_cpu
from trl.config.errors import refuse

TEN_MINUTES = 600.0
MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10}
"""Bits of it."""
_HEAD = "get_output_embeddings"
_AT_ONCE = 2**24
"""Weights that `dither` has in its hands at a time."""


def fast_bf16(device: torch.device) -> bool:
    """Return whether matrix products in bfloat16 are in the hardware of `device`."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def check_accelerator(accelerator: Accelerator, precision: str) -> None:
    """Raise a ValueError if the accelerator would do something else than a trainer asks for."""
    check_joined(accelerator)
    if (steps := accelerator.gradient_accumulation_steps) != 1:
        fix = "the trainer accumulates by itself, set `forward_batch_size` or `token_budget`"
        refuse("accelerator", "have gradient_accumulation_steps 1", steps, fix)
    its = accelerator.mixed_precision
    if MIXED_PRECISION.get(precision, its) != its:
        got = f"{precision!r} and {its!r}"
        refuse("precision", "agree with the accelerator's", got, "leave `precision` at 'auto'")


def make_accelerator(precision: str, timeout: float = TEN_MINUTES) -> Accelerator:
    """Return an accelerator whose autocast runs at `precision` ("auto", "fp32", "bf16", "fp16").

    "auto" is what `accelerate launch` was told, or what an accelerator of this process already
    has; else bf16 where the hardware is fast at it, else fp32.

    Args:
        precision: Of autocast.
        timeout: Seconds that the processes of a run wait for each other, at most, before they end.

    Raises:
        ValueError: for fp16 on a CPU, which has no use for it; for processes that do not make one
            run.
    """
    _accelerator = partial(_joined, timeout)
    settled = "ACCELERATE_MIXED_PRECISION" in os.environ or AcceleratorState._shared_state
    if precision == "auto" and settled:
        return _accelerator()
    device = _accelerator().device
    if precision == "auto":
        precision = "bf16" if fast_bf16(device) else "fp32"
    if precision == "fp16" and device.type == "cpu":
        refuse("precision", "be 'fp32', 'bf16' or 'auto' on a CPU", "'fp16'")
    wanted = MIXED_PRECISION[precision]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        # One process has one AcceleratorState. A trainer that exists keeps the autocast that it
        # was prepared with; only what is made from now on gets the new precision.
        AcceleratorState._reset_state()
    return _accelerator(mixed_precision=wanted)


def _joined(timeout: float, **settings: Any) -> Accelerator:
    """Return an accelerator, in whose group of processes no one waits for ever."""
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=timeout))
    accelerator = Accelerator(cpu=joins_on_cpu(), kwargs_handlers=[group], **settings)
    check_joined(accelerator)
    watch_peers(accelerator, timeout)
    return accelerator


def dither(model: nn.Module, low: torch.dtype | None) -> None:
    """Fill the digits that weights lack since they were stored in a coarser format.

    In float32 small updates add up; products see of them what a cast leaves. Weights of all digits
    lie anywhere between two numbers of `low`, so that an update by δ takes δ / (their distance) of
    them to the next one: what products see moves by δ on average. Weights from bfloat16 lie on its
    numbers, where no update below half a distance is seen (SmolLM2 so rounded, one update by 1e-6:
    approxkl 1e-6, where 6e-4 is right); those from float16 or 4 bits often lie halfway, where every
    one moves them by a whole distance in the direction of the gradient (approxkl 0.21 instead of
    5e-7 at 3e-8). Each goes to a place among the numbers of float32 that round to the same one of
    `low`, all alike probable: products stay as they are, bit for bit, and see each update.

    Args:
        model: Of its float32 matrices that are trained, the weights whose last 8 bits are 0 are
            changed, where a tenth are such. Not those of embeddings, which are read without a cast,
            and of heads, of which a mean is taken before it.
        low: bfloat16 or float16, to which products cast; None: nothing is cast.
    """
    fill = ditherer(model, low)
    for weight in model.parameters():
        if fill is not None:
            fill(weight, weight.data)


def ditherer(
    model: nn.Module, low: torch.dtype | None
) -> Callable[[nn.Parameter, Tensor], None] | None:
    """Return what `dither` does to one weight: given it and its numbers, which are changed.

    It is to be asked weight after weight, in the order of the model; None: nothing is cast.
    """
    if low is None:
        return None
    cut = 2 ** (23 - _MANTISSA[low])  # of the bits, read as an integer, those below are lost
    heads = (part.get_output_embeddings() for part in model.modules() if hasattr(part, _HEAD))
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    apart = {getattr(part, "weight", None) for part in (*tables, *heads)}
    stream = torch.Generator().manual_seed(0)  # the same on each process

    @torch.no_grad()
    def fill(weight: nn.Parameter, numbers: Tensor) -> None:
        fits = weight.requires_grad and weight.dtype == torch.float32 and weight.ndim > 1
        if not fits or not weight.numel() or weight in apart:
            return
        rows = max(1, _AT_ONCE * len(weight) // weight.numel())
        for bits in numbers.view(torch.int32).split(rows):
            coarse = (bits & 0xFF == 0) & (bits != 0)
            if 10 * coarse.sum() > bits.numel():
                odd = (bits & cut) // cut  # half goes to the even number
                rounded = (bits + cut // 2 - 1 + odd) & -cut
                place = torch.randint(1 - cut // 2, cut // 2, bits.shape, generator=stream)
                bits.copy_(torch.where(coarse, rounded + place.to(bits), bits))

    return fill


def check_first_ratio(gap: float, precision: str, what: str = "log-probs") -> None:
    """Raise if the policy does not give its own log-probs, or values, back before the first update.

    Until then the ratio is 1 by definition, up to rounding.

    Args:
        gap: Mean |log ratio| of the first minibatch, or mean gap of values in relation to 1 + |V|.
        precision: Of autocast, as accelerate names it.
        what: Of the two.
    """
    allowed = 1e-3 if precision == "no" else 0.1  # beyond, something is wrong, not just rounded
    if gap > allowed:
        raise RuntimeError(
            f"before the first update the {what} differ by {gap:.3g} on average from those "
            f"of the forward pass a moment ago (allowed: {allowed} at {precision}). "
            "The model is not a fixed function of its input: look for dropout that "
            "`model.eval()` does not turn off, noise, or weights changed meanwhile. If the "
            "rollout carries those of another policy or temperature, set reuse_recorded=False, or "
            "`behaviour_logprobs` of the rollout to None."
        )


def exit_after_gloo() -> None:
    """Have this process give Gloo's threads a moment before it ends, if it has such threads.

    They let go of a collective's tensors a little after it has returned, and need the GIL for it.
    In a process that is already ending, asking for the GIL aborts: the run is done, and its exit
    code is SIGABRT's (pytorch/pytorch#179291, #190489; 3 of 20 short runs). Not even
    `destroy_process_group` waits for them. While the main thread sleeps, the GIL is theirs.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and "gloo" in torch.distributed.get_backend_config():
        atexit.unregister(_leave_the_gil)  # once, however many trainers there are
        atexit.register(_leave_the_gil)


def _leave_the_gil() -> None:
    time.sleep(0.5)
