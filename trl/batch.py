"""`Rollout`: queries and the responses to them, as padded tensors with masks.

Layout of one row (Q = 5, R = 4); `·` is padding, which holds token 0 and is never looked at:

    queries  · · q q q | r r r ·  responses         T = Q + R
             left-padded | right-padded

so that the response starts at the same column in every row, and the logits and values that
belong to response token t stand at column Q − 1 + t.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trl.core import position_ids_from_mask

TokenLists = Tensor | Sequence[Tensor]

RECORDED = ("behaviour_logprobs", "values", "group_ids", "ended")
"""Tensors that a sampler may add to a rollout."""

OF_EACH_ROW = ("query_texts", "response_texts", "query_messages")
"""What else it may add, one entry for each row."""


class ResponseOutput(NamedTuple):
    """What a model says of a rollout: all [B, R], float32, 0 outside the response mask."""

    logprobs: Tensor
    """log π(token | query, earlier tokens)."""
    values: Tensor
    """V before the token is written; zeros if the model has no value head."""
    entropy: Tensor
    """Entropy in nats of the distribution that the token was drawn from."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A batch of queries and responses. All masks are bool, True = a token that counts."""

    queries: Tensor
    """[B, Q] token ids, left-padded."""
    query_mask: Tensor
    """[B, Q]."""
    responses: Tensor
    """[B, R] token ids, right-padded."""
    response_mask: Tensor
    """[B, R]; the first EOS, if any, is inside. May have holes: tokens that the policy saw but
    did not write (the output of a tool, another speaker); the tokens after the last counted one
    are padding."""

    # What a sampler may add. None: not recorded.
    behaviour_logprobs: Tensor | None = None
    """[B, R] float32, log π(token) at the temperature of sampling, over the whole vocabulary; 0
    outside the mask."""
    values: Tensor | None = None
    """[B, R] float32, the value head's, before the token was written; 0 outside the mask."""
    group_ids: Tensor | None = None
    """[B] equal for the responses to one query."""
    ended: Tensor | None = None
    """[B] bool, whether the response ended by itself, rather than at the limit of its length."""
    temperature: float | None = None
    """What the logits were divided by while sampling."""
    query_texts: tuple[str, ...] | None = None
    """B texts."""
    response_texts: tuple[str, ...] | None = None
    """B texts; see `texts` for query and response as one."""
    texts_apart: bool = False
    """Whether the texts of query and response stand apart, as an encoder-decoder's do; else the
    response goes on where the query ends, in the middle of a word if need be."""
    query_messages: tuple[Sequence[Mapping[str, Any]], ...] | None = None
    """B chats, for queries that were chats: {"role": …, "content": …} for each message."""
    trunk_states: Tensor | None = None
    """[B, T − 1, d] what the frozen lower layers of a policy make of all tokens but the last."""

    @classmethod
    def from_lists(
        cls,
        queries: TokenLists,
        responses: TokenLists,
        *,
        eos_token_id: int | Sequence[int] | None = None,
        response_masks: Sequence[Tensor] | Tensor | None = None,
        group_ids: Tensor | Sequence[int] | None = None,
    ) -> Rollout:
        """Pad lists of 1-D token tensors of any lengths, or take equal-length 2-D tensors.

        Args:
            queries: B tensors of token ids, or one tensor [B, Q].
            responses: B tensors of token ids, or one tensor [B, R].
            eos_token_id: The token or tokens that end a response: what follows the first of them
                does not count. None: every token counts.
            response_masks: B masks shaped like the responses, True on tokens that the policy
                wrote. None: it wrote all.
            group_ids: B numbers, equal for the responses to one query. None: not known.

        Raises:
            TypeError: if they are not integer tensors, or the EOS is not a token id.
            ValueError: if the numbers of rows differ, or a row is empty.
        """
        query_rows = token_rows("query", queries)
        response_rows = token_rows("response", responses)
        if len(query_rows) != len(response_rows):
            raise ValueError(
                f"`query` and `response` must have the same number of rows, got {len(query_rows)} "
                f"and {len(response_rows)}: pass one response for each query."
            )
        padded_queries, query_mask = pad_rows(query_rows, left=True)
        padded_responses, response_mask = pad_rows(response_rows, left=False)
        if eos_token_id is not None:
            response_mask &= _until_end(padded_responses, _end_ids(eos_token_id))
            padded_responses = padded_responses.masked_fill(~response_mask, 0)
        if response_masks is not None:
            masks = _padded_masks(response_masks, response_rows)
            response_mask &= masks.to(response_mask.device)
        groups = None
        if group_ids is not None:
            groups = _group_numbers(group_ids, len(response_rows)).to(padded_responses.device)
        return cls(padded_queries, query_mask, padded_responses, response_mask, group_ids=groups)

    def check(self) -> None:
        """Raise a ValueError unless the tensors have the layout that the class promises."""
        for name, tokens, mask in (
            ("query", self.queries, self.query_mask),
            ("response", self.responses, self.response_mask),
        ):
            if tokens.is_floating_point() or tokens.ndim != 2:
                raise ValueError(
                    f"the {name} tokens of a Rollout must be integers [batch, length], got "
                    f"{tokens.dtype} {list(tokens.shape)}."
                )
            check_token_mask(f"{name}_mask", mask, tokens)
        check_left_padded("query_mask", self.query_mask)
        if len(self.queries) != len(self.responses):
            raise ValueError(
                f"a Rollout must have one response for each query, got {len(self.queries)} "
                f"queries and {len(self.responses)} responses."
            )
        if len(self) == 0:
            raise ValueError("a Rollout must have at least one row, got none.")
        rows, width = self.responses.shape
        for name, tensor in self._tensors().items():
            shape = [rows, width] if name in ("behaviour_logprobs", "values") else [rows]
            if name in RECORDED and list(tensor.shape) != shape:
                raise ValueError(
                    f"`{name}` of a Rollout must have the shape {shape}, got {list(tensor.shape)}."
                )
        for name in OF_EACH_ROW:
            entries = getattr(self, name)
            if entries is not None and len(entries) != rows:
                raise ValueError(
                    f"`{name}` of a Rollout must have one entry for each of its {rows} rows, got "
                    f"{len(entries)}."
                )

    def __len__(self) -> int:
        return self.queries.shape[0]

    def __repr__(self) -> str:
        recorded = [name for name in RECORDED if getattr(self, name) is not None]
        shown = f"Rollout of {len(self)}: queries {list(self.queries.shape)}"
        shown += f", responses {list(self.responses.shape)}"
        if recorded:
            shown += f", with {', '.join(recorded)}"
        if self.texts:
            text = self.texts[0]
            shown += f"; first: {text if len(text) <= 60 else text[:58] + ' …'!r}"
        return shown

    @property
    def input_ids(self) -> Tensor:
        """[B, T] queries followed by responses."""
        return torch.cat((self.queries, self.responses), dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """[B, T] True on every token up to the last counted one, uncounted tokens between included.

        A response may have holes in its mask, tokens that the policy saw but did not write.
        """
        until_last = self.response_mask.flip(1).cumsum(1).flip(1) > 0
        return torch.cat((self.query_mask, until_last), dim=1)

    @property
    def position_ids(self) -> Tensor:
        """[B, T] positions that count from 0 at each row's first real token."""
        return position_ids_from_mask(self.attention_mask)

    @property
    def lengths(self) -> Tensor:
        """[B] tokens of query and response together, padding left out."""
        return self.attention_mask.sum(1)

    @property
    def texts(self) -> tuple[str, ...] | None:
        """B texts, each query and its response as one, which a scorer reads; None without them."""
        if self.query_texts is None or self.response_texts is None:
            return None
        pairs = zip(self.query_texts, self.response_texts, strict=True)
        return tuple(_with_space(*pair) if self.texts_apart else "".join(pair) for pair in pairs)

    def select(self, rows: Tensor) -> Rollout:
        """Return the given rows, without the columns that are padding in all of them.

        Args:
            rows: Indices [b], or a bool mask [B] of the rows to keep.

        Raises:
            ValueError: if there are none, or the mask has another length.
        """
        rows = self._indices(rows)
        first, last = self.window(rows)
        kept: dict[str, Any] = {name: tensor[rows] for name, tensor in self._tensors().items()}
        for name in ("queries", "query_mask"):
            kept[name] = kept[name][:, first:]
        for name in ("responses", "response_mask", "behaviour_logprobs", "values"):
            if name in kept:
                kept[name] = kept[name][:, :last]
        if "trunk_states" in kept:
            kept["trunk_states"] = kept["trunk_states"][:, first : self.queries.shape[1] + last - 1]
        others: dict[str, Any] = {
            name: tuple(entries[row] for row in rows.tolist())
            for name in OF_EACH_ROW
            if (entries := getattr(self, name)) is not None
        }
        return replace(self, **kept, **others)

    def _indices(self, rows: Tensor) -> Tensor:
        """Return the indices of the chosen rows, of which there must be some."""
        if rows.dtype == torch.bool:
            if list(rows.shape) != [len(self)]:
                raise ValueError(
                    f"`rows` must be indices, or a mask of the shape {[len(self)]} of the rows, "
                    f"got a mask {list(rows.shape)}."
                )
            rows = rows.nonzero()[:, 0]
        if rows.numel() == 0:
            raise ValueError("`rows` must choose at least one row, got none.")
        return rows

    def window(self, rows: Tensor) -> tuple[int, int]:
        """Return the first column of the queries, and the number of columns of the responses, that
        hold more than padding in the given rows.
        """
        first = self.queries.shape[1] - int(self.query_mask[rows].sum(1).max())
        return first, int(self.response_mask[rows].any(0).nonzero().max()) + 1

    @classmethod
    def concat(cls, parts: Sequence[Rollout]) -> Rollout:
        """Return the rows of all parts as one rollout; groups of different parts stay apart.

        Args:
            parts: At least one. What was recorded for one of them must be there for all.

        Raises:
            ValueError: if there are none, or they differ in what was recorded, in the
                temperature, or in how query and response stand to each other.
        """
        if not parts:
            raise ValueError("`parts` must have at least one rollout, got none.")
        for name in ("temperature", "texts_apart"):
            if len(found := {getattr(part, name) for part in parts}) > 1:
                raise ValueError(
                    f"`parts` must have the same `{name}`, got {sorted(found, key=str)}."
                )
        joined: dict[str, Any] = {}
        # The states of a trunk are left out: they are of columns that are other columns now.
        for name in (entry.name for entry in fields(cls) if entry.name != "trunk_states"):
            columns = [getattr(part, name) for part in parts]
            missing = [index for index, column in enumerate(columns) if column is None]
            if missing and len(missing) < len(parts):
                raise ValueError(
                    f"`parts` must all have `{name}` or none, but parts {missing} have none."
                )
            if not missing:
                joined[name] = _JOINED[name](columns) if name in _JOINED else columns[0]
        return cls(**joined)

    def split(self, rows: int) -> Iterator[Rollout]:
        """Yield the rollout in parts of so many rows; the last may be smaller."""
        for chosen in torch.arange(len(self)).split(rows):
            yield self.select(chosen)

    def micro_batches(
        self, rows: Tensor | None = None, *, max_rows: int | None, max_tokens: int
    ) -> Iterator[Tensor]:
        """Split rows into groups that fit one pass, rows of like length together.

        Args:
            rows: Indices [b] to split; None: all.
            max_rows: Most rows in a group; None: no such limit.
            max_tokens: Most tokens in a group, its padding included. A single row may exceed it.

        Yields:
            Indices of the rows of one group.
        """
        query_lengths = self.query_mask.sum(1).tolist()
        lengths = self.lengths.tolist()
        every = range(len(self)) if rows is None else rows.tolist()
        group: list[int] = []
        longest_query = longest_response = 0
        for row in self._longest_first(every, lengths):
            query = max(longest_query, query_lengths[row])
            response = max(longest_response, lengths[row] - query_lengths[row])
            too_many = max_rows is not None and len(group) == max_rows
            if group and (too_many or (len(group) + 1) * (query + response) > max_tokens):
                yield torch.tensor(group, device=self.queries.device)
                group = []
                query, response = query_lengths[row], lengths[row] - query_lengths[row]
            group.append(row)
            longest_query, longest_response = query, response
        if group:
            yield torch.tensor(group, device=self.queries.device)

    def _longest_first(self, rows: Sequence[int], lengths: list[int]) -> list[int]:
        """Return the rows from the longest to the shortest, those of a group side by side."""
        if self.group_ids is None:
            return sorted(rows, key=lengths.__getitem__, reverse=True)
        group = self.group_ids.tolist()
        longest: dict[int, int] = {}
        for row in rows:
            longest[group[row]] = max(longest.get(group[row], 0), lengths[row])
        return sorted(rows, key=lambda row: (-longest[group[row]], group[row], -lengths[row]))

    def shuffled_rows(self, generator: torch.Generator) -> Tensor:
        """Return all rows [B] in random order, those of a group side by side."""
        if self.group_ids is None:
            return torch.randperm(len(self), generator=generator)
        group = self.group_ids.cpu().unique(return_inverse=True)[1]
        order = torch.randperm(int(group.max()) + 1, generator=generator)
        return order[group].argsort(stable=True)

    def to(self, device: torch.device | str) -> Rollout:
        """Return the same rollout on `device`."""
        moved: dict[str, Any] = {k: tensor.to(device) for k, tensor in self._tensors().items()}
        return replace(self, **moved)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rollout to one safetensors file, its texts and messages included."""
        others = (*OF_EACH_ROW, "texts_apart", "temperature")
        texts = {name: getattr(self, name) for name in others}
        # Copies: the format has no place for two tensors that share their memory.
        tensors = {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in self._tensors().items()
        }
        save_file(tensors, path, metadata={"texts": json.dumps(texts)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Rollout:
        """Read what `save` has written, on the CPU."""
        with safe_open(path, framework="pt") as file:
            names = {entry.name for entry in fields(cls)}
            if not {"queries", "query_mask", "responses", "response_mask"} <= set(file.keys()):
                raise ValueError(f"{os.fspath(path)!r} must hold a Rollout, got other tensors.")
            tensors: dict[str, Any] = {
                name: file.get_tensor(name) for name in names & set(file.keys())
            }
            texts = json.loads((file.metadata() or {}).get("texts", "{}"))
        others: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in texts.items()
            if value is not None
        }
        return cls(**tensors, **others)

    def _tensors(self) -> dict[str, Tensor]:
        """Return the fields that are tensors, by name."""
        named = ((entry.name, getattr(self, entry.name)) for entry in fields(self))
        return {name: value for name, value in named if isinstance(value, Tensor)}

    def response_lists(self) -> list[list[int]]:
        """Return the counted tokens of each response."""
        return _counted(self.responses, self.response_mask)

    def query_lists(self) -> list[list[int]]:
        """Return the tokens of each query."""
        return _counted(self.queries, self.query_mask)


def _counted(tokens: Tensor, mask: Tensor) -> list[list[int]]:
    """Return the tokens of each row that count."""
    pairs = zip(tokens.cpu(), mask.cpu(), strict=True)  # a GPU would be waited for in each row
    return [row[counts].tolist() for row, counts in pairs]


def _side_by_side(columns: Sequence[Tensor], *, left: bool = False) -> Tensor:
    """Join tensors [b, L] below each other, padded with 0 to the longest."""
    longest = max(column.shape[1] for column in columns)
    room = [longest - column.shape[1] for column in columns]
    return torch.cat(
        [F.pad(x, (more, 0) if left else (0, more)) for x, more in zip(columns, room, strict=True)]
    )


def _groups_apart(columns: Sequence[Tensor]) -> Tensor:
    """Join group numbers [b] so that no two parts share one."""
    joined, first = [], 0
    for column in columns:
        joined.append(column - column.min() + first)
        first = int(joined[-1].max()) + 1
    return torch.cat(joined)


def _one_after_another(columns: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(entry for column in columns for entry in column)


_JOINED: dict[str, Callable[[list[Any]], Any]] = {
    **dict.fromkeys(("queries", "query_mask"), partial(_side_by_side, left=True)),
    **dict.fromkeys(("responses", "response_mask", "behaviour_logprobs", "values"), _side_by_side),
    "group_ids": _groups_apart,
    "ended": torch.cat,
    **dict.fromkeys(OF_EACH_ROW, _one_after_another),
}
"""How `Rollout.concat` joins a field; any other is the same in all parts."""


def _with_space(query: str, response: str) -> str:
    """Join two texts with a space, unless there is white space where they meet, or one is empty."""
    meet = query[-1:] + response[:1]
    apart = len(meet) == 2 and not any(character.isspace() for character in meet)
    return f"{query} {response}" if apart else query + response


def _end_ids(eos_token_id: int | Sequence[int]) -> list[int]:
    """Return one or several token ids as a list."""
    ids = [eos_token_id] if isinstance(eos_token_id, Integral) else eos_token_id
    if not isinstance(ids, Sequence) or not all(
        isinstance(token, Integral) and not isinstance(token, bool) for token in ids
    ):
        raise TypeError(
            f"`eos_token_id` must be a token id, a list of token ids or None, got {eos_token_id!r}."
        )
    return [int(token) for token in ids]


def _group_numbers(group_ids: Tensor | Sequence[int], rows: int) -> Tensor:
    """Return the groups of so many responses as integers [B]."""
    numbers = torch.as_tensor(group_ids)
    if list(numbers.shape) != [rows] or numbers.is_floating_point() or numbers.is_complex():
        raise ValueError(
            f"`group_ids` must be one whole number for each of the {rows} responses, got "
            f"{numbers.dtype} {list(numbers.shape)}."
        )
    return numbers.long()


def _until_end(tokens: Tensor, ids: list[int]) -> Tensor:
    """Return the mask [B, R] of the tokens up to the first one of `ids`, that one included."""
    ends = torch.isin(tokens, torch.tensor(ids, dtype=tokens.dtype, device=tokens.device)).long()
    return ends.cumsum(1) - ends == 0


def check_token_mask(name: str, mask: Tensor, tokens: Tensor) -> None:
    """Raise unless `mask` is bool, shaped like `tokens` [B, L], and counts a token in each row."""
    if mask.dtype != torch.bool or mask.shape != tokens.shape:
        raise ValueError(
            f"`{name}` must be bool and of the shape {list(tokens.shape)} of its tokens, got "
            f"{mask.dtype} {list(mask.shape)}: use {name}.bool()."
        )
    if not mask.any(1).all():
        row = int((~mask.any(1)).nonzero()[0])
        raise ValueError(f"`{name}` must count a token in every row, got none in row {row}.")


def check_left_padded(name: str, mask: Tensor) -> None:
    """Raise unless in every row of `mask` [B, L] the padding comes first."""
    if (mask[:, :-1] & ~mask[:, 1:]).any():
        row = int((mask[:, :-1] & ~mask[:, 1:]).any(1).nonzero()[0])
        raise ValueError(
            f"`{name}` must have its padding on the left, got padding after a token in row {row}: "
            "set tokenizer.padding_side = 'left'."
        )


def token_rows(name: str, tokens: TokenLists) -> list[Tensor]:
    """Split [B, L] or a sequence of 1-D tensors into rows, after checking them.

    Raises:
        TypeError: if a row is not a tensor of integers.
        ValueError: if there are no rows, a row is not 1-D, or a row is empty.
    """
    if isinstance(tokens, Tensor) and tokens.ndim != 2:
        raise ValueError(
            f"`{name}` must be a tensor [batch, length] or a list of 1-D tensors, got a tensor of "
            f"shape {list(tokens.shape)}: use {name}.unsqueeze(0) for a single row."
        )
    rows = list(tokens)
    if not rows:
        raise ValueError(f"`{name}` must have at least one row, got none.")
    for index, row in enumerate(rows):
        if not isinstance(row, Tensor):
            raise TypeError(
                f"`{name}[{index}]` must be a 1-D tensor of token ids, got {type(row).__name__}: "
                "wrap it in torch.tensor(...)."
            )
        if row.is_floating_point() or row.is_complex() or row.dtype == torch.bool:
            raise TypeError(
                f"`{name}[{index}]` must hold token ids of an integer dtype, got {row.dtype}: "
                "convert it with .long()."
            )
        if row.ndim != 1:
            raise ValueError(
                f"`{name}[{index}]` must be 1-D, got shape {list(row.shape)}: "
                "pass one tensor of token ids for each row."
            )
        if row.numel() == 0:
            raise ValueError(
                f"`{name}[{index}]` must have at least one token, got none: leave the row out."
            )
    return rows


def pad_rows(rows: Sequence[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    """Pad 1-D token tensors with 0 to one tensor [B, L] and its mask [B, L]."""
    side = "left" if left else "right"
    padded = torch.nn.utils.rnn.pad_sequence(
        [row.long() for row in rows], batch_first=True, padding_side=side
    )
    lengths = torch.tensor([row.numel() for row in rows], device=padded.device)[:, None]
    column = torch.arange(padded.shape[1], device=padded.device)
    mask = column >= padded.shape[1] - lengths if left else column < lengths
    return padded, mask


def _padded_masks(masks: Sequence[Tensor] | Tensor, responses: list[Tensor]) -> Tensor:
    """Pad one mask for each response to [B, R], after checking them."""
    rows = list(masks)
    if len(rows) != len(responses):
        raise ValueError(
            f"`response_masks` must have one mask for each of the {len(responses)} responses, got "
            f"{len(rows)}."
        )
    for index, (mask, response) in enumerate(zip(rows, responses, strict=True)):
        if not isinstance(mask, Tensor) or mask.shape != response.shape:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"`response_masks[{index}]` must be a tensor of the shape {list(response.shape)} "
                f"of its response, got {shape}."
            )
        if not mask.bool().any():
            raise ValueError(
                f"`response_masks[{index}]` must count a token, got none: leave the row out."
            )
    return pad_rows(rows, left=False)[0].bool()


def score_tensor(
    scores: Tensor | Sequence[float | Tensor | Sequence[float]], rollout: Rollout
) -> Tensor:
    """Return finite float32 scores of a rollout: [B] of its responses, or [B, R] of their tokens.

    Args:
        scores: One number for each response; or, for each token, a tensor [B, R] or B sequences
            as long as the responses, or as their counted tokens.
        rollout: B rows.

    Raises:
        TypeError: if they are not numbers.
        ValueError: if there is not one for each row, or for each token, or one is not finite.
    """
    rows = len(rollout)
    if not isinstance(scores, Tensor):
        try:
            entries = [torch.as_tensor(score, dtype=torch.float32).cpu() for score in scores]
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"`scores` must be a tensor [batch] or a list of numbers, one for each response, "
                f"or for each token ({error})."
            ) from error
        if all(entry.shape in ((), (1,)) for entry in entries):
            scores = torch.tensor([entry.item() for entry in entries])
        else:
            scores = _token_scores(entries, rollout)
    if scores.is_complex():
        raise TypeError(f"`scores` must be real numbers, got {scores.dtype}.")
    if scores.ndim != 1 and scores.shape != rollout.response_mask.shape:
        raise ValueError(
            f"`scores` must be 1-D, one number for each response, or of the shape "
            f"{list(rollout.response_mask.shape)} of the responses, got shape "
            f"{list(scores.shape)}: use scores.squeeze(-1) or take one column."
        )
    if len(scores) != rows:
        raise ValueError(
            f"`scores` must have one number for each of the {rows} rows of query and response, "
            f"got {len(scores)}."
        )
    scores = scores.detach().float()
    if scores.ndim == 2:
        scores = scores.masked_fill(~rollout.response_mask.to(scores.device), 0.0)
    if not scores.isfinite().all():
        row = int((~scores.isfinite()).nonzero()[0, 0])
        bad = scores[row][~scores[row].isfinite()].flatten()[0].item()
        raise ValueError(
            f"`scores` must be finite, got {bad} at row {row}: check the reward function on that "
            "response."
        )
    return scores


def _token_scores(scores: Sequence[Tensor], rollout: Rollout) -> Tensor:
    """Put the scores of each response's tokens to their places in [B, R]."""
    if len(scores) != len(rollout):
        raise ValueError(
            f"`scores` must have one entry for each of the {len(rollout)} rows of query and "
            f"response, got {len(scores)}."
        )
    mask = rollout.response_mask.cpu()
    placed = torch.zeros(mask.shape)
    for row, score in enumerate(scores):
        counted = mask[row].nonzero().flatten()
        length = int(counted[-1]) + 1
        if score.ndim != 1 or len(score) not in (length, len(counted)):
            raise ValueError(
                f"`scores[{row}]` must be one number, or one for each of the {length} tokens of "
                f"its response, got shape {list(score.shape)}."
            )
        if len(score) == length:
            placed[row, :length] = score.masked_fill(~mask[row, :length], 0.0)
        else:
            placed[row, counted] = score
    return placed
