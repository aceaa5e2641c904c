"""When a response ends by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StopStringCriteria


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
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise ValueError(
                    f"`eos_token_id` must hold token ids >= 0, got {token_id!r}: use None for "
                    "responses that never end early."
                )
        if isinstance(strings, str) or not all(isinstance(s, str) and s for s in strings):
            raise ValueError(
                f"`stop_strings` must be a list of texts that are not empty, got {strings!r}."
            )
        if strings and tokenizer is None:
            raise ValueError(
                "`stop_strings` must come with a tokenizer, got none: pass "
                "Sampler(tokenizer, stop_strings=...)."
            )
        self._ids = torch.tensor(list(token_ids), dtype=torch.long)
        self._strings: Any = StopStringCriteria(tokenizer, list(strings)) if strings else None

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
