"""Tools that are plain functions, and a reward that checks the answer.

    python examples/environments/functions.py

A tiny model is asked for a square. It may call a function for it, and has to say the answer itself
at the end. It begins with random weights.
"""

import argparse

from tiny import tiny

import trl
from trl.evaluation import RegexScorer

CALL = r"(?P<name>square) (?P<number>\d+)"  # how it writes a call; chat templates have their own


def square(number: int) -> int:
    """Work out a square.

    Args:
        number: To be squared.
    """
    return number * number


def called(completions: list, **columns) -> list[float]:
    """One point for each response in which a tool has answered."""
    return [float(any(turn["role"] == "tool" for turn in chat)) for chat in completions]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80)
    steps = parser.parse_args().steps

    model, tokenizer = tiny("square of : 2 3 4 5 9 16 25")
    _, history = trl.train(
        model,
        [{"prompt": f"square of {n} :", "answer": str(n * n)} for n in (2, 3, 4, 5)] * 32,
        {RegexScorer(r"(\d+)\s*$", key="answer"): 1.0, called: 0.5},
        tokenizer=tokenizer,
        tools=[square],
        environment_kwargs={"call_format": CALL, "max_turns": 2, "max_tokens": 32},
        max_new_tokens=2,  # of a turn
        steps=steps,
        batch_size=64,
        learning_rate=3e-3,  # a rate that sets itself would take longer from random weights
        ref_model="none",  # random weights are nothing to stay close to
        on_step=lambda step, row: print(
            f"step {step}: right {row['reward/regex']:.0%}, called {row['reward/called']:.0%}"
        ),
    )
    first, last = history[0]["reward/mean"], history[-1]["reward/mean"]
    print(f"reward: {first:.2f} at first, {last:.2f} at the end")
    assert last > first, (first, last)


if __name__ == "__main__":
    main()
