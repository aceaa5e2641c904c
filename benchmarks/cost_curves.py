"""Time and memory of one iteration against batch, response and query length, and layers.

    python benchmarks/cost_curves.py            a table, results/cost_curves.json and .png
    python benchmarks/cost_curves.py --quick    a few small points: does it run?

One iteration is sampling and then `step`, on a small GPT-2 with random weights, in bf16 where the
machine is fast at it. Each size is doubled from one end to the other with the others at the base
point; every point is measured in a process of its own, after a warm-up, and is the median of 3. On
a CPU it has one thread, and the seconds are those that the process had of it, so that other work on
the machine matters little.

A slope is that of a straight line through log(cost) against log(size). Beside it stands the slope
of the work which that size adds: 1 for batch and layers, between 1 and 2 for lengths, since
attention grows with their square. A cost that rises faster by more than 0.15 is flagged, also one
that does so by more than 0.3 from the last size but one to the last, where fixed costs hide least.
Memory is the growth of the resident set (on a GPU: what tensors took) since before the model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ALLOWED, ALLOWED_AT_END = 0.15, 0.3
COSTS = {
    "seconds": "iteration, s",
    "sampling": "sampling, s",
    "step": "step, s",
    "megabytes": "peak memory, MB",
}


@dataclass(frozen=True)
class Point:
    """The sizes of one iteration."""

    batch: int = 16
    query: int = 32
    response: int = 32
    layers: int = 4
    width: int = 128
    vocabulary: int = 1000
    epochs: int = 1


BASE = Point()
AXES = {
    "batch": (16, 32, 64, 128, 256),
    "response": (32, 64, 128, 256, 512),
    "query": (64, 128, 256, 512, 1024),
    "layers": (2, 4, 8, 16, 32),
}
QUICK_BASE = Point(batch=4, query=8, response=8, layers=2, width=32, vocabulary=50)
QUICK_AXES = {"batch": (4, 8), "response": (8, 16)}


def work(point: Point) -> float:
    """Return the additions and multiplications of an iteration, but for its constant part."""
    from trl.watch.profile import Tokens, Weights, iteration_flops

    width, length = point.width, point.query + point.response - 1
    weights = Weights(
        trained=12 * width**2 * point.layers,
        head=width * point.vocabulary,
        attention=width * point.layers,
    )
    tokens = Tokens(
        read=point.batch * length,
        predicted=point.batch * point.response,
        pairs=point.batch * length * (length + 1) // 2,
    )
    return sum(iteration_flops(weights, tokens, reference=weights, epochs=point.epochs).values())


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the slope of the line through log(cost) against log(size), by least squares.

    A cost that grows like a power of the size has that power.
    """
    import numpy as np

    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def expected_slope(base: Point, axis: str, sizes: Sequence[int]) -> float:
    """Return the slope of the work that a size adds to the same iteration without any of it."""
    nothing = work(replace(base, **{axis: 0}))
    return slope(sizes, [work(replace(base, **{axis: size})) - nothing for size in sizes])


def too_steep(slopes: dict[str, float], expected: float, allowed: float) -> list[str]:
    """Return the names of the costs that rise faster than the work by more than is allowed."""
    return [cost for cost, found in slopes.items() if found > expected + allowed]


# -- measuring -------------------------------------------------------------------------------------


def measure(point: Point, repeats: int) -> dict[str, float]:
    """Run iterations at one point in this process; return medians and the peak of memory."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from variants import Peak

    from trl import CausalLMWithValueHead, PPOTrainer, Sampler

    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.nn.Linear(8, 8)(torch.zeros(1, 8)).sum().backward()  # what torch itself takes
    peak = Peak()
    shape = GPT2Config(
        vocab_size=point.vocabulary,
        n_positions=point.query + point.response,
        n_embd=point.width,
        n_layer=point.layers,
        n_head=max(1, point.width // 32),
        bos_token_id=0,
        eos_token_id=0,
    )
    trainer = PPOTrainer(
        CausalLMWithValueHead(GPT2LMHeadModel(shape)),
        batch_size=point.batch,
        ppo_epochs=point.epochs,
        learning_rate=1e-6,
    )
    on_cpu = trainer.accelerator.device.type == "cpu"
    now = time.process_time if on_cpu else time.perf_counter
    sampler = Sampler(max_new_tokens=point.response)
    queries = torch.randint(0, point.vocabulary, (point.batch, point.query))
    sampling, step = [], []
    for _ in range(1 + repeats):
        started = now()
        with trainer.sampling():
            rollout = sampler(trainer.model, queries.to(trainer.accelerator.device))
        sampled = now()
        trainer.step(rollout, torch.randn(point.batch))
        sampling.append(sampled - started)
        step.append(now() - sampled)
    assert rollout.response_mask.all()
    megabytes = peak.megabytes() if on_cpu else torch.accelerator.max_memory_allocated() / 2**20
    both = [a + b for a, b in zip(sampling, step, strict=True)]
    return {
        "seconds": statistics.median(both[1:]),
        "sampling": statistics.median(sampling[1:]),
        "step": statistics.median(step[1:]),
        "megabytes": megabytes,
        "bf16": float(trainer.precision == "bf16"),
    }


def processes() -> ProcessPoolExecutor:
    """Return what runs every task in a process of its own."""
    # A server that has imported everything, but run nothing, forks them.
    methods = multiprocessing.get_all_start_methods()
    method = "forkserver" if "forkserver" in methods else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["trl.watch.profile"])
    return ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1)


def curves(base: Point, axes: dict[str, tuple[int, ...]], repeats: int) -> dict[str, Any]:
    """Measure every point of every axis; return costs and slopes by axis."""
    measured: dict[Point, dict[str, float]] = {}
    found = {}
    with processes() as pool:
        for axis, sizes in axes.items():
            for size in sizes:
                point = replace(base, **{axis: size})
                if point not in measured:
                    measured[point] = pool.submit(measure, point, repeats).result()
                    print(line(point, measured[point]), flush=True)
            results = [measured[replace(base, **{axis: size})] for size in sizes]
            whole, end = (
                {
                    "expected": pool.submit(expected_slope, base, axis, sizes[first:]).result(),
                    "slopes": {
                        cost: slope(sizes[first:], [result[cost] for result in results[first:]])
                        for cost in COSTS
                    },
                }
                for first in (0, -2)
            )
            found[axis] = whole | {
                "sizes": sizes,
                "at_end": end,
                "flagged": too_steep(**whole, allowed=ALLOWED),
                "flagged_at_end": too_steep(**end, allowed=ALLOWED_AT_END),
                "results": results,
            }
    return found


# -- results ---------------------------------------------------------------------------------------


def line(point: Point, result: dict[str, float]) -> str:
    """Return what is shown of a point as soon as it is measured."""
    return (
        f"batch {point.batch:3} query {point.query:4} response {point.response:4} "
        f"layers {point.layers:3}: {result['seconds']:7.3f} s (sampling {result['sampling']:.3f}), "
        f"{result['megabytes']:5.0f} MB"
    )


def table(axes: dict[str, Any]) -> str:
    """Return the slopes as a table."""
    lines = [
        f"| slope against | work adds | {' | '.join(COSTS.values())} | |",
        "|---|---:|" + "---:|" * len(COSTS) + "---|",
    ]
    for axis, found in axes.items():
        for name, part, flagged in (
            (axis, found, found["flagged"]),
            (f"{axis}, last two", found["at_end"], found["flagged_at_end"]),
        ):
            slopes = " | ".join(f"{part['slopes'][cost]:.2f}" for cost in COSTS)
            flag = "TOO STEEP: " + ", ".join(flagged) if flagged else ""
            lines.append(f"| {name} | {part['expected']:.2f} | {slopes} | {flag} |")
    return "\n".join(lines)


def plot(axes: dict[str, Any], file: Path) -> None:
    """Draw seconds and megabytes against each size; the dashed line rises like the work."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(axes), 5.6), layout="constrained")
    panels = figure.subplots(2, len(axes), squeeze=False)
    for column, (axis, found) in enumerate(axes.items()):
        sizes = found["sizes"]
        drawn = (("seconds", "sampling", "step"), ("megabytes",))
        for row, costs in enumerate(drawn):
            panel = panels[row, column]
            for cost in costs:
                values = [result[cost] for result in found["results"]]
                label = f"{COSTS[cost]} (slope {found['slopes'][cost]:.2f})"
                panel.loglog(sizes, values, "o-", base=2, label=label)
            last = found["results"][-1][costs[0]]
            line = [last * (size / sizes[-1]) ** found["expected"] for size in sizes]
            label = f"as the work (slope {found['expected']:.2f})"
            panel.loglog(sizes, line, "--", base=2, color="#9aa0a8", label=label)
            panel.set_xlabel(axis)
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.yaxis.set_major_formatter("{x:g}")
            panel.legend(fontsize=7)
            panel.grid(color="#e3e6ea")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few small points")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    base, axes = (QUICK_BASE, QUICK_AXES) if args.quick else (BASE, AXES)
    started = time.perf_counter()
    found = curves(base, axes, args.repeats)
    print("\n" + table(found))
    args.out.mkdir(parents=True, exist_ok=True)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.processor() or platform.machine(),
        "python": sys.version.split()[0],
        "seconds": time.perf_counter() - started,
        "base": asdict(base),
        "axes": found,
    }
    (args.out / "cost_curves.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(found, args.out / "cost_curves.png")
    print(f"\n{result['seconds']:.0f} s; {args.out}/cost_curves.json and .png")


if __name__ == "__main__":
    main()
