"""The shapes of the comparison, by name. Standard library only: driver and workers read this."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Workload:
    """A model and the batch of one PPO iteration. Lengths are (shortest, longest), in tokens."""

    title: str
    family: str = "gpt2"
    """gpt2 (learned positions, MLP of 4 × width) or llama."""
    layers: int = 12
    width: int = 768
    heads: int = 12
    key_value_heads: int = 12
    """Of llama."""
    inner: int = 3072
    """Width of llama's MLP."""
    vocabulary: int = 50257
    positions: int = 1024
    batch_size: int = 32
    minibatch_size: int = 8
    ppo_epochs: int = 4
    group_size: int = 1
    """Responses to each query; rows of a group are adjacent."""
    query_length: tuple[int, int] = (8, 8)
    response_length: tuple[int, int] = (24, 24)

    @classmethod
    def from_json(cls, text: str) -> Workload:
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        for name in ("query_length", "response_length"):
            fields[name] = tuple(fields[name])
        return cls(**fields)

    def to_json(self) -> str:
        """Write the workload as text that fits a command line."""
        return json.dumps(asdict(self))

    @property
    def updates(self) -> int:
        """Optimiser updates of one iteration."""
        return self.ppo_epochs * math.ceil(self.batch_size / self.minibatch_size)

    @property
    def query_lengths(self) -> list[int]:
        """Length of the query of each row, uniform; the same in every iteration."""
        chance = random.Random(1)
        shortest, longest = self.query_length
        lengths = []
        for _ in range(self.batch_size // self.group_size):
            lengths += [chance.randint(shortest, longest)] * self.group_size
        return lengths

    @property
    def response_lengths(self) -> list[int]:
        """Length of the response of each row; the same in every iteration.

        If they differ: log-normal, the median a third of the longest, σ 0.8 of the logarithm, cut
        to the range. The longest comes up.
        """
        shortest, longest = self.response_length
        if shortest == longest:
            return [longest] * self.batch_size
        chance = random.Random(2)
        drawn = [chance.lognormvariate(math.log(longest / 3), 0.8) for _ in range(self.batch_size)]
        lengths = [max(shortest, min(longest, round(length))) for length in drawn]
        lengths[lengths.index(max(lengths))] = longest
        return lengths

    @property
    def tokens(self) -> int:
        """Tokens of all queries and responses, without padding."""
        return sum(self.query_lengths) + self.response_tokens

    @property
    def response_tokens(self) -> int:
        """Tokens of all responses, without padding."""
        return sum(self.response_lengths)


WORKLOADS = {
    "a": Workload("GPT-2 124M, 32 × (8 + 24) tokens"),
    "b": Workload(
        "GPT-2 124M, 64 rows of ragged lengths",
        batch_size=64,
        minibatch_size=16,
        query_length=(4, 64),
        response_length=(1, 64),
    ),
    "c": Workload(
        "Llama 61M, 8 prompts × 4 responses, 128 + 64 tokens",
        family="llama",
        layers=15,
        width=512,
        heads=8,
        key_value_heads=4,
        inner=1408,
        vocabulary=32000,
        batch_size=32,
        minibatch_size=16,
        ppo_epochs=2,
        group_size=4,
        query_length=(128, 128),
        response_length=(64, 64),
    ),
    "d": Workload(
        "the demo's GPT-2 5M, 256 × (8 + 24) tokens",
        layers=4,
        width=256,
        heads=4,
        vocabulary=8192,
        positions=256,
        batch_size=256,
        minibatch_size=64,
        ppo_epochs=1,
    ),
    "e": Workload(
        "GPT-2 124M, 256 × (5 + 15) tokens",
        batch_size=256,
        minibatch_size=64,
        query_length=(5, 5),
        response_length=(15, 15),
    ),
}
"""Name -> workload. Input and output embedding are one in all of them."""
