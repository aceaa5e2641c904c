"""When a response ends by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StopStringCriteria

from trl.batch import check_unicode
from trl.config.errors import refuse


class StopRule:
    """A response ends with one of some tokens, or with the token that completes a string.

    Args:
        token_ids: Tokens that end a response.
        strings: Texts that end a response, wherever token borders lie. What precedes them in the
            last token, or follows, stays in the response. Texts of the query do not count.
        tokenizer: Needed for `strings`.

    Raises:
        ValueError: if an id is negative, a string is empty, or there are strings without tokenizer.
    """

    def __init__(
        self,
        token_ids: Sequence[int] = (),
        strings: Sequence[str] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        for token_id in token_ids:
            whole = isinstance(token_id, Integral) and not isinstance(token_id, bool)
            if not whole or not 0 <= token_id < 2**63:
                fix = "use None for responses that never end early"
                refuse("eos_token_id", "hold token ids >= 0", repr(token_id), fix)
        listed = isinstance(strings, Sequence) and not isinstance(strings, str)
        if not listed or not all(isinstance(text, str) and text for text in strings):
            refuse("stop_strings", "be a list of texts that are not empty", repr(strings))
        check_unicode(strings, "stop_strings")
        if strings and tokenizer is None:
            fix = "pass Sampler(tokenizer, stop_strings=...)"
            refuse("stop_strings", "come with a tokenizer", "none", fix)
        self._ids = torch.tensor(list(map(int, token_ids)), dtype=torch.long, device="cpu")
        self._strings: Any = _ends_with(tokenizer, list(strings)) if strings else None

    @property
    def token_ids(self) -> list[int]:
        """The tokens that end a response."""
        return self._ids.tolist()

    def also(self, token_ids: Sequence[int]) -> StopRule:
        """Return the same rule with more tokens that end a response."""
        rule = copy.copy(self)
        every = sorted({*self.token_ids, *token_ids})
        rule._ids = torch.tensor(every, dtype=torch.long, device="cpu")
        return rule

    @property
    def window(self) -> int:
        """The most tokens at the end of a response that matter."""
        return 1 if self._strings is None else int(self._strings.maximum_token_len)

    def __bool__(self) -> bool:
        return len(self._ids) > 0 or self._strings is not None

    def forbid(self, logits: Tensor) -> Tensor:
        """Return logits [B, V] with −inf for the tokens that end a response."""
        return logits.index_fill(-1, self._ids.to(logits.device), -torch.inf)

    def __call__(self, written: Tensor) -> Tensor:
        """Return [B] bool: does the last token of the responses so far [B, t] end them?

        Only the last `window` tokens of each are looked at.
        """
        ended = torch.zeros(len(written), dtype=torch.bool, device=written.device)
        if len(self._ids) > 0:
            self._ids = self._ids.to(written.device)
            ended |= torch.isin(written[:, -1], self._ids)
        if self._strings is not None:
            ended |= self._strings(written, None)
        return ended


def _ends_with(tokenizer: Any, strings: list[str]) -> Callable[[Tensor, None], Tensor]:
    """Return what tells whether the last token of a row completes one of the strings."""
    try:
        with torch.device("cpu"):  # whatever the default one is
            return StopStringCriteria(tokenizer, strings)
    except ValueError as error:
        # It writes each token behind "abcdef", which not every vocabulary can spell.
        if "substring not found" not in str(error):
            raise
        return _DecodedEnds(tokenizer, strings)


class _DecodedEnds:
    """Looks for the strings in the decoded text: slower, but right for every tokenizer."""

    def __init__(self, tokenizer: Any, strings: list[str]) -> None:
        self.tokenizer, self.strings = tokenizer, strings
        # A token for each byte, one before them whose space may be lost, and the last one.
        self.maximum_token_len = max(len(string.encode()) for string in strings) + 2

    def __call__(self, written: Tensor, _: None) -> Tensor:
        """Return [B] bool: does the last token of the rows [B, t] complete a string?"""
        rows = written[:, -self.maximum_token_len :].tolist()
        return torch.tensor([self._completes(row) for row in rows], device=written.device)

    def _completes(self, row: list[int]) -> bool:
        before, text = self.tokenizer.decode(row[:-1]), self.tokenizer.decode(row)
        # Up to the last token the text may hold the string: that was for an earlier token.
        return any(
            text.rfind(string) + len(string) > len(before)
            for string in self.strings
            if string in text
        )
