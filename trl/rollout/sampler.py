"""`Sampler`: texts, chats or token ids in, a `Rollout` out.

sampler = Sampler(tokenizer, max_new_tokens=24)
rollout = sampler(policy, ["This film was", "I saw"])
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trl.anatomy import is_encoder_decoder, language_model, vocabulary_size
from trl.batch import Rollout, pad_rows
from trl.config import check_values, closest
from trl.config.errors import refuse
from trl.config.types import Count, CountRange, Whole
from trl.core import LengthSampler
from trl.fit import check_end_ids, check_ids, check_positions, out_of_memory_told, uncompiled
from trl.kernels.memory import give_back_memory
from trl.rollout.draw import random_dtype
from trl.rollout.queries import (
    Encoded,
    Queries,
    check_template_kwargs,
    decode_pair,
    encode_queries,
)
from trl.rollout.sampling import Distribution, Progress, Writing
from trl.rollout.stop import StopRule


class Sampler:
    """Samples responses and records the log-prob and the value of each token on the way.

    Every row has random numbers of its own: its response does not depend on the rows beside it,
    on padding, on `max_rows` or on the device (up to rounding). Dropout is off while sampling.

    The tokens come from the model's own distribution at `temperature`. `top_k`, `top_p` and
    `min_new_tokens` cut it; the recorded log-probs remain those of the whole distribution, which
    training scores. See `cuts`.

    Args:
        tokenizer: Turns texts and chats into tokens, and responses into texts. None: queries are
            token ids, the rollout has no texts.
        max_new_tokens: Most tokens of a response; or (shortest, longest) or a `LengthSampler`: the
            limit of each row is drawn at random, from the row's random numbers; or a function
            without arguments, called for each row.
        temperature: Divides the logits. Give the same number to `PPOConfig`.
        top_k: Sample among the k likeliest tokens; 0: all.
        top_p: Sample among the likeliest tokens that together have this probability; 1: all.
        min_new_tokens: So many tokens come before any that ends a response.
        eos_token_id: The token or tokens that end a response (the response includes it).
            "tokenizer": the tokenizer's EOS and those of the policy's `generation_config`, of
            which chat models have several; without a tokenizer, none. None: none.
        stop_strings: Texts that end a response (it includes the token that completes one).
        group_size: Responses to each query; the query is computed once.
        seed: Start of all random numbers. In a distributed run give each process its own.
        max_rows: Most rows sampled at once; None: all.
        add_bos: Begin texts with the BOS token where the tokenizer does not do so itself (GPT-2's
            does not). Chats are left as their template has them.
        keep_special_tokens: Leave special tokens in `response_texts`, but for one that ends the
            response: for a reward that looks for a tag.
        chat_template_kwargs: What the chat template is told besides the messages, as
            {"enable_thinking": False}.

    Attributes:
        calls: How often the sampler was called without `seeds`; set it to resume a run.

    Raises:
        TypeError: if a setting is of another kind.
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_new_tokens: int | tuple[int, int] | LengthSampler | Callable[[], int] = 20,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_new_tokens: int = 0,
        eos_token_id: int | Sequence[int] | Literal["tokenizer"] | None = "tokenizer",
        stop_strings: Sequence[str] = (),
        group_size: int = 1,
        seed: int = 0,
        max_rows: int | None = None,
        add_bos: bool = False,
        keep_special_tokens: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        for name in unknown:
            known = inspect.signature(Sampler).parameters
            raise TypeError(f"Sampler has no setting `{name}`.{closest(name, known)}")
        _check_tokenizer(tokenizer)
        check_template_kwargs(tokenizer, chat_template_kwargs)
        self.tokenizer, self.chat_template_kwargs = tokenizer, chat_template_kwargs
        self.distribution = Distribution(temperature, top_k, top_p, min_new_tokens)
        self._lengths = _check_lengths(max_new_tokens, min_new_tokens)
        # Those of the policy are added when there is one.
        self._ends_as_policy = tokenizer is not None and isinstance(eos_token_id, str)
        self.stop = StopRule(_end_ids(eos_token_id, tokenizer), stop_strings, tokenizer)
        self.group_size, self.max_rows, self.seed = group_size, max_rows, seed
        self.add_bos, self.keep_special_tokens = add_bos, keep_special_tokens
        kinds = {"group_size": Count, "max_rows": Count | None, "seed": Whole}
        kinds |= {"add_bos": bool, "keep_special_tokens": bool}
        check_values("Sampler", {name: (kinds[name], getattr(self, name)) for name in kinds})
        self.calls = 0
        if self.cuts:
            warnings.warn(
                f"{', '.join(self.cuts)}: tokens are then drawn from a cut distribution, while "
                "training scores the model's whole one. The KL that it measures is not that of "
                "what was sampled and can be driven negative, and the ratios of PPO start from "
                "the wrong policy. Leave these settings out to train; for evaluation they are "
                "harmless.",
                stacklevel=2,
            )

    @property
    def cuts(self) -> tuple[str, ...]:
        """The settings that make the sampled distribution differ from the one training scores."""
        return self.distribution.cuts()

    def __call__(
        self,
        policy: nn.Module,
        queries: Queries,
        *,
        seeds: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> Rollout:
        """Sample `group_size` responses to each query.

        Args:
            policy: A language model of transformers, causal or encoder-decoder, or a wrapper with
                it as `.language_model`. If its output has `.value` [B, T], values are recorded.
            queries: Texts, chats (lists of messages), or token ids: B tensors of any length or
                one tensor [B, Q]; or rows of a data set, dicts with one of these as "prompt",
                "query", "text" or "messages": what else they have becomes `Rollout.columns`.
            seeds: One number for each row of the rollout (B · group_size) that fixes its response.
                None: they follow from `seed` and `calls`.
            progress: Called after every step.

        Returns:
            A rollout on the policy's device; the rows of a group stand side by side.

        Raises:
            TypeError: if the queries, or the policy, are of another kind.
            ValueError: if a query is empty or too long for the model, `seeds` do not fit, or the
                model does not know a token that is to end a response.
            FloatingPointError: if the model gives NaN.
        """
        (rollout,) = self.in_parts(policy, queries, seeds=seeds, progress=progress)
        return rollout

    def in_parts(
        self,
        policy: nn.Module,
        queries: Queries,
        parts: int = 1,
        *,
        seeds: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Rollout]:
        """Yield what a call would return in parts, each as soon as it is written.

        Something else can be done with a part while the next one is written. `Rollout.concat` of
        them is the rollout of a call, up to rounding.

        Args:
            policy: See `__call__`.
            queries: See `__call__`.
            parts: How many; at most one for each query.
            seeds: See `__call__`.
            progress: Called after every step, with the tokens of the part.

        Raises:
            TypeError, ValueError, FloatingPointError: see `__call__`.
        """
        policy = uncompiled(policy, "policy")
        encoded = self._encode(policy, queries, "queries")
        size = self.group_size
        streams = self._streams(len(encoded.rows) * size, seeds)
        every = range(len(encoded.rows))
        for rows in np.array_split(every, min(parts, len(every))):
            first, end = int(rows[0]), int(rows[-1]) + 1
            part = Encoded(*(column and column[first:end] for column in encoded))
            yield self._sample(policy, part, streams[first * size : end * size], progress)
        if seeds is None:
            self.calls += 1

    @out_of_memory_told("sampling")
    def _sample(
        self,
        policy: nn.Module,
        encoded: Encoded,
        streams: list[np.random.Generator],
        progress: Progress | None,
    ) -> Rollout:
        """Return a rollout of the queries, a stream of random numbers for each row."""
        stop = self._stop_for(policy)
        limits = [self._draw_limit(stream) for stream in streams]
        writing = self._written(policy, encoded.rows, streams, limits, stop, progress)
        device = writing.queries.device
        every = writing.query_of_row.tolist()
        of_rows: dict[str, Any] = {}
        if self.group_size > 1:
            of_rows["group_ids"] = writing.query_of_row.to(device)
        if others := encoded.others:
            of_rows["columns"] = {k: tuple(others[q][k] for q in every) for k in others[0]}
        rollout = writing.rollout(**of_rows)
        if self.tokenizer is None:
            return rollout
        apart = is_encoder_decoder(policy)
        settings = {"apart": apart, "keep_special_tokens": self.keep_special_tokens}
        pairs = zip(rollout.query_lists(), rollout.response_lists(), strict=True)
        decoded = [
            decode_pair(*pair, self.tokenizer, end_ids=stop.token_ids, **settings) for pair in pairs
        ]
        queries, responses = zip(*decoded, strict=True)
        texts, messages = encoded.texts, encoded.messages
        return dataclasses.replace(
            rollout,
            query_texts=tuple(texts[query] for query in every) if texts else queries,
            query_messages=tuple(messages[query] for query in every) if messages else None,
            texts_apart=apart,
            response_texts=responses,
            decode=self.text_of,
        )

    def text_of(self, query: list[int], response: list[int]) -> str:
        """Return the text that the first tokens of a response add to the last ones of its query."""
        kept = {"keep_special_tokens": self.keep_special_tokens}
        return decode_pair(query, response, self.tokenizer, **kept)[1]  # type: ignore[arg-type]

    def _written(
        self,
        policy: nn.Module,
        tokens: Sequence[Tensor],
        streams: Sequence[np.random.Generator],
        limits: Sequence[int],
        stop: StopRule,
        progress: Progress | None,
        **of_states: Any,
    ) -> Writing:
        """Write what follows rows of tokens, as many responses to each, and no longer than limits.

        Args:
            policy: See `__call__`.
            tokens: P rows of token ids.
            streams: B sources of random numbers.
            limits: B of them.
            stop: When a response ends by itself.
            progress: See `__call__`.
            **of_states: See `Writing`.
        """
        device = language_model(policy).get_input_embeddings().weight.device
        padded, mask = pad_rows([row.to(device) for row in tokens], left=True)
        lengths = [len(row) for row in tokens]
        longest = torch.tensor(limits, device="cpu").view(len(lengths), -1).amax(1)
        check_positions(policy, lengths, longest)  # a function may give any
        numbers = np.zeros((len(limits), max(limits)))
        for row, (stream, limit) in enumerate(zip(streams, limits, strict=True)):
            numbers[row, :limit] = stream.random(limit)
        uniforms = torch.from_numpy(numbers).to(device, random_dtype(device)).unbind(1)
        each = uniforms.__getitem__
        writing = Writing(padded, mask, limits, each, self.distribution, stop, **of_states)
        for rows in self._batches(lengths, len(limits) // len(lengths)):
            writing.write(policy, rows, progress)
            give_back_memory()  # from turn to turn what is kept has other sizes
        return writing

    def check(self, policy: nn.Module, queries: Queries, *, name: str = "queries") -> None:
        """Raise what calling the sampler would raise of these queries; nothing is sampled.

        Args:
            policy: See `__call__`.
            queries: Any number of them.
            name: What errors call them.

        Raises:
            TypeError, ValueError: see `__call__`.
        """
        policy = uncompiled(policy, "policy")
        self._encode(policy, queries, name)
        self._stop_for(policy)

    def _encode(self, policy: nn.Module, queries: Queries, name: str) -> Encoded:
        """Return the queries as rows of tokens that the policy can take, response included."""
        encoded = encode_queries(
            queries,
            self.tokenizer,
            add_bos=self.add_bos,
            keep_eos=is_encoder_decoder(policy),
            chat_template_kwargs=self.chat_template_kwargs,
            name=name,
        )
        check_ids(policy, encoded.rows, name)
        # The limit that any row might get: whether a query fits must not be a matter of luck.
        known = isinstance(self._lengths, tuple)
        longest = self._lengths[1] if known else max(1, self.distribution.min_new_tokens)
        check_positions(policy, [len(row) for row in encoded.rows], longest, name)
        return encoded

    def _stop_for(self, policy: nn.Module) -> StopRule:
        """Return the rule that ends the policy's responses."""
        check_end_ids(policy, self.stop.token_ids)
        return self.stop.also(_own_end_ids(policy)) if self._ends_as_policy else self.stop

    def _streams(self, rows: int, seeds: Sequence[int] | None) -> list[np.random.Generator]:
        """Return a source of random numbers for each row."""
        if seeds is None:
            # A SeedSequence mixes the numbers: neighbours are as independent as any.
            return [np.random.default_rng([self.seed, self.calls, row]) for row in range(rows)]
        numbers = [operator.index(seed) for seed in seeds]
        if len(numbers) != rows or min(numbers) < 0:
            rule = f"be one number >= 0 for each of the {rows} rows (queries × group_size)"
            got = f"{len(numbers)} of them" if len(numbers) != rows else min(numbers)
            refuse("seeds", rule, got)
        return [np.random.default_rng(seed) for seed in numbers]

    def _draw_limit(self, stream: np.random.Generator) -> int:
        """Return the most tokens of one row."""
        if isinstance(self._lengths, tuple):
            shortest, longest = self._lengths
            return longest if shortest == longest else int(stream.integers(shortest, longest + 1))
        limit = self._lengths()
        if limit < max(1, self.distribution.min_new_tokens):
            rule = "give lengths > 0 and >= min_new_tokens"
            refuse("max_new_tokens()", rule, str(limit))
        return limit

    def _batches(self, lengths: list[int], size: int) -> Iterator[Tensor]:
        """Yield rows that are sampled together, on the CPU; the `size` rows of a query adjacent."""
        # Queries of like length together, the longest first: if memory is short it shows at once.
        order = torch.tensor(lengths, device="cpu").repeat_interleave(size)
        if self.max_rows is None or len(order) <= self.max_rows:
            yield torch.arange(len(order), device="cpu")
        else:
            yield from order.argsort(descending=True, stable=True).split(self.max_rows)


def _check_tokenizer(tokenizer: Any) -> None:
    """Raise unless it is None or has what a tokenizer of transformers has."""
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
        got = repr(tokenizer) if isinstance(tokenizer, str) else type(tokenizer).__name__
        fix = "load it with AutoTokenizer.from_pretrained(...)"
        refuse("tokenizer", "be a tokenizer of transformers or None", got, fix, error=TypeError)


def _end_ids(eos_token_id: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Return the tokens that end a response, without those that the policy adds."""
    if isinstance(eos_token_id, str):
        if eos_token_id != "tokenizer":
            rule, fix = "be token ids, 'tokenizer' or None", "give texts as stop_strings"
            refuse("eos_token_id", rule, repr(eos_token_id), fix)
        eos_token_id = getattr(tokenizer, "eos_token_id", None)
    return _listed_ids(eos_token_id)


def _listed_ids(token_ids: Any) -> list[int]:
    """Return token ids, one of them, or None as a list."""
    if token_ids is None:
        return []
    return list(token_ids) if isinstance(token_ids, Sequence) else [token_ids]


def _own_end_ids(policy: nn.Module) -> list[int]:
    """Return the tokens that end a response by the policy's generation_config."""
    config = getattr(language_model(policy), "generation_config", None)
    ids = _listed_ids(getattr(config, "eos_token_id", None))
    # A configuration may name, by default, a token that the model has not.
    return [token for token in ids if 0 <= token < vocabulary_size(policy)]


def _check_lengths(
    max_new_tokens: int | tuple[int, int] | LengthSampler | Callable[[], int], min_new_tokens: int
) -> tuple[int, int] | Callable[[], int]:
    """Return (shortest, longest) limit, both possible, or the user's function."""
    if isinstance(max_new_tokens, LengthSampler):
        max_new_tokens = (max_new_tokens.min_value, max_new_tokens.max_value - 1)
    if callable(max_new_tokens):
        return max_new_tokens
    is_pair = isinstance(max_new_tokens, Sequence)
    check_values("Sampler", {"max_new_tokens": (CountRange if is_pair else Count, max_new_tokens)})
    lengths = tuple(max_new_tokens) if is_pair else (max_new_tokens, max_new_tokens)
    if min_new_tokens > lengths[0]:
        rule = f"be <= the least max_new_tokens, {lengths[0]}"
        refuse("min_new_tokens", rule, str(min_new_tokens))
    return lengths
