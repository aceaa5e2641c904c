"""A reward of your own: responses that say "film", and that end their sentences.

    python examples/custom_reward.py

A reward is a function from a list to as many numbers. Two of them are added up with weights; each
has a figure of its own in the history. Everything ships with trl: no network is needed.
"""

import argparse

from transformers import AutoTokenizer

import trl
from trl import CausalLMWithValueHead, FunctionScorer, WeightedSum, starter


def says_film(responses):
    """One point if the word is in what the policy wrote: a prompt may have it too."""
    return [float("film" in response) for response in responses]


def full_stops(texts):
    """One point for each, up to two."""
    return [float(min(text.count("."), 2)) for text in texts]


def mean(history, figure, steps):
    return sum(row[figure] for row in history[steps]) / len(history[steps])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15)
    steps = parser.parse_args().steps

    reward = WeightedSum(
        [
            (FunctionScorer(says_film), 1.0),
            (FunctionScorer(full_stops), 0.2),
        ]
    )
    trained = trl.train(
        model=CausalLMWithValueHead.from_pretrained(starter.LANGUAGE_MODEL),
        tokenizer=AutoTokenizer.from_pretrained(starter.LANGUAGE_MODEL),
        prompts=starter.prompts("train"),
        reward=reward,
        steps=steps,
        max_new_tokens=12,
        batch_size=48,
        on_step=lambda step, row: print(f"step {step}: reward {row['reward/mean']:.2f}"),
    )

    history = trained.history
    before = mean(history, "reward/says_film", slice(0, 2))
    after = mean(history, "reward/says_film", slice(-2, None))
    print(f'responses with "film": {before:.0%} at first, {after:.0%} at the end')
    assert after > before + 0.05, (before, after)


if __name__ == "__main__":
    main()
