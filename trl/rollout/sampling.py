"""Sampling responses with a KV cache: the loop, the distribution, and `sample` for token tensors.

`trl.rollout.sampler.Sampler` adds texts, chats, groups and seeds for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from trl.anatomy import without_dropout
from trl.batch import Rollout, check_dense, check_left_padded, check_token_mask, token_rows
from trl.config import check_values
from trl.config.errors import refuse
from trl.config.section import section
from trl.config.types import Count, Positive, PositiveShare, Whole
from trl.core import at_least_fp32
from trl.fit import check_end_ids, check_ids, check_positions, uncompiled
from trl.rollout.decoder import Decoder
from trl.rollout.draw import draw_at, draw_from_logits, uniform
from trl.rollout.past import State, go_on
from trl.rollout.stop import StopRule

# Finished rows are taken out of the batch when they are this share of it: sooner would copy the
# cache for each of them, later would compute tokens that nobody reads.
_FINISHED_SHARE = 0.25

Progress = Callable[[int, int], None]
"""Called with (tokens done, tokens in all); a row that ends early has done all of its tokens."""

_CUTS_NOTHING = {"top_k": 0, "top_p": 1, "min_new_tokens": 0}


@section
class Distribution:
    """What a token is drawn from: the model's distribution at a temperature, whole or cut."""

    temperature: Positive = 1.0
    """Divides the logits, here and in training."""
    top_k: Whole = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: PositiveShare = 1.0
    """Only the likeliest tokens that together have this probability; 1: all."""
    min_new_tokens: Whole = 0
    """No stop token among so many first tokens."""

    def cuts(self) -> tuple[str, ...]:
        """Name the settings that take tokens out of the distribution, with their values."""
        pairs = [(name, getattr(self, name)) for name in _CUTS_NOTHING]
        return tuple(f"{name}={value}" for name, value in pairs if value != _CUTS_NOTHING[name])

    def draw(
        self, logits: Tensor, uniforms: Tensor, step: int, stop: StopRule
    ) -> tuple[Tensor, Tensor]:
        """Draw token number `step` of each response.

        Args:
            logits: [B, V].
            uniforms: [B, 1] random numbers in [0, 1).
            step: How many tokens have been written.
            stop: Knows the tokens that end a response.

        Returns:
            token ids [B, 1], and their log π [B, 1] at the temperature under the whole
            distribution: what training scores.
        """
        if not self.cuts():
            return draw_from_logits(logits, uniforms, self.temperature)
        logprobs = (at_least_fp32(logits) / self.temperature).log_softmax(-1)
        tokens = draw_at(self._cut(logprobs, step, stop), uniforms)
        return tokens, logprobs.gather(-1, tokens)

    def _cut(self, logprobs: Tensor, step: int, stop: StopRule) -> Tensor:
        """Return the probabilities [B, V] without what is cut."""
        if step < self.min_new_tokens:
            logprobs = stop.forbid(logprobs)
        nothing: Any = None  # the warpers do not look at the tokens so far
        if self.top_k > 0:
            logprobs = TopKLogitsWarper(self.top_k)(nothing, logprobs)
        if self.top_p < 1:
            logprobs = TopPLogitsWarper(self.top_p)(nothing, logprobs)
        return logprobs.softmax(-1)  # what is left may be too unlikely for exp


class Writing:
    """Responses while they are written, all B rows of a rollout: as many, in turn, to each query.

    Args:
        queries: [P, Q] left-padded.
        query_mask: [P, Q] bool.
        limits: [B] the most tokens of each response.
        uniforms: From a step to the random numbers [B] in [0, 1) of all rows.
        distribution: What tokens are drawn from.
        stop: When a row ends by itself.
        before: What the model has read of the first tokens of each query, see `Decoder.states`;
            None: nothing. They are taken out of the list, so that their memory is free when they
            have been copied.
        keeps: Keep what the model has read of each row, where it can be gone on from.

    Attributes:
        query_of_row: [B] index in `queries`, on the CPU.
        responses: [B, R] token ids.
        logprobs: [B, R] float32.
        values: [B, R] float32; None until a model gives values.
        lengths: [B] tokens that count; at first the limits.
        ended: [B] bool.
        states: Of B rows, what the model has read, all but the last token; None where it was not
            kept.
    """

    def __init__(
        self,
        queries: Tensor,
        query_mask: Tensor,
        limits: Sequence[int],
        uniforms: Callable[[int], Tensor],
        distribution: Distribution,
        stop: StopRule,
        *,
        before: list[State] | None = None,
        keeps: bool = False,
    ) -> None:
        shape, device = (len(limits), max(limits)), queries.device
        self.before, self.keeps = before, keeps
        self.states: list[State | None] = [None] * len(limits)
        self.queries, self.query_mask, self.uniforms = queries, query_mask, uniforms
        self.distribution, self.stop = distribution, stop
        self.query_of_row = torch.arange(len(limits), device="cpu") // (len(limits) // len(queries))
        self.responses = torch.zeros(shape, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(shape, dtype=torch.float32, device=device)
        self.values: Tensor | None = None
        self.lengths = torch.tensor(limits, device=device)
        self.ended = torch.zeros(len(limits), dtype=torch.bool, device=device)
        self._tokens = self._later = sum(limits)  # in all, and of rows that are not begun

    @torch.no_grad()
    def write(self, model: nn.Module, rows: Tensor, progress: Progress | None = None) -> None:
        """Write the responses of some rows.

        Args:
            model: See `Decoder`.
            rows: [b] growing, on the CPU. Each query is computed once, however many rows it has.
            progress: Called after every step.
        """
        device, stop = self.queries.device, self.stop
        chosen, query_of_row = self.query_of_row[rows].unique_consecutive(return_inverse=True)
        mask = self.query_mask[chosen.to(device)]
        lengths = mask.sum(1)
        columns = int(lengths.max())
        past = None
        if self.before is not None:
            past, columns = go_on([self.before[each] for each in chosen], lengths.tolist())
            for each in chosen:  # they are copied
                self.before[each] = []
        queries, mask = self.queries[chosen.to(device), -columns:], mask[:, -columns:]
        rows, query_of_row = rows.to(device), query_of_row.to(device)
        limits = self.lengths[rows]
        longest, shortest = int(limits.max()), int(limits.min())
        last = int((lengths[query_of_row] + limits).max()) - 1
        # Without early ends nothing needs to be asked of the device before the last step.
        ends_early = bool(stop) or shortest < longest
        done = torch.zeros_like(rows, dtype=torch.bool)
        if progress is not None:
            self._later -= int(limits.sum())
        with without_dropout(model):
            decoder = Decoder(model, queries, mask, longest, past, last)
            if len(rows) > len(queries):
                if decoder.can_select:
                    decoder.select(query_of_row)
                else:
                    every = queries[query_of_row], mask[query_of_row]
                    decoder = Decoder(model, *every, longest, last=last)
            if decoder.values is not None and self.values is None:
                self.values = torch.zeros_like(self.logprobs)
            for step in range(longest):
                numbers = self.uniforms(step)[rows, None]
                drawn = self.distribution.draw(decoder.logits, numbers, step, stop)
                tokens, logprobs = (column[:, 0] for column in drawn)  # [b]
                self.responses[rows, step] = tokens
                self.logprobs[rows, step] = logprobs.float()
                if self.values is not None:
                    self.values[rows, step] = decoder.values
                running = len(rows)
                if ends_early:
                    if stop and step >= self.distribution.min_new_tokens:
                        first = max(0, step + 1 - stop.window)
                        stopped = stop(self.responses[rows, first : step + 1]) & ~done
                        self.lengths[rows] = torch.where(stopped, step + 1, self.lengths[rows])
                        self.ended[rows] |= stopped
                        done |= stopped
                    done |= limits <= step + 1
                    running = int((~done).sum())
                if progress is not None:
                    left = int((limits[~done] - step - 1).sum())
                    progress(self._tokens - self._later - left, self._tokens)
                if running == 0 or step == longest - 1:
                    self._keep(decoder, rows)
                    break
                if decoder.can_select and running <= (1 - _FINISHED_SHARE) * len(rows):
                    kept = (~done).nonzero()[:, 0]
                    self._keep(decoder, rows, done)
                    decoder.select(kept)
                    rows, limits, done, tokens = rows[kept], limits[kept], done[kept], tokens[kept]
                decoder.advance(tokens)

    def _keep(self, decoder: Decoder, rows: Tensor, chosen: Tensor | None = None) -> None:
        """Keep what the model has read of the rows [b], of those chosen [b] by a mask.

        What is chosen is copied, as the cache goes on without it; at the end, the cache is kept.
        """
        if not self.keeps or not decoder.can_go_on:
            return
        places = torch.arange(len(rows)) if chosen is None else chosen.nonzero()[:, 0].cpu()
        kept, written = rows[places.to(rows.device)].tolist(), (self.lengths[rows] - 1).tolist()
        states = decoder.states(places.tolist(), [written[place] for place in places.tolist()])
        for row, state in zip(kept, states, strict=True):
            copied = [(keys.clone(), values.clone()) for keys, values in state]
            self.states[row] = state if chosen is None else copied

    def rollout(self, **more: Any) -> Rollout:
        """Return what was written, without the columns that no row needed.

        Raises:
            FloatingPointError: if a log-prob is NaN or infinite.
        """
        longest = int(self.lengths.max())
        mask = torch.arange(longest, device=self.lengths.device) < self.lengths[:, None]
        columns = (self.responses, self.logprobs, self.values)
        responses, logprobs, values = (
            None if column is None else column[:, :longest].masked_fill(~mask, 0)
            for column in columns
        )
        if not logprobs.isfinite().all():
            got, fix = "NaN or infinity", "go back to the last good checkpoint"
            refuse("model", "give finite logits", got, fix, error=FloatingPointError)
        query = self.query_of_row.to(mask.device)
        recorded = {"behaviour_logprobs": logprobs, "values": values, "ended": self.ended}
        return Rollout(
            self.queries[query],
            self.query_mask[query],
            responses,
            mask,
            temperature=self.distribution.temperature,
            **recorded,
            **more,
        )


def sample(
    model: nn.Module,
    queries: Tensor,
    query_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Sample a response to each query.

    With `top_k` 0 and `top_p` 1 the tokens come from the model's own distribution, the one that
    training scores. Other settings sample from a cut distribution: the KL that training then
    measures is not that of what was sampled.

    Args:
        model: A language model of transformers. Runs without dropout.
        queries: [B, Q] token ids, left-padded if their lengths differ.
        query_mask: [B, Q], True or 1 on real tokens; None: all are real.
        max_new_tokens: R, the most tokens of a response.
        temperature: Divides the logits. Give the same number to `PPOConfig`.
        top_k: Sample among the k likeliest tokens; 0: all.
        top_p: Sample among the likeliest tokens that together have this probability; 1: all.
        eos_token_id: A response ends with the first of these; None: it never ends early.
        generator: Source of randomness; None: torch's global one.

    Returns:
        A rollout whose responses are [B, R' <= R]; columns after every row's end are left off.

    Raises:
        TypeError: if it is no language model, or the queries are no token ids.
        ValueError: if a setting is out of range, or the model has too few positions.
        FloatingPointError: if the model gives NaN.
    """
    model = uncompiled(model, "model")
    token_rows("queries", queries)
    check_ids(model, queries, "queries")
    check_values("sampling", {"max_new_tokens": (Count, max_new_tokens)})
    distribution = Distribution(temperature, top_k, top_p)
    stop = StopRule([] if eos_token_id is None else [eos_token_id])
    check_end_ids(model, stop.token_ids)
    if query_mask is None:
        query_mask = torch.ones_like(queries, dtype=torch.bool)
    check_dense("query_mask", query_mask)
    query_mask = query_mask.bool()
    check_token_mask("query_mask", query_mask, queries)
    check_left_padded("query_mask", query_mask)
    check_positions(model, query_mask.sum(1), max_new_tokens)
    queries = queries.masked_fill(~query_mask, 0)
    size, device = len(queries), queries.device

    def uniforms(step: int) -> Tensor:
        # One number for every row, the finished ones too: no row's tokens depend on another's end.
        return uniform(size, device, generator)[:, 0]

    limits = [max_new_tokens] * size
    writing = Writing(queries, query_mask, limits, uniforms, distribution, stop)
    writing.write(model, writing.query_of_row)
    return writing.rollout()
