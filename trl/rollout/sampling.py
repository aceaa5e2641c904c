"""Sampling responses with a KV cache: the loop, the distribution, and `sample` for token tensors.

`trl.rollout.sampler.Sampler` adds texts, chats, groups and seeds for each row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from trl.anatomy import is_encoder_decoder, language_model, without_dropout
from trl.batch import Rollout, check_left_padded, check_token_mask
from trl.core import at_least_fp32
from trl.rollout.decoder import Decoder
from trl.rollout.stop import StopRule

# Finished rows are taken out of the batch when they are this share of it: sooner would copy the
# cache for each of them, later would compute tokens that nobody reads.
_FINISHED_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Distribution:
    """What a token is drawn from: the model's distribution at a temperature, whole or cut."""

    temperature: float = 1.0
    """Divides the logits, here and in training."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability; 1: all."""
    min_new_tokens: int = 0
    """No stop token among so many first tokens."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be > 0, got {self.temperature}.")
        if self.top_k < 0:
            raise ValueError(f"`top_k` must be >= 0 (0: all tokens), got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p}.")
        if self.min_new_tokens < 0:
            raise ValueError(f"`min_new_tokens` must be >= 0, got {self.min_new_tokens}.")

    def cuts(self) -> tuple[str, ...]:
        """Name the settings that take tokens out of the distribution, with their values."""
        named = (
            ("top_k", self.top_k, self.top_k > 0),
            ("top_p", self.top_p, self.top_p < 1),
            ("min_new_tokens", self.min_new_tokens, self.min_new_tokens > 0),
        )
        return tuple(f"{name}={value}" for name, value, cuts in named if cuts)

    def logprobs(self, logits: Tensor) -> Tensor:
        """Return log π [B, V] at the temperature, whole: what training scores."""
        logits = at_least_fp32(logits)
        return (logits if self.temperature == 1 else logits / self.temperature).log_softmax(-1)

    def probabilities(self, logprobs: Tensor, step: int, stop: StopRule) -> Tensor:
        """Return [B, V], up to a factor, to draw token `step` from: log π without what is cut."""
        if not self.cuts():
            return logprobs.exp()
        if step < self.min_new_tokens:
            logprobs = stop.forbid(logprobs)
        nothing: Any = None  # the warpers do not look at the tokens so far
        if self.top_k > 0:
            logprobs = TopKLogitsWarper(self.top_k)(nothing, logprobs)
        if self.top_p < 1:
            logprobs = TopPLogitsWarper(self.top_p)(nothing, logprobs)
        return logprobs.softmax(-1)  # what is left may be too unlikely for exp


@dataclass
class Record:
    """What is written down while sampling, for all B rows of a rollout."""

    responses: Tensor
    """[B, R] token ids."""
    logprobs: Tensor
    """[B, R] float32."""
    lengths: Tensor
    """[B] tokens that count; at first the most tokens that each row may have."""
    ended: Tensor
    """[B] bool."""
    values: Tensor | None = None
    """[B, R] float32; None until a model gives values."""

    @classmethod
    def empty(cls, limits: Tensor) -> Record:
        """Make room for rows of at most `limits` [B] tokens."""
        shape, device = (len(limits), int(limits.max())), limits.device
        return cls(
            responses=torch.zeros(shape, dtype=torch.long, device=device),
            logprobs=torch.zeros(shape, device=device),
            lengths=limits.clone(),
            ended=torch.zeros(len(limits), dtype=torch.bool, device=device),
        )

    def rollout(self, queries: Tensor, query_mask: Tensor, **more: Any) -> Rollout:
        """Return what was recorded, without the columns that no row needed.

        Raises:
            FloatingPointError: if a log-prob is NaN or infinite.
        """
        longest = int(self.lengths.max())
        mask = torch.arange(longest, device=self.lengths.device) < self.lengths[:, None]
        logprobs = self.logprobs[:, :longest].masked_fill(~mask, 0)
        if not logprobs.isfinite().all():
            raise FloatingPointError(
                "`model` must give finite logits, got NaN or infinity: its weights hold NaN or "
                "infinity. Go back to the last good checkpoint."
            )
        return Rollout(
            queries,
            query_mask,
            self.responses[:, :longest].masked_fill(~mask, 0),
            mask,
            logprobs=logprobs,
            values=None if self.values is None else self.values[:, :longest].masked_fill(~mask, 0),
            ended=self.ended,
            **more,
        )


@torch.no_grad()
def write(
    model: nn.Module,
    queries: Tensor,
    query_mask: Tensor,
    record: Record,
    *,
    rows: Tensor,
    query_of_row: Tensor,
    uniforms: Callable[[int], Tensor],
    distribution: Distribution,
    stop: StopRule,
    report: Callable[[int], None] | None = None,
) -> None:
    """Write the responses of some rows into the record.

    Args:
        model: See `Decoder`.
        queries: [P, Q] left-padded; each is computed once, however many rows it has.
        query_mask: [P, Q] bool.
        record: Its `lengths` say how long a row may get.
        rows: [b] rows of the record.
        query_of_row: [b] index in `queries`, growing.
        uniforms: From a step to the random numbers [B] in [0, 1) of all rows of the record.
        distribution: What tokens are drawn from.
        stop: When a row ends by itself.
        report: Called after every step with the number of tokens that may still be written.
    """
    limits = record.lengths[rows]
    longest, shortest = int(limits.max()), int(limits.min())
    # Without early ends nothing needs to be asked of the device before the last step.
    ends_early = bool(stop) or shortest < longest
    done = torch.zeros_like(rows, dtype=torch.bool)
    with without_dropout(model):
        decoder = Decoder(model, queries, query_mask, longest)
        if len(rows) > len(queries):
            if decoder.can_select:
                decoder.select(query_of_row)
            else:
                repeated = queries[query_of_row], query_mask[query_of_row]
                decoder = Decoder(model, *repeated, longest)
        if decoder.values is not None and record.values is None:
            record.values = torch.zeros_like(record.logprobs)
        for step in range(longest):
            logprobs = distribution.logprobs(decoder.logits)
            probabilities = distribution.probabilities(logprobs, step, stop)
            tokens = draw_at(probabilities, uniforms(step)[rows, None])  # [b, 1]
            record.responses[rows, step] = tokens[:, 0]
            record.logprobs[rows, step] = logprobs.gather(-1, tokens)[:, 0].float()
            if record.values is not None:
                record.values[rows, step] = decoder.values
            if ends_early:
                if stop and step >= distribution.min_new_tokens:
                    first = max(0, step + 1 - stop.window)
                    stopped = stop(record.responses[rows, first : step + 1]) & ~done
                    record.lengths[rows[stopped]] = step + 1
                    record.ended[rows[stopped]] = True
                    done |= stopped
                done |= limits <= step + 1
                running = int((~done).sum())
            else:
                running = len(rows)
            if report is not None:
                report(int((limits[~done] - step - 1).sum()))
            if running == 0 or step == longest - 1:
                break
            if decoder.can_select and running <= (1 - _FINISHED_SHARE) * len(rows):
                kept = (~done).nonzero()[:, 0]
                decoder.select(kept)
                rows, limits, done, tokens = rows[kept], limits[kept], done[kept], tokens[kept]
            decoder.advance(tokens[:, 0])


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
        ValueError: if a setting is out of range, or the model has too few positions.
        FloatingPointError: if the model gives NaN.
    """
    check_queries(model, queries)
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be > 0, got {max_new_tokens}.")
    distribution = Distribution(temperature, top_k, top_p)
    if query_mask is None:
        query_mask = torch.ones_like(queries, dtype=torch.bool)
    query_mask = query_mask.bool()
    check_token_mask("query_mask", query_mask, queries)
    check_left_padded("query_mask", query_mask)
    check_positions(model, query_mask.sum(1).tolist(), max_new_tokens)
    queries = queries.masked_fill(~query_mask, 0)
    size, device = len(queries), queries.device
    record = Record.empty(torch.full((size,), max_new_tokens, device=device))
    rows = torch.arange(size, device=device)
    write(
        model,
        queries,
        query_mask,
        record,
        rows=rows,
        query_of_row=rows,
        # One number for every row, the finished ones too: no row's tokens depend on another's end.
        uniforms=lambda _: _uniform(size, device, generator)[:, 0],
        distribution=distribution,
        stop=StopRule([] if eos_token_id is None else [eos_token_id]),
    )
    return record.rollout(queries, query_mask)


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token from each row by inverting the cumulative distribution.

    One random number for each row, where `torch.multinomial` takes one for each token of the
    vocabulary.

    Args:
        probabilities: [B, V]; the rows need not sum to exactly 1.
        generator: Source of randomness; None: torch's global one.

    Returns:
        [B, 1] token ids, never one of probability 0.
    """
    return draw_at(probabilities, _uniform(len(probabilities), probabilities.device, generator))


def draw_at(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Invert the cumulative distribution: the first token at which it exceeds `uniform`.

    Args:
        probabilities: [B, V]; the rows need not sum to exactly 1.
        uniform: [B, 1] in [0, 1).

    Returns:
        [B, 1] token ids, never one of probability 0.
    """
    # float32 sums over a large vocabulary would lose tokens of small probability.
    cumulative = probabilities.cumsum(-1, dtype=random_dtype(probabilities.device))
    total = cumulative[:, -1:]
    token = torch.searchsorted(cumulative, uniform * total, right=True)
    # Rounding may carry u up to the sum itself: then the last token with any probability.
    last = torch.searchsorted(cumulative, total.contiguous())
    # NaN, which is reported at the end, is beyond every token.
    return torch.minimum(token, last).clamp(max=probabilities.shape[-1] - 1)


def random_dtype(device: torch.device) -> torch.dtype:
    """Return the precision of random numbers and cumulative sums: float64 where there is one."""
    return torch.float32 if device.type == "mps" else torch.float64


def _uniform(size: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.rand(size, 1, dtype=random_dtype(device), device=device, generator=generator)


def check_queries(model: nn.Module, queries: Tensor) -> None:
    """Raise unless `queries` are [B, Q] token ids that the model knows."""
    if queries.ndim != 2 or queries.shape[0] == 0 or queries.shape[1] == 0:
        raise ValueError(
            f"`queries` must be a tensor [batch, length] with at least one token a row, got shape "
            f"{list(queries.shape)}: encode with return_tensors='pt'."
        )
    if queries.is_floating_point():
        raise TypeError(
            f"`queries` must hold token ids of an integer dtype, got {queries.dtype}: "
            "convert them with .long()."
        )
    vocabulary = language_model(model).get_input_embeddings().num_embeddings
    if int(queries.min()) < 0 or int(queries.max()) >= vocabulary:
        raise ValueError(
            f"`queries` must hold ids from 0 to {vocabulary - 1}, got {int(queries.min())} to "
            f"{int(queries.max())}: the tokenizer does not belong to this model."
        )


def check_positions(model: nn.Module, lengths: list[int], max_new_tokens: int) -> None:
    """Raise unless the longest query and a response of `max_new_tokens` fit the model."""
    limit = getattr(language_model(model).config, "max_position_embeddings", None)
    if limit is None:
        return
    longest = max(lengths)
    row = lengths.index(longest)
    if is_encoder_decoder(model):  # each side has its own positions
        too_long = max(longest, max_new_tokens) > limit
        rule = f"query and response must each fit the model's {limit} positions"
        got = f"{longest} and {max_new_tokens} tokens"
    else:
        too_long = longest + max_new_tokens > limit
        rule = f"query + response must fit the model's {limit} positions"
        got = f"{longest} + {max_new_tokens} tokens"
    if too_long:
        raise ValueError(f"{rule}, got {got} in row {row}: shorten the query or the response.")
