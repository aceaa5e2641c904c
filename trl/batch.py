"""`Rollout`: queries and the responses to them, as padded tensors with masks.

Layout of one row (Q = 5, R = 4); `·` is padding, which holds token 0 and is never looked at:

    queries  · · q q q | r r r ·  responses         T = Q + R
             left-padded | right-padded

so that the response starts at the same column in every row, and the logits and values that
belong to response token t stand at column Q − 1 + t.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trl.axes import (
    ALL_BUT_THE_LAST,
    GROUPS,
    IF_ALIKE,
    ONE_FOR_ALL,
    QUERY_TOKENS,
    RESPONSE_TOKENS,
    ROWS,
    TUPLE,
    TUPLES,
    Axes,
)
from trl.config.errors import problem, refuse, shown
from trl.core import position_ids_from_mask

TokenLists = Tensor | Sequence[Tensor]

MOST_LOG_PROB = 1e-2
"""A log-prob is at most 0, up to rounding in low precision."""


class ValueBins(NamedTuple):
    """What a value head of bins says: a distribution for each token, whose mean is the value."""

    logits: Tensor
    """[B, R, K] float32, 0 outside the response mask."""
    centres: Tensor
    """[K] the values that the bins stand for."""


class ResponseOutput(NamedTuple):
    """What a model says of a rollout: all [B, R], float32, 0 outside the response mask."""

    logprobs: Tensor
    """log π(token | query, earlier tokens)."""
    values: Tensor
    """V before the token is written; zeros if the model has no value head."""
    entropy: Tensor
    """Entropy in nats of the distribution that the token was drawn from."""
    router: Tensor | None = None
    """What the routers of a mixture of experts add to the loss, for all tokens of a pass the same;
    None: nothing."""
    bins: ValueBins | None = None
    """What the loss of a value head of bins needs, in passes with a gradient; None: it has none."""


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """A batch of queries and responses. All masks are bool, True = a token that counts.

    `select`, `concat`, `to`, `save`, `load` and `check` know a field by its `Axes` alone: another
    field is one line here.
    """

    queries: Annotated[Tensor, QUERY_TOKENS]
    """[B, Q] token ids, left-padded."""
    query_mask: Annotated[Tensor, QUERY_TOKENS]
    """[B, Q]."""
    responses: Annotated[Tensor, RESPONSE_TOKENS]
    """[B, R] token ids, right-padded."""
    response_mask: Annotated[Tensor, RESPONSE_TOKENS]
    """[B, R]; the first EOS, if any, is inside. May have holes: tokens that the policy saw but
    did not write (the output of a tool, another speaker); the tokens after the last counted one
    are padding."""

    # What a sampler may add. None: not recorded.
    behaviour_logprobs: Annotated[Tensor | None, RESPONSE_TOKENS] = None
    """[B, R] float32, log π(token) at the temperature of sampling, over the whole vocabulary; 0
    outside the mask."""
    values: Annotated[Tensor | None, RESPONSE_TOKENS] = None
    """[B, R] float32, the value head's, before the token was written; 0 outside the mask."""
    group_ids: Annotated[Tensor | None, GROUPS] = None
    """[B] equal for the responses to one query."""
    ended: Annotated[Tensor | None, ROWS] = None
    """[B] bool, whether the response ended by itself, rather than at the limit of its length."""
    temperature: Annotated[float | None, ONE_FOR_ALL] = None
    """What the logits were divided by while sampling."""
    query_texts: Annotated[tuple[str, ...] | None, TUPLE] = None
    """B texts."""
    response_texts: Annotated[tuple[str, ...] | None, TUPLE] = None
    """B texts; see `texts` for query and response as one."""
    decode: Annotated[Callable[[list[int], list[int]], str] | None, IF_ALIKE] = None
    """From token ids of the end of a query, and of the beginning of its response, to the text of
    the latter, as `response_texts` have it: `Sampler.text_of`. It is not saved."""
    texts_apart: Annotated[bool, ONE_FOR_ALL] = False
    """Whether the texts of query and response stand apart, as an encoder-decoder's do; else the
    response goes on where the query ends, in the middle of a word if need be."""
    query_messages: Annotated[tuple[Sequence[Mapping[str, Any]], ...] | None, TUPLE] = None
    """B chats, for queries that were chats: {"role": …, "content": …} for each message."""
    turn_rewards: Annotated[Tensor | None, RESPONSE_TOKENS] = None
    """[B, R] float32, what environments gave, each on the last token of the turn that it is for."""
    episodes: Annotated[tuple[Mapping[str, Any], ...] | None, TUPLE] = None
    """B conversations with an environment: the `messages` that follow the query, the number of
    `turns`, `tool_calls` and `tool_errors`, what ended it, `stop`, and what the model was told of
    its `tools`, if it has some; see `trl.environments`."""
    environments: Annotated[tuple[Any, ...] | None, TUPLE] = None
    """B environments, as they were left, until the next episodes begin; they are not saved."""
    columns: Annotated[Mapping[str, tuple[Any, ...]] | None, TUPLES] = None
    """What else is known of each row, such as the right answer: B values for each name. To be
    saved they must be such as JSON can hold."""
    trunk_states: Annotated[Tensor | None, ALL_BUT_THE_LAST] = None
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
            ValueError: if the numbers of rows differ, or a row is empty or counts no token.
        """
        query_rows = token_rows("query", queries)
        response_rows = token_rows("response", responses)
        sizes = len(query_rows), len(response_rows)
        if sizes[0] != sizes[1]:
            got, fix = "{} and {}".format(*sizes), "pass one response for each query"
            refuse("query` and `response", "have the same number of rows", got, fix)
        padded_queries, query_mask = pad_rows(query_rows, left=True)
        padded_responses, response_mask = pad_rows(response_rows, left=False)
        if eos_token_id is not None:
            response_mask &= _until_end(padded_responses, eos_token_id)
            padded_responses = padded_responses.masked_fill(~response_mask, 0)
        if response_masks is not None:
            response_mask &= _padded_masks(response_masks, response_rows).to(response_mask.device)
            rule = "count a token up to the EOS in every row"
            _check_counts("response_masks", response_mask, rule)
        if group_ids is not None:
            group_ids = _group_numbers(group_ids, len(response_rows)).to(response_mask.device)
        return cls(padded_queries, query_mask, padded_responses, response_mask, group_ids=group_ids)

    def check(self) -> None:
        """Raise a ValueError unless the tensors have the layout that the class promises."""
        known = self._known()
        for name, (axes, value) in known.items():
            if axes.names and axes not in (TUPLE, TUPLES):
                check_dense(name, value)
        for name in ("queries", "responses"):
            tokens = getattr(self, name)
            if tokens.dtype not in (torch.int64, torch.int32) or tokens.ndim != 2:
                rule = "be integers [batch, length], int64"
                refuse(name, rule, f"{tokens.dtype} {list(tokens.shape)}")
        if len(self) == 0:
            refuse("queries", "have at least one row", "none")
        check_token_mask("query_mask", self.query_mask, self.queries)
        check_token_mask("response_mask", self.response_mask, self.responses)
        check_left_padded("query_mask", self.query_mask)
        (rows, before), after = self.queries.shape, self.responses.shape[1]
        sizes = {"B": rows, "Q": before, "R": after, "T−1": before + after - 1}
        for name, (axes, value) in known.items():
            if isinstance(value, Tensor):
                found = list(value.shape)
                shape = [sizes[axis] for axis in axes.names if axis in sizes]
                if found[: len(shape)] != shape or len(found) != len(axes.names):
                    refuse(name, f"have the shape {shape} in this Rollout", found)
            elif axes.names:
                for column in value.values() if isinstance(value, Mapping) else [value]:
                    if len(column) != rows:
                        rule = f"have one entry for each of the {rows} rows of this Rollout"
                        refuse(name, rule, len(column))
        self._check_recorded()

    def _check_recorded(self) -> None:
        """Raise a ValueError unless what was recorded is of the kind that it says."""
        for name in ("query_texts", "response_texts"):
            texts = getattr(self, name)
            if isinstance(texts, str) or not all(isinstance(text, str) for text in texts or ()):
                refuse(name, "be a list of texts", shown(texts))
        if not isinstance(self.columns, Mapping | None):
            refuse("columns", "be values for each row by their names", shown(self.columns))
        heat = self.temperature
        if heat is not None and not (isinstance(heat, Real) and 0 < heat < math.inf):
            refuse("temperature", "be a number > 0", repr(heat))
        if self.ended is not None and self.ended.dtype != torch.bool:
            refuse("ended", "be bool", self.ended.dtype, "use ended.bool()")
        if self.group_ids is not None:
            _group_numbers(self.group_ids, len(self))
        for name in ("behaviour_logprobs", "values", "turn_rewards"):
            numbers = getattr(self, name)
            if numbers is None:
                continue
            if not numbers.is_floating_point():
                refuse(name, "be floating-point numbers", numbers.dtype)
            counted = numbers[self.response_mask.to(numbers.device)].float()
            if not (finite := counted.isfinite()).all():
                refuse(name, "be finite on the tokens that count", counted[~finite][0].item())
            if name == "behaviour_logprobs" and counted.max() > MOST_LOG_PROB:
                fix = "a probability is at most 1; pass log-probs, not probabilities or values"
                refuse(name, "be log-probs, at most 0", f"{counted.max().item():.3g}", fix)

    def _known(self) -> dict[str, tuple[Axes, Any]]:
        """Return the fields that are not None, each with its axes."""
        named = {name: (axes, getattr(self, name)) for name, axes in axes_of(type(self)).items()}
        return {name: pair for name, pair in named.items() if pair[1] is not None}

    def __len__(self) -> int:
        return self.queries.shape[0]

    def __repr__(self) -> str:
        recorded = list(self.tensors())[4:]  # tokens and masks are always there
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

    def select(self, rows: Tensor | Sequence[int] | Sequence[bool]) -> Rollout:
        """Return the given rows, without the columns that are padding in all of them.

        Args:
            rows: Indices [b], or a bool mask [B] of the rows to keep.

        Raises:
            ValueError: if there are none, or no such rows, or the mask has another length.
        """
        rows = self._indices(rows)
        first, last = self.window(rows)
        both = slice(first, self.queries.shape[1] + last - 1)
        columns = {"Q": slice(first, None), "R": slice(last), "T−1": both}
        kept: dict[str, Any] = {}
        for name, (axes, value) in self._known().items():
            if axes.names:
                kept[name] = _chosen(value, rows)
            if len(axes.names) > 1:
                kept[name] = kept[name][:, columns[axes.names[1]]]
        return replace(self, **kept)

    def _indices(self, rows: Tensor | Sequence[int] | Sequence[bool]) -> Tensor:
        """Return the indices of the chosen rows, of which there must be some."""
        rule = f"be indices of the {len(self)} rows, or a mask of the shape {[len(self)]} of them"
        try:
            rows = torch.as_tensor(rows, device=self.queries.device)
        except (TypeError, ValueError, RuntimeError):
            refuse("rows", rule, shown(rows))
        if rows.dtype == torch.bool and list(rows.shape) == [len(self)]:
            rows = rows.nonzero()[:, 0]
        if rows.numel() == 0:
            refuse("rows", "choose at least one row", "none")
        if not _are_whole(rows) or rows.ndim != 1:
            refuse("rows", rule, f"{rows.dtype} {list(rows.shape)}")
        on_cpu = rows.device.type == "cpu"  # a GPU would be waited for
        if on_cpu and not -len(self) <= int(rows.min()) <= int(rows.max()) < len(self):
            refuse("rows", rule, f"{int(rows.min())} to {int(rows.max())}")
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
            refuse("parts", "have at least one rollout", "none")
        joined: dict[str, Any] = {}
        for name, axes in axes_of(cls).items():
            values = [getattr(part, name) for part in parts]
            missing = [index for index, value in enumerate(values) if value is None]
            if axes is IF_ALIKE:
                joined[name] = values[0] if len(set(values)) == 1 else None
                continue
            if not axes.names and len(found := set(values)) > 1:
                refuse("parts", f"have the same `{name}`", str(sorted(found, key=str)))
            if 0 < len(missing) < len(parts):
                refuse("parts", f"all have `{name}` or none, but parts {missing} have none")
            if not missing and axes.join is not None:
                joined[name] = axes.join(values)
        return cls(**joined)

    def split(self, rows: int) -> Iterator[Rollout]:
        """Yield the rollout in parts of so many rows; the last may be smaller."""
        for chosen in torch.arange(len(self), device=self.queries.device).split(rows):
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
        size = 0, 0  # tokens of the longest query and response
        for row in self._longest_first(every, lengths):
            own = query_lengths[row], lengths[row] - query_lengths[row]
            longest = max(size[0], own[0]), max(size[1], own[1])
            too_many = max_rows is not None and len(group) == max_rows
            if group and (too_many or (len(group) + 1) * sum(longest) > max_tokens):
                yield torch.tensor(group, device=self.queries.device)
                group, longest = [], own
            group.append(row)
            size = longest
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
            return torch.randperm(len(self), generator=generator, device="cpu")
        group = self.group_ids.cpu().unique(return_inverse=True)[1]
        order = torch.randperm(int(group.max()) + 1, generator=generator, device="cpu")
        return order[group].argsort(stable=True)

    def to(self, device: torch.device | str) -> Rollout:
        """Return the same rollout on `device`."""
        moved: dict[str, Any] = {k: tensor.to(device) for k, tensor in self.tensors().items()}
        return replace(self, **moved)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rollout to one safetensors file, its texts and other columns included.

        Raises:
            TypeError: if a column has values that JSON cannot hold.
        """
        tensors = self.tensors()
        apart = {*tensors, "environments", "decode"}
        others = {k: value for k, (_, value) in self._known().items() if k not in apart}
        for name, column in (self.columns or {}).items():
            try:
                json.dumps(column)
            except (TypeError, ValueError) as error:
                rule, fix = (
                    "hold what JSON can, to be saved",
                    "leave the column out, or write texts",
                )
                refuse(f"columns[{name!r}]", rule, str(error), fix, error=TypeError)
        # Copies: the format has no place for two tensors that share their memory.
        copies = {k: tensor.detach().cpu().contiguous().clone() for k, tensor in tensors.items()}
        save_file(copies, path, metadata={"texts": json.dumps(others)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Rollout:
        """Read what `save` has written, on the CPU.

        Raises:
            OSError: if there is no such file.
            ValueError: if it is none that `save` has written, or was damaged since.
        """
        place = os.fspath(path)
        if os.path.exists(place) and not os.path.isfile(place):  # a pipe would be waited for
            refuse(place, "be a file that Rollout.save has written", "a folder, pipe or device")
        try:
            with safe_open(place, framework="pt") as file:
                # Copies: the tensors themselves change with the file.
                found: dict[str, Any] = {k: file.get_tensor(k).clone() for k in list(file.keys())}
                found |= json.loads((file.metadata() or {}).get("texts", "{}"))
            known = {_FORMER_NAMES.get(name, name): value for name, value in found.items()}
            known = {name: known[name] for name in axes_of(cls) if known.get(name) is not None}
            needed = ("queries", "query_mask", "responses", "response_mask")
            if missing := [name for name in needed if name not in known]:
                raise ValueError(f"a file without {', '.join(missing)}")
            rollout = cls(**{name: _with_tuples(value) for name, value in known.items()})
            rollout.check()
        except (SafetensorError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            rule = f"hold a Rollout that is whole ({str(error).rstrip('.')})"
            fix = "copy it anew, or write it again with Rollout.save"
            raise ValueError(problem(place, rule, fix=fix)) from error
        return rollout

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields that are tensors, by name."""
        return {k: value for k, (_, value) in self._known().items() if isinstance(value, Tensor)}

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


def _read_axes(cls: type[Rollout]) -> dict[str, Axes]:
    hints = get_type_hints(cls, include_extras=True)
    return {entry.name: hints[entry.name].__metadata__[0] for entry in fields(cls)}


axes_of: Callable[[Any], dict[str, Axes]] = cache(_read_axes)
"""From `Rollout`, or a class made of it, to what each of its fields is."""


_FORMER_NAMES = {"logprobs": "behaviour_logprobs"}
"""Names of fields in files that older versions wrote."""


def _chosen(values: Any, rows: Tensor) -> Any:
    """Return the given rows of a tensor, of a tuple, or of each tuple of a mapping."""
    if isinstance(values, Mapping):
        return {name: _chosen(column, rows) for name, column in values.items()}
    return values[rows] if isinstance(values, Tensor) else tuple(values[r] for r in rows.tolist())


def _with_tuples(value: Any) -> Any:
    """Return what JSON made lists of as tuples, one entry for each row."""
    if isinstance(value, dict):
        return {name: tuple(column) for name, column in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _with_space(query: str, response: str) -> str:
    """Join two texts with a space, unless there is white space where they meet, or one is empty."""
    meet = query[-1:] + response[:1]
    apart = len(meet) == 2 and not any(character.isspace() for character in meet)
    return f"{query} {response}" if apart else query + response


def _group_numbers(group_ids: Tensor | Sequence[int], rows: int) -> Tensor:
    """Return the groups of so many responses as integers [B]."""
    rule = f"be one whole number for each of the {rows} responses"
    try:
        numbers = (
            group_ids if isinstance(group_ids, Tensor) else torch.tensor(group_ids, device="cpu")
        )
    except (TypeError, ValueError, RuntimeError):
        refuse("group_ids", rule, shown(group_ids))
    check_dense("group_ids", numbers)
    if list(numbers.shape) != [rows] or not _are_whole(numbers):
        refuse("group_ids", rule, f"{numbers.dtype} {list(numbers.shape)}")
    return numbers.long()


def _until_end(tokens: Tensor, eos_token_id: int | Sequence[int]) -> Tensor:
    """Return the mask [B, R] of the tokens up to the first one that is an end, that included."""
    ids = eos_token_id if isinstance(eos_token_id, Sequence) else [eos_token_id]
    whole = all(isinstance(token, Integral) and not isinstance(token, bool) for token in ids)
    if not whole or not all(0 <= token < 2**63 for token in ids):
        rule = "be a token id, a list of token ids or None"
        kind = ValueError if whole else TypeError
        refuse("eos_token_id", rule, repr(eos_token_id), error=kind)
    ends = torch.isin(tokens, tokens.new_tensor([int(token) for token in ids])).long()
    return ends.cumsum(1) - ends == 0


def check_row_mask(name: str, mask: Tensor, tokens: Tensor) -> None:
    """Raise unless `mask` says yes or no of each of the `tokens` [L]."""
    check_dense(name, mask)
    if mask.shape != tokens.shape:
        rule = f"be a tensor of the shape {list(tokens.shape)} of its tokens"
        refuse(name, rule, list(mask.shape))
    if mask.is_complex() or not ((mask == 0) | (mask == 1)).all():
        refuse(name, "be True and False, or 1 and 0", mask.tolist())


def check_token_mask(name: str, mask: Tensor, tokens: Tensor) -> None:
    """Raise unless `mask` is bool, shaped like `tokens` [B, L], and counts a token in each row."""
    if mask.dtype != torch.bool or mask.shape != tokens.shape:
        rule = f"be bool and of the shape {list(tokens.shape)} of its tokens"
        refuse(name, rule, f"{mask.dtype} {list(mask.shape)}", f"use {name}.bool()")
    _check_counts(name, mask, "count a token in every row")


def _check_counts(name: str, mask: Tensor, rule: str) -> None:
    if not mask.any(1).all():
        refuse(name, rule, f"none in row {int((~mask.any(1)).nonzero()[0])}")


def check_dense(name: str, value: Any, rule: str = "be a tensor") -> None:
    """Raise a TypeError unless it is a tensor whose entries are all in memory."""
    if not isinstance(value, Tensor):
        got, fix = type(value).__name__, f"wrap it in torch.tensor({name})"
        refuse(name, rule, got, fix, error=TypeError)
    if kind := odd_kind(value):
        fix = "use .to_dense(), .unbind() for nested ones, or a device that holds numbers"
        refuse(name, f"{rule} with all its numbers", kind, fix, error=TypeError)


def odd_kind(tensor: Tensor) -> str:
    """Return what a tensor is whose entries are not all in memory; nothing: they are."""
    if tensor.is_nested:
        return "a nested one"
    dense = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized)
    return "" if dense else f"{tensor.layout} on {tensor.device}"


def check_unicode(texts: Sequence[str], name: str) -> None:
    """Raise unless tokenizers and files can take the texts: half of a surrogate pair has no UTF-8.

    JSON can name one, as an emoji that was cut in two.
    """
    for row, text in enumerate(texts):
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            fix = "use text.encode('utf-8', 'replace').decode()"
            refuse(f"{name}[{row}]", "be valid Unicode", shown(text), fix)


def _are_whole(numbers: Tensor) -> bool:
    """Return whether a tensor is of integers."""
    kind = numbers.dtype
    return not (kind.is_floating_point or kind.is_complex or kind == torch.bool)


def check_left_padded(name: str, mask: Tensor) -> None:
    """Raise unless in every row of `mask` [B, L] the padding comes first."""
    breaks = (mask[:, :-1] & ~mask[:, 1:]).any(1)
    if breaks.any():
        got = f"padding after a token in row {int(breaks.nonzero()[0])}"
        fix = "set tokenizer.padding_side = 'left'"
        refuse(name, "have its padding on the left", got, fix)


def _listed(name: str, rows: Any, rule: str) -> list[Any]:
    """Return rows as a list, or raise a TypeError if they are no rows."""
    try:
        return list(rows)
    except TypeError:
        refuse(name, rule, shown(rows), error=TypeError)


def token_rows(name: str, tokens: TokenLists) -> list[Tensor]:
    """Split [B, L] or a sequence of 1-D tensors into rows, after checking them.

    Raises:
        TypeError: if a row is not a tensor of integers.
        ValueError: if there are no rows, a row is not 1-D, or a row is empty.
    """
    if isinstance(tokens, Tensor):
        check_dense(name, tokens)
        if tokens.ndim != 2:
            got = f"a tensor of shape {list(tokens.shape)}"
            fix = f"use {name}.unsqueeze(0) for a single row"
            refuse(name, "be a tensor [batch, length] or a list of 1-D tensors", got, fix)
    rows = _listed(name, tokens, "be a tensor [batch, length] or a list of 1-D tensors")
    if not rows:
        refuse(name, "have at least one row", "none")
    for index, row in enumerate(rows):
        where = f"{name}[{index}]"
        check_dense(where, row, "be a 1-D tensor of token ids")
        if not _are_whole(row):
            rule, fix = "hold token ids of an integer dtype", "convert it with .long()"
            refuse(where, rule, row.dtype, fix, error=TypeError)
        if row.ndim != 1:
            fix = "pass one tensor of token ids for each row"
            refuse(where, "be 1-D", f"shape {list(row.shape)}", fix)
        if row.numel() == 0:
            refuse(where, "have at least one token", "none", "leave the row out")
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
    rows = _listed("response_masks", masks, "be a list of masks, one for each response")
    if len(rows) != len(responses):
        rule = f"have one mask for each of the {len(responses)} responses"
        refuse("response_masks", rule, len(rows))
    for index, (mask, response) in enumerate(zip(rows, responses, strict=True)):
        name = f"response_masks[{index}]"
        check_row_mask(name, mask, response)
        if not mask.bool().any():
            refuse(name, "count a token", "none", "leave the row out")
    return pad_rows(rows, left=False)[0].bool()
