"""A step of PPO and of GRPO on a GPU, beside the GRPO of another release, in one JSON file.

    python benchmarks/peers.py --make-environment trl-1.12.0    # once; without it, it is left out
    python benchmarks/gpu.py                     GPT-2 124M, and half a billion weights at random
    python benchmarks/gpu.py --device cpu --toy  the same code at a toy size, to try it out

Everything else is as in `peers.py`: sides in processes of their own, which take turns. Beside what
was measured stands what `scale.py` says of this GPU, given its products and its memory as measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peers import (
    HERE,
    SIDES,
    Worker,
    as_table,
    describe_machine,
    measure,
    summarise,
    wait_until_idle,
)
from scale import H100, Machine, Shape, Work, step_seconds
from workers.workloads import WORKLOADS, Workload

GPU_SIDES = ("ours-bf16-recorded", "ours-bf16-grpo", "trl-1.12.0-bf16-grpo")
GPU_WORKLOADS = {
    "a": replace(WORKLOADS["a"], group_size=4),
    "half a billion": Workload(
        "Llama 0.5B, 16 prompts × 8 responses, 128 + 256 tokens",
        family="llama",
        layers=24,
        width=896,
        heads=14,
        key_value_heads=2,
        inner=4864,
        vocabulary=151936,
        batch_size=128,
        minibatch_size=32,
        ppo_epochs=1,
        group_size=8,
        query_length=(128, 128),
        response_length=(256, 256),
    ),
}
"""Groups, since GRPO compares responses; the second has the sizes of Qwen2.5 0.5B."""
TOY = {"layers": 2, "width": 32, "heads": 2, "key_value_heads": 1, "inner": 48, "vocabulary": 200}
TOY |= {"batch_size": 8, "minibatch_size": 4, "group_size": 4, "ppo_epochs": 2, "positions": 64}
TOY |= {"query_length": (5, 5), "response_length": (6, 6)}


def on_paper(workload: Workload, machine: Machine) -> dict[str, float]:
    """What `scale.py` says of a step, its passes of all rows of an update."""
    llama = workload.family == "llama"
    shape = Shape(
        workload.layers,
        workload.width,
        workload.inner if llama else 4 * workload.width,
        workload.heads,
        workload.key_value_heads if llama else workload.heads,
        workload.width // workload.heads,
        workload.vocabulary,
        gated=llama,
        positions=0 if llama else workload.positions,
    )
    work = Work(
        workload.batch_size,
        workload.query_length[1],
        workload.response_length[1],
        minibatch=workload.minibatch_size,
        epochs=workload.ppo_epochs,
        pass_rows=workload.minibatch_size,
        recomputed=False,
    )
    return step_seconds(shape, work, machine)


def measured_bandwidth(device: str) -> float:
    """Return the bytes a second at which one large tensor is read."""
    large = torch.ones(2**31 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    numbers, seconds = large.view(torch.int64), []
    for _ in range(5):
        started = time.perf_counter()
        numbers.sum().item()
        seconds.append(time.perf_counter() - started)
    return large.nbytes / min(seconds)


def sides_here(arguments: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """Return the interpreter of each side, and why others are left out."""
    pythons = {"ours": sys.executable, "trl-1.12.0": str(arguments.peer_python)}
    whose = {side: SIDES[side][0] for side in GPU_SIDES}
    here = {side: pythons[each] for side, each in whose.items() if Path(pythons[each]).exists()}
    hint = "there is no environment of {0}: python benchmarks/peers.py --make-environment {0}"
    return here, {side: hint.format(whose[side]) for side in GPU_SIDES if side not in here}


def measure_sides(
    name: str, workload: Workload, pythons: dict[str, str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Run one workload on all sides, print their table, and return what was found."""
    flags = ["--workload", workload.to_json(), "--threads", str(arguments.threads)]
    flags += ["--matmul-size", "64" if arguments.toy else "8192"]
    workers: list[Worker] = []
    try:
        for side, python in pythons.items():
            workers.append(Worker(side, python, flags, arguments.device))
        found = measure(workers, arguments.repeats, workload)
    finally:
        for worker in workers:
            worker.close()
    summary = summarise(found["runs"])
    gflops = summary["medians"]["ours-bf16-grpo"]["matmul_gflops"]
    machine = replace(H100, peak=gflops * 1e9, bandwidth=measured_bandwidth(arguments.device))
    print(f"\n{name}: {workload.title}\n\n{as_table(summary)}\n", flush=True)
    return {
        "workload": asdict(workload),
        "device": workers[0].introduction["device"],
        "parameters": workers[0].introduction["parameters"],
        "packages": {worker.side: worker.introduction["packages"] for worker in workers},
        "on_paper": on_paper(workload, machine),
        "summary": summary,
        **found,
    }


def main(given: list[str] | None = None) -> Path:
    """Measure, print tables, and return the file that was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="tiny models and batches")
    parser.add_argument("--repeats", type=int, default=5, help="counted iterations of each side")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--peer-python",
        type=Path,
        default=HERE.parent / ".venv-peers" / "trl-1.12.0" / "bin" / "python",
        help="Python of an environment with trl==1.12.0",
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: try the script with --device cpu --toy")
    if not arguments.toy:
        wait_until_idle(minutes=10.0)
    pythons, left_out = sides_here(arguments)
    for side, reason in left_out.items():
        print(f"{side} is left out: {reason}", flush=True)
    now = datetime.datetime.now(datetime.UTC)
    content: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "left_out": left_out,
        "workloads": {},
    }
    for name, workload in GPU_WORKLOADS.items():
        workload = replace(workload, **TOY) if arguments.toy else workload
        content["workloads"][name] = measure_sides(name, workload, pythons, arguments)
    arguments.results.mkdir(parents=True, exist_ok=True)
    file = arguments.results / f"gpu-{now:%Y-%m-%d-%H%M}.json"
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {file.name}", flush=True)
    return file


if __name__ == "__main__":
    main()
