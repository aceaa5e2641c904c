"""One PPO iteration, generation and step, of this project beside `trl==0.11.4`.

    python benchmarks/peers.py --make-environment ENV     # once: a throw-away venv for the peer
    python benchmarks/peers.py --peer-python ENV/bin/python

GPT-2 of 124M parameters with random weights, batch 32, query 8, response exactly 24 tokens, 4
epochs, minibatch 8 (16 optimiser updates), 2 threads. Both sides get the same weights, tokens and
scores. Each runs in a process and an environment of its own; they take turns, one iteration at a
time, and the first iteration of each is a warm-up that is checked and not counted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEER_PACKAGES = (
    "torch==2.13.0",
    "trl==0.11.4",
    "transformers==4.46.3",
    "accelerate==1.15.0",
    "datasets==5.0.1",
    "rich==15.0.0",
)
SIDES = {
    "ours-bf16": ("ours.py", "--precision", "bf16"),
    "ours-bf16-tuned": ("ours.py", "--precision", "bf16", "--tuned"),
    "ours-fp32": ("ours.py", "--precision", "fp32"),
    "trl-0.11.4-bf16": ("trl_0_11.py", "--precision", "bf16"),
    "trl-0.11.4-bf16-tuned": ("trl_0_11.py", "--precision", "bf16", "--tuned"),
    "trl-0.11.4-fp32": ("trl_0_11.py", "--precision", "fp32"),
    "trl-0.11.4-fp32-tuned": ("trl_0_11.py", "--precision", "fp32", "--tuned"),
}
"""Name -> worker and its flags; each worker says what tuned means for it."""
DEFAULT_SIDES = ("ours-bf16-tuned", "ours-bf16", "trl-0.11.4-bf16-tuned", "trl-0.11.4-bf16")
WORKLOAD = {
    "batch-size": 32,
    "minibatch-size": 8,
    "ppo-epochs": 4,
    "query-length": 8,
    "response-length": 24,
}
MEASURED = ("generate_s", "step_s", "iteration_s", "peak_rss_gib")
IDLE_LOAD = 0.6


def make_environment(folder: Path) -> None:
    """Create a virtual environment with trl 0.11.4 and what it needs."""
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", *PEER_PACKAGES], check=True)


class Worker:
    """One side in a process of its own, which runs an iteration when it is told to."""

    def __init__(self, side: str, python: str, flags: list[str]) -> None:
        script, *own_flags = SIDES[side]
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment.pop("PYTHONPATH", None)
        if script == "ours.py":  # only this side may see the trl of this repository
            environment["PYTHONPATH"] = str(HERE.parent)
        self.side = side
        self.process = subprocess.Popen(
            [python, HERE / "workers" / script, *own_flags, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.packages = self.read()["packages"]

    def read(self) -> dict[str, Any]:
        """Read one message of the worker."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker of {self.side} ended early: its error is above.")
        return json.loads(line)

    def iterate(self) -> dict[str, Any]:
        """Run one iteration and return its measurements."""
        assert self.process.stdin is not None
        self.process.stdin.write("iterate\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def check_same_work(first: dict[str, dict[str, Any]], updates: int) -> None:
    """Raise if a side did not do the agreed work in its first iteration.

    Same weights, tokens and scores must give the same −Σ log π and returns, up to the precision.

    Raises:
        RuntimeError: naming the side and the number.
    """
    names = list(first)
    for name in names:
        if first[name]["updates"] != updates:
            raise RuntimeError(
                f"{name} made {first[name]['updates']} optimiser updates, not {updates}."
            )
        for key in ("objective/entropy", "ppo/returns/mean"):
            mine, reference = first[name]["stats"][key], first[names[0]]["stats"][key]
            if abs(mine - reference) > 0.01 * (1 + abs(reference)):
                raise RuntimeError(
                    f"{key} is {mine:.5f} for {name} and {reference:.5f} for {names[0]}: "
                    "they do not train on the same thing."
                )


def wait_until_idle(minutes: float) -> None:
    """Wait for the load of the last minute to fall below 0.6.

    Raises:
        RuntimeError: if it has not after `minutes`.
    """
    deadline = time.monotonic() + 60 * minutes
    while os.getloadavg()[0] >= IDLE_LOAD:
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"the load is {os.getloadavg()[0]:.2f}, not below {IDLE_LOAD}: something else is "
                "running. Stop it, or measure anyway with --wait-for-idle 0."
            )
        time.sleep(5)


def describe_machine() -> dict[str, Any]:
    """Return the processor, its cores and the load before the measurement."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    flags = re.findall(r"flags\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    known = flags[0].split() if flags else []
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "bf16_instructions": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in known],
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def measure(workers: list[Worker], repeats: int, updates: int) -> dict[str, Any]:
    """Warm up and check every side, then let them take turns for `repeats` rounds."""
    first = {worker.side: worker.iterate() for worker in workers}
    check_same_work(first, updates)
    runs: dict[str, list[dict[str, Any]]] = {worker.side: [] for worker in workers}
    for number in range(repeats):
        turn = number % len(workers)
        for worker in workers[turn:] + workers[:turn]:  # nobody is always first
            result = worker.iterate()
            runs[worker.side].append(result)
            print(
                f"round {number + 1}  {worker.side:24}"
                f" generate {result['generate_s']:6.2f} s  step {result['step_s']:6.2f} s",
                flush=True,
            )
    return {"first_iteration": first, "runs": runs}


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return medians of each side, and how many times as much as the first side it takes."""
    names = list(runs)
    medians = {
        name: {key: statistics.median(run[key] for run in runs[name]) for key in MEASURED}
        for name in names
    }
    ratios = {}
    for name in names[1:]:
        rounds = list(zip(runs[name], runs[names[0]], strict=True))
        ratios[name] = {
            key: {
                "median": statistics.median(theirs[key] / ours[key] for theirs, ours in rounds),
                "lowest": min(theirs[key] / ours[key] for theirs, ours in rounds),
                "highest": max(theirs[key] / ours[key] for theirs, ours in rounds),
            }
            for key in MEASURED
        }
    return {"medians": medians, f"times_{names[0]}": ratios}


def as_table(summary: dict[str, Any]) -> str:
    """Write the summary as a Markdown table."""
    medians = summary["medians"]
    baseline, *others = medians
    ratios = summary[f"times_{baseline}"]
    lines = [
        f"| side | generate (s) | step (s) | iteration (s) | peak memory (GiB) | × {baseline} |",
        "|---|---|---|---|---|---|",
    ]
    for name in [baseline, *others]:
        numbers = " | ".join(f"{medians[name][key]:.2f}" for key in MEASURED)
        times = ratios[name]["iteration_s"] if name in ratios else None
        cell = (
            f"{times['median']:.2f} ({times['lowest']:.2f}–{times['highest']:.2f})"
            if times
            else "1"
        )
        lines.append(f"| {name} | {numbers} | {cell} |")
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--make-environment", type=Path, metavar="ENV", help="create it and stop")
    parser.add_argument("--peer-python", help="Python of the environment with trl 0.11.4")
    parser.add_argument("--our-python", default=sys.executable, help="Python for this project")
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=SIDES,
        default=DEFAULT_SIDES,
        help="contenders; ratios are to the first of them",
    )
    parser.add_argument("--repeats", type=int, default=5, help="counted iterations of each side")
    parser.add_argument("--layers", type=int, default=12, help="fewer for a quick check")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--wait-for-idle",
        type=float,
        default=10.0,
        metavar="MINUTES",
        help=f"how long to wait for a load below {IDLE_LOAD}; 0: measure anyway",
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    needs_peer = any(SIDES[side][0] != "ours.py" for side in arguments.sides)
    if not arguments.make_environment and needs_peer and not arguments.peer_python:
        parser.error("--peer-python is missing: make an environment with --make-environment ENV")
    return arguments


def main() -> None:
    """Measure, print the table and write the results."""
    arguments = parse_arguments()
    if arguments.make_environment:
        make_environment(arguments.make_environment)
        return
    if arguments.wait_for_idle:
        wait_until_idle(arguments.wait_for_idle)
    workload = WORKLOAD | {"layers": arguments.layers, "threads": arguments.threads}
    updates = workload["ppo-epochs"] * workload["batch-size"] // workload["minibatch-size"]
    flags = [text for name, value in workload.items() for text in (f"--{name}", str(value))]
    machine = describe_machine()
    workers: list[Worker] = []
    try:
        for side in arguments.sides:
            ours = SIDES[side][0] == "ours.py"
            python = arguments.our_python if ours else arguments.peer_python
            workers.append(Worker(side, python, flags))
        measured = measure(workers, arguments.repeats, updates)
    finally:
        for worker in workers:
            worker.close()
    summary = summarise(measured["runs"])
    now = datetime.datetime.now(datetime.UTC)
    content = {
        "date": now.isoformat(timespec="seconds"),
        "machine": machine,
        "workload": workload | {"optimiser updates": updates},
        "packages": {worker.side: worker.packages for worker in workers},
        "summary": summary,
        **measured,
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    name = f"peers-{now:%Y-%m-%d-%H%M}.json"
    (arguments.results / name).write_text(json.dumps(content, indent=1) + "\n")
    print(as_table(summary))
    print(f"written: {name}")


if __name__ == "__main__":
    main()
