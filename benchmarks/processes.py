"""A step of one process with two threads, beside two processes with one thread each.

    python benchmarks/processes.py               each cell that has no result yet, in turn
    python benchmarks/processes.py --table       the table

Workload a of `peers.py`, GPT-2 124M with random weights in float32: 32 queries of 8 tokens and
responses of 24, four epochs of minibatches of 8, all weights or LoRA. The machine should have two
cores and be quiet. Each cell starts its processes by torchrun, makes a step to warm up and times
the next ones; kinds take turns, so that the machine's moods meet all of them.

Beside the step stands how long it takes the processes to add up one gradient (`all_reduce` alone,
the median of some), times the updates of a step: DDP does it while it computes, as far as it can.

Results: results/processes.jsonl.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "workers"))

import cells
from workloads import WORKLOADS

REPEATS, STEPS, CORES = 3, 1, 2
WORK = WORKLOADS["a"]


@dataclass(frozen=True)
class Cell:
    """Some processes, and what they train."""

    kind: str
    """lora or full."""
    processes: int
    shard: bool
    repeat: int

    @property
    def name(self) -> str:
        """As in full-2-sharded-0."""
        sharded = "sharded" if self.shard else "whole"
        return f"{self.kind}-{self.processes}-{sharded}-{self.repeat}"


def grid() -> Iterator[Cell]:
    """All of them, repeat by repeat."""
    for repeat in range(REPEATS):
        for kind in ("lora", "full"):
            for processes, shard in ((1, False), (2, False), (2, True)):
                yield Cell(kind, processes, shard, repeat)


def run(cell: Cell, steps: int | None) -> dict[str, Any]:
    """Start the processes of a cell, and return what the first one has timed."""
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    started += ["--local-addr", "localhost", f"--nproc-per-node={cell.processes}"]
    told = json.dumps({"kind": cell.kind, "shard": cell.shard, "steps": steps or STEPS})
    threads = {"OMP_NUM_THREADS": str(CORES // cell.processes)}
    done = subprocess.run(
        [*started, __file__, "--worker", told],
        env=os.environ | threads,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(line)


def work(kind: str, shard: bool, steps: int) -> None:
    """Be one of the processes: make some steps, and print how long they took."""
    import torch
    import torch.distributed
    from ours import lora_config
    from side import build_language_model

    from trl import CausalLMWithValueHead, PPOTrainer, Sampler

    lora = lora_config(WORK.family) if kind == "lora" else None
    model = CausalLMWithValueHead.from_pretrained(build_language_model(WORK), peft_config=lora)
    trainer = PPOTrainer(
        model,
        batch_size=WORK.batch_size,
        minibatch_size=WORK.minibatch_size,
        ppo_epochs=WORK.ppo_epochs,
        precision="fp32",
        shard=shard,
    )
    rank, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
    sampler = Sampler(None, max_new_tokens=WORK.response_length[1], eos_token_id=None, seed=rank)
    queries = torch.randint(1, WORK.vocabulary, (WORK.batch_size, WORK.query_length[0]))
    times: dict[str, list[float]] = {"sampling": [], "step": []}
    for _ in range(1 + steps):
        begun = time.perf_counter()
        with trainer.sampling():
            rollout = sampler(trainer.model, list(queries[rank::processes]))
        sampled = time.perf_counter()
        trainer.step(rollout, torch.randn(len(rollout)))
        times["sampling"].append(sampled - begun)
        times["step"].append(time.perf_counter() - sampled)
    found = {name: round(statistics.median(each[1:]), 3) for name, each in times.items()}
    if processes > 1:
        flat = torch.zeros(sum(weight.numel() for weight in trainer.trainable))
        found["all_reduce"] = round(statistics.median(_all_reduce(flat) for _ in range(5)), 4)
    if rank == 0:
        print(json.dumps(found), flush=True)


def _all_reduce(flat: Any) -> float:
    import torch.distributed

    torch.distributed.barrier()
    begun = time.perf_counter()
    torch.distributed.all_reduce(flat)
    return time.perf_counter() - begun


def table(found: Mapping[str, dict[str, Any]]) -> str:
    """Return the medians of the repeats, and their ratios to one process."""
    lines = ["| | sampling, s | step, s | both | gradients exchanged, s | both, without that |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for kind, what in (("lora", "LoRA"), ("full", "all weights")):
        alone = _medians(found, kind, 1, "whole")
        for processes, how in ((1, "whole"), (2, "whole"), (2, "sharded")):
            now = _medians(found, kind, processes, how)
            if not now or not alone:
                continue
            both, of_one = now["sampling"] + now["step"], alone["sampling"] + alone["step"]
            exchanged = now.get("all_reduce", 0.0) * WORK.updates if how == "whole" else 0.0
            name = f"{what}, {processes} process{'es' * (processes > 1)}"
            row = [name + ", sharded" * (how == "sharded")]
            row += [f"{now['sampling']:.1f}", f"{now['step']:.1f}", f"{both / of_one:.2f}×"]
            row += (
                [f"{exchanged:.1f}", f"{(both - exchanged) / of_one:.2f}×"]
                if exchanged
                else [
                    "",
                    "",
                ]
            )
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _medians(found: Mapping[str, dict[str, Any]], kind: str, n: int, how: str) -> dict[str, float]:
    rows = [row for name, row in found.items() if name.startswith(f"{kind}-{n}-{how}-")]
    names = ("sampling", "step", "all_reduce")
    return {
        name: statistics.median(row[name] for row in rows)
        for name in names
        if rows and name in rows[0]
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(**json.loads(sys.argv[2]))
    else:
        cells.main(__file__, grid(), run, table)
