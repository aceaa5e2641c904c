"""Folders of runs that never ran, with figures as those of a real one."""

import json
import math
import random
from pathlib import Path

import yaml

WORDS_BEFORE = (
    "the film was a bad boring plot and awful acting with no story it made me tired".split()
)
WORDS_AFTER = (
    "the film was a great lovely story and wonderful acting with heart it made me happy".split()
)
HOSTILE = [
    "<script>alert(1)</script> & <img src=x onerror=alert(2)> {{ 7 * 7 }} **bold** `code`",
    "\x00null \x1b[31mred\x1b[0m bell\x07 \u202eturned\u202c half \ud83d of a pair",
    "مرحبا بالعالم, שלום עולם, and then English again",
    "long" * 5_000,
    "😀 👩‍👩‍👧‍👦 \u200b zero width ]]> --> </textarea></style></svg>",
]


def write_lines(path: Path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(
    folder: Path,
    *,
    steps=40,
    total=None,
    algorithm="ppo",
    seed=0,
    gain=2.5,
    prompts=24,
    eval_every=10,
    learning_rate=1.41e-5,
    scorers=("sentiment",),
    warnings=(),
    finished=True,
):
    """Write a whole run: reward rises, KL rises to its target, entropy falls."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    total = total or steps
    recipe = {
        "model": {"name": "gpt2", "lora": None},
        "ppo": {
            "algorithm": algorithm,
            "learning_rate": learning_rate,
            "init_kl_coef": 0.2,
            "batch_size": 64,
            "adaptive_kl": True,
        },
        "reward": [{"kind": "classifier", "name": name, "weight": 1.0} for name in scorers],
        "sampling": {"stop_strings": [], "max_new_tokens": 24},
        "steps": total,
        "seed": seed,
        "out": str(folder),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    metrics, scores, samples = [], [], []
    for step in range(steps + 1):
        done = 1 - math.exp(-3 * step / max(1, total))
        row = {"step": step, "episodes": 64 * step}
        reward = 0.1 + gain * done + draw.gauss(0, 0.08)
        if step:
            batch = [draw.gauss(reward, 1.4 - 0.6 * done) for _ in range(64)]
            scores.append({"step": step, "scores": batch})
            row |= {
                "reward/mean": reward,
                "reward/std": 1.4 - 0.6 * done,
                "objective/kl": 9 * done + abs(draw.gauss(0, 0.4)),
                "objective/kl_coef": 0.2 + 0.05 * math.sin(step / total * 4),
                "objective/entropy": 80 - 20 * done,
                "ppo/policy/entropy": 3.9 - 1.1 * done + draw.gauss(0, 0.04),
                "ppo/policy/clipfrac": max(0, 0.06 * done + draw.gauss(0, 0.01)),
                "ppo/policy/approxkl": abs(0.004 * done + draw.gauss(0, 0.0004)),
                "ppo/loss/policy": draw.gauss(-0.004, 0.003),
                "ppo/grad_norm": 1.5 + draw.gauss(0, 0.3),
                "response/length": 22 + 2 * done + draw.gauss(0, 0.2),
                "response/ended": 0.2 + 0.3 * done,
                "learning_rate": learning_rate * (1 - step / (total + 1)),
                "time/rollout": 1.1 + draw.gauss(0, 0.03),
                "time/evaluation": 0.2 + draw.gauss(0, 0.01),
                "time/optimisation": 2.3 + draw.gauss(0, 0.05),
                "tokens_per_second": 900 + draw.gauss(0, 20),
            }
            row |= {f"reward/{name}": reward / len(scorers) for name in scorers}
            if algorithm == "ppo":
                row["ppo/loss/value"] = 0.5 - 0.4 * done + abs(draw.gauss(0, 0.02))
                row["ppo/val/explained_variance"] = max(-3, 0.7 * done - 2 / (step + 0.5))
        if step % eval_every == 0 or step == total:
            row |= {
                "held_out/reward/mean": 0.1 + gain * done,
                "held_out/kl": 9 * done,
                "held_out/distinct_2": 0.95 - 0.2 * done,
                "held_out/length": 22 + 2 * done,
            }
            row |= {
                f"held_out/reward/{name}": (0.1 + gain * done) / len(scorers) for name in scorers
            }
            for number in range(prompts):
                words = [
                    draw.choice(WORDS_AFTER if draw.random() < done else WORDS_BEFORE)
                    for _ in range(18)
                ]
                samples.append(
                    {
                        "step": step,
                        "prompt": f"I saw film number {number}",
                        "response": " " + " ".join(words) + ".",
                        "reward": gain * done + draw.gauss(0, 0.5),
                        "kl": 9 * done + draw.gauss(0, 0.5),
                        "length": 22,
                        "ended": draw.random() < 0.3,
                        "parts": {name: gain * done / len(scorers) for name in scorers},
                    }
                )
        metrics.append(row)
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "scores.jsonl", scores)
    write_lines(folder / "samples.jsonl", samples)
    if warnings:
        write_lines(folder / "warnings.jsonl", warnings)
    if finished:
        ends = [
            {
                key.removeprefix("held_out/"): value
                for key, value in row.items()
                if "held_out" in key
            }
            for row in (metrics[0], metrics[-1])
        ]
        summary = {"before": ends[0], "after": ends[1], "seconds": 3.6 * steps, "steps": steps}
        (folder / "summary.json").write_text(json.dumps(summary | {"trl": "1.0"}))
    return folder


KL_NEGATIVE = [
    {
        "step": 12,
        "name": "kl_negative",
        "seen": "The KL to the reference is −1.3 nats per response, over the last 3 steps.",
        "causes": [
            "Responses are sampled with top-k or top-p, which the reference is not.",
            "The padding token is the end token, and the mask leaves the end out.",
        ],
        "fix": "Set sampling.top_k: 0 and sampling.top_p: 1.0.",
    }
]
ENTROPY = [
    {
        "step": 31,
        "name": "entropy_collapse",
        "seen": "The entropy fell from 3.9 to 0.4 nats per token.",
        "causes": ["The learning rate is too high.", "The KL coefficient is too low."],
        "fix": "Halve ppo.learning_rate, or raise ppo.init_kl_coef.",
    }
]
