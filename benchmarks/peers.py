"""One PPO iteration, generation and step, of this project beside two releases of Hugging Face TRL.

    python benchmarks/peers.py --make-environment trl-0.11.4 trl-1.12.0    # once
    python benchmarks/peers.py --workload a b c d

Workloads are in `workers/workloads.py`, sides in `SIDES` here. Every side gets the same weights and
batches of the same shape; those with a `step` also train on the same tokens and scores. Each runs
in a process and an environment of its own; they take turns, one iteration at a time, and the first
iteration of each is a warm-up that is checked and not counted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import venv
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from workers.workloads import WORKLOADS, Workload

HERE = Path(__file__).resolve().parent
COMMON_PACKAGES = ("torch==2.13.0", "accelerate==1.15.0", "rich==15.0.0")
PEERS = {
    "trl-0.11.4": (
        "trl==0.11.4",
        "transformers==4.46.3",
        "datasets==5.0.1",
        *COMMON_PACKAGES,
    ),
    "trl-1.12.0": (
        "trl==1.12.0",
        "transformers==5.23.0",
        "datasets==5.2.0",
        *COMMON_PACKAGES,
    ),
}
"""Name -> what its environment is made of."""
WORKERS = {"ours": "ours.py", "trl-0.11.4": "trl_0_11.py", "trl-1.12.0": "trl_1_12.py"}
SIDES = {
    "ours-bf16": ("ours", "--precision", "bf16"),
    "ours-bf16-recorded": ("ours", "--precision", "bf16", "--recorded"),
    "ours-bf16-unshared": ("ours", "--precision", "bf16", "--unshared"),
    "ours-bf16-recorded-unshared": ("ours", "--precision", "bf16", "--recorded", "--unshared"),
    "ours-bf16-unfrozen4": ("ours", "--precision", "bf16", "--recorded", "--unfrozen-layers", "4"),
    "ours-bf16-lora": ("ours", "--precision", "bf16", "--recorded", "--lora"),
    "ours-bf16-lora-low": ("ours", "--precision", "bf16", "--recorded", "--lora", "--low-base"),
    "ours-fp32": ("ours", "--precision", "fp32"),
    "ours-fp32-recorded": ("ours", "--precision", "fp32", "--recorded"),
    "trl-0.11.4-bf16": ("trl-0.11.4", "--precision", "bf16"),
    "trl-0.11.4-bf16-tuned": ("trl-0.11.4", "--precision", "bf16", "--tuned"),
    "trl-0.11.4-fp32": ("trl-0.11.4", "--precision", "fp32"),
    "trl-0.11.4-fp32-tuned": ("trl-0.11.4", "--precision", "fp32", "--tuned"),
    "trl-1.12.0-bf16": ("trl-1.12.0", "--precision", "bf16"),
    "trl-1.12.0-bf16-tuned": ("trl-1.12.0", "--precision", "bf16", "--tuned"),
    "trl-1.12.0-fp32": ("trl-1.12.0", "--precision", "fp32"),
    "ours-bf16-grpo": ("ours", "--precision", "bf16", "--recorded", "--algorithm", "grpo"),
    "trl-1.12.0-bf16-grpo": ("trl-1.12.0", "--precision", "bf16", "--grpo"),
}
"""Name -> whose it is, and the flags of its worker, which says what they mean."""
DEFAULT_SIDES = ("ours-bf16-recorded", "ours-bf16", "trl-0.11.4-bf16-tuned", "trl-1.12.0-bf16")
ALWAYS_MEASURED = ("iteration_s", "peak_rss_gib")
SECONDS = ("generate_s", "step_s", "iteration_s", "forward_s", "optimize_s")
SPEEDS = (
    "generate_tokens_per_s",
    "forward_tokens_per_s",
    "optimize_tokens_per_s",
    "matmul_gflops",
    "share_of_peak",
)
MEASURED = (*SECONDS, "peak_rss_gib", "peak_gpu_gib", *SPEEDS)
"""What a summary is made of; a side reports None for what it cannot tell."""
SAME = ("objective/entropy", "ppo/returns/mean")
IDLE_LOAD = 0.6

Run = dict[str, Any]


def make_environment(name: str, folder: Path) -> None:
    """Create a virtual environment for a peer, unless it is there."""
    ready = folder / ".ready"
    if ready.exists():
        return
    print(f"Installing {name} and what it needs into {folder} ...", flush=True)
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", *PEERS[name]], check=True)
    ready.touch()


class Worker:
    """One side in a process of its own, which runs an iteration when it is told to."""

    def __init__(self, side: str, python: str, flags: list[str], device: str = "cpu") -> None:
        whose, *own_flags = SIDES[side]
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }
        environment.pop("PYTHONPATH", None)
        if device == "cpu":  # also on a machine with a GPU, which accelerate would choose
            environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        if whose == "ours":  # only this side may see the trl of this repository
            environment["PYTHONPATH"] = str(HERE.parent)
        self.side = side
        self.process = subprocess.Popen(
            [python, HERE / "workers" / WORKERS[whose], *own_flags, *flags, "--device", device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.introduction = self.read()

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


def check_same_work(
    first: dict[str, Run], workload: Workload, same_tokens: dict[str, bool]
) -> None:
    """Raise if a side did not do the agreed work in its first iteration.

    All must make as many updates, on as many response tokens, and have finite stats. Those that
    train on the same tokens must also agree, up to the precision, on −Σ log π and the returns.

    Args:
        first: Side -> its first iteration.
        workload: The agreed work.
        same_tokens: Side -> whether it trains on the prepared tokens.

    Raises:
        RuntimeError: naming the side and the number.
    """
    for name, run in first.items():
        for key, wanted in (
            ("updates", workload.updates),
            ("trained_tokens", workload.response_tokens),
        ):
            if run[key] != wanted:
                raise RuntimeError(f"{name}: `{key}` must be {wanted}, got {run[key]}.")
        for key, value in run["stats"].items():
            if not math.isfinite(value):
                raise RuntimeError(f"{name}: {key} must be finite, got {value}.")
    comparable = [name for name in first if same_tokens[name]]
    for name in comparable[1:]:
        for key in SAME:
            mine, reference = (first[each]["stats"][key] for each in (name, comparable[0]))
            if abs(mine - reference) > 0.01 * (1 + abs(reference)):
                raise RuntimeError(
                    f"{key} is {mine:.5f} for {name} and {reference:.5f} for {comparable[0]}: "
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


def measure(workers: list[Worker], repeats: int, workload: Workload) -> dict[str, Any]:
    """Warm up and check every side, then let them take turns for `repeats` rounds."""
    first = {worker.side: worker.iterate() for worker in workers}
    same_tokens = {worker.side: worker.introduction["same_tokens"] for worker in workers}
    check_same_work(first, workload, same_tokens)
    runs: dict[str, list[Run]] = {worker.side: [] for worker in workers}
    for number in range(repeats):
        turn = number % len(workers)
        for worker in workers[turn:] + workers[:turn]:  # nobody is always first
            result = worker.iterate()
            runs[worker.side].append(result)
            print(
                f"round {number + 1}  {worker.side:28}"
                f" generate {as_number(result['generate_s']):>6} s"
                f"  step {as_number(result['step_s']):>6} s",
                flush=True,
            )
    return {"first_iteration": first, "runs": runs}


def summarise(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Return medians of each side, and how many times as much as the first side it takes.

    What a side cannot tell is None.
    """
    names = list(runs)
    medians = {
        name: {key: median_of([run[key] for run in runs[name]]) for key in MEASURED}
        for name in names
    }
    ratios: dict[str, dict[str, Any]] = {}
    for name in names[1:]:
        rounds = list(zip(runs[name], runs[names[0]], strict=True))
        ratios[name] = {}
        for key in (*SECONDS, "peak_rss_gib"):
            pairs = [(theirs[key], ours[key]) for theirs, ours in rounds]
            if any(None in pair for pair in pairs):
                ratios[name][key] = None
                continue
            times = [theirs / ours for theirs, ours in pairs]
            ratios[name][key] = {
                "median": statistics.median(times),
                "lowest": min(times),
                "highest": max(times),
            }
    return {"medians": medians, f"times_{names[0]}": ratios}


def median_of(values: list[float | None]) -> float | None:
    """Return the median, None if a value is not known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if len(known) == len(values) else None


def as_number(value: float | None, digits: int = 2) -> str:
    """Write a number; a dash for one that is not known."""
    return "–" if value is None else f"{value:,.{digits}f}"


def as_table(summary: dict[str, Any]) -> str:
    """Write seconds and memory as a Markdown table."""
    medians = summary["medians"]
    baseline, *others = medians
    ratios = summary[f"times_{baseline}"]
    lines = [
        f"| side | generate (s) | step (s) | iteration (s) | peak memory (GiB) | × {baseline} |",
        "|---|---|---|---|---|---|",
    ]
    for name in [baseline, *others]:
        on_gpu = medians[name].get("peak_gpu_gib") is not None
        shown = ("generate_s", "step_s", "iteration_s", f"peak_{'gpu' if on_gpu else 'rss'}_gib")
        numbers = " | ".join(as_number(medians[name][key]) for key in shown)
        times = ratios[name]["iteration_s"] if name in ratios else None
        cell = (
            f"{times['median']:.2f} ({times['lowest']:.2f}–{times['highest']:.2f})"
            if times
            else "1"
        )
        lines.append(f"| {name} | {numbers} | {cell} |")
    return "\n".join(lines)


def as_table_of_speeds(summary: dict[str, Any], runs: dict[str, list[Run]]) -> str:
    """Write tokens a second and the share of the machine's peak as a Markdown table."""
    lines = [
        "| side | generation (tokens/s) | no-grad pass (tokens/s) | optimisation (tokens/s) "
        "| matrix product (GFLOP/s) | share of that |",
        "|---|---|---|---|---|---|",
    ]
    for name, medians in summary["medians"].items():
        speeds = " | ".join(as_number(medians[key], 0) for key in SPEEDS[:-1])
        share = medians["share_of_peak"]
        cell = "–" if share is None else f"{share:.0%}"
        if runs[name][0]["share_of_peak_in"] == "step_s":
            cell += " (of the whole step)"
        lines.append(f"| {name} | {speeds} | {cell} |")
    return "\n".join(lines)


def compare(name: str, workload: Workload, arguments: argparse.Namespace) -> None:
    """Measure one workload, print its tables and write the results."""
    if arguments.wait_for_idle:
        wait_until_idle(arguments.wait_for_idle)
    machine = describe_machine()
    flags = ["--workload", workload.to_json(), "--threads", str(arguments.threads)]
    flags += ["--matmul-size", str(arguments.matmul_size)]
    workers: list[Worker] = []
    try:
        for side in arguments.sides:
            python = arguments.pythons[SIDES[side][0]]
            workers.append(Worker(side, python, flags, arguments.device))
        measured = measure(workers, arguments.repeats, workload)
    finally:
        for worker in workers:
            worker.close()
    summary = summarise(measured["runs"])
    now = datetime.datetime.now(datetime.UTC)
    parameters = workers[0].introduction["parameters"]
    content = {
        "date": now.isoformat(timespec="seconds"),
        "machine": machine | {"device": workers[0].introduction["device"]},
        "workload": {
            "name": name,
            **asdict(workload),
            "optimiser updates": workload.updates,
            "tokens": workload.tokens,
            "response tokens": workload.response_tokens,
            "parameters": parameters,
            "threads": arguments.threads,
        },
        "packages": {worker.side: worker.introduction["packages"] for worker in workers},
        "summary": summary,
        **measured,
    }
    arguments.results.mkdir(parents=True, exist_ok=True)
    file = f"peers-{name}-{now:%Y-%m-%d-%H%M}.json"
    (arguments.results / file).write_text(json.dumps(content, indent=1) + "\n")
    print(
        f"\nworkload {name}: {workload.title} ({parameters['all'] / 1e6:.1f}M parameters,"
        f" {workload.layers} layers), {workload.tokens} tokens, {workload.response_tokens} of them"
        f" of responses, {workload.updates} updates, {arguments.threads} threads\n"
    )
    print(as_table(summary))
    print()
    print(as_table_of_speeds(summary, measured["runs"]))
    print(f"\nwritten: {file}", flush=True)


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--make-environment",
        nargs="+",
        choices=PEERS,
        metavar="PEER",
        help=f"create what is missing of the environments of {', '.join(PEERS)}, and stop",
    )
    parser.add_argument(
        "--environments",
        type=Path,
        default=HERE.parent / ".venv-peers",
        help="folder of the peers' environments",
    )
    parser.add_argument(
        "--peer-python",
        nargs="+",
        default=[],
        metavar="PEER=PYTHON",
        help="Python of a peer whose environment is elsewhere",
    )
    parser.add_argument("--our-python", default=sys.executable, help="Python for this project")
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["a"])
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=SIDES,
        default=DEFAULT_SIDES,
        help="contenders; ratios are to the first of them",
    )
    parser.add_argument("--repeats", type=int, default=5, help="counted iterations of each side")
    parser.add_argument("--layers", type=int, help="fewer for a quick check")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--matmul-size", type=int, default=2048, help="of the products timed")
    parser.add_argument(
        "--wait-for-idle",
        type=float,
        default=10.0,
        metavar="MINUTES",
        help=f"how long to wait for a load below {IDLE_LOAD}; 0: measure anyway",
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args(given)
    arguments.pythons = {"ours": arguments.our_python}
    for peer in PEERS:
        arguments.pythons[peer] = str(arguments.environments.resolve() / peer / "bin" / "python")
    for entry in arguments.peer_python:
        peer, _, python = entry.partition("=")
        if peer not in PEERS or not python:
            parser.error(f"--peer-python must be PEER=PYTHON with one of {list(PEERS)}: {entry}")
        arguments.pythons[peer] = python
    if not arguments.make_environment:
        for peer in {SIDES[side][0] for side in arguments.sides} - {"ours"}:
            if not Path(arguments.pythons[peer]).exists():
                parser.error(f"there is no environment of {peer}: --make-environment {peer}")
    return arguments


def main(given: list[str] | None = None) -> None:
    """Measure, print the tables and write the results."""
    arguments = parse_arguments(given)
    if arguments.make_environment:
        for peer in arguments.make_environment:
            make_environment(peer, arguments.environments / peer)
        return
    for name in arguments.workload:
        workload = WORKLOADS[name]
        if arguments.layers is not None:
            workload = replace(workload, layers=arguments.layers)
        compare(name, workload, arguments)


if __name__ == "__main__":
    main()
