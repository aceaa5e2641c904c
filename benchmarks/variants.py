"""Step time and memory of what may be trained of GPT-2 124M: all, the top layers, an adapter.

    python benchmarks/variants.py        a table, and benchmarks/results/variants.json

Random weights; batch 32, query 8, response 24, 4 epochs, minibatch 8 (16 updates). Each repeat runs
every variant in a process of its own, one after the other; medians. Memory is the growth of the
resident set since before the model was made: with the trainer made, and at the highest point.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

VARIANTS = {
    "all": {},
    "unfrozen_layers=3": {"unfrozen_layers": 3},
    "lora": {"lora": True},
}
MEGABYTE = 2**20


class Peak:
    """The highest resident set of this process, looked at a hundred times a second."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.start = self.highest = self.process.memory_info().rss
        self.running = True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while self.running:
            self.highest = max(self.highest, self.process.memory_info().rss)
            time.sleep(0.01)

    def now(self) -> float:
        """Growth up to this moment, without what was needed only for a time."""
        return (self.process.memory_info().rss - self.start) / MEGABYTE

    def megabytes(self) -> float:
        return (self.highest - self.start) / MEGABYTE


def measure(name: str, precision: str, steps: int) -> dict[str, float]:
    """Run one variant in this process."""
    import torch
    from peft import LoraConfig
    from transformers import GPT2Config, GPT2LMHeadModel

    from trl import CausalLMWithValueHead, PPOTrainer

    variant = VARIANTS[name]
    torch.manual_seed(0)
    torch.nn.Linear(8, 8)(torch.zeros(1, 8)).sum().backward()  # what torch itself takes
    peak = Peak()
    plain = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    base = sum(weight.numel() * weight.element_size() for weight in plain.parameters()) / MEGABYTE
    lora = LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    policy = CausalLMWithValueHead.from_pretrained(
        plain,
        unfrozen_layers=variant.get("unfrozen_layers"),
        peft_config=lora if variant.get("lora") else None,
    )
    trainer = PPOTrainer(
        policy, batch_size=32, minibatch_size=8, forward_batch_size=8, precision=precision
    )
    loaded = peak.now()
    frozen = {n: w.clone() for n, w in policy.named_parameters() if not w.requires_grad}
    queries = torch.randint(0, 50257, (32, 8))
    responses = torch.randint(0, 50257, (32, 24))
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        stats = trainer.step(queries, responses, torch.randn(32))
        seconds.append(time.perf_counter() - started)
        assert stats["ppo/updates"] == 16
    assert all(torch.equal(frozen[n], w) for n, w in policy.named_parameters() if n in frozen)
    return {
        "seconds": statistics.median(seconds),
        "peak_mb": peak.megabytes() - sum(w.numel() * 4 for w in frozen.values()) / MEGABYTE,
        "policy_and_reference_mb": loaded,
        "base_mb": base,
        "trained_parameters": sum(w.numel() for w in trainer.trainable),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--worker", choices=VARIANTS, help="measure one variant in this process")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.worker, args.precision, args.steps)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(args.repeats):
        for name, found in runs.items():
            command = [sys.executable, __file__, "--worker", name]
            command += ["--precision", args.precision, "--steps", str(args.steps)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append(json.loads(output.splitlines()[-1]))
            print(name, found[-1], flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for name, found in runs.items()
    }
    whole = medians["all"]["seconds"]
    print("\n| trained | weights trained | step | times faster | policy + reference | peak |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, row in medians.items():
        print(
            f"| {name} | {row['trained_parameters'] / 1e6:.1f}M | {row['seconds']:.2f} s | "
            f"{whole / row['seconds']:.2f} | {row['policy_and_reference_mb'] / row['base_mb']:.2f} "
            f"× base | {row['peak_mb']:,.0f} MB |"
        )
    args.out.mkdir(exist_ok=True)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.processor() or platform.machine(),
        "precision": args.precision,
        "medians": medians,
        "runs": runs,
    }
    (args.out / "variants.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
