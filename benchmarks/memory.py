"""How much memory `trl.train` takes, by model and by what is trained.

    python benchmarks/memory.py                  each cell that has no result yet, in turn
    python benchmarks/memory.py --only smollm2   those with this in their names
    python benchmarks/memory.py --list           names, and what is there
    python benchmarks/memory.py --table          a Markdown table of the results

A cell is two steps at the defaults (32 responses of up to 24 tokens, updates of 8 rows, passes of
at most 16) in a process of its own; its result, a line of results/memory.jsonl, is the most that
this process ever had resident, and what it had with the libraries imported and nothing loaded. A
killed script goes on at the first cell without a line. SmolLM2 comes from
examples/real_models/get.py; the others are here, or are made from a config with random weights,
which take as much as trained ones.
"""

from __future__ import annotations

import os
import resource
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells

MODELS = Path(os.environ.get("TRL_MODELS", "~/.cache/trl/models")).expanduser()
TO_GIB = 2.0**-20 if sys.platform.startswith("linux") else 2.0**-30  # ru_maxrss: KiB, or bytes

TOP_THIRD = {"tiny": 1, "starter": 1, "gpt2": 4, "smollm2": 10}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {},
    "top": {},
    "grpo": {"algorithm": "grpo"},
    "no-reference": {"ref_model": "none"},
    "lora-bf16": {"model_kwargs": {"dtype": "bfloat16"}},
    "long": {"max_new_tokens": 72},
    "long-few-rows": {"max_new_tokens": 72, "forward_batch_size": 2},
    "long-recomputed": {"max_new_tokens": 72},
}
SHORT_QUESTION = "How do I boil an egg?"


@dataclass(frozen=True)
class Cell:
    """A model, and what is trained of it or set otherwise."""

    model: str
    kind: str

    @property
    def name(self) -> str:
        return f"{self.model} {self.kind}"


def grid() -> Iterator[Cell]:
    """All of them: each model, and one with everything."""
    common = ("full", "lora", "top")
    for model in TOP_THIRD:
        yield from (Cell(model, kind) for kind in common)
    yield from (Cell("smollm2", kind) for kind in KINDS if kind not in common)


def model_of(name: str) -> tuple[Any, Any]:
    """A loaded model with random weights or a folder, and its tokenizer's folder."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from trl import starter

    end = {"bos_token_id": 0, "eos_token_id": 0}
    if name == "tiny":
        sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 8192}
        layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(**sizes, **layers, **end)), starter.LANGUAGE_MODEL
    if name == "gpt2":
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(**no_dropout, **end)), starter.LANGUAGE_MODEL
    folder = starter.LANGUAGE_MODEL if name == "starter" else MODELS / "smollm2"
    return str(folder), folder


def run(cell: Cell, steps: int | None = None) -> dict[str, Any]:
    """Train two steps in this process, and return the result."""
    import psutil
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import trl
    from trl import starter

    name, kind = cell.model, cell.kind
    libraries = psutil.Process().memory_info().rss / 2**30
    model, tokenizer = model_of(name)
    given = dict(KINDS[kind])
    if kind.startswith("lora"):
        given["peft_config"] = LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", fan_in_fan_out=name in TRANSPOSED
        )
    if kind == "top":
        given["unfrozen_layers"] = TOP_THIRD[name]
    if kind == "long-recomputed":
        model = AutoModelForCausalLM.from_pretrained(model)
        model.gradient_checkpointing_enable()
    chats = [[{"role": "user", "content": SHORT_QUESTION}]] * 64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two steps that teach nothing
        policy, history = trl.train(
            model,
            chats if name == "smollm2" else starter.prompts("train")[:64],
            lambda completion_ids: [len(set(ids)) / 24 for ids in completion_ids],
            tokenizer=AutoTokenizer.from_pretrained(tokenizer),
            steps=steps or 2,
            **given,
        )
    trained = sum(w.numel() for w in policy.parameters() if w.requires_grad)
    return {
        "weights": sum(w.numel() for w in policy.parameters()),
        "trained": trained,
        "libraries_gib": round(libraries, 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * TO_GIB, 2),
        "response_length": round(history[-1]["response/length"], 1),
    }


TRANSPOSED = ("starter", "gpt2")
"""Those that keep their matrices as GPT-2 does."""

# -- results ---------------------------------------------------------------------------------------


def table(found: Mapping[str, dict[str, Any]]) -> str:
    """One row a cell."""
    lines = [
        "| cell | weights | trained | peak, GiB | less the libraries |",
        "|---|---|---|---|---|",
    ]
    for cell in grid():
        if result := found.get(cell.name):
            above = result["peak_gib"] - result["libraries_gib"]
            lines.append(
                f"| {cell.name} | {result['weights'] / 1e6:.2f} M "
                f"| {result['trained'] / 1e6:.2f} M | {result['peak_gib']:.2f} | {above:.2f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    cells.main(__file__, grid(), run, table)
