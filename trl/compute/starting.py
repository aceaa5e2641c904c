"""How many processes a run has: as many as were asked for, or an error that says what to type."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import gather_object, get_cpu_distributed_information, parse_flag_from_env
from accelerate.utils.environment import get_int_from_env

from trl.config.errors import refuse

_RANKS = ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"]
HOSTS_TOLD = 4
"""Hosts that the first line of a run names; of more it says how many."""


def joins_on_cpu() -> bool:
    """Return whether accelerate has to be told that the processes of this run are on CPUs.

    By itself it takes each of them for a run of its own.

    Raises:
        ValueError: if the launcher has started fewer processes than it was asked for, or more than
            there are devices for.
    """
    started = get_cpu_distributed_information()
    asked, here, ranked = started.world_size, started.local_world_size, get_int_from_env(_RANKS, -1)
    if asked > 1 and ranked < 0:
        fix = f"type {_command(asked)}, or unset it for one process"
        refuse("WORLD_SIZE", "come from a launcher, together with RANK", asked, fix)
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and ranked < 0:
        rule = "be 1 for `accelerate launch` on this machine, where it starts no more than one"
        fix = f"type {_command('NUMBER')}, or unset MASTER_ADDR for one process"
        refuse("--num_processes", rule, "more", fix)
    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        return asked > 1
    if asked > 1 and here > (devices := torch.accelerator.device_count()):
        rule = f"be at most {devices}, the devices that torch sees on this machine"
        refuse("--nproc-per-node", rule, here, f"or type ACCELERATE_USE_CPU=1 {_command(here)}")
    return False


def check_joined(accelerator: Accelerator) -> None:
    """Raise a ValueError if an accelerator does not know of all processes of its run."""
    asked, its = get_cpu_distributed_information().world_size, accelerator.num_processes
    if its != asked and asked > 1:
        fix = f"on a CPU make it with Accelerator(cpu=True), and type {_command(asked)}"
        refuse("accelerator", f"have all {asked} processes of WORLD_SIZE", its, fix)


def _command(processes: int | str) -> str:
    """Return what starts the program at hand on several processes of one machine."""
    program, *arguments = sys.argv
    ours = Path(program).name == "trl" or Path(program).parts[-2:] == ("trl", "__main__.py")
    started = ["-m", "trl"] if ours else [program]
    return f"torchrun --nproc-per-node {processes} {shlex.join([*started, *arguments])}"


def processes_told(accelerator: Accelerator) -> str:
    """Return how many processes a run has, on what, and where; all of them have to ask."""
    device, processes = accelerator.device, accelerator.num_processes
    what = "the CPU" if device.type == "cpu" else device.type.upper()
    if device.type == "cuda":
        what = torch.cuda.get_device_name(device)
    if processes == 1:
        return f"1 process on {what}."
    hosts = list(dict.fromkeys(gather_object([socket.gethostname()])))
    named = ", ".join(hosts) if len(hosts) <= HOSTS_TOLD else f"{len(hosts)} hosts"
    joined = torch.distributed.get_backend()
    return f"{processes} processes on {what} of {named}, joined by {joined}."


def busy_told(accelerator: Accelerator) -> Iterator[str]:
    """Yield that other work takes the cores that a run on CPUs needs, if so."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if accelerator.device.type == "cpu" and load > cores:
        told = f"This machine is busy: a load of {load:.1f} on {cores} cores"
        slow = "Two processes of several threads each slow one another many times over"
        one = torch.get_num_threads() == 1
        yield (
            f"{told}." if one else f"{told}. {slow}: set OMP_NUM_THREADS=1, or wait for it to end."
        )
