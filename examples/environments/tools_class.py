"""A class of tools: `reset` begins an episode, its other public methods are what the policy calls.

    python examples/environments/tools_class.py

A tiny model adds numbers to a sum until it is what was asked for. It begins with random weights:
that "add 3" is a call, and when to end, it finds out by the reward.
"""

import argparse

from tiny import tiny

import trl

CALL = (
    r"(?P<name>add) (?P<number>\d+)"  # how it writes a call; a chat template has a way of its own
)


class Ledger:
    """Keeps a sum."""

    def reset(self, goal):
        """Begin: `goal` is a column of the data, and what is returned is added to the prompt."""
        self.goal, self.total = goal, 0
        return f" {goal} :"

    def add(self, number: int) -> str:
        """Add a number to the sum.

        Args:
            number: What to add.
        """
        self.total += number
        return f"sum {self.total} :"

    def get_reward(self) -> float:
        """Return 1 for the right sum, and less the farther it is."""
        return max(0.0, 1 - abs(self.goal - self.total) / self.goal)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps

    model, tokenizer = tiny("add sum goal : 1 2 3 4 5 6 7 8 9")
    _, history = trl.train(
        model,
        [{"prompt": "goal", "goal": goal} for goal in (3, 4, 5, 6)] * 32,
        tokenizer=tokenizer,
        environment=Ledger,
        environment_kwargs={"call_format": CALL, "max_turns": 3, "max_tokens": 32},
        max_new_tokens=2,  # of a turn
        steps=steps,
        batch_size=64,
        learning_rate=3e-3,  # a rate that sets itself would take longer from random weights
        ref_model="none",  # random weights are nothing to stay close to
        on_step=lambda step, row: print(
            f"step {step}: reward {row['reward/mean']:.2f}, calls {row['episode/tool_calls']:.2f}"
        ),
    )
    first, last = history[0]["reward/mean"], history[-1]["reward/mean"]
    print(f"reward: {first:.2f} at first, {last:.2f} at the end")
    assert last > first, (first, last)


if __name__ == "__main__":
    main()
