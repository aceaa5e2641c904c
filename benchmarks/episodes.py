"""What several turns cost beside one, with the same tokens.

    python benchmarks/episodes.py [--model smollm2] [--episodes 64] [--turns 3] [--tokens 16]

Samples episodes of a game that answers each turn with a few words, and one-turn responses:

read and written   as many tokens as the policy wrote in such an episode, to prompts with as many
                   tokens more as it was told in between: the same work, without the turns
written            as many as the policy wrote, and nothing is read
in all             as many as such an episode has, replies included: these are written one by one

The first is the fair one: what a tool says has to be read by the model, but at once. With `--train`
there are steps of PPO on episodes and on "in all". The ways take turns, round by round, and the
median of the rounds' ratios is told, in seconds of the CPU: on a machine that does other things
too, those of the clock say little. Writes results/episodes-<model>.json.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer

import trl
from trl import starter
from trl.environments import EnvironmentReward, Episodes, Turn

FOLDER = Path(__file__).parent / "results"
MODELS = {
    "starter": starter.LANGUAGE_MODEL,
    "smollm2": Path("~/.cache/trl/models/smollm2").expanduser(),
}


REPLY = " It said: go on, please."


class Game:
    """Answers each turn, and is over after the last."""

    turns = 3

    def reset(self):
        self.left = self.turns

    def step(self, text: str) -> Turn:
        self.left -= 1
        return Turn(REPLY, reward=1.0, done=self.left == 0)


def timed(function):
    """Return what a function returns, and the seconds of the CPU that it took."""
    begun = time.process_time()
    return function(), time.process_time() - begun


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="starter", choices=MODELS)
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train", action="store_true", help="steps of PPO too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    Game.turns = options.turns
    tokenizer = AutoTokenizer.from_pretrained(MODELS[options.model])
    policy = trl.CausalLMWithValueHead.from_pretrained(MODELS[options.model]).eval()
    rows = options.episodes
    prompts = [f"Film number {row} was{' very' * (row % 5)}" for row in range(rows)]

    def sampler(most):
        return trl.Sampler(tokenizer, max_new_tokens=most, eos_token_id=None)

    episodes = Episodes(sampler(options.tokens), Game, max_turns=options.turns)
    in_all = int(episodes(policy, prompts[:2]).responses.shape[1])
    written = options.tokens * options.turns
    longer = [prompt + REPLY * (options.turns - 1) for prompt in prompts]
    ways = {
        "episodes": (episodes, prompts),
        "read and written": (sampler(written), longer),
        "written": (sampler(written), prompts),
        "in all": (sampler(in_all), prompts),
    }
    trainer = trl.PPOTrainer(policy, batch_size=rows) if options.train else None
    seconds = {name: [] for name in ways}
    for round_ in range(options.rounds + 1):  # the first warms up
        for name, (way, asked) in ways.items():
            rollout, taken = timed(lambda way=way, asked=asked: way(policy, asked))
            own = rollout.response_mask.sum(1)
            assert (own == (in_all if name == "in all" else written)).all()
            if trainer is not None and name in ("episodes", "in all"):
                once = EnvironmentReward() if name == "episodes" else lambda rollout: [1.0] * rows
                key = f"step, {name}"
                _, trained = timed(lambda r=rollout, s=once: trainer.step(r, s(r)))
                seconds.setdefault(key, []).extend([trained] * (round_ > 0))
            seconds[name] += [taken] * (round_ > 0)
    pairs = [(a, b) for a in seconds for b in seconds if a.endswith("episodes") and a != b]
    ratios = {
        f"{a} / {b}": statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))
        for a, b in pairs
        if a.startswith("step") == b.startswith("step")
    }
    found = {
        "model": options.model,
        "episodes": rows,
        "turns": options.turns,
        "tokens written": written,
        "tokens in all": in_all,
        "threads": 1,
        "load": os.getloadavg()[0],
        "seconds": {name: [round(x, 3) for x in every] for name, every in seconds.items()},
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
    }
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(found, indent=2)
    (FOLDER / f"episodes-{options.model}.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
