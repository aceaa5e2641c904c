"""Rows of text for a mixed pretraining loss (InstructGPT, arXiv:2203.02155, equation 2).

rows = PretrainingText(recipe.pretraining, tokenizer, seed=0)
rows(16)                            # the next 16, each [tokens]
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl.config.errors import refuse
from trl.config.recipe import PretrainingConfig
from trl.data.prompts import encoded
from trl.data.sources import checked_texts, chosen_column, read_table

NAME = "pretraining.text"
"""What errors call the source."""


class PretrainingText:
    """Rows of token ids, cut from texts that are joined by EOS.

    Every row comes once, in random order, before any comes again. What is left at the end of the
    texts and fills no row is not used.

    Args:
        settings: The section `pretraining` of a recipe, with a text.
        tokenizer: The policy's.
        seed: Of the order.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: see `trl.data.prompts.load_prompts`.
    """

    def __init__(
        self, settings: PretrainingConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int
    ) -> None:
        if tokenizer.eos_token_id is None:
            rule = "be left out for a tokenizer without an EOS token, which ends each text"
            refuse(NAME, rule, fix="set tokenizer.eos_token")
        assert settings.text is not None
        table = read_table(settings.text, subset=settings.subset, split=settings.split, name=NAME)
        column = chosen_column(table, settings.column, NAME)
        texts = [text for text in checked_texts(table, column, NAME) if text.strip()]
        ends = [tokenizer.eos_token_id]
        joined = itertools.chain.from_iterable(row + ends for row in encoded(texts, tokenizer))
        ids = torch.from_numpy(np.fromiter(joined, np.int32))
        tokens = settings.tokens
        if len(ids) < tokens:
            rule = f"be at most the {len(ids)} tokens of all texts of {table.source}"
            refuse("pretraining.tokens", rule, str(tokens), "lower it, or add text")
        self._rows = ids[: len(ids) // tokens * tokens].view(-1, tokens)
        self._seed = seed
        # What a saved state must have the same.
        checksum = zlib.crc32(self._rows.numpy())
        self._fixed = {"seed": seed, "rows": len(self), "checksum": checksum}
        self._go_to(0, 0)

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    def __call__(self, n: int) -> list[Tensor]:
        """Return the next n rows of token ids, each [tokens]."""
        rows = []
        for _ in range(n):
            if self._position == len(self):
                self._go_to(self._turn + 1, 0)
            rows.append(self._rows[self._order[self._position]].long())
            self._position += 1
        return rows

    def state_dict(self) -> dict[str, int]:
        """Return how far it has come, as plain numbers."""
        return {"turn": self._turn, "position": self._position} | self._fixed

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: if it is that of another text, tokenizer, row length or seed.
        """
        for key, mine in self._fixed.items():
            if state[key] != mine:
                what = f"be the text of the saved state, whose {key} is {state[key]}"
                advice = "pass the same text, tokenizer, tokens and seed as before"
                refuse(NAME, what, str(mine), advice)
        self._go_to(state["turn"], state["position"])

    def _go_to(self, turn: int, position: int) -> None:
        """Go to a row of a turn, each of which has an order of its own."""
        self._turn, self._position = turn, position
        self._order = np.random.default_rng([self._seed, turn]).permutation(len(self))
