"""The same pay at the end of a right first step or of the response: which is learned faster?

    python benchmarks/process_reward.py        a table, and benchmarks/results/process_reward.json

The query is one of four letters. A response of 24 tokens, letters and `;`, is paid 1 if its first
step, what stands before a `;`, begins with that letter. The best policy writes it always: 1.0; one
that knows nothing: 0.25. What else it writes is not paid. A random model of one layer; PPO with a
critic, γ 1, λ 0.95, no KL. Seeds differ in weights and in what is sampled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from trl import CausalLMWithValueHead, FunctionScorer, PPOTrainer, Sampler

LETTERS, SEPARATOR = "abcd", ";"
RESPONSE, BATCH = 24, 64
ENOUGH = 0.9
"""Share of right first steps in a batch, of the optimum 1."""


def at_the_step(response_steps: list[list[str]], queries: list[str]) -> list[list[float]]:
    """Pay a right first step where it ends."""
    return [
        [float(steps[0].startswith(query)), *[0.0] * (len(steps) - 1)]
        for steps, query in zip(response_steps, queries, strict=True)
    ]


def at_the_end(response_steps: list[list[str]], queries: list[str]) -> list[float]:
    """Pay the same where the response ends."""
    return [sum(numbers) for numbers in at_the_step(response_steps, queries)]


PAYS: dict[str, Callable[..., list]] = {"step": at_the_step, "end": at_the_end}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters."""
    vocabulary = {letter: index for index, letter in enumerate(LETTERS + SEPARATOR)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SEPARATOR))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def learn(pay: str, seed: int, steps: int, *, batch: int = BATCH) -> list[float]:
    """Return the share of right first steps of each batch, until it is enough."""
    torch.manual_seed(seed)
    shape = {"n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": RESPONSE + 8}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"vocab_size": len(LETTERS) + 1, "bos_token_id": None, "eos_token_id": None}
    policy = CausalLMWithValueHead.from_pretrained(
        GPT2LMHeadModel(GPT2Config(**shape, **dropout, **tokens))
    )
    trainer = PPOTrainer(
        policy,
        batch_size=batch,
        minibatch_size=batch,
        ppo_epochs=4,
        learning_rate=1e-3,
        init_kl_coef=0.0,
        adap_kl_ctrl=False,
        gamma=1.0,
        gae_lambda=0.95,
        precision="fp32",
        seed=seed,
    )
    sampler = Sampler(make_tokenizer(), max_new_tokens=RESPONSE, eos_token_id=None, seed=seed)
    scorer = FunctionScorer(PAYS[pay], separator=SEPARATOR)
    queries = [LETTERS[row % len(LETTERS)] for row in range(batch)]
    shares = []
    for _ in range(steps):
        rollout = sampler(policy, queries)
        scored = scorer(rollout)
        shares.append(float(scored.totals.mean()))
        if shares[-1] >= ENOUGH:
            break
        trainer.step(rollout, scored)
    return shares


def main() -> None:
    """Measure, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="give up after so many")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    path = args.out / "process_reward.json"
    curves: dict[str, list[list[float]]] = {pay: [] for pay in PAYS}
    if path.exists():  # goes on where it was stopped
        curves |= json.loads(path.read_text())["curves"]
    for seed, (pay, found) in itertools.product(range(args.seeds), curves.items()):
        if seed < len(found):
            continue
        found.append([round(share, 3) for share in learn(pay, seed, args.steps)])
        print(f"seed {seed}, paid at the {pay}: {len(found[-1])} steps", flush=True)
        result = {"date": time.strftime("%Y-%m-%d"), "steps": args.steps, "curves": curves}
        path.write_text(json.dumps(result) + "\n")
    reached = {
        pay: [len(curve) if curve[-1] >= ENOUGH else None for curve in found]
        for pay, found in curves.items()
    }
    print(f"\n| paid at the | batches until {ENOUGH:.0%} are right, each seed | median |")
    print("|---|---|---:|")
    for pay, each in reached.items():
        median = statistics.median(n or args.steps for n in each)
        told = ", ".join(str(n or f"not in {args.steps}") for n in each)
        print(f"| {pay} | {told} | {median:g} |")


if __name__ == "__main__":
    main()
