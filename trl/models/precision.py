"""Where the matrix products run, and how precisely: an `Accelerator` for a precision."""

from __future__ import annotations

import atexit
import os
import time

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState

MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            "`accelerator` must have gradient_accumulation_steps 1, got "
            f"{accelerator.gradient_accumulation_steps}: the trainer accumulates by itself, set "
            "`forward_batch_size` or `token_budget`."
        )
    wanted = MIXED_PRECISION.get(precision, accelerator.mixed_precision)
    if wanted != accelerator.mixed_precision:
        raise ValueError(
            f"`precision` must agree with the accelerator's, got {precision!r} and "
            f"{accelerator.mixed_precision!r}: leave `precision` at 'auto'."
        )


def make_accelerator(precision: str) -> Accelerator:
    """Return an accelerator whose autocast runs at `precision` ("auto", "fp32", "bf16", "fp16").

    "auto" is what `accelerate launch` was told, or what an accelerator of this process already
    has; else bf16 where the hardware is fast at it, else fp32.

    Raises:
        ValueError: for fp16 on a CPU, which has no use for it.
    """
    settled = "ACCELERATE_MIXED_PRECISION" in os.environ or AcceleratorState._shared_state
    if precision == "auto" and settled:
        return Accelerator()
    device = Accelerator().device
    if precision == "auto":
        precision = "bf16" if fast_bf16(device) else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("`precision` must be 'fp32', 'bf16' or 'auto' on a CPU, got 'fp16'.")
    wanted = MIXED_PRECISION[precision]
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        # One process has one AcceleratorState. A trainer that exists keeps the autocast that it
        # was prepared with; only what is made from now on gets the new precision.
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=wanted)


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
