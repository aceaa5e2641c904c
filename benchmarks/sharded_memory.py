"""What one process of several holds of GPT-2 124M, its weights whole or sharded, on CPUs (Gloo).

    python benchmarks/sharded_memory.py                    # 1, 2 and 4 processes; ten minutes
    python benchmarks/sharded_memory.py --dtype bfloat16   # the format of the model's file

Weights are random and batches tiny: what is measured is the memory of weights, gradients and what
Adam keeps, in float32, with a frozen copy as the reference. It is that of the process alone,
`RssAnon`: pages of a file that is mapped into memory are the system's. Each process measures
itself:

held     of the process between two steps, less what it had before the model was loaded
tensors  of weights and optimiser alone, the reference's apart, between two steps
peak     the most that the process had at once, looked at every few milliseconds, while the model
         was loaded and the trainer made, or within a step
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from trl import CausalLMWithValueHead, PPOTrainer
from trl.kernels.sharded import own_part

ROWS, TOKENS = 4, 16
MB = 1e6


def own_memory() -> float:
    """Return the memory of this process alone, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024 / MB


def held() -> float:
    """Return the memory of this process in MB, after what is free has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return own_memory()


def peak_of(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what `work` returns, and the most memory in MB that this process had meanwhile."""
    peak, over = own_memory(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, own_memory())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        result = work()
    finally:
        over.set()
        watching.join()
    return result, peak


def size(tensors: list[Tensor]) -> float:
    """Return the memory in MB of this process's parts of tensors; tied ones count once."""
    parts = {own_part(x).data_ptr(): own_part(x).nbytes for x in tensors}
    return sum(parts.values()) / MB


def measured(model: Path, shard: bool) -> dict[str, float]:
    """Take two steps and return what this process held, in MB."""
    torch.manual_seed(0)
    before = held()

    def make(ref_model: Any = None, **other: Any) -> PPOTrainer:
        policy: nn.Module = CausalLMWithValueHead.from_pretrained(model, shard=shard)
        sizes = {"batch_size": ROWS, "minibatch_size": ROWS, "ppo_epochs": 1}
        other |= {"precision": "fp32", "keep_freed_memory": False, "forward_batch_size": 1}
        return PPOTrainer(policy, ref_model, shard=shard, learning_rate=1e-5, **sizes, **other)

    alone = peak_of(lambda: make("none", init_kl_coef=0.0))[1] - before
    again = held()
    trainer, loading = peak_of(make)
    rows = ROWS // trainer.accelerator.num_processes
    queries, responses = [torch.arange(TOKENS)] * rows, [torch.arange(TOKENS).flip(0)] * rows
    scores = [float(row + trainer.accelerator.process_index) for row in range(rows)]

    def step() -> None:
        trainer.step(queries, responses, scores)

    step()
    _, peak = peak_of(step)
    state = trainer.optimizer.state.values()
    moments = [x for kept in state for x in kept.values() if isinstance(x, Tensor)]
    assert trainer.ref_model is not None
    return {
        "held": held() - again,
        "tensors": size([*trainer.model.parameters(), *moments]),
        "tensors of the reference": size(list(trainer.ref_model.parameters())),
        "peak while loading": loading - again,
        "the same without a reference": alone,
        "peak of a step": peak - again,
    }


def run(processes: int, shard: bool, model: Path, folder: Path) -> dict[str, float]:
    """Return the largest figures of so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    env |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [
        sys.executable,
        __file__,
        "--model",
        str(model),
        "--into",
        str(folder),
        *(["--shard"] if shard else []),
    ]
    ranks = [
        {"RANK": str(n), "LOCAL_RANK": str(n)} if processes > 1 else {} for n in range(processes)
    ]
    if processes == 1:
        env = {
            name: value for name, value in env.items() if name not in ("WORLD_SIZE", "MASTER_PORT")
        }
    started = [subprocess.Popen(command, env=env | rank) for rank in ranks]
    if any(process.wait() for process in started):
        raise SystemExit(f"a process of {processes} failed")
    figures = [json.loads((folder / f"{n}.json").read_text()) for n in range(processes)]
    return {name: max(each[name] for each in figures) for name in figures[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--dtype", default="float32", help="the format of the model's file")
    parser.add_argument("--model", type=Path, help="of one process: the model's folder")
    parser.add_argument("--into", type=Path, help="of one process: the folder of its figures")
    parser.add_argument("--shard", action="store_true")
    given = parser.parse_args()
    if given.into is not None:
        figures = measured(given.model, given.shard)
        (given.into / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(figures))
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        made = GPT2LMHeadModel(GPT2Config()).to(getattr(torch, given.dtype))
        made.save_pretrained(model := Path(folder, "model"))
        ways = [("whole", 1, False), *((f"sharded over {n}", n, True) for n in given.processes)]
        rows = {name: run(n, shard, model, Path(folder)) for name, n, shard in ways}
    whole = rows["whole"]
    print("| of one process, MB |", *(f"{name} |" for name in rows))
    print("|---|", *("---:|" for _ in rows))
    for name in whole:
        cells = [f"{row[name]:.0f} ({row[name] / whole[name]:.2f}×) |" for row in rows.values()]
        print(f"| {name} |", *cells)


if __name__ == "__main__":
    main()
