"""A game over several turns: `step` answers what the policy wrote, and rewards come turn by turn.

    python examples/environments/game.py

A tiny model finds a number from 1 to 7 in three guesses. It begins with random weights, and learns
from its mistakes alone that guesses are numbers, what higher means, and where to begin.
"""

import argparse
import random

from tiny import tiny

import trl
from trl.environments import Turn

MOST = 7


class Guess:
    """Thinks of a number, and says whether it is higher or lower than a guess."""

    def reset(self, seed=None):
        """Begin: what is returned is the prompt. The seed is of the row, or its group."""
        self.number = random.Random(seed).randint(1, MOST)
        return "guess :"

    def step(self, text: str) -> Turn:
        """Answer a guess. The return type `Turn` makes this a game, and no tool."""
        if not text.strip().isdigit():
            return Turn("number :", reward=-0.2)
        if (guess := int(text)) == self.number:
            return Turn("right", reward=1.0, done=True)
        return Turn("higher :" if guess < self.number else "lower :")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    steps = parser.parse_args().steps

    model, tokenizer = tiny("1 2 3 4 5 6 7 guess number higher lower right :")
    _, history = trl.train(
        model,
        tokenizer=tokenizer,
        environment=Guess,  # no prompts: it makes up its own
        environment_kwargs={"max_turns": 3},
        max_new_tokens=1,  # of a turn
        steps=steps,
        batch_size=64,
        learning_rate=3e-3,  # a rate that sets itself would take longer from random weights
        ref_model="none",  # random weights are nothing to stay close to
        on_step=lambda step, row: print(f"step {step}: found {row['stop/done']:.0%}"),
    )
    first, last = history[0]["stop/done"], history[-1]["stop/done"]
    print(f"found in three guesses: {first:.0%} at first, {last:.0%} at the end")
    assert last > first, (first, last)


if __name__ == "__main__":
    main()
