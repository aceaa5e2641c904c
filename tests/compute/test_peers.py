"""A process that fails tells the others why."""

import os
import socket
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys, time
import torch
from trl.compute.peers import watch_peers
from trl.compute.precision import make_accelerator

accelerator = make_accelerator("fp32")
watch_peers(accelerator)
torch.distributed.barrier()
if accelerator.process_index == 1:
    time.sleep(0.7)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("no such reward")
torch.distributed.all_reduce(torch.zeros(1))
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raised", "rank 0 stops, since rank 1 failed: ValueError: no such reward"),
        ("killed", "rank 0 stops, since rank 1 ended without a word"),
    ],
)
def test_the_others_say_whose_failure_it_was(how, message):
    """Started by hand: torchrun would end them by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, how],
            env=os.environ | where | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    other, failed = (process.communicate(timeout=120)[1] for process in processes)
    assert [process.returncode for process in processes] == [1, -9 if how == "killed" else 1]
    assert other.splitlines()[-1].startswith(message)
    assert ("ValueError: no such reward" in failed) == (how == "raised")
