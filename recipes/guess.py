"""The game of guess-number.yaml: find a number in four guesses."""

import random
import re

from trl.environments import Turn

MOST = 15
ASK = "Guess my number. It is from {} to {}."
EXAMPLE = [ASK.format(1, MOST), "8", ASK.format(1, 7), "4", ASK.format(5, 7), "6"]


class Guess:
    """Thinks of a number and says after each guess what is still possible.

    The middle of that is the guess which always finds it: 4 of them for 15 numbers.
    """

    def reset(self, seed: int | None = None) -> list[dict[str, str]]:
        """Show a game, and begin another; a seed is a number to guess."""
        self.number = random.Random(seed).randint(1, MOST)
        self.low, self.high = 1, MOST
        contents = [*EXAMPLE, "Right! " + ASK.format(1, MOST)]
        roles = ["user", "assistant"] * len(contents)
        return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]

    def step(self, text: str) -> Turn:
        """Answer a guess: 1 for the right one, -0.2 for what was no number or ruled out before."""
        numbers = [int(found) for found in re.findall(r"\d+", text[:20])]
        if numbers == [self.number]:
            return Turn("Right!", reward=1.0, done=True)
        possible = len(numbers) == 1 and self.low <= numbers[0] <= self.high
        if possible and numbers[0] < self.number:
            self.low = numbers[0] + 1
        elif possible:
            self.high = numbers[0] - 1
        return Turn(ASK.format(self.low, self.high), reward=0.0 if possible else -0.2)
